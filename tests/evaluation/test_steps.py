"""Measures of step-aware answers: by hand, on models whose behaviour is known, and the identity that must hold."""

import random
from fractions import Fraction

import pytest

from data_prep.steps.grammar import parse, write
from data_prep.steps.graph import Step, Trace, canonical_edges, recomputed, show
from data_prep.steps.programs import draw_problem, with_an_error
from data_prep.steps.rows import step_rows
from evaluation.generation import encode_prompts, load_tokenizer
from evaluation.judging.questions import load_questions
from evaluation.significance import difference_interval
from evaluation.step_measures import Judged, fidelity, first_wrong, judged, summary
from evaluation.steps import answer, lines, measures, split
from nano3.arch import resolve_model
from nano3.cli import UserError
from nano3.rows import write_rows


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("steps") / "held.jsonl"
    write_rows(path, step_rows(120, 7, injected=0.5))
    return load_questions(path)


def problem_of(question):
    return parse(question.reasoning)


class Solver:
    """Answers without a mistake; EXECUTE continues from whatever values it has written, as a faithful one would.

    `verdict`: what VERIFY says: "right" judges each step, "ok" and "wrong" say always the same.
    """

    def __init__(self, verdict="right", errs=0.0):
        self.verdict, self.errs, self.source = verdict, errs, random.Random(0)

    def __call__(self, questions, begun, limit):
        assert limit > 50
        return [self.write(question, text) for question, text in zip(questions, begun, strict=True)]

    def write(self, question, begun):
        taught = problem_of(question)
        right = Trace(taught.trace.inputs, tuple(s.with_value(taught.verified[s.id]) for s in taught.trace.steps))
        executed = right.values
        if not begun and self.source.random() < self.errs:
            executed = with_an_error(right, self.source) or executed
        if "[EXECUTE]" in begun and begun.endswith("\n"):
            written = begun
            executed = self.values(right, begun)
        elif begun:
            executed = recomputed(right, self.values(right, begun))
            written = write(right, taught.goal, executed).text.partition("[VERIFY]")[0]
            assert written.startswith(begun)
        else:
            written = write(right, taught.goal, executed).text.partition("[VERIFY]")[0]
        judgements = write(right, taught.goal, executed).text.partition("[VERIFY]")[2]
        first = right.steps[0]
        if self.verdict == "wrong":
            rest = "; ".join(f"{s.id}: {show(s.value)}" for s in right.steps[1:])
            judgements = f" {first.id}: {show(first.value)} wrong; {rest}"
        if self.verdict == "ok":
            judgements = " " + "; ".join(f"{s.id}: {show(executed[s.id])} ok" for s in right.steps)
        final = executed[right.steps[-1].id] if self.verdict == "ok" else right.answer
        return f"{written}[VERIFY]{judgements}\n</think>\n{show(final)}"

    @staticmethod
    def values(trace, begun):
        """The values that EXECUTE has so far."""
        items = begun.partition("[EXECUTE] ")[2].strip().split("; ")
        texts = dict(item.split(": ") for item in items)
        kinds = {step.id: isinstance(step.value, tuple) for step in trace.steps}
        return {
            name: tuple(map(int, text.split(", ")))
            if kinds[name] and text != "none"
            else ()
            if kinds[name]
            else Fraction(text)
            for name, text in texts.items()
        }


def test_a_solver_without_mistakes_has_every_measure_at_its_best(questions):
    found = measures(answer(questions, Solver(), 100))
    own, injected, right = found["own"], found["injected"], found["right_execute"]
    assert own["rfs"]["share"] == own["soundness"]["share"] == own["accuracy_final"]["share"] == 1
    assert own["svr"] == {"count": 0, "n": 0}, "of no error there is no share"
    assert injected["accuracy_execute"]["n"] == injected["n"] > 110
    assert injected["svr"]["share"] == injected["detection"]["share"] == 1
    assert injected["accuracy_execute"]["count"] > injected["false_alarms"]["n"] == 0, "each has a wrong step"
    assert right["false_alarms"]["share"] == right["harm"]["share"] == 0
    assert found["interventions"]["changes"]["share"] == found["interventions"]["keeps"]["share"] == 1
    assert found["interventions"]["changes"]["n"] > 40
    assert found["interventions"]["keeps"]["n"] > 5
    assert found["given_j"]["share"] == 1
    assert found["given_j"]["n"] == injected["detection"]["n"] + right["false_alarms"]["n"]
    assert "injected: svr" in "\n".join(lines(found))


@pytest.mark.parametrize(("verdict", "detects", "alarms"), [("wrong", "some", 1), ("ok", 0, 0)])
def test_a_constant_verdict_looks_bad(questions, verdict, detects, alarms):
    """One that always says "wrong" repairs everything, and one that always says "ok" nothing: neither has J above 0."""
    found = measures(answer(questions, Solver(verdict, errs=0.4), 100))
    own = found["own"]
    assert own["false_alarms"]["share"] == alarms
    assert own["repair"]["share"] == (1 if verdict == "wrong" else 0)
    assert own["j"]["share"] <= 0
    assert found["given_j"]["share"] <= 0
    assert own["detection"]["share"] < 1 if detects == "some" else own["detection"]["share"] == detects
    assert own["net_gain"]["share"] == (own["repair"]["count"] / 120 if verdict == "wrong" else 0)


