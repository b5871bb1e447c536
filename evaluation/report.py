"""One page for any run: curves, scores with intervals, what was gained and forgotten, errors, lineage, what to do next.

    python evaluation/report.py OUT [--before BASE.json --after TUNED.json]

OUT is a training run's folder, a pipeline's, or one with results of evaluation/evaluate.py. Writes OUT/report-run.html.
Verdicts are read from the results, nothing is judged again. Results pair up by their questions. Which of two is the
base's is known from their names (scores-base.json, scores.json), or said by --before and --after.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
    from nano3.outputs import fresh_file
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from evaluation.charts import bar_chart, line_chart
from evaluation.comparison import accuracy, by_groups, check_comparable, enough, interval, paired, split_gain
from evaluation.error_analysis import by_form, by_length, by_subject, changed, outcomes
from evaluation.judging.judges import OUTCOMES
from evaluation.judging.reasoning_form import KEPT
from evaluation.lineage import Link, Parts, lineage, parts_of, read_run
from evaluation.page import facts_table, page, points, section, signed, table
from evaluation.result_file import Result, read_result
from evaluation.significance import SMALL_GROUP, wilson_interval
from nano3.arch import Arch
from nano3.hf_config import is_plain
from nano3.training.journal import FILE, read_rows

PAGE = "report-run.html"
EXAMPLES = 6
"""Fixed and broken answers that are shown, of each."""
SHORTEST = 2
"""Points that make a curve."""


@dataclass(frozen=True)
class Pair:
    """Two results on the same questions; `name` says which: the second's file, and for FP8 both."""

    name: str
    before: Result
    after: Result


def pairs_of(results: Mapping[Path, Result], before: Path | None, after: Path | None) -> list[Pair]:
    """Results that answer the same questions: base and tuned, then tuned and FP8. Raises `UserError` for two that were
    named and do not."""
    if before and after:
        chosen = read_result(before), read_result(after)
        check_comparable({"before": chosen[0], "after": chosen[1]})
        return [Pair(before.stem, *chosen)]
    groups: dict[tuple[str, ...], list[tuple[Path, Result]]] = {}
    for path, result in results.items():
        groups.setdefault(tuple(sorted(row["id"] for row in result["answers"])), []).append((path, result))
    gains, costs = [], []
    for group in groups.values():
        base = [one for one in group if "base" in one[0].stem]
        fp8 = [one for one in group if "fp8" in one[0].stem]
        tuned = [one for one in group if one not in base and one not in fp8]
        tuned.sort(key=lambda one: one[0].stem not in ("scores", "scores-merged") and "tuned" not in one[0].stem)
        gains += _pair(base, tuned, "{1}")
        tuned.sort(key=lambda one: "merged" not in one[0].stem)  # what FP8 was made from
        costs += _pair(tuned, fp8, "{0} to {1}")
    return [*sorted(gains, key=lambda pair: -pair.after["n"]), *costs]


def _pair(before: Sequence[tuple[Path, Result]], after: Sequence[tuple[Path, Result]], name: str) -> list[Pair]:
    """The first of both, where they compare."""
    if not before or not after or not _comparable(before[0][1], after[0][1]):
        return []
    return [Pair(name.format(before[0][0].stem, after[0][0].stem), before[0][1], after[0][1])]


def _comparable(before: Result, after: Result) -> bool:
    try:
        check_comparable({"before": before, "after": after})
    except UserError:
        return False
    return True


