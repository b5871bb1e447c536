"""Every script says what to do when it is run without the environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("conversion", "data_prep", "evaluation", "recipes", "launch", "launch/plan", "launch/slurm", "pico")
LEFT_OUT = {"guard.py", "inside.py", "demo.py", "flat_loop.py"}
"""The first two are started by a launcher and import nothing of ours. The others are two recipes to be read, and
`make demo` runs one of them in the environment."""
SCRIPTS = [
    file
    for folder in FOLDERS
    for file in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in file.read_text() and file.name not in LEFT_OUT
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_without_the_environment_a_script_says_how_to_activate_it(script, tmp_path):
    """`-S` leaves out all installed packages, as another Python on the machine would lack them."""
    done = subprocess.run(
        [sys.executable, "-S", str(script)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: No module named 'nano3'; run: make install, then: . .venv/bin/activate\n"


def test_the_scripts_are_found():
    assert len(SCRIPTS) > 25
