"""A bundle beside an image: what is in it, and that jobs run from it with an interpreter that has none of it.

The "image" is a bare virtual environment that gets only what is compiled of the packages here, as an image has its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from launch.slurm import bundle
from launch.slurm.cluster import Cluster
from launch.slurm.inside import search_path
from launch.slurm.sbatch import Job, render
from launch.slurm.versions import REQUIREMENTS, pins
from nano3.cli import UserError
from tests.launch.test_slurm import fake_slurm

TESTED = pins(REQUIREMENTS.read_text())


def test_what_is_compiled_for_one_python_stays_the_images():
    chosen = bundle.chosen(TESTED)
    assert {"nemo-toolkit", "megatron-core", "transformers", "tokenizers", "safetensors"} <= set(chosen)
    assert not {"torch", "numpy", "triton", "pytest", "ruff", "numba", "nano3-lora"} & set(chosen)
    assert "pydantic" not in chosen  # it works with one version of pydantic-core only, which is compiled
    files = [str(file) for package in chosen.values() for file in bundle.files_of(package)]
    compiled = [file for file in files if ".so" in Path(file).name]
    assert compiled
    assert all(file.endswith(".abi3.so") for file in compiled)


def test_another_version_than_the_tested_one_is_not_bundled():
    with pytest.raises(UserError, match=r"transformers is .* here, and 4\.0 in requirements\.txt"):
        bundle.chosen({"transformers": "4.0"})


def test_a_bundle_of_another_state_is_refused(tmp_path):
    folder = tmp_path / "bundle"
    bundle.refuse_stale(folder)  # only the nodes see it
    folder.mkdir()
    with pytest.raises(UserError, match="is no bundle; make it"):
        bundle.refuse_stale(folder)
    facts = {"project": bundle.hashes(bundle.ROOT)}
    (folder / "bundle.json").write_text(json.dumps(facts))
    bundle.refuse_stale(folder)
    facts["project"]["launch/local.py"] = "0"
    (folder / "bundle.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"another state of this project \(1 files, such as launch/local\.py\)"):
        bundle.refuse_stale(folder)


def test_the_project_and_its_packages_come_before_what_an_image_has(tmp_path):
    root = tmp_path / "project"
    assert search_path(root, f"/image:{root}") == f"{root}:/image"
    (tmp_path / "bundle.json").write_text("{}")
    assert search_path(root, "/image") == f"{root}:{tmp_path}/packages:/image"


def image(folder: Path, left_out: set[str]) -> Path:
    """The interpreter of a bare environment with links to the packages of this one but those."""
    venv.create(folder, symlinks=True)
    there = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    for package in importlib.metadata.distributions():
        name = package.name
        if name in left_out or name == "nano3-lora":
            continue
        for top in {file.parts[0] for file in package.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            source, target = Path(str(package.locate_file(top))), there / top
            if source.exists() and not target.exists():
                target.symlink_to(source)
    return folder / "bin" / "python"


@pytest.mark.full
def test_a_stage_runs_from_a_bundle_with_an_interpreter_that_lacks_the_packages(tmp_path):
    """The rendered script of the chain's first stage, to its end; then the same with one wrong version."""
    shared = tmp_path / "bundle"
    bundle.make(shared)
    facts = json.loads((shared / "bundle.json").read_text())
    python = image(tmp_path / "image", set(facts["packages"]))
    bare = subprocess.run([str(python), "-c", "import transformers"], capture_output=True, text=True, check=False)
    assert "No module named 'transformers'" in bare.stderr
    lines = tmp_path / "chats.jsonl"
    lines.write_text('{"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}\n')
    project = shared / "project"
    prepare = [
        "data_prep/prepare.py",
        "--input",
        str(lines),
        "--tokenizer",
        str(project / "nano3" / "presets" / "pico"),
    ]
    prepare += ["--out", str(tmp_path / "store"), "--seq-length", "64"]
    site = Cluster("a", "b", python=str(python), bundle=str(shared), hardware="cpu", gpus_per_node=0)
    script = render(site, Job("prepare", prepare, ranks=False))
    (tmp_path / "tools").mkdir()
    environment = fake_slurm(tmp_path / "tools") | {"PYTHONNOUSERSITE": "1"}
    environment.pop("PYTHONPATH", None)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash"], input=script, text=True, capture_output=True, env=environment, cwd=tmp_path, check=False
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "store" / "manifest.json").exists()
    nemo = "import torch, megatron.core, nemo; print(torch.__file__, megatron.core.__file__)"
    paths = {"PYTHONPATH": f"{project}{os.pathsep}{shared / 'packages'}"}
    said = subprocess.run(
        [str(python), "-W", "ignore", "-c", nemo], capture_output=True, text=True, check=True, env=os.environ | paths
    )
    torch, megatron = said.stdout.split()[-2:]
    assert str(tmp_path / "image") in torch  # its own
    assert str(shared / "packages") in megatron
    # Another version of one package, named in the job's first second; nothing is written.
    (facts_of,) = (shared / "packages").glob("megatron_core-*.dist-info")
    shutil.rmtree(tmp_path / "store")
    metadata = facts_of / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 0.16.1", "Version: 0.15.0"))
    done = run()
    assert done.returncode == 2
    assert "has other packages than were tested: megatron-core is 0.15.0 (tested: 0.16.1)" in done.stderr
    assert not (tmp_path / "store").exists()