def report(out: Path, before: Path | None = None, after: Path | None = None) -> Path:
    """Writes the page and returns its path. Raises `UserError` for a folder that holds nothing to report."""
    parts = parts_of(out)
    rows = read_rows(parts.run / FILE) if parts.run else []
    pairs = pairs_of(parts.results, before, after)
    sections = [
        _head(out, rows, pairs),
        section("Scores", _scores(parts.results)),
        *(section(f"What changed: {pair.name}", _gain(pair)) for pair in pairs),
        *(section(f"How answers fail: {pair.name}", _errors(pair)) for pair in pairs[:1]),
        *(section(f"Fixed and broken: {pair.name}", _examples(pair)) for pair in pairs[:1]),
        section("Training", _curves(rows)),
        section("Adapter norms by layer", _norms(rows)),
        section("Load of the experts", _experts(rows)),
        section("Lineage", _lineage(lineage(parts))),
        section("Next", _next(parts, out, bool(pairs))),
    ]
    path = out / PAGE
    with fresh_file(path) as temporary:
        temporary.write_text(page(f"Report of {out.resolve().name}", sections), encoding="utf-8")
    return path


def _head(out: Path, rows: Sequence[Mapping[str, Any]], pairs: Sequence[Pair]) -> str:
    losses = [row["loss"] for row in rows if "loss" in row]
    words = [f"{len(losses):,} steps, loss {losses[0]:.3f} → {losses[-1]:.3f}"] if losses else []
    tokens = sum(row.get("tokens", 0) for row in rows)
    words += [f"{tokens:,} training tokens"] if tokens else []
    score = ""
    if pairs:
        pair = paired(pairs[0].before, pairs[0].after)
        low, high = pair.interval
        before, after = accuracy(pairs[0].before), accuracy(pairs[0].after)
        score = (
            f"<p class='scores'><span class='before'>{before:.1%}</span> <span class='arrow'>→</span> "
            f"<span class='after'>{after:.1%}</span></p>"
            f"<p>{points(pair.gain)} points on {pair.n:,} questions, 95 % interval {points(low)} to {points(high)}</p>"
        )
    name = escape(out.resolve().name)
    return f"<header><p class='kicker'>Report</p><h1>{name}</h1>{score}<p>{escape('; '.join(words))}</p></header>"


def _scores(results: Mapping[Path, Result]) -> str:
    bars = {path.stem: (accuracy(result), interval(result)) for path, result in results.items()}
    if not bars:
        return ""
    return bar_chart(bars, "accuracy of each result") + (
        "<p class='fine'>95 % intervals: Wilson; with several samples of a question, clustered by question.</p>"
    )


def _gain(pair: Pair) -> str:
    """Gain with its tests, and by subject or source."""
    both = paired(pair.before, pair.after)
    low, high = both.interval
    facts = {
        "gain": f"{points(both.gain)} points, 95 % interval {points(low)} to {points(high)} (Newcombe 1998"
        + (")" if both.single else ", clustered by question)"),
        "fixed, broken": f"{both.fixed:,} wrong before and right after, {both.broken:,} the other way",
        both.test: f"p = {both.p_value:.2g}, {'exact' if both.single else 'over the questions'}",
        "enough questions?": enough(both, 0.02),
    }
    if split := split_gain(pair.before, pair.after):
        facts["of the gain"] = f"{points(split['knowledge'])} knowledge (by letter), {points(split['format'])} format"
    key = _key(pair)
    lines = by_groups(pair.before, pair.after, key)
    rows = [
        [
            escape(line.name) + (" *" if line.marked else ""),
            f"{line.before.n:,}",
            _share(line.before),
            _share(line.after),
            signed(line.pair.gain),
            f"{line.p_holm:.2g}",
        ]
        for line in lines
    ]
    note = f"<p class='fine'>* fewer than {SMALL_GROUP} questions: read the interval, not the figure.</p>"
    groups = table((key, "questions", "before", "after", "points", "p (Holm)"), rows)
    marked = note if any(line.marked for line in lines) else ""
    return facts_table(facts) + (f"<h3>By {key}</h3>{groups}{marked}" if len(lines) > 1 else "")


def _key(pair: Pair) -> str:
    """What the questions are grouped by."""
    return "subject" if any(row.get("subject") for row in pair.before["answers"]) else "source"


def _share(group: Any) -> str:
    low, high = group.interval
    return f"{group.accuracy:.1%} <span class='fine'>{low:.0%}–{high:.0%}</span>"


