"""What a sweep gave: the ranked table, results.json, and report.html with curves and what each setting does."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from evaluation.charts import Series, dot_chart, line_chart
from evaluation.page import facts_table, page, section, table
from finetune.sweep.space import words_of
from finetune.sweep.study import Study
from nano3.outputs import fresh_file

RESULTS, REPORT = "results.json", "report.html"
WORDS = {"COMPLETE": "finished", "PRUNED": "given up", "FAIL": "failed", "RUNNING": "not finished"}
"""Optuna's states in words, the best kind first."""
SHOWN = 8
"""Curves in one chart, those of the best trials."""


@dataclass(frozen=True)
class Line:
    """A trial as the table shows it. `loss` is the validation loss that it ended with, `curve` (step, loss) of all."""

    number: int
    state: str
    loss: float | None
    params: dict[str, Any]
    curve: list[tuple[int, float]]
    folder: str


def ranked(study: Study) -> list[Line]:
    """All trials, the best first: the finished ones by their loss, then those given up, which were measured earlier."""
    lines = [
        Line(
            one.number,
            WORDS[one.state.name],
            one.value,
            dict(one.params),
            sorted(one.intermediate_values.items()),
            str(study.folder_of(one.number)),
        )
        for one in study.trials()
    ]
    order = list(WORDS.values())
    return sorted(
        lines, key=lambda one: (order.index(one.state), math.inf if one.loss is None else one.loss, one.number)
    )


def as_lines(lines: Sequence[Line]) -> str:
    """The table as plain text."""
    rows = [f"{'rank':>4} {'trial':>5}  {'loss':>8}  {'':<13}settings"]
    for place, one in enumerate(lines, 1):
        rows.append(f"{place:>4} {one.number:>5}  {_loss(one):>8}  {one.state:<13}{words_of(one.params)}")
    return "\n".join(rows)


def write_report(study: Study, command: str) -> list[Line]:
    """Writes results.json and report.html into the sweep's folder; the ranked trials. `command` runs a trial alone."""
    lines = ranked(study)
    content = json.dumps({"tries": dict(study.plan.tries), "trials": [asdict(one) for one in lines]}, indent=1) + "\n"
    for name, text in ((RESULTS, content), (REPORT, _page(study, lines, command))):
        with fresh_file(study.folder / name) as temporary:
            temporary.write_text(text)
    return lines


def _page(study: Study, lines: Sequence[Line], command: str) -> str:
    rows = [
        [str(place), str(one.number), _loss(one), escape(one.state), escape(words_of(one.params))]
        for place, one in enumerate(lines, 1)
    ]
    curves: dict[str, Series] = {f"trial {one.number}": one.curve for one in lines[:SHOWN] if one.curve}
    states = {word: sum(one.state == word for one in lines) for word in WORDS.values()}
    plan = {**study.plan.tries, "sampler": study.plan.sampler, "seed": study.plan.seed, "trials": states}
    parts = [
        section("Ranked", table(("rank", "trial", "validation loss", "", "settings"), rows)),
        section(f"Validation loss, the best {SHOWN}", line_chart(curves, "step", "validation loss")),
        *(section(f"Loss by {key}", chart) for key, chart in _by_setting(study.plan.tries, lines).items()),
        section("The best alone", f"<p><code>{escape(command)}</code></p>"),
        section("Sweep", facts_table(plan)),
    ]
    return page(f"Sweep {study.folder.name}", parts)


def _by_setting(tries: Mapping[str, str], lines: Sequence[Line]) -> dict[str, str]:
    """A chart for every setting that is a number: a dot for each finished trial."""
    charts = {}
    finished = [one for one in lines if one.loss is not None and one.state == WORDS["COMPLETE"]]
    for key, text in tries.items():
        values = [_number(one.params[key]) for one in finished]
        if not finished or any(value is None for value in values):
            continue
        log = text.endswith(":log")
        points = [
            (math.log10(value) if log else value, one.loss)
            for value, one in zip(values, finished, strict=True)
            if value is not None and one.loss is not None
        ]
        charts[key] = dot_chart(points, f"log10 {key}" if log else key, "validation loss")
    return charts


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _loss(line: Line) -> str:
    return "-" if line.loss is None else f"{line.loss:.4f}"


def best_of(lines: Sequence[Line]) -> Line | None:
    """The finished trial with the lowest loss."""
    return next((one for one in lines if one.state == WORDS["COMPLETE"]), None)


def folder_config(line: Line) -> Path:
    """The file that says all settings of a trial, for `--config`."""
    return Path(line.folder) / "config.yaml"
