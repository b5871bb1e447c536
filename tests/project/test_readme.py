"""README's pipeline table, typed as it stands, ends in a tuned model that is better than its base."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.significance import gain_interval

ROOT = Path(__file__).parents[2]


def pipeline_commands() -> list[str]:
    """The commands of the table, in its order."""
    table = (ROOT / "README.md").read_text().split("## The pipeline, step by step")[1].split("\nMore commands")[0]
    return [
        command
        for row in table.splitlines()
        if row.startswith("| ")
        for command in re.findall(r"`(python [^`]+)`", row)
    ]


def test_the_table_is_read():
    commands = pipeline_commands()
    assert len(commands) == 16
    assert all((ROOT / command.split()[1]).is_file() for command in commands)


@pytest.mark.full
def test_the_table_typed_as_it_stands_ends_in_a_gain(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for command in pipeline_commands():
        words = shlex.split(command)
        done = subprocess.run(
            [sys.executable, str(ROOT / words[1]), *words[2:]],
            cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
    base, tuned = (json.loads((tmp_path / "runs" / f).read_text()) for f in ("base-scores.json", "scores.json"))
    assert [a["id"] for a in base["answers"]] == [a["id"] for a in tuned["answers"]]
    low, _ = gain_interval([a["correct"] for a in base["answers"]], [a["correct"] for a in tuned["answers"]])
    assert tuned["accuracy"] > base["accuracy"]
    assert low > 0
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"runs"}, "a user's folder gets nothing but what the commands name"
