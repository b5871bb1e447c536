"""Named data sets in their published forms: values by hand, and damaged rows refused by file, row and field."""

import json
from pathlib import Path

import pytest

from data_prep.chat_rows import ChatRows, form_named
from data_prep.sources import SOURCES
from data_prep.sources.bfcl import NO_FUNCTION_FITS
from data_prep.sources.reasoning_gym import TODAY, fixed_day, reasoning_gym_rows
from nano3.cli import UserError
from tests.helpers.data_fixtures import write_jsonl

MEDMCQA = {
    "id": "m1", "question": "Which?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 0, "exp": "Since w.",
    "subject_name": "Anatomy", "topic_name": "Limbs", "choice_type": "single",
}  # fmt: skip
FORMATTED = {
    "data": {"Question": "Which?", "Options": {"A": "w", "B": "x", "C": "y", "D": "z"}, "Correct Option": "C",
             "Correct Answer": "y"},
    "explanation": "Since y.", "subject_name": "Anatomy", "id": "m1",
}  # fmt: skip
MEDMCQA_EVALS = {
    "input": [{"role": "user", "content": "Subject: Skin\n\nWhich?\n\na) w\nb) x\nc) y\nd) z"}], "ideal": "b) x",
}  # fmt: skip
GSM8K = {"question": "How many?", "answer": "He has 2*600=<<2*600=1200>>1200.\n#### 1,200"}
MATH = {"problem": "Find x.", "solution": "So $x=\\boxed{\\frac{1}{2}}$.", "level": "Level 3", "type": "Algebra"}
SVAMP = {"ID": "chal-1", "Body": "He has 3", "Question": "How many?", "Equation": "( 3.0 + 4.0 )", "Answer": 7.0,
         "Type": "Addition"}  # fmt: skip
LOGIQA = {"context": "C.", "query": "Q?", "options": ["w", "x", "y", "z"], "correct_option": 2}
LOGIQA2 = {"id": 9, "answer": 1, "text": "C.", "question": "Q?", "options": ["w", "x", "y", "z"],
           "type": {"Categorical Reasoning": True, "Conjunctive Reasoning": False}}  # fmt: skip
PASSAGE = {
    "input": [{"role": "user", "content": "\nPassage: C. Question: Q? \nA. w \nB. x \nC. y \nD. z \nAnswer: "}],
    "ideal": "D", "id_string": "val_3",
}  # fmt: skip
RECLOR = {"context": "C.", "question": "Q?", "answers": ["w", "x", "y", "z"], "label": 3, "id_string": "train_1"}
LSAT = {"query": "C.\nQ: Q?\nAnswer Choices: (A)w (B)x\nA: Among A through B, the answer is",
        "choices": ["(A)w", "(B)x"], "gold": [1]}  # fmt: skip
JEE = {"input": [{"role": "user", "content": "Q?\n(A) w\n(B)\n(C) y\n(D) z\n"}], "ideal": ["the answer is (C)", "x"]}
PARARULE = {"input": [{"role": "user", "content": "\nPassage: A. B. Question: C. \nAnswer: "}], "ideal": "false",
            "id_string": "NegationRule-D4-1"}  # fmt: skip


def rows_of(tmp_path: Path, name: str, rows: list, file: str = "rows.jsonl") -> list[dict]:
    path = write_jsonl(tmp_path / file, rows)
    return [row.fields for row in ChatRows(path, form_named(name))]


def one(tmp_path: Path, name: str, row: dict, file: str = "rows.jsonl") -> dict:
    (chat,) = rows_of(tmp_path, name, [row], file)
    return chat


def said(chat: dict) -> tuple:
    """The answer and its reasoning."""
    last = chat["messages"][-1]
    return last["content"], last.get("reasoning_content")


ABCD = "Which?\n\nA. w\nB. x\nC. y\nD. z\n\nAnswer with the letter of the right option."


