"""Step-aware traces: the graph computes, the grammar reads exactly what it writes, errors are propagated exactly."""

import json
import random
from collections import Counter
from fractions import Fraction

import pytest

from data_prep.chat import render
from data_prep.generate import fresh_rows
from data_prep.sources.gsm8k import STEPS as GSM8K_STEPS
from data_prep.steps.calculations import NoTrace, trace_of
from data_prep.steps.grammar import REASONS, STAGES, Unparsed, parse, write
from data_prep.steps.graph import Step, Trace, canonical_edges, recomputed, show
from data_prep.steps.programs import another_value, draw_problem, with_an_error
from data_prep.steps.rows import step_rows
from nano3.cli import UserError
from nano3.conversations import conversation

X = (52, 7, 31)
BY_HAND = Trace(
    {"x": X},
    (
        Step("s1", "sort", ("x",), (7, 31, 52)),
        Step("s2", "keep > 30", ("s1",), (31, 52)),
        Step("s3", "first", ("s2",), Fraction(31)),
    ),
)
TEXT = """[UNDERSTAND] x = 52, 7, 31; goal = sort, keep > 30, first
[PLAN] s1 = sort x; s2 = keep > 30 s1; s3 = first s2
[EXECUTE] s1: 7, 31, 52; s2: 52; s3: 52
[VERIFY] s1: 7, 31, 52 ok; s2: 31, 52 wrong; s3: 31"""
WRONG = {"s1": (7, 31, 52), "s2": (52,), "s3": Fraction(52)}


def test_a_trace_by_hand_is_written_and_read():
    text = write(BY_HAND, "sort, keep > 30, first", WRONG)
    assert text.text == TEXT
    assert text.text[text.wrong :].startswith(" 52; s3: 52\n[VERIFY]")
    assert [text.text[start : start + 3] for start, _ in text.parts.values()] == ["[UN", "[PL", "[EX", "[VE"]
    read = parse(TEXT)
    assert read.trace.values == WRONG
    assert read.verified == BY_HAND.values
    assert read.flagged == "s2"
    assert recomputed(read.trace) == BY_HAND.values


MUTATIONS = {
    "marks": [
        ("[PLAN]", "[plan]"),
        ("[VERIFY]", "[EXECUTE]"),
        ("goal = sort", "goal = [PLAN] sort"),
        ("\n[EXECUTE]", " [EXECUTE]"),
    ],
    "input": [("x = 52, 7, 31", "x = 52, 7, many"), ("x = 52, 7, 31; ", ""), ("x = 52", "x: 52")],
    "goal": [("; goal = sort, keep > 30, first", "")],
    "step": [("s1 = sort x", "s1: sort x"), ("; s2 = keep", ";  s2 = keep")],
    "operation": [("sort x", "shuffle x"), ("keep > 30 s1", "keep >= 30 s1")],
    "twice": [("s2 = keep > 30 s1", "s1 = keep > 30 s1"), ("x = 52, 7, 31", "x = 52, 7; x = 31, 7")],
    "undeclared": [("sort x", "sort y"), ("sort x", "sort s2")],
    "operands": [("sort x", "sort x x"), ("first s2", "add s2 s2"), ("sort x;", "sort;")],
    "execute": [("s2: 52; s3: 52", "s3: 52; s2: 52"), ("; s3: 52\n", "\n")],
    "value": [("s2: 52; s3", "s2: 052; s3"), ("s3: 52\n", "s3: 5, 2\n"), ("s2: 52; s3", "s2: 52,; s3")],
    "verify": [("[VERIFY] s1", "[VERIFY] s4"), ("; s3: 31", "")],
    "verdict": [("31, 52 wrong", "31, 52"), ("s3: 31", "s3: 31 ok"), ("7, 31, 52 ok", "7, 31, 52 fine")],
}


def test_every_reason_has_its_mutations_and_there_are_twenty_kinds():
    assert set(MUTATIONS) == set(REASONS)
    assert sum(map(len, MUTATIONS.values())) >= 20


@pytest.mark.parametrize("reason", MUTATIONS)
def test_what_is_not_exactly_a_trace_is_refused_for_its_reason(reason):
    for old, new in MUTATIONS[reason]:
        assert old in TEXT
        with pytest.raises(Unparsed) as refused:
            parse(TEXT.replace(old, new, 1))
        assert refused.value.reason == reason, (old, new)


