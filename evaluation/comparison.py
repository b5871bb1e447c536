"""Models side by side on the same questions: gains with intervals and tests, by group, split into format and knowledge.

Works on results of `evaluation.evaluate` as they are: verdicts are read, nothing is judged again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.result_file import Result
from evaluation.significance import (
    SMALL_GROUP,
    Group,
    by_group,
    gain_interval,
    holm,
    mcnemar,
    mean_interval,
    paired_t,
    questions_needed,
    shares_gain_interval,
)
from nano3.cli import UserError

MUST_AGREE = {
    "questions": "the questions differ; score all models on the same file",
    "prompts": "the prompts differ; score all models with the same task and the same --plain and --thinking",
    "template": "the chat templates differ; give the folders the same chat_template.jinja",
    "sampling": "the sampling differs; score all models with the same --method, --max-new-tokens, --samples and so on",
}
"""What two results must have equal hashes of before a difference between them means anything, and what to do."""

NO_SUBJECT = "(no subject)"


def check_comparable(results: Mapping[str, Result]) -> None:
    """Raises `UserError` where results cannot be compared: other questions, prompts, template or sampling."""
    (first, one), *others = results.items()
    for name, other in others:
        odd = sorted({row["id"] for row in one["answers"]} ^ {row["id"] for row in other["answers"]})
        if odd:
            raise UserError(
                f"the results of {first} and {name} answer different questions ({len(odd)} differ, first {odd[0]}); "
                "score all of them anew"
            )
        for part, remedy in MUST_AGREE.items():
            hashes = [result.get("hashes", {}).get(part) for result in (one, other)]
            if hashes[0] != hashes[1]:
                raise UserError(f"the results of {first} and {name} cannot be compared: {remedy}")


@dataclass(frozen=True)
class Paired:
    """Scores of two models on the same questions in the same order: 0, 1, or the share of a question's right samples.

    The gain is the change of the mean score, so of the accuracy of one answer, however many samples there are.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.before)

    @property
    def single(self) -> bool:
        """Whether every question has one answer, right or wrong."""
        return all(score in (0, 1) for score in (*self.before, *self.after))

    @property
    def fixed(self) -> int:
        """Wrong before, right after; of several samples more than half decide."""
        return sum(a > 0.5 >= b for b, a in zip(self.before, self.after, strict=True))

    @property
    def broken(self) -> int:
        """Right before, wrong after; of several samples more than half decide."""
        return sum(b > 0.5 >= a for b, a in zip(self.before, self.after, strict=True))

    @property
    def gain(self) -> float:
        return (sum(self.after) - sum(self.before)) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Newcombe's, of the gain; with several samples clustered by question."""
        if self.single:
            return gain_interval([score == 1 for score in self.before], [score == 1 for score in self.after])
        return shares_gain_interval(self.before, self.after)

    @property
    def test(self) -> str:
        """What `p_value` is of."""
        return "McNemar" if self.single else "paired t"

    @property
    def p_value(self) -> float:
        """McNemar's, exact; with several samples of the paired t test over the questions."""
        return mcnemar(self.fixed, self.broken) if self.single else paired_t(self.before, self.after)


def share(row: Mapping[str, Any]) -> float:
    """A question's score: 1 or 0; with several samples the share of right ones."""
    return float(row["share"] if "samples" in row else row["correct"])


def paired(before: Result, after: Result, score: Callable[[Mapping[str, Any]], float] = share) -> Paired:
    """The two results' scores, paired by question id."""
    there = {row["id"]: row for row in after["answers"]}
    pairs = [(score(row), score(there[row["id"]])) for row in before["answers"]]
    return Paired(tuple(b for b, _ in pairs), tuple(a for _, a in pairs))


def compare(base: Result, tuned: Result, **others: Result) -> dict[str, Any]:
    """The report's score fields: for every model NAME_accuracy and ci95_NAME; of tuned over base gain, ci95_gain,
    fixed, broken, p_value (`Paired`) and, where both results have letters too, format and knowledge (`split_gain`).

    Raises `UserError` as `check_comparable` does.
    """
    results: dict[str, Result] = {"base": base, "tuned": tuned, **others}
    check_comparable(results)
    pair = paired(base, tuned)
    report: dict[str, Any] = {"n": pair.n}
    report |= {f"{name}_accuracy": accuracy(result) for name, result in results.items()}
    report["gain"] = report["tuned_accuracy"] - report["base_accuracy"]
    report |= {f"ci95_{name}": list(interval(result)) for name, result in results.items()}
    report |= {"ci95_gain": list(pair.interval), "fixed": pair.fixed, "broken": pair.broken, "p_value": pair.p_value}
    return report | split_gain(base, tuned)


