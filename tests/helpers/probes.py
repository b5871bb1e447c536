"""Scripts of this folder that need a process of their own: what `enable()` puts in place stays for its whole life."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.rank_server import done_by

ROOT = Path(__file__).resolve().parents[2]


def made_by(probe: str, out: Path) -> Path:
    """Runs the script PROBE with the argument OUT on the CPU backend; returns `out`, which it has written."""
    done_by(f"tests.helpers.{probe}", out)
    return out


def made_afresh_by(probe: str, out: Path, **environment: str) -> Path:
    """The same in a process that has imported nothing yet, for what measures memory or changes what is imported."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", f"tests.helpers.{probe}", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out
