"""The demo's report: report.json for machines and report.html, one file without outside parts, for people.

evaluation/report.py makes the page of any other run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from evaluation.charts import Series, bar_chart, line_chart, stage_bar
from evaluation.page import facts_table, page, points, section, signed, table
from nano3.outputs import fresh_files

REQUIRED = (
    "n",
    "base_accuracy",
    "tuned_accuracy",
    "ci95_gain",
    "train_tokens",
    "seconds",
    "router_unchanged",
    "layout",
    "git_commit",
)
"""Fields of every report. `seconds` maps stage to seconds, `layout` group to size, `ci95_gain` is [low, high]."""

MODELS = {
    "base": "base",
    "tuned": "tuned",
    "merged": "merged",
    "fp8": "FP8",
}
"""Models that a report may compare, in order, and what the page calls them: the base, the adapter beside its weights,
the merged folder, and that folder in FP8. The first two are in every report."""

_SHOWN = {
    *REQUIRED,
    *(field for model in MODELS for field in (f"{model}_accuracy", f"ci95_{model}")),
    *("gain", "task", "forgetting", "settings", "overlap", "router_sha256"),
}
"""Fields that have their own place on the page; all others are listed under "More"."""

Examples = Sequence[Mapping[str, Any]]


def write_report(
    folder: Path | str, report: Mapping[str, Any], curve: Mapping[str, Series], examples: Examples
) -> tuple[Path, Path]:
    """Writes `report.json` and `report.html` into `folder` and returns their paths.

    `report` has the fields of `REQUIRED`, and may have gain, merged_accuracy, fp8_accuracy and ci95_MODEL (see
    `evaluation.comparison.compare`), task (a sentence), overlap (name -> count), forgetting (old task -> {MODEL:
    accuracy, ..., "n": questions}), router_sha256, settings (name -> value), and anything else that JSON can hold.
    `curve` maps a series' name to its (step, loss) points. For `examples` see `examples_from`. Raises `ValueError` when
    a required field is missing.
    """
    missing = [name for name in REQUIRED if name not in report]
    if missing:
        raise ValueError(f"the report lacks {', '.join(missing)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "report.json", folder / "report.html"
    texts = json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n", render(report, curve, examples)
    with fresh_files(*paths) as temporaries:
        for temporary, text in zip(temporaries, texts, strict=True):
            temporary.write_text(text, encoding="utf-8")
    return paths


def examples_from(base: Mapping[str, Any], tuned: Mapping[str, Any], count: int = 10) -> list[dict[str, Any]]:
    """The first `count` questions with both models' answers, from two results of `evaluation.evaluate`.

    Each has question, expected, before and after, and the verdicts before_right and after_right; an answer that did not
    end within its tokens ends in `…`.
    """
    after = {row["id"]: row for row in tuned["answers"]}
    return [
        {
            "question": row["question"],
            "expected": row["expected"],
            "before": _answer(row),
            "after": _answer(after[row["id"]]),
            "before_right": row["correct"],
            "after_right": after[row["id"]]["correct"],
        }
        for row in base["answers"][:count]
    ]


def _answer(row: Mapping[str, Any]) -> str:
    return row["answer"] if row["finished"] else row["answer"] + " …"


def render(report: Mapping[str, Any], curve: Mapping[str, Series], examples: Examples) -> str:
    """The page's HTML. Whatever comes from data is escaped."""
    sections = [
        _headline(report),
        section("Scores", _scores(report)),
        section("Loss", line_chart(curve, "step", "loss")),
        section(f"{len(examples)} answers before and after", _examples(examples)),
        section("Old tasks", _forgetting(report["forgetting"])) if report.get("forgetting") else "",
        section(f"Time: {sum(report['seconds'].values()):.0f} s", stage_bar(report["seconds"])),
        section("Run", _facts(report)),
        section("Settings", facts_table(report["settings"])) if report.get("settings") else "",
        section("More", facts_table(rest)) if (rest := {k: v for k, v in report.items() if k not in _SHOWN}) else "",
    ]
    return page(str(report.get("task", "LoRA tuning report")), sections)