@pytest.mark.parametrize(
    ("row", "letter", "thought", "subject"),
    [
        (MEDMCQA, "A", "Since w.", "Anatomy"),
        (MEDMCQA | {"cop": 4, "exp": None}, "D", None, "Anatomy"),
        (FORMATTED, "C", "Since y.", "Anatomy"),
        (MEDMCQA_EVALS, "B", None, "Skin"),
    ],
)
def test_medmcqa_in_its_three_forms(tmp_path: Path, row: dict, letter: str, thought: str | None, subject: str) -> None:
    chat = one(tmp_path, "medmcqa", row)
    assert chat["messages"][0] == {"role": "user", "content": ABCD}
    assert said(chat) == (letter, thought)
    assert (chat["answer"], chat["subject"], chat["choices"]) == (letter, subject, list("wxyz"))
    assert (chat["source"], chat["terms"]) == ("medmcqa", "Apache-2.0")
    assert chat.get("evaluation_only", False) == ("input" in row)  # those are of the validation split


@pytest.mark.parametrize(
    ("cops", "letters"),
    [([1, 3, 0, 2], "BDAC"), ([1, 3, 4, 2], "ACDB"), (["1", "3", "4"], "ACD"), ([2, 2, 1, 1, 0], "CCBBA")],
)
def test_where_cop_counts_from_is_decided_from_the_file(tmp_path: Path, cops: list, letters: str) -> None:
    rows = [MEDMCQA | {"question": f"Which {n}?", "cop": cop} for n, cop in enumerate(cops)]
    assert "".join(row["answer"] for row in rows_of(tmp_path, "medmcqa", rows)) == letters


