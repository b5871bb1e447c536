"""The recipe on a real Slurm: two nodes train what two local ranks train, and nothing that befalls a job changes it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from conversion.hf_to_nemo import convert
from conversion.torch_dist import TorchDistReader
from data_prep.packing import build_packs
from nano3.arch import resolve_model
from nano3.token_store import TokenStore, tokenizer_sha256
from tests.slurm_site import Slurm, require_slurm, slurm_site
from tests.tiny_run import metrics
from tests.tiny_store import tiny_store

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]
STEPS = 40
SITE = {
    "account": "tests",
    "partition": "batch",
    "time": "01:00:00",
    "hardware": "cpu",
    "gpus_per_node": 1,
    "exclusive": False,
    "workdir": str(ROOT),
    "python": sys.executable,
    "environment": {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    require_slurm()
    with slurm_site() as site:
        yield site


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pico, imported, a store of its tokenizer, and the site file."""
    folder = tmp_path_factory.mktemp("slurm")
    pico = resolve_model("pico")
    convert(pico, folder / "base", context=False)
    build_packs(TokenStore(tiny_store(folder / "store", 60, 60, 300, tokenizer=tokenizer_sha256(pico))), 64)
    (folder / "cluster.yaml").write_text(yaml.safe_dump(SITE | {"logs": str(folder / "logs")}))
    return folder


def recipe(folder: Path, name: str, *arguments: str, **environment: str) -> str:
    """What `nemotron_lora.py` prints; an AssertionError with its words when it fails."""
    command = [sys.executable, str(ROOT / "recipes" / "nemotron_lora.py"), "--model", "pico"]
    command += ["--base", str(folder / "base"), "--data", str(folder / "store"), "--out", str(folder / name)]
    command += ["layout.ep=2", "lora.rank=4", "lora.dropout=0.1", f"train.steps={STEPS}", "train.warmup=2"]
    command += ["train.global_batch=4", "train.seq_length=64", "checkpoint.every=5", "log.every=1"]
    command += ["log.wandb=off", "log.tensorboard=false", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(slurm: Slurm, folder: Path, name: str, *arguments: str) -> int:
    said = recipe(folder, name, "--nodes", "2", *arguments, **slurm.environment)
    return int(said.split("submitted job ")[1].split(";")[0])


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    """The run on two ranks of this machine, undisturbed."""
    recipe(folder, "local", "--local", "--ranks", "2", OMP_NUM_THREADS="1")
    return folder / "local"


def assert_same(one: Path, other: Path) -> None:
    """Equal adapters and losses, bit for bit, each step once."""
    ours, theirs = (TorchDistReader(out / "adapter" / "weights") for out in (one, other))
    assert set(ours.shapes) == set(theirs.shapes)
    for key in ours.shapes:
        assert torch.equal(ours.whole(key).view(torch.uint8), theirs.whole(key).view(torch.uint8)), key
    rows = [[(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in metrics(out)] for out in (one, other)]
    assert rows[0] == rows[1]
    assert [row[0] for row in rows[0]] == list(range(1, STEPS + 1))


def test_two_nodes_train_what_two_local_ranks_train(slurm, folder, reference):
    number = submit(slurm, folder, "nodes")
    job = slurm.wait(number, "COMPLETED")
    assert job["NodeList"] == "node[1-2]"
    assert_same(folder / "nodes", reference)
