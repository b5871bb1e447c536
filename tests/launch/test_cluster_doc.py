"""docs/cluster.md, command by command, on a real Slurm; one element of its array is killed on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from launch.pipeline import NAMES
from tests.helpers.doc_page import ROOT, Page, run, site
from tests.helpers.slurm_site import Slurm, only_site, processes_of, require_slurm, slurm_site
from tests.launch.test_bundle import image

PAGE = Page("cluster")
COPY = "cp launch/cluster.example.yaml $WORK/cluster.yaml"
"""After this command one edits the file."""


def kill_element(slurm: Slurm, element: int) -> None:
    """Kills the process of one element of the array of shards in its first run, as soon as it is there."""

    def killed() -> bool:
        for pid in processes_of(slurm, SLURM_ARRAY_TASK_ID=str(element)):
            with suppress(OSError):
                if b"data_prep/prepare.py" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)
                    return True
        return False

    slurm.until(killed, f"element {element} of the array", 300)


def assert_store_is_that_of_one_process(out: Path) -> None:
    """The joined store is, byte for byte, what the same command makes here without an array."""
    (prepare,) = [stage for stage in json.loads((out / "pipeline.json").read_text()) if stage["name"] == "prepare"]
    *command, join = prepare["commands"][-1]
    assert join == "--join"
    command[command.index("--out") + 1] = str(out / "alone")
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stores = [
        {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
        for store in (out / "data", out / "alone")
    ]
    assert stores[0] == stores[1]
    assert sum(name.endswith("tokens.bin") for name in stores[0]) == 4


def test_the_page_has_its_commands():
    assert len(PAGE.blocks) == 7
    assert sum(COPY in block for block in PAGE.blocks) == 1
    assert all("$" in block or "preflight" in block for block in PAGE.blocks)
    assert "layout.ep=2" in PAGE.tried("SETTINGS")


@pytest.mark.full
def test_every_command_of_the_page_works_in_its_order(tmp_path):
    require_slurm()
    said = []
    variables = {name: PAGE.tried(name) for name in ("MODEL", "SHARDS", "SETTINGS", "CALIBRATION")}
    with only_site(), slurm_site() as slurm, ThreadPoolExecutor(1) as aside:
        killed = aside.submit(kill_element, slurm, 2)
        for block in PAGE.blocks:
            said.append(run(block, slurm, tmp_path, variables))
            if COPY in block:
                (tmp_path / "cluster.yaml").write_text(site(tmp_path, image(tmp_path / "image", set())))
        killed.result()
        restarts = [slurm.job(f"1_{element}")["Restarts"] for element in range(1, 5)]
    _made, fits, _site, submitted, looked, have, again = said
    assert "fits: layout.ep=8 on 16 h100" in fits
    numbers = [int(re.findall(rf"^{name} +job (\d+)", submitted, re.MULTILINE)[-1]) for name in ("shards", *NAMES)]
    assert numbers == sorted(set(numbers))  # not 1 to 7: an element of an array gets a number when it starts
    assert restarts == ["0", "1", "0", "0"]
    assert f"prepare   job {numbers[1]}, after {numbers[0]}" in submitted
    assert re.findall(r"^(\w+) +finished", looked, re.MULTILINE)[-6:] == list(NAMES)
    assert "nothing wrong: vLLM, SGLang, TensorRT-LLM read it" in have
    assert re.search(r"of 12 right = ", have)
    assert "job 1: quantize" in again
    assert_store_is_that_of_one_process(tmp_path / "out")
    assert '"step": 3' in (tmp_path / "out" / "lora" / "metrics.jsonl").read_text()
