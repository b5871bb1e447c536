"""What a check found, as rows that can be pasted into docs/gpu.md. Imports no torch."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]


@dataclass
class Row:
    """One number and its bound; no bound: a measurement that nothing is demanded of."""

    name: str
    value: float
    bound: float | None = None
    unit: str = "relative error"

    @property
    def holds(self) -> bool:
        """A NaN holds nothing."""
        return self.bound is None or self.value <= self.bound


def worst(errors: Iterable[float]) -> float:
    """The largest of the errors; NaN where one is NaN (`max` would keep whichever came first)."""
    found = list(errors)
    return math.nan if any(math.isnan(error) for error in found) else max(found)


@dataclass
class Tier:
    """One tier: what it needs, what became of it."""

    name: str
    needs: str
    state: Literal["passed", "failed", "skipped"] = "skipped"
    reason: str = ""
    rows: list[Row] = field(default_factory=list)

    def judge(self) -> None:
        """Passed where every row holds."""
        beyond = [row.name for row in self.rows if not row.holds]
        self.state = "failed" if beyond or not self.rows else "passed"
        self.reason = f"beyond the bound: {', '.join(beyond[:5])}" if beyond else ""

    def skip(self, reason: str) -> None:
        self.state, self.reason = "skipped", reason

    def fail(self, reason: str) -> None:
        self.state, self.reason = "failed", reason


def commit() -> str:
    """The checkout's commit, `+` with changes in it; "unknown" in a copy without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    found = git("rev-parse", "--short", "HEAD")
    return found + ("+" if found and git("status", "--porcelain", "--untracked-files=no") else "") or "unknown"


def markdown(tiers: list[Tier], machine: str) -> str:
    """The record as Markdown: a paragraph for each tier and a table of its rows."""
    today = datetime.now(UTC).date().isoformat()
    parts = [f"`make gpu-check`, commit {commit()}, {today}, {machine}, Python {platform.python_version()}"]
    for tier in tiers:
        head = f"**{tier.name}: {tier.state}**"
        parts.append(head + (f" ({tier.reason})" if tier.reason else "") + f". Needs {tier.needs}.")
        if tier.rows:
            lines = ["| what | value | bound |", "|---|---|---|"]
            lines += [f"| {r.name} | {r.value:.3g} {r.unit} | {'' if r.bound is None else f'{r.bound:.3g}'} |"
                      for r in tier.rows]  # fmt: skip
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def as_json(tiers: list[Tier], machine: str) -> str:
    """The same as JSON."""
    facts = {"commit": commit(), "time": datetime.now(UTC).isoformat(), "machine": machine}
    return json.dumps({**facts, "tiers": [asdict(tier) for tier in tiers]}, indent=1) + "\n"


def rows_from(text: str) -> list[Row]:
    """Rows that a check's process printed, one JSON object a line after the word ROW."""
    lines = [line.removeprefix("ROW ") for line in text.splitlines() if line.startswith("ROW ")]
    return [Row(**json.loads(line)) for line in lines]


def say(row: Row) -> None:
    """Prints a row for `rows_from`."""
    print("ROW " + json.dumps(asdict(row)), flush=True)