def _mutated(text: str, source: random.Random) -> tuple[str, set[str]]:
    """A text changed in one way that each of its reasons would be right for."""
    kind = source.randrange(8)
    lines = text.split("\n")
    if kind == 0:
        lines.pop(source.randrange(4))
        return "\n".join(lines), {"marks"}
    if kind == 1:
        first, second = source.sample(range(4), 2)
        lines[first], lines[second] = lines[second], lines[first]
        return "\n".join(lines), {"marks"}
    if kind == 2:
        return text.replace("s1 = ", "s1 = best ", 1), {"operation"}
    if kind == 3:
        return text.replace(" x;", " q;", 1) if " x;" in text else text.replace(" x\n", " q\n", 1), {"undeclared"}
    if kind == 4:
        return text.replace("[EXECUTE] s1: ", "[EXECUTE] s9: ", 1), {"execute"}
    if kind == 5:
        return text.replace("[EXECUTE] s1: ", "[EXECUTE] s1: 0", 1), {"value"}
    if kind == 6:
        return text.replace("[VERIFY] s1", "[VERIFY] s2", 1), {"verify"}
    return text + " perhaps", {"value", "verdict"}


def test_ten_thousand_traces_parse_and_compute_and_as_many_changed_ones_do_not():
    source, lengths, branches, flagged = random.Random(0), Counter(), 0, 0
    for number in range(10_000):
        problem = draw_problem(1, number)
        assert recomputed(problem.trace) == problem.trace.values
        executed = with_an_error(problem.trace, source) if number % 2 else None
        text = write(problem.trace, problem.goal, executed).text
        read = parse(text)
        first_wrong = next((n for n, value in (executed or {}).items() if value != problem.trace.values[n]), None)
        assert read.flagged == first_wrong
        assert read.verified == problem.trace.values
        if executed:
            assert first_wrong is not None
            assert recomputed(read.trace, {first_wrong: executed[first_wrong]}) == executed  # propagated exactly
        lengths[len(problem.trace.steps)] += 1
        branches += any(
            step.operands[0] not in ("x" if place == 0 else f"s{place}",)
            for place, step in enumerate(problem.trace.steps)
        )
        flagged += read.flagged is not None
        changed, reasons = _mutated(text, source)
        with pytest.raises(Unparsed) as refused:
            parse(changed)
        assert refused.value.reason in reasons, changed
    assert set(lengths) == {2, 3, 4}
    assert flagged == 5000
    assert 1500 < branches < 3000  # a third of those with three steps or more, less those with one list only


def test_edges_do_not_depend_on_names_or_order_and_do_on_what_is_computed():
    renamed = Trace(
        {"numbers": X},
        tuple(
            Step(f"t{s.id[1]}", s.op, tuple({"x": "numbers"}.get(o, f"t{o[1:]}") for o in s.operands), s.value)
            for s in BY_HAND.steps
        ),
    )
    assert canonical_edges(renamed) == canonical_edges(BY_HAND)
    two = {"a": Fraction(2), "b": Fraction(3)}
    total, product = Step("s1", "add", ("a", "b"), Fraction(5)), Step("s2", "multiply", ("a", "b"), Fraction(6))
    swapped = Step("s1", "add", ("b", "a"), Fraction(5))
    assert canonical_edges(Trace(two, (total, product))) == canonical_edges(Trace(two, (product, swapped)))
    less, more = Step("s1", "subtract", ("a", "b"), Fraction(-1)), Step("s1", "subtract", ("b", "a"), Fraction(1))
    assert canonical_edges(Trace(two, (less,))) != canonical_edges(Trace(two, (more,)))
    # One operand of the last step is another: of three edges two stay.
    first, second, _ = BY_HAND.steps
    rewired = Trace(BY_HAND.inputs, (first, second, Step("s3", "first", ("s1",), Fraction(7))))
    assert (canonical_edges(rewired) & canonical_edges(BY_HAND)).total() == 2