def _errors(pair: Pair) -> str:
    """Outcomes of both models, of the second by subject and by length."""
    names = [name for name in OUTCOMES if any(outcomes(side["answers"])[name] for side in (pair.before, pair.after))]

    def rows(groups: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
        return [[escape(name), *(f"{counts[one]:,}" for one in names)] for name, counts in groups.items()]

    both = {"before": outcomes(pair.before["answers"]), "after": outcomes(pair.after["answers"])}
    meanings = "; ".join(f"{name}: {OUTCOMES[name]}" for name in names)
    parts = [table(("", *names), rows(both)), f"<p class='fine'>{escape(meanings)}.</p>"]
    parts += [f"<h3>After, by {_key(pair)}</h3>", table(("", *names), rows(by_subject(pair.after["answers"])))]
    parts += [
        "<h3>After, by length of the question</h3>",
        table(("characters", *names), rows(by_length(pair.after["answers"]))),
    ]
    return "".join([*parts, _forms(pair, names)])


def _forms(pair: Pair, names: Sequence[str]) -> str:
    """Whether answers keep the form of reasoning, apart from whether they are right; "" where none was asked for."""
    parts = []
    for title, side in (("Before", pair.before), ("After", pair.after)):
        if forms := by_form(side["answers"]):
            kept = sum(forms.get(KEPT, {}).values())
            low, high = wilson_interval(kept, side["n"])
            rows = [[escape(form), *(f"{counts[name]:,}" for name in names)] for form, counts in forms.items()]
            parts.append(f"<h3>{title}, form of the reasoning: kept {kept / side['n']:.1%} ({low:.0%}–{high:.0%})</h3>")
            parts.append(table(("form", *names), rows))
    return "".join(parts)


def _examples(pair: Pair) -> str:
    fixed, broken = changed(pair.before, pair.after)
    parts = []
    for title, found in (("Wrong, then right", fixed), ("Right, then wrong", broken)):
        if found:
            rows = [
                [escape(_short(old["question"])), *(f"<code>{escape(_short(text))}</code>" for text in texts)]
                for old, new in found[:EXAMPLES]
                for texts in [(old["expected"], old["answer"], new["answer"])]
            ]
            head = ("question", "expected", "before", "after")
            shown = f"{len(rows)} of {len(found):,}"
            parts.append(f"<h3>{title}: {shown}</h3>{table(head, rows)}")
    return "".join(parts)


def _short(text: Any, longest: int = 400) -> str:
    text = str(text)
    return text if len(text) <= longest else text[:longest] + " …"


CHARTS = (
    ("Loss", "loss", ("loss", "validation_loss")),
    ("Learning rate", "learning rate", ("lr",)),
    ("Gradient norm", "norm", ("grad_norm",)),
    ("Speed, tokens/s", "tokens/s", ("tokens_per_second",)),
    ("Memory, 10⁹ bytes", "10^9 bytes", ("memory_gb",)),
    ("Uneven experts, most tokens over mean", "max over mean", ("expert_imbalance",)),
)
"""Title, axis and metrics of each chart."""


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every chart that has points; loss and validation by source where there are several sources."""
    figures = []
    sources = sorted({name for row in rows for name in row if name.startswith(("loss/", "validation_loss/"))})
    chosen = [*CHARTS[:1], *([("Loss by source", "loss", tuple(sources[:8]))] if len(sources) > 1 else []), *CHARTS[1:]]
    for title, axis, names in chosen:
        curves = {name: _points(rows, name) for name in names}
        curves = {name.removeprefix("loss/"): curve for name, curve in curves.items() if len(curve) >= SHORTEST}
        if curves:
            figures.append(f"<figure><figcaption>{title}</figcaption>{line_chart(curves, 'step', axis, 240)}</figure>")
    return f"<div class='charts'>{''.join(figures)}</div>" if figures else ""


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [
        (row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float) and math.isfinite(row[name])
    ]


def _last_with(rows: Sequence[Mapping[str, Any]], prefix: str) -> Mapping[str, Any]:
    """The last row that has metrics beginning so; empty when there is none."""
    return next((row for row in reversed(rows) if any(name.startswith(prefix) for name in row)), {})


def _norms(rows: Sequence[Mapping[str, Any]]) -> str:
    """The last norms of all adapters, a bar each."""
    prefix = "adapter_norm/"
    last = _last_with(rows, prefix)
    norms = {name.removeprefix(prefix): float(value) for name, value in last.items() if name.startswith(prefix)}
    largest = max(norms.values(), default=0.0)
    if not largest:
        return ""
    lines = []
    for name, norm in norms.items():
        width = f"<i class='share' style='width:{100 * norm / largest:.0f}%'></i>"
        lines.append([escape(name.replace("decoder.layers.", "")), f"{norm:.3g}", width])
    return f"<p class='fine'>Norm of scale · B A at step {last['step']:,}.</p>" + table(("layer", "norm", ""), lines)


def _experts(rows: Sequence[Mapping[str, Any]]) -> str:
    """The last load of every expert, layer by layer: the darker, the more tokens."""
    prefix = "expert_load/"
    last = _last_with(rows, prefix)
    loads = {int(name.removeprefix(prefix)): load for name, load in last.items() if name.startswith(prefix)}
    lines = []
    for layer, load in sorted(loads.items()):
        most = max(load) or 1
        cells = "".join(
            f"<td><i style='opacity:{0.06 + 0.94 * count / most:.2f}' title='expert {number}: {count}'></i></td>"
            for number, count in enumerate(load)
        )
        lines.append(f"<tr><th>{layer}</th>{cells}</tr>")
    if not lines:
        return ""
    note = f"Tokens of each expert at step {last['step']:,}, a line for each layer: the darker, the more."
    return f"<p class='fine'>{note}</p><div class='wide'><table class='heat'>{''.join(lines)}</table></div>"


def _lineage(links: Sequence[Link]) -> str:
    rows = [
        [
            escape(link.name),
            f"<code class='hash'>{escape(link.sha256[:12]) or '—'}</code>",
            escape(link.says),
            f"<span class='bad'>{escape(link.problem)}</span>" if link.problem else "<span class='good'>holds</span>",
        ]
        for link in links
    ]
    return table(("part", "hash", "what", "verified"), rows) if rows else ""


def _next(parts: Parts, out: Path, compared: bool) -> str:
    """Commands that make what is still missing."""
    model = read_run(parts.run).get("model", "BASE") if parts.run is not None else "BASE"
    merged, commands = out / "merged", []
    if parts.run is not None and parts.merged is None:
        commands.append(f"python conversion/merge_lora.py {model} {parts.run / 'adapter'} {merged}")
    has_fp8 = parts.merged is not None and not is_plain(parts.merged) and bool(Arch.load(parts.merged).moe_layers)
    if has_fp8 and parts.fp8 is None:
        commands.append(f"python conversion/quantize_fp8.py {merged} {out / 'fp8'} --calibration STORE")
    if not compared:
        for name, result in ((model, "scores-base.json"), (merged, "scores.json")):
            commands.append(f"python evaluation/evaluate.py {name} --questions HELD.jsonl --out {out / result}")
    else:
        commands.append(f"python evaluation/compare.py {out / 'scores-base.json'} {out / 'scores.json'} --by source")
    if parts.merged is not None:
        commands.append(f"python evaluation/chat.py {model} --beside {merged}")
        commands.append(f"python conversion/certify.py verify {merged} --against {model}")
    return f"<pre>{escape(chr(10).join(commands))}</pre>"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of a run, of a pipeline, or of results")
    parser.add_argument("--before", type=Path, metavar="FILE", help="result of the base model")
    parser.add_argument("--after", type=Path, metavar="FILE", help="result of the tuned model")
    args = parser.parse_args()
    if bool(args.before) != bool(args.after):
        raise UserError("--before and --after go together; give both, or neither")
    print(report(args.out, args.before, args.after))
    return 0


if __name__ == "__main__":
    run(main)