@pytest.mark.parametrize(
    ("cops", "reason"),
    [
        ([1, 2, 3, 1], r"rows\.jsonl:4: 'cop' was 1, 2 or 3 in all 4 rows so far"),
        ([1, 0, 4], r"rows\.jsonl:3: 'cop' is 4; it must be a whole number from 0 to 3, as in the rows before it"),
        ([4, 0], r"rows\.jsonl:2: 'cop' is 0; it must be a whole number from 1 to 4, as in the rows before it"),
        ([0, 7], r"rows\.jsonl:2: 'cop' is 7"),
        ([None], r"rows\.jsonl:1: 'cop' is missing: no answer, as in the test split"),
        ([0, -1], r"rows\.jsonl:2: 'cop' is -1: no answer, as in the test split"),
    ],
)
def test_a_cop_that_cannot_be_decided_is_refused(tmp_path: Path, cops: list, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        rows_of(tmp_path, "medmcqa", [MEDMCQA | {"question": str(n), "cop": cop} for n, cop in enumerate(cops)])


def test_worked_problems(tmp_path: Path) -> None:
    chat = one(tmp_path, "gsm8k", GSM8K, "gsm8k-test.jsonl")
    assert said(chat) == ("\\boxed{1200}", "He has 2*600=1200.")
    assert (chat["answer"], chat["split"], chat["evaluation_only"]) == ("1200", "test", True)
    assert "evaluation_only" not in one(tmp_path, "gsm8k", GSM8K, "train.jsonl")
    chat = one(tmp_path, "math", MATH)
    assert said(chat) == ("\\boxed{\\frac{1}{2}}", MATH["solution"])
    assert (chat["answer"], chat["level"], chat["subject"]) == ("\\frac{1}{2}", "Level 3", "Algebra")
    chat = one(tmp_path, "svamp", SVAMP)
    assert chat["messages"][0]["content"] == "He has 3. How many?"
    assert said(chat) == ("\\boxed{7}", "( 3.0 + 4.0 ) = 7")
    assert (chat["id"], chat["subject"]) == ("chal-1", "Addition")


def test_logic(tmp_path: Path) -> None:
    asked = "C.\n\nQ?\n\nA. w\nB. x\nC. y\nD. z\n\nAnswer with the letter of the right option."
    for name, row, letter in [("logiqa", LOGIQA, "C"), ("logiqa2", LOGIQA2, "B"), ("reclor", RECLOR, "D")]:
        chat = one(tmp_path, name, row)
        assert (chat["messages"][0]["content"], said(chat)) == (asked, (letter, None))
        assert (chat["evaluation_only"], chat["source"]) == (True, name)
        # OpenAI's evals: the package's own wording stays.
        chat = one(tmp_path, name, PASSAGE)
        assert chat["messages"][:-1] == PASSAGE["input"]
        assert (said(chat), chat["choices"], chat["id"]) == (("D", None), list("wxyz"), "val_3")
    assert one(tmp_path, "logiqa2", LOGIQA2)["subject"] == "Categorical Reasoning"
    doubled = PASSAGE["input"][0]["content"]
    for letter in "ABCD":
        doubled = doubled.replace(f"\n{letter}. ", f"\n{letter}. {letter}.")
    row = {"input": [{"role": "user", "content": doubled}], "ideal": "A"}
    assert one(tmp_path, "logiqa", row)["choices"] == list("wxyz")


def test_lsat_in_both_forms(tmp_path: Path) -> None:
    asked = "C.\n\nQ?\n\nA. w\nB. x\n\nAnswer with the letter of the right option."
    own = {"passage": "C.", "question": "Q?", "options": ["(A)w", "(B)x"], "label": "B", "answer": None, "other": None}
    for row in (LSAT, own):
        chat = one(tmp_path, "lsat", row, "lsat-ar.jsonl")
        assert (chat["messages"][0]["content"], said(chat), chat["subject"]) == (asked, ("B", None), "ar")


def test_sets_of_evals(tmp_path: Path) -> None:
    chat = one(tmp_path, "jee-math", JEE)
    assert (said(chat), chat["choices"], chat["evaluation_only"]) == (("C", None), ["w", "", "y", "z"], True)
    chat = one(tmp_path, "pararule", PARARULE)
    assert chat["messages"][0]["content"] == "A. B.\n\nDoes it follow: C.\nAnswer true or false."
    assert (said(chat), chat["subject"], "evaluation_only" in chat) == (("false", None), "NegationRule", False)


FUNCTION = {"name": "f.area", "description": "Area.", "parameters": {
    "type": "dict", "required": ["base"],
    "properties": {"base": {"type": "float"}, "unit": {"type": "any"}}}}  # fmt: skip


def write_bfcl(folder: Path, category: str, rows: list[dict], answers: list[dict] | None) -> Path:
    (folder / "possible_answer").mkdir(parents=True, exist_ok=True)
    name = f"BFCL_v4_{category}.json"
    if answers is not None:
        write_jsonl(folder / "possible_answer" / name, answers)
    return write_jsonl(folder / name, rows)


def asked(identity: str) -> dict:
    return {"id": identity, "question": [[{"role": "user", "content": f"Area {identity}?"}]], "function": [FUNCTION]}


def test_bfcl_takes_the_first_right_value_and_json_schemas_types(tmp_path: Path) -> None:
    truth = {"base": [[1.5, 2], 3], "unit": ["cm", ""], "none": [], "more": [{"x": [1, 2], "y": ["", 2]}]}
    write_bfcl(tmp_path, "simple_python", [asked("a")], [{"id": "a", "ground_truth": [{"f.area": truth}]}])
    write_bfcl(tmp_path, "irrelevance", [asked("b")], None)
    write_bfcl(tmp_path, "live_relevance", [asked("c")], None)
    rows = ChatRows(tmp_path, form_named("bfcl"))
    call, nothing = [row.fields for row in rows]
    assert call["messages"][-1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f.area", "arguments": {"base": [1.5, 2], "more": {"x": 1}}}}
    ]
    assert call["tools"][0]["function"]["parameters"] == {
        "type": "object",
        "required": ["base"],
        "properties": {"base": {"type": "number"}, "unit": {}},
    }
    assert (call["subject"], call["split"], call["evaluation_only"]) == ("simple_python", "test", True)
    assert said(nothing) == (NO_FUNCTION_FITS, None)
    assert [(fact["reason"], fact["rows"]) for fact in rows.drops.facts()] == [("BFCL publishes no answer for it", 1)]
    assert len(rows.facts) == 4


COT = "About x.\n\nQ: Is (A) in it?\n(A) yes (B) no (C) so\nA: Let's think step by step. It is. The answer is (A).\n\n"


def write_cot(tmp_path: Path, **subjects: str) -> Path:
    (tmp_path / "cot.json").write_text(json.dumps(subjects))
    return tmp_path / "cot.json"


def write_champ(tmp_path: Path, **changes) -> Path:
    problem = {"identifier": "P_1", "_text": "Find x.", "category": "Sequence", "_answer": "3", "conversations": {},
               "solution": {"steps": [{"_text": "One."}, {"_text": "Two."}]}} | changes  # fmt: skip
    (tmp_path / "v0.json").write_text(json.dumps({"problems": {"P_1": problem}, "hints": {}}, indent=1))
    return tmp_path / "v0.json"


def test_rationales(tmp_path: Path) -> None:
    (row,) = ChatRows(write_cot(tmp_path, x=COT), form_named("mmlu-dev"))
    assert row.fields["messages"][0]["content"].startswith("Is (A) in it?\n\nA. yes\nB. no\nC. so\n")
    assert (said(row.fields), row.fields["subject"], row.fields["id"]) == (("A", "It is."), "x", "x-0")
    (row,) = ChatRows(write_champ(tmp_path), form_named("champ"))
    assert said(row.fields) == ("\\boxed{3}", "One.\nTwo.")
    assert (row.fields["id"], row.fields["subject"]) == ("P_1", "Sequence")


def test_a_question_that_comes_twice_is_left_out_and_named(tmp_path: Path) -> None:
    rows = ChatRows(
        write_jsonl(tmp_path / "x.jsonl", [LOGIQA2, LOGIQA2, LOGIQA2 | {"answer": 2}]), form_named("logiqa2")
    )
    assert [row.fields["answer"] for row in rows] == ["B", "C"]
    (drop,) = rows.drops.facts()
    assert (drop["reason"], drop["rows"]) == ("the same question and answer as a row before", 1)
    assert drop["examples"][0]["where"].endswith("x.jsonl:2")


def changed(row: dict, key: str, value: object) -> dict:
    """The row with another `input` text, or another field; without it for None."""
    if key == "text":
        return row | {"input": [{"role": "user", "content": value}]}
    row = {**row, key: value}
    return {name: inner for name, inner in row.items() if inner is not None}


BAD_ROWS = [
    ("medmcqa", MEDMCQA, "question", None, "'question' is missing"),
    ("medmcqa", MEDMCQA, "opb", " ", "'opb' is empty"),
    ("medmcqa", MEDMCQA, "opc", 3, "'opc' is 3"),
    ("medmcqa", MEDMCQA, "subject_name", None, "'subject_name' is missing"),
    ("medmcqa", MEDMCQA, "cop", True, "'cop' is True"),
    ("medmcqa", MEDMCQA, "exp", 1, "'exp' is 1"),
    ("medmcqa", FORMATTED, "data", {"Question": "q"}, "'data' is"),
    ("medmcqa", FORMATTED, "data", FORMATTED["data"] | {"Correct Option": "E"}, "'Correct Option' is 'E'"),
    ("medmcqa", FORMATTED, "data", FORMATTED["data"] | {"Correct Answer": "x"}, "'Correct Answer' is 'x'"),
    ("medmcqa", MEDMCQA_EVALS, "text", "Which?", "'input' is 'Which[?]'"),
    ("medmcqa", MEDMCQA_EVALS, "ideal", "b) y", "'ideal' is"),
    ("gsm8k", GSM8K, "answer", "It is 3.", "'answer' ends in 'It is 3.'"),
    ("gsm8k", GSM8K, "answer", "So.\n#### three", "'answer' ends in"),
    ("gsm8k", GSM8K, "question", "", "'question' is empty"),
    ("math", MATH, "solution", "So 3.", "'solution' ends in 'So 3.'"),
    ("math", MATH, "level", "hard", "'level' is 'hard'"),
    ("math", MATH, "type", None, "'type' is missing"),
    ("svamp", SVAMP, "Answer", "seven", "'Answer' is 'seven'"),
    ("svamp", SVAMP, "Body", None, "'Body' is missing"),
    ("svamp", SVAMP, "Equation", 7, "'Equation' is 7"),
    ("logiqa", LOGIQA, "correct_option", 4, "'correct_option' is 4"),
    ("logiqa", LOGIQA, "options", ["w", "x"], "'options' is"),
    ("logiqa", LOGIQA, "context", None, "'context' is missing"),
    ("logiqa", PASSAGE, "text", "Passage: C.", "'input' is"),
    ("logiqa", PASSAGE, "ideal", "E", "'ideal' is 'E'"),
    ("logiqa2", LOGIQA2, "answer", "B", "'answer' is 'B'"),
    ("logiqa2", LOGIQA2, "options", ["w", "", "y", "z"], r"options\[1\] is ''"),
    ("logiqa2", LOGIQA2, "type", "all", "'type' is 'all'"),
    ("reclor", RECLOR, "label", None, "'label' is missing, as in the test split"),
    ("reclor", RECLOR, "label", 1.5, "'label' is 1.5"),
    ("reclor", RECLOR, "answers", "w", "'answers' is 'w'"),
    ("lsat", LSAT, "gold", [0, 1], r"'gold' is \[0, 1\]"),
    ("lsat", LSAT, "gold", [2], "'gold' is 2"),
    ("lsat", LSAT, "query", "C. Q?", "'query' is"),
    ("lsat", LSAT, "choices", ["(A)w", "(C)x"], "option 1 is"),
    ("jee-math", JEE, "ideal", "C", "'ideal' is 'C'"),
    ("jee-math", JEE, "text", "Q? (A) w", "'input' is not a question with options"),
    ("pararule", PARARULE, "ideal", "maybe", "'ideal' is 'maybe'"),
    ("pararule", PARARULE, "text", "A. B.", "'input' is"),
    ("pararule", PARARULE, "input", [], r"'input' is \[\]"),
]
"""Data set, a good row, what is wrong with it in which field, and what the refusal says."""


def test_forty_bad_rows_are_refused_by_file_row_and_field(tmp_path: Path) -> None:
    assert len(BAD_ROWS) == 40
    for name, good, key, value, reason in BAD_ROWS:
        first = good | ({"question": "Another?"} if "question" in good else {})
        path = write_jsonl(tmp_path / "rows.jsonl", [first, changed(good, key, value)])
        with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{reason}"):
            list(ChatRows(path, form_named(name)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": [[{"role": "user", "content": "a"}], []]}, "'question' is"),
        ({"function": {"name": "f"}}, "'function' is"),
        ({"function": [{"description": "no name"}]}, r"function\[0\] is"),
        ({"id": "other"}, "'id' is 'other', which has no possible answer"),
        ({"function": [{"name": "g"}]}, r"ground_truth\[0\] calls 'f.area', which is none of 'function'"),
    ],
)
def test_bad_rows_of_bfcl(tmp_path: Path, change: dict, reason: str) -> None:
    answers = [{"id": "a", "ground_truth": [{"f.area": {"base": [1]}}]}]
    path = write_bfcl(tmp_path, "simple_python", [asked("a") | change], answers)
    with pytest.raises(UserError, match=rf"BFCL_v4_simple_python\.json:1: .*{reason}"):
        list(ChatRows(path, form_named("bfcl")))
    multi = write_jsonl(tmp_path / "BFCL_v4_multi_turn_base.json", [asked("a")])
    with pytest.raises(UserError, match="none of the single-turn categories"):
        list(ChatRows(multi, form_named("bfcl")))


@pytest.mark.parametrize("change", [{"_answer": None}, {"solution": {"steps": []}}, {"category": 3}, {"_text": ""}])
def test_bad_problems_of_champ(tmp_path: Path, change: dict) -> None:
    (field,) = change
    with pytest.raises(UserError, match=rf"v0\.json:1: '{field}' is"):
        list(ChatRows(write_champ(tmp_path, **change), form_named("champ")))


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("no questions", "'x' is 'no questions'"),
        (COT.replace("The answer is (A).", "Yes."), "'text' is"),
        (COT.replace("(B) no", "no"), "'text' asks"),
        (COT.replace("answer is (A)", "answer is (D)"), "'answer' is 'D'; it must be a letter from A to C"),
    ],
)
def test_bad_prompts_of_mmlu(tmp_path: Path, prompt: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"cot\.json:1: .*{reason}"):
        list(ChatRows(write_cot(tmp_path, x=prompt), form_named("mmlu-dev")))


def test_every_source_says_where_it_is_from_and_on_what_terms() -> None:
    assert len({source.name for source in SOURCES}) == len(SOURCES)
    for source in SOURCES:
        assert source.terms
        assert not ("non-commercial" in source.terms.lower() and not source.evaluation_only), source.name


def test_reasoning_gym_asks_nothing_that_it_cannot_answer_or_that_changes_by_day() -> None:
    from reasoning_gym.arithmetic import time_intervals

    for task in ("propositional_logic", "boxnet", "graph_color", "rubiks_cube", "rush_hour"):
        with pytest.raises(UserError, match=f"task {task} publishes no answer"):
            list(reasoning_gym_rows(task, 1, 1))
    with fixed_day():
        assert time_intervals.date.today() == TODAY
        assert time_intervals.parser.parse("10:31").date() == TODAY
    assert time_intervals.date.today() != TODAY
    assert len(list(reasoning_gym_rows("time_intervals", 20, 3))) == 20
