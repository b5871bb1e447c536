"""No command runs what stands in the folders that it reads: an audit hook says so (tests/helpers/audit_probe.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.audit_probe import COMMANDS, NOT_PROBED, RUN_BY_RANKS
from tests.helpers.rank_server import done_by
from tests.project.test_structure import FILES, ROOT


def check(said: str) -> None:
    """Nothing was seen with our readers, whose commands ended in words; with those of before everything was."""
    told: dict[str, Any] = json.loads(next(line for line in said.splitlines() if line.startswith('{"ours"')))
    assert {name: result["seen"] for name, result in told["ours"].items() if result["seen"]} == {}
    odd = {
        name: result for name, result in told["ours"].items() if result["ended"] not in ("refused", "exit 0", "exit 1")
    }
    assert odd == {}
    for name, result in told["old"].items():
        assert "os.system" in result["seen"], (name, result)


@pytest.mark.full
def test_no_command_runs_what_stands_in_a_folder(tmp_path: Path):
    """Without the CPU backend, which a reference must not meet; forked from one process."""
    command = [sys.executable, "-m", "tests.helpers.audit_probe", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    check(done.stdout)


@pytest.mark.full
def test_no_rank_runs_what_stands_in_a_base_an_adapter_or_a_checkpoint(tmp_path: Path):
    check(done_by("tests.helpers.audit_probe", tmp_path, "--ranks"))


def test_every_script_is_probed_or_says_why_not():
    scripts = {str(file.relative_to(ROOT)) for file in FILES if '__name__ == "__main__"' in file.read_text()}
    probed = {command.script for command in COMMANDS.values()} | RUN_BY_RANKS
    scripts -= {"finetune/recipe_file.py"}  # looks for these words in a recipe
    assert probed | set(NOT_PROBED) == scripts
    assert not probed & set(NOT_PROBED)
