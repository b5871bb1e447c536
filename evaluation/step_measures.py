"""What step-aware answers are measured by: faithfulness to the teacher's graph, and what VERIFY is worth.

None of these measures has a public definition, so these are ours (docs/step_aware.md). Each rate comes with its n and
its interval, and the rate of repairs never without that of false alarms: a model that always says "wrong" repairs much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.steps.grammar import Unparsed, parse
from data_prep.steps.graph import Trace, Undefined, Value, applied, canonical_edges, show
from evaluation.significance import clustered_interval, difference_interval, gain_interval, wilson_interval


@dataclass(frozen=True)
class Judged:
    """One answer to a problem.

    `unparsed` is the grammar's reason, "" for a trace; without a trace only `final_right` means anything. `found`:
    VERIFY flags the first step of EXECUTE that is wrong. `flagged`: it flags any. `sound` of `steps` have the value
    that their own operands give.
    """

    unparsed: str
    final_right: bool
    fidelity: float = 0.0
    sound: int = 0
    steps: int = 0
    execute_right: bool = False
    flagged: bool = False
    found: bool = False


def judged(teacher: Trace, reasoning: str, answer: str) -> Judged:
    """The reasoning and the answer of a model, beside the teacher's right trace."""
    final = answer.strip() == show(teacher.answer)
    try:
        written = parse(reasoning)
    except Unparsed as error:
        return Judged(error.reason, final)
    return Judged(
        "",
        final,
        fidelity(written.trace, teacher),
        sum(_is_sound(written.trace)),
        len(written.trace.steps),
        written.trace.answer == teacher.answer,
        written.flagged is not None,
        written.flagged is not None and written.flagged == first_wrong(written.trace),
    )


def fidelity(student: Trace, teacher: Trace) -> float:
    """RFS: 2 |E and E*| / (|E| + |E*|) over canonical edges, 1 for equal graphs whatever their names and order."""
    ours, theirs = canonical_edges(student), canonical_edges(teacher)
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def _is_sound(trace: Trace) -> list[bool]:
    """Of each step, whether its value is that of its operation on the values that its operands have in the text."""
    known: dict[str, Value] = {**trace.inputs, **trace.values}
    return [_value_or_none(trace, number, known) == step.value for number, step in enumerate(trace.steps)]


def _value_or_none(trace: Trace, number: int, known: Mapping[str, Value]) -> Value | None:
    try:
        return applied(trace.steps[number], known)
    except Undefined:
        return None


def first_wrong(trace: Trace) -> str | None:
    """The first step whose value does not follow from the inputs by the trace's own plan."""
    sound = _is_sound(trace)  # up to the first step that is not, values are those that follow
    return next((step.id for step, right in zip(trace.steps, sound, strict=True) if not right), None)


def summary(answers: Sequence[Judged]) -> dict[str, Any]:
    """All measures of one kind of answers. Rates of VERIFY are over those that are traces.

    Fields: n, unparsed (by reason), accuracy_final over all; and over traces: rfs, soundness, accuracy_execute,
    net_gain (final minus EXECUTE), svr (wrong EXECUTE: first wrong step found and the answer right), detection (found),
    repair (answer right), false_alarms (EXECUTE without a wrong step: any flagged), harm (right EXECUTE: answer wrong),
    j (detection minus false alarms). A rate is {count, n, share, ci95}, without share where n is 0.
    """
    traces = [one for one in answers if not one.unparsed]
    wrong, right = ([one for one in traces if one.execute_right is value] for value in (False, True))
    faultless = [one for one in right if one.sound == one.steps]
    reasons = Counter(one.unparsed for one in answers if one.unparsed)
    found: dict[str, Any] = {
        "n": len(answers),
        "unparsed": {**rate(reasons.total(), len(answers)), "reasons": dict(sorted(reasons.items()))},
        "accuracy_final": rate(sum(one.final_right for one in answers), len(answers)),
        "rfs": _mean([one.fidelity for one in traces]),
        "soundness": _soundness(traces),
        "accuracy_execute": rate(len(right), len(traces)),
        "svr": rate(sum(one.found and one.final_right for one in wrong), len(wrong)),
        "detection": rate(sum(one.found for one in wrong), len(wrong)),
        "repair": rate(sum(one.final_right for one in wrong), len(wrong)),
        "false_alarms": rate(sum(one.flagged for one in faultless), len(faultless)),
        "harm": rate(sum(not one.final_right for one in right), len(right)),
    }
    return found | {"j": youden(found["detection"], found["false_alarms"]), "net_gain": _net_gain(traces)}


def rate(count: int, n: int) -> dict[str, Any]:
    """A share with its n and Wilson's interval; of nothing there is no share."""
    found: dict[str, Any] = {"count": count, "n": n}
    return found | ({"share": count / n, "ci95": list(wilson_interval(count, n))} if n else {})


def _mean(scores: Sequence[float]) -> dict[str, Any]:
    if not scores:
        return {"n": 0}
    interval = clustered_interval(scores, range(len(scores)))
    return {"n": len(scores), "share": sum(scores) / len(scores), "ci95": list(interval)}


def _soundness(traces: Sequence[Judged]) -> dict[str, Any]:
    """Sound steps of all steps; steps of one answer go together."""
    flags = [(place < one.sound, number) for number, one in enumerate(traces) for place in range(one.steps)]
    if not flags:
        return rate(0, 0)
    interval = clustered_interval([float(flag) for flag, _ in flags], [number for _, number in flags])
    return {**rate(sum(flag for flag, _ in flags), len(flags)), "ci95": list(interval)}


def youden(detection: Mapping[str, Any], alarms: Mapping[str, Any]) -> dict[str, Any]:
    """Detection minus false alarms (Youden, Cancer 3:32-35, 1950): 0 for a constant verdict."""
    if not detection["n"] or not alarms["n"]:
        return {"n": 0}
    interval = difference_interval(detection["count"], detection["n"], alarms["count"], alarms["n"])
    share = detection["share"] - alarms["share"]
    return {"n": detection["n"] + alarms["n"], "share": share, "ci95": list(interval)}


def _net_gain(traces: Sequence[Judged]) -> dict[str, Any]:
    """Accuracy of the answers minus that of EXECUTE: P(wrong) repair - P(right) harm, exactly."""
    if not traces:
        return {"n": 0}
    before, after = [one.execute_right for one in traces], [one.final_right for one in traces]
    share = (sum(after) - sum(before)) / len(traces)
    return {"n": len(traces), "share": share, "ci95": list(gain_interval(before, after))}