def test_answers_to_two_lots_of_questions_are_those_to_all(questions):
    half = len(questions) // 2
    parts = [answer(part, Solver("ok", errs=0.4), 100) for part in (questions[:half], questions[half:])]
    both = measures(parts[0] + parts[1])
    for kind in ("own", "injected", "right_execute"):
        assert both[kind]["n"] == sum(measures(part)[kind]["n"] for part in parts)
        counts = [measures(part)[kind]["accuracy_execute"]["count"] for part in parts]
        assert both[kind]["accuracy_execute"]["count"] == sum(counts)
    assert both["interventions"]["changes"]["n"] == sum(len(part.interventions["changes"]) for part in parts)


def test_the_identity_of_gain_repair_and_harm_holds_exactly():
    source = random.Random(3)
    for _ in range(200):
        answers = [
            Judged("" if source.random() < 0.9 else "marks", *(source.random() < p for p in (0.6,)), 0.5, 1, 2,
                   source.random() < 0.5, source.random() < 0.3, source.random() < 0.2)
            for _ in range(source.randint(1, 40))
        ]  # fmt: skip
        found = summary(answers)
        traces = [one for one in answers if not one.unparsed]
        if not traces:
            continue
        n = len(traces)
        wrong, right = Fraction(found["repair"]["n"], n), Fraction(found["harm"]["n"], n)
        repair = Fraction(found["repair"]["count"], found["repair"]["n"] or 1)
        harm = Fraction(found["harm"]["count"], found["harm"]["n"] or 1)
        final = Fraction(sum(one.final_right for one in traces), n)
        assert final - Fraction(found["accuracy_execute"]["count"], n) == wrong * repair - right * harm
        assert found["net_gain"]["share"] == pytest.approx(float(wrong * repair - right * harm), abs=1e-12)


def test_fidelity_by_hand():
    x = (3, 1, 2)
    first = Step("s1", "sort", ("x",), (1, 2, 3))
    second, third = Step("s2", "reverse", ("s1",), (3, 2, 1)), Step("s3", "first", ("s2",), Fraction(3))
    teacher = Trace({"x": x}, (first, second, third))
    assert fidelity(teacher, teacher) == 1
    shorter = Trace({"x": x}, (first, Step("s2", "last", ("s1",), Fraction(3))))
    assert fidelity(shorter, teacher) == 2 * 1 / (2 + 3)  # the first edge is the same, no other
    skipping = Trace({"x": x}, (first, second, Step("s3", "first", ("s1",), Fraction(1))))
    assert fidelity(skipping, teacher) == 2 * 2 / (3 + 3)
    assert fidelity(Trace({"x": (3, 1)}, (Step("s1", "sort", ("x",), (1, 3)),)), teacher) == 0


def test_rewiring_k_edges_costs_those_and_what_follows_from_them():
    """Chains of reversals of distinct lists: rewiring the operand of step i changes the edges from step i on."""
    source = random.Random(5)
    for _ in range(100):
        problem = draw_problem(11, source.randrange(1000), 4).trace
        place = source.randrange(1, 4)
        step = problem.steps[place]
        others = [name for name in ("x", *(s.id for s in problem.steps[:place])) if name not in step.operands]
        lists = [name for name in others if isinstance({**problem.inputs, **problem.values}[name], tuple)]
        if not lists:
            continue
        changed = Step(step.id, step.op, (source.choice(lists),), step.value)
        rewired = Trace(problem.inputs, (*problem.steps[:place], changed, *problem.steps[place + 1 :]))
        touched = {step.id}
        for later in problem.steps[place + 1 :]:
            touched |= {later.id} if touched & set(later.operands) else set()
        kept = (canonical_edges(problem) & canonical_edges(rewired)).total()
        assert kept == 4 - len(touched)
        assert fidelity(rewired, problem) == kept / 4


def test_the_first_wrong_step_is_found_and_later_ones_follow_from_it():
    problem = draw_problem(2, 1, 4).trace
    executed = with_an_error(problem, random.Random(1))
    steps = tuple(step.with_value(executed[step.id]) for step in problem.steps)
    expected = next(step.id for step in problem.steps if executed[step.id] != step.value)
    assert first_wrong(Trace(problem.inputs, steps)) == expected
    assert first_wrong(problem) is None


def test_what_is_no_trace_counts_as_unparsed_with_its_answer():
    teacher = draw_problem(2, 1).trace
    text = write(teacher, "goal").text
    assert judged(teacher, text, f" {show(teacher.answer)} ").final_right
    broken = judged(teacher, text.replace("[PLAN]", "[plan]"), show(teacher.answer))
    assert (broken.unparsed, broken.final_right) == ("marks", True)
    assert split("only reasoning, cut") == ("only reasoning, cut", "")
    found = summary([broken])
    assert found["unparsed"]["reasons"] == {"marks": 1}
    assert found["j"] == {"n": 0}


def test_rows_without_a_trace_are_refused(tmp_path):
    write_rows(
        tmp_path / "plain.jsonl",
        [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
    )
    with pytest.raises(UserError, match="its reasoning is no trace"):
        answer(load_questions(tmp_path / "plain.jsonl"), Solver(), 100)


def test_the_interval_of_a_difference_is_newcombes():
    """Newcombe 1998, table II, method 10: (a) 56/70 - 48/80 and (h) 0/10 - 0/10."""
    assert difference_interval(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert difference_interval(0, 10, 0, 10) == pytest.approx((-0.2775, 0.2775), abs=5e-5)


def test_no_conversation_has_no_prompt():
    """A model none of whose answers is a trace leaves nothing to intervene in."""
    assert encode_prompts(load_tokenizer(str(resolve_model("pico"))), [], thinking=True) == []
