"""docs/medical.md from a hub name to the FP8 model that the server's command line names, on a real Slurm.

The hub is a stand-in on loopback that has pico under Nano's name, and questions in the shape of MedMCQA's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conversion.lint_export import lint
from launch.pipeline import NAMES
from nano3.arch import resolve_model
from tests.helpers.doc_page import Page, run, site
from tests.helpers.hub_server import COMMIT, serve_hub
from tests.helpers.slurm_site import only_site, require_slurm, slurm_site
from tests.launch.test_bundle import image

PAGE = Page("medical")
NANO, SET = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "openlifescienceai/medmcqa"
SERVE = "vllm serve $WORK/out/fp8 --kv-cache-dtype fp8"
TRAINING, VALIDATION, IN_BOTH = 24, 6, 2


def medmcqa(folder: Path) -> Path:
    """A repository of parquet files; two validation questions are training questions too."""
    (folder / "data").mkdir(parents=True)
    last = TRAINING + VALIDATION - IN_BOTH
    for split, numbers in (("train", range(TRAINING)), ("validation", range(TRAINING - IN_BOTH, last))):
        rows = [
            {"id": str(n), "question": f"Which of the {WORDS[n % 7]} words is number {n * n + 11}?", "opa": "one",
             "opb": "two", "opc": "three", "opd": "four", "cop": n % 4, "choice_type": "single", "exp": f"It is {n}.",
             "subject_name": ("ENT", "Skin")[n % 2], "topic_name": None}
            for n in numbers
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


WORDS = ("red", "large", "third", "last", "other", "same", "left")


def test_the_page_names_what_its_last_command_serves():
    assert len(PAGE.blocks) == 3
    assert all(NANO in PAGE.blocks[0] or SET in block or "$WORK/out" in block for block in PAGE.blocks)
    assert f"```\n{SERVE}\n```" in PAGE.text  # in a box of its own, which is not run here


@pytest.mark.full
def test_from_a_hub_name_to_the_folder_that_is_served(tmp_path):
    require_slurm()
    variables = {name: PAGE.tried(name) for name in ("SETTINGS", "CALIBRATION")}
    variables |= {"MODEL": str(tmp_path / "model"), "REVISION": "main", "HF_HOME": str(tmp_path / "hub-cache")}
    (tmp_path / "cluster.yaml").write_text(site(tmp_path, image(tmp_path / "image", set())))
    hub = {f"models/{NANO}": resolve_model("pico"), f"datasets/{SET}": medmcqa(tmp_path / "medmcqa")}
    with serve_hub(hub) as address, only_site(), slurm_site() as slurm:
        _fetched, trained, found = (run(block, slurm, tmp_path, variables | address) for block in PAGE.blocks)
    assert COMMIT in (tmp_path / "train.jsonl.about.json").read_text()
    assert len((tmp_path / "clean.jsonl").read_text().splitlines()) == TRAINING - IN_BOTH
    assert re.findall(r"^(\w+) +finished", trained, re.MULTILINE)[-6:] == list(NAMES)
    rows = [json.loads(line) for line in (tmp_path / "out" / "lora" / "metrics.jsonl").read_text().splitlines()]
    assert any("stage_loss/answer" in row for row in rows)
    assert "published 37.7 -> 62.3" in found  # ENT
    assert (tmp_path / "out" / "report-run.html").is_file()
    assert lint(tmp_path / "out" / "fp8") == []
