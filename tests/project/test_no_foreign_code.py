"""No command runs what stands in a checkpoint's pickles: Python's audit hook says so (tests/helpers/audit_probe.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def watched(folder: Path, *flags: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.audit_probe", str(folder), *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"NANO3_CPU": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.full
def test_no_command_runs_what_stands_in_a_pickle(tmp_path):
    found = watched(tmp_path)
    assert {name: result["seen"] for name, result in found.items() if result["seen"]} == {}
    assert {name: result for name, result in found.items() if result["ended"] not in ("refused", "exit 1")} == {}


@pytest.mark.full
def test_the_old_readers_are_seen(tmp_path):
    found = watched(tmp_path, "--old")
    seen = {name for name, result in found.items() if "pickle.find_class builtins.eval" in result["seen"]}
    assert {"merge", "export", "identity", "certify", "base of a run", "NeMo's load of the base"} <= seen
    assert "os.system" in found["export"]["seen"]
