"""What every benchmark says beside its numbers, and where it keeps them. Imports no torch."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nano3.outputs import fresh_file

ROOT = Path(__file__).resolve().parents[1]


def conditions() -> dict[str, Any]:
    """What a number means nothing without."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the start",
    }


def save(out: Path | None, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes facts and rows as JSON, where `--out` asked for it."""
    if out is not None:
        with fresh_file(out) as path:
            path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