def _headline(report: Mapping[str, Any]) -> str:
    base, tuned = report["base_accuracy"], report["tuned_accuracy"]
    low, high = report["ci95_gain"]
    router = "router unchanged" if report["router_unchanged"] else "ROUTER CHANGED"
    return (
        f"<header><p class='kicker'>LoRA tuning report</p><h1>{escape(str(report.get('task', '')))}</h1>"
        f"<p class='scores'><span class='before'>{base:.1%}</span> <span class='arrow'>→</span> "
        f"<span class='after'>{tuned:.1%}</span></p>"
        f"<p>{points(tuned - base)} points on {report['n']:,} held-out questions "
        f"(95% interval {points(low)} to {points(high)}), {report['train_tokens']:,} training tokens, "
        f"<span class='{'good' if report['router_unchanged'] else 'bad'}'>{router}</span></p>"
        f"{_exported(report)}</header>"
    )


def _exported(report: Mapping[str, Any]) -> str:
    """What is left of the accuracy in the folders that are handed on: each against the interval of the one before."""
    words, models = [], [model for model in MODELS if f"{model}_accuracy" in report]
    for before, model in pairwise(models[1:]):
        share, (low, high) = report[f"{model}_accuracy"], report[f"ci95_{before}"]
        kept = low <= share <= high
        words.append(
            f"{MODELS[model]} {share:.1%}, <span class='{'good' if kept else 'bad'}'>"
            f"{'within' if kept else 'OUTSIDE'} the interval of {MODELS[before]}</span>"
        )
    return f"<p>{'; '.join(words)}</p>" if words else ""


def _scores(report: Mapping[str, Any]) -> str:
    bars = {
        name: (report[f"{model}_accuracy"], tuple(report[f"ci95_{model}"]) if f"ci95_{model}" in report else None)
        for model, name in MODELS.items()
        if f"{model}_accuracy" in report
    }
    return bar_chart(bars, "accuracy of each model") + (
        "<p class='fine'>Greedy answers by plain transformers, exact match. 95% intervals: Wilson; "
        "of the gain: paired, Newcombe 1998. Tuned: the adapter beside the base's weights, in FP32; merged: added to "
        "them, each tensor in its own dtype; FP8: of the merged folder, weights, activations and cache rounded to "
        "E4M3.</p>"
    )


def _examples(examples: Examples) -> str:
    rows = []
    for example in examples:
        cells = [f"<td>{escape(example['question'])}</td><td><code>{escape(example['expected'])}</code></td>"]
        for key in ("before", "after"):
            sort, mark = ("good", "✓") if example[f"{key}_right"] else ("bad", "✗")
            cells.append(f"<td class='{sort}'>{mark} <code>{escape(example[key]) or '—'}</code></td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "<tr><th>question</th><th>expected</th><th>before</th><th>after</th></tr>"
    return (
        f"<div class='wide'><table class='examples'><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _forgetting(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    models = [model for model in MODELS if all(model in task for task in tasks.values())]
    rows = [
        [
            escape(name),
            *(f"{task[model]:.1%}" for model in models),
            signed(task[models[-1]] - task[models[0]]),
            f"{task['n']:,}",
        ]
        for name, task in tasks.items()
    ]
    names = [MODELS[model] for model in models]
    return table(("task of the pretraining", *names, "points, first to last", "questions"), rows)


def _facts(report: Mapping[str, Any]) -> str:
    facts = {
        "commit": report["git_commit"],
        "layout": report["layout"],
        "training tokens": f"{report['train_tokens']:,}",
        "router and expert bias": "unchanged" if report["router_unchanged"] else "CHANGED",
        **({"router SHA-256": report["router_sha256"]} if "router_sha256" in report else {}),
        **{f"overlap with training: {name}": count for name, count in report.get("overlap", {}).items()},
    }
    return facts_table(facts)