def test_spans_say_stage_and_weight_of_every_part():
    row = next(step_rows(1, 5, injected=1.0))
    said = row["messages"][1]
    pieces = render(conversation(row, "row", "steps").messages, thinking=True)
    written = next(piece for piece in pieces if piece.spans)
    parts = [(written.text[s.start : s.end], s.stage, s.weight) for s in written.spans]
    assert "".join(text for text, stage, _ in parts if stage < 5) == said["reasoning_content"]
    assert [stage for _, stage, _ in parts] == [1, 2, 3, 3, 3, 4, 5]
    assert [weight for *_, weight in parts] == [1, 1, 1, 0, 1, 1, 1]
    assert parts[4][0] == "[VERIFY]", "who writes EXECUTE writes the mark, also after an error"
    assert parts[2][0].startswith("[EXECUTE] ")
    assert parts[-1][0] == row["answer"] == said["content"]
    right, executed = {n["id"]: n["value"] for n in row["trace"]["nodes"]}, row["trace"]["executed"]
    first = next(name for name in right if right[name] != executed[name])
    assert parts[3][0].startswith(f" {executed[first]}")
    assert STAGES == {"UNDERSTAND": 1, "PLAN": 2, "EXECUTE": 3, "VERIFY": 4, "ANSWER": 5}


@pytest.mark.parametrize("value", [0, 9, 10, 99, -10, Fraction(5, 2), Fraction(98, 99)])
def test_a_wrong_number_differs_and_its_length_does_not_tell(value):
    found = {another_value(Step("s1", "count", ("x",), Fraction(value)), random.Random(seed)) for seed in range(50)}
    assert value not in found
    if value != Fraction(98, 99):  # whose neighbours are all longer or negative
        assert {len(show(one)) for one in found} == {len(show(Fraction(value)))}


def test_rows_are_the_same_for_a_seed_and_errors_come_in_their_share():
    rows = list(step_rows(400, 3, injected=0.25))
    assert rows == list(step_rows(400, 3, injected=0.25))
    assert 70 < sum("executed" in row["trace"] for row in rows) < 130
    assert all("executed" not in row["trace"] for row in step_rows(50, 3))
    assert json.loads(json.dumps(rows)) == rows
    assert len({row["messages"][0]["content"] for row in fresh_rows("steps/lists", 50, 3, steps=3)}) == 50


@pytest.mark.parametrize("wrong", [{"steps": 9}, {"injected": 2}, {"injected": "half"}, {"level": 1}])
def test_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=str(next(iter(wrong)))):
        list(fresh_rows("steps/lists", 2, 1, **wrong))


def test_calculations_become_a_trace_by_hand():
    trace = trace_of("16-3-4 = <<16-3-4=9>>9 eggs, 9*2 = $<<9*2=18>>18.", "18")
    assert [(s.op, s.operands, show(s.value)) for s in trace.steps] == [
        ("subtract", ("x1", "x2"), "13"),
        ("subtract", ("s1", "x3"), "9"),
        ("multiply", ("s2", "x4"), "18"),
    ]
    assert {name: show(value) for name, value in trace.inputs.items()} == {"x1": "16", "x2": "3", "x3": "4", "x4": "2"}
    assert show(trace_of("<<5/2=2.5>>", "2.5").answer) == "2.5"


@pytest.mark.parametrize(
    ("rationale", "answer", "reason"),
    [
        ("It is 3.", "3", "none"),
        ("<<abs(3)=3>>", "3", "expression"),
        ("<<2**3=8>>", "8", "expression"),
        ("<<1+1=3>>", "3", "wrong"),
        ("<<1/0=1>>", "1", "wrong"),
        ("<<1+3=4>> <<2+2=4>> <<4*5=20>>", "20", "twice"),
        ("<<1+1=2>> and one more", "3", "answer"),
        ("<<1+9999999999999999=10000000000000000>>", "1", "large"),
    ],
)
def test_a_rationale_that_leaves_something_open_makes_no_trace(rationale, answer, reason):
    with pytest.raises(NoTrace) as refused:
        trace_of(rationale, answer)
    assert refused.value.reason == reason


def test_gsm8k_rows_become_traces_and_are_left_out_with_their_reason():
    fields = {"question": "How much?", "answer": "She pays <<3*4=12>>12.\n#### 12"}
    assert GSM8K_STEPS.drop(fields) is None
    row = GSM8K_STEPS.chat(fields)
    assert parse(row["messages"][1]["reasoning_content"]).trace.answer == 12
    assert "two earlier steps" in GSM8K_STEPS.drop(fields | {"answer": "<<1+3=4>> <<2+2=4>> <<4*5=20>>\n#### 20"})