def accuracy(result: Result) -> float:
    """Share of right answers; with several samples, the mean of the questions' shares."""
    return sum(map(share, result["answers"])) / len(result["answers"])


def interval(result: Result) -> tuple[float, float]:
    """95 %: Wilson's; with several samples of each question, clustered by question."""
    return mean_interval([share(row) for row in result["answers"]])


def split_gain(base: Result, tuned: Result) -> dict[str, Any]:
    """gain = format + knowledge. Knowledge is the change by log-likelihood, in which no answer can be written wrongly;
    format is the rest: answers that are found now and were not. Empty where the results have not both."""
    if not all("letter_correct" in row for result in (base, tuned) for row in result["answers"]):
        return {}
    known = paired(base, tuned, lambda row: float(row["letter_correct"]))
    written = accuracy(tuned) - accuracy(base)
    return {"knowledge": known.gain, "ci95_knowledge": list(known.interval), "format": written - known.gain}


@dataclass(frozen=True)
class Line:
    """A group in a table of gains; `p_holm` is corrected for all groups of the table."""

    name: str
    before: Group
    after: Group
    pair: Paired
    p_holm: float

    @property
    def marked(self) -> bool:
        """Fewer than `SMALL_GROUP` questions: read the interval, not the figure."""
        return self.before.small


def by_groups(before: Result, after: Result, key: str = "subject") -> list[Line]:
    """Gains by subject, source or another field of the rows, the largest group first."""
    check_comparable({"before": before, "after": after})
    return grouped(before, after, key)


def grouped(before: Result, after: Result, key: str) -> list[Line]:
    """The same for results of one set of questions, however they were asked: with thinking and without, say."""
    there = {row["id"]: row for row in after["answers"]}
    names = [str(row.get(key) or NO_SUBJECT) for row in before["answers"]]
    first = by_group(names, [share(row) for row in before["answers"]])
    second = by_group(names, [share(there[row["id"]]) for row in before["answers"]])
    pairs = {name: Paired(first[name].scores, second[name].scores) for name in first}
    adjusted = holm({name: pair.p_value for name, pair in pairs.items()})
    return [Line(name, first[name], second[name], pairs[name], adjusted[name]) for name in first]


def table(lines: Sequence[Line], published: Mapping[str, tuple[int, int, int]] | None = None) -> str:
    """The groups as a table of plain text, totals last; `*` marks groups of fewer than `SMALL_GROUP` questions.

    `published`, group -> (questions, right before, right after) of others, stands beside ours where it is known.
    """
    before = tuple(score for line in lines for score in line.pair.before)
    after = tuple(score for line in lines for score in line.pair.after)
    total = Paired(before, after)
    width = max(len("all"), *(len(line.name) for line in lines)) + 2
    share = f"{'%':>7} {'95 %':^15}"
    rows = [f"{'group':<{width}}{'n':>6}  {share}  {share}  {'gain':>7} {'p (Holm)':>9}"]
    for line in lines:
        name = line.name + (" *" if line.marked else "")
        rows.append(_row(name, width, line.before, line.after, f"{line.p_holm:9.2g}" + _others(published, line.name)))
    rows.append(_row("all", width, Group(before), Group(after), f"{total.p_value:9.2g}"))
    if any(line.marked for line in lines):
        rows.append(f"* fewer than {SMALL_GROUP} questions: the figure says little, its interval says how little")
    return "\n".join(rows)


def _others(published: Mapping[str, tuple[int, int, int]] | None, name: str) -> str:
    """`   published 36.3 -> 77.8` of a group that others have scored too."""
    if not published or name not in published:
        return ""
    n, before, after = published[name]
    return f"   published {100 * before / n:.1f} -> {100 * after / n:.1f}"


def _row(name: str, width: int, before: Group, after: Group, p_value: str) -> str:
    cells = [f"{name:<{width}}{before.n:>6}"]
    for group in (before, after):
        low, high = group.interval
        cells.append(f"{100 * group.accuracy:>7.2f} [{100 * low:5.1f}, {100 * high:5.1f}] ")
    return "  ".join([*cells, f"{100 * (after.accuracy - before.accuracy):+7.2f}"]) + " " + p_value


def enough(pair: Paired, wanted: float) -> str:
    """A sentence on whether these questions are enough to see a gain of `wanted`, from how often the models differ."""
    off = sum(abs(a - b) for b, a in zip(pair.before, pair.after, strict=True))
    differ = max(off / pair.n, wanted)
    need = questions_needed(wanted, min(1.0, differ))
    verdict = "enough" if pair.n >= need else "too few"
    return (
        f"{pair.n:,} questions are {verdict} for a gain of {100 * wanted:.1f} points: {need:,} find it four times in "
        f"five, where {100 * differ:.0f} % of the answers differ"
    )
