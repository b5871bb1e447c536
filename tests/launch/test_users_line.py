"""`python recipes/nemotron_lora.py --nodes 2`: what a dry run prints, and that submission sends exactly that."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from data_prep.packing import build_packs
from launch.slurm.versions import GPU, REQUIREMENTS, differences, pins
from nano3.token_store import TokenStore, tokenizer_sha256
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_store import tiny_store
from tests.launch.test_slurm import fake_slurm

RECIPE = str(Path(__file__).parents[2] / "recipes" / "nemotron_lora.py")


def recipe(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Runs the recipe as a script, in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [RECIPE, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(RECIPE, run_name="__main__")
    return end.value.code


@pytest.mark.usefixtures("roomy_disk")
def test_a_dry_run_in_an_empty_folder_prints_preflight_and_the_script_with_its_blanks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert recipe(monkeypatch, "--nodes", "2", "--dry-run") == 0
    said = capsys.readouterr()
    assert "#SBATCH --nodes=2\n" in said.out
    assert "#SBATCH --account='FILL IN'\n" in said.out
    assert "# FILL IN what says so below (account, partition)" in said.out
    assert said.out.rstrip().endswith("finished")
    assert "fits: layout.ep=8 on 16 h100" in said.err
    assert "no cluster.yaml: the script is that of " in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a whole cluster.yaml: the model and the data too, and a key."""
    model = tiny_hf_folder(tmp_path / "hf")
    data = tiny_store(tmp_path / "store", 40, 60, 128, tokenizer=tokenizer_sha256(model))
    build_packs(TokenStore(data), 64)
    (tmp_path / "cluster.yaml").write_text(
        f"account: me\npartition: batch\nlogs: {tmp_path}/logs\nmodel: {model}\ndata: {data}\n"
        "settings: [train.seq_length=64, lora.rank=8]\nenvironment: {WANDB_API_KEY: SECRET-123}\n"
    )
    return tmp_path


def test_the_bare_line_submits_what_its_dry_run_prints(site, monkeypatch, capsys):
    monkeypatch.chdir(site)
    for name, value in fake_slurm(site).items():
        monkeypatch.setenv(name, value)
    assert recipe(monkeypatch, "--nodes", "2", "--dry-run") == 0
    dry = capsys.readouterr()
    assert not (site / "runs").exists()
    assert recipe(monkeypatch, "--nodes", "2", "lora.rank=16") == 0
    sent = (site / "submitted").read_text()
    assert dry.out[dry.out.index("#!/bin/bash") :] == sent
    out = site / "runs" / "lora"
    assert (out / "job.sbatch").read_text() == sent
    run = (out / "run.json").read_text()
    assert f'"model": "{site}/hf"' in run
    assert f'"data": "{site}/store"' in run
    assert '"seq_length": 64' in run  # the site's
    assert '"rank": 16' in run  # the command line's, which wins over the site's 8
    # The key is in the private file only.
    assert "SECRET-123" not in sent + dry.out + dry.err + run
    assert f"it goes to {out}/job.env, which only you can read (0600)" in dry.err
    private = [path for path in out.rglob("*") if path.is_file() and b"SECRET-123" in path.read_bytes()]
    assert private == [out / "job.env"]
    assert {path.name: path.stat().st_mode & 0o777 for path in (out / "job.env", out / "job.sbatch")} == {
        "job.env": 0o600,
        "job.sbatch": 0o600,
    }
    assert f"source {out}/job.env\n" in sent


TESTED = pins(REQUIREMENTS.read_text())
IMAGE = {**TESTED, "torch": "2.9.0a0+50eac81", "numpy": "1.26.4", "numba": None, "pytest": None, "ruff": None}
IMAGE |= {"transformer-engine": "2.9.0", "mamba-ssm": "2.2.5", "causal-conv1d": "1.5.3"}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, []),
        ({"megatron-core": "0.15.0"}, ["megatron-core is 0.15.0 (tested: 0.16.1)"]),
        ({"nemo-toolkit": None}, ["nemo-toolkit is missing (tested: 2.7.3)"]),
        ({"torch": "2.5.1"}, ["torch is 2.5.1 (tested: 2.7 or later)"]),
        ({"lm-eval": None, "rensa": None}, []),  # which training does not import
        ({"tiktoken": None}, ["tiktoken is missing (tested: any version)"]),
        ({"transformer-engine": "2.12.1"}, ["transformer-engine is 2.12.1 (tested: 2.9 or later below 2.12)"]),
        ({"mamba-ssm": None}, ["mamba-ssm is missing (tested: 2.0 or later)"]),
        # The tested torch itself: all of requirements.txt must be as it is there.
        (
            {"torch": TESTED["torch"] + "+cpu", "mamba-ssm": None, "numba": "0.68.1"},
            ["numpy is 1.26.4 (tested: 2.4.6)"],
        ),
    ],
)
def test_what_differs_from_the_tested_packages_is_named(changes, wrong):
    found = IMAGE | changes
    assert set(found) >= set(TESTED) | set(GPU)
    assert differences(TESTED, found) == wrong
