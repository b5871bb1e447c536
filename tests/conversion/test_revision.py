"""Where the base's revision is read from, and that nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conversion.certificates.certificate import base_revision

HASH = "5e" * 32
COMMIT, OTHER = "2d59de1cbd51c0adf384eb906b766d1aee0e0517", "e0ac9ee3dfd02be21b5479edfc2f671ed269d0a2"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_an_unmarked_folder_is_unknown(tmp_path):
    (tmp_path / "model").mkdir()
    assert base_revision(tmp_path / "model", HASH) == {"name": "model", "revision": "unknown"}


def test_the_cache_says_repository_and_commit(tmp_path):
    folder = tmp_path / f"models--nvidia--A-Model/snapshots/{COMMIT}"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link"):
        assert base_revision(path, HASH) == {
            "name": "nvidia/A-Model",
            "revision": COMMIT,
            "found_in": "Hugging Face cache",
        }


def test_a_download_says_the_commit_when_all_files_agree(tmp_path):
    for name in ("config.json", "sub/model.safetensors"):
        write(tmp_path / f".cache/huggingface/download/{name}.metadata", f"{COMMIT}\netag\n1700000000.0\n")
    assert base_revision(tmp_path, HASH)["revision"] == COMMIT
    write(tmp_path / ".cache/huggingface/download/tokenizer.json.metadata", f"{OTHER}\netag\n1700000000.0\n")
    found = base_revision(tmp_path, HASH)
    assert found["revision"] == "unknown"
    assert "several revisions" in found["found_in"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_clone_says_its_commit_and_no_credentials(tmp_path, packed):
    write(tmp_path / ".git/HEAD", "ref: refs/heads/main\n")
    if packed:
        write(tmp_path / ".git/packed-refs", f"# pack-refs with: peeled\n{COMMIT} refs/heads/main\n")
    else:
        write(tmp_path / ".git/refs/heads/main", f"{COMMIT}\n")
    write(
        tmp_path / ".git/config", '[remote "origin"]\n\turl = https://user:secret@huggingface.co/nvidia/A-Model.git\n'
    )
    assert base_revision(tmp_path, HASH) == {"name": "nvidia/A-Model", "revision": COMMIT, "found_in": ".git"}


def test_a_detached_head_and_a_broken_one(tmp_path):
    write(tmp_path / ".git/HEAD", f"{COMMIT}\n")
    assert base_revision(tmp_path, HASH)["revision"] == COMMIT
    write(tmp_path / ".git/HEAD", "ref: refs/heads/gone\n")
    assert base_revision(tmp_path, HASH)["revision"] == "unknown"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://user:secret@huggingface.co/gpt2", "gpt2"),
        ("https://user:secret@huggingface.co/", None),
        ("https://user:secret@host", None),
        ("https://[broken/a/b", None),
        ("git@host:nvidia/A-Model.git", None),
    ],
)
def test_no_credentials_of_a_clone_get_into_the_name(tmp_path, url, name):
    write(tmp_path / ".git/HEAD", f"{COMMIT}\n")
    write(tmp_path / ".git/config", f'[remote "origin"]\n\turl = {url}\n')
    assert base_revision(tmp_path, HASH)["name"] == (name or tmp_path.name)


def test_a_nemo_checkpoint_says_what_its_import_found(tmp_path):
    write(tmp_path / "base.json", json.dumps({"sha256": HASH, "base": {"name": "nvidia/A", "revision": COMMIT}}))
    assert base_revision(tmp_path, HASH) == {"name": "nvidia/A", "revision": COMMIT}
    found = base_revision(tmp_path, "0" * 64)  # somebody trained on: not that revision any more
    assert found["revision"] == "unknown"
    assert "other weights" in found["found_in"]
