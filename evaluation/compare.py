"""Two results side by side: gain, intervals, tests, groups, what was fixed and what was broken.

    python evaluation/compare.py BEFORE.json AFTER.json [--by subject]

Both are results of evaluation/evaluate.py. They compare only when questions, prompts, template and sampling are equal.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
from pathlib import Path

from evaluation.comparison import (
    accuracy,
    by_groups,
    check_comparable,
    enough,
    interval,
    paired,
    split_gain,
    table,
)
from evaluation.result_file import Result, read_result
from evaluation.tasks import load_task, names


def summary(before: Result, after: Result, wanted: float) -> str:
    """Accuracies, gain and tests, a line each."""
    check_comparable({"before": before, "after": after})
    pair, lines = paired(before, after), []
    for name, result in (("before", before), ("after", after)):
        low, high = interval(result)
        lines.append(f"{name:<7}{accuracy(result):7.2%}  (95 %: {low:.2%} to {high:.2%})  {result['model']}")
    low, high = pair.interval
    lines.append(
        f"gain   {100 * pair.gain:+6.2f} points (95 %: {100 * low:+.2f} to {100 * high:+.2f}); {pair.fixed} fixed, "
        f"{pair.broken} broken, {pair.test} p = {pair.p_value:.2g}"
    )
    if split := split_gain(before, after):
        lines.append(
            f"of it  {100 * split['knowledge']:+6.2f} knowledge (by letter), {100 * split['format']:+.2f} format"
        )
    return "\n".join([*lines, enough(pair, wanted)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="result of the base model")
    parser.add_argument("after", type=Path, metavar="AFTER", help="result of the tuned model")
    parser.add_argument("--by", default="subject", metavar="FIELD", help="subject or source (default: subject)")
    parser.add_argument(
        "--gain", type=float, default=2.0, metavar="POINTS", help="gain that matters to you (default: 2)"
    )
    args = parser.parse_args()
    if not 0 < args.gain <= 100:
        raise UserError(f"--gain is {args.gain}; give points above 0, at most 100")
    before, after = read_result(args.before), read_result(args.after)
    print(summary(before, after, args.gain / 100))
    task = before.get("settings", {}).get("task")
    published = load_task(task).published if task in names() else None
    print(f"\n{table(by_groups(before, after, args.by), published)}")
    return 0


if __name__ == "__main__":
    run(main)
