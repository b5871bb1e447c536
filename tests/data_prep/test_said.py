"""convert.py --say: what a multiple-choice turn says, and that the letter alone is marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.chat_rows import ChatRows, form_named
from data_prep.convert import convert
from data_prep.forms.said import ANSWER, SAY
from data_prep.prepare import prepare
from nano3.arch import resolve_model
from nano3.cli import UserError
from nano3.token_store import open_tokenizer
from tests.helpers.data_fixtures import write_jsonl

ROW = {"question": "Which?", "opa": "one", "opb": "two", "opc": "three", "opd": "four", "exp": "Two it is.",
       "subject_name": "ENT"}  # fmt: skip
ROWS = [{**ROW, "question": f"Which of {n}?", "cop": n} for n in range(4)] + [
    {**ROW, "question": "Why?", "cop": 1, "exp": None}
]
TURNS = {
    "letter": [{"content": letter} for letter in "ABCDB"],
    "reasoned": [{"content": letter, "reasoning_content": "Two it is."} for letter in "ABCD"] + [{"content": "B"}],
    "explained": [{"content": f"Two it is.\n\nAnswer: {letter}"} for letter in "ABCD"] + [{"content": "Answer: B"}],
}


@pytest.mark.parametrize("how", SAY)
def test_the_turn_and_the_marked_letter(how: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "train.jsonl", ROWS)
    rows = ChatRows(source, form_named("medmcqa"), say=how)
    found = [row.fields["messages"][-1] for row in rows]
    assert [{k: turn[k] for k in ("content", "reasoning_content") if k in turn} for turn in found] == TURNS[how]
    # In the store exactly the letter has the stage, and the loss counts it.
    convert(ChatRows(source, form_named("medmcqa"), say=how), tmp_path / "rows.jsonl")
    pico = resolve_model("pico")
    store, _ = prepare([tmp_path / "rows.jsonl"], pico, tmp_path / "store", 256)
    tokenizer = open_tokenizer(pico)
    for number, letter in enumerate("ABCDB"):
        tokens, weights = store.document(number)
        marked = store.stages(number) == ANSWER
        assert tokenizer.decode(tokens[marked].tolist()).strip() == letter
        assert (weights[marked] == 1).all()
        assert np.flatnonzero(marked)[-1] == len(tokens) - 3  # the end of the turn and a line break follow


def test_rows_without_choices_are_refused_by_name(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": "hi"},
                                                              {"role": "assistant", "content": "ho"}]}])  # fmt: skip
    with pytest.raises(UserError, match=r"t\.jsonl:1: the row has no choices; --say is for multiple-choice"):
        convert(ChatRows(source, say="letter"), tmp_path / "out.jsonl")


@pytest.mark.parametrize(("cop", "shown"), [(None, "missing"), (-1, "-1"), ("", "''")])
def test_the_test_split_is_refused(tmp_path: Path, cop: int | str | None, shown: str) -> None:
    """By its name in both scripts that read rows, also where nobody said which data set it is."""
    source = write_jsonl(tmp_path / "test.jsonl", [{**ROW, "cop": cop}])
    refused = rf"test\.jsonl:1: 'cop' is {shown}: no answer, as in the test split; score validation"
    with pytest.raises(UserError, match=refused):
        convert(ChatRows(source, form_named("medmcqa"), say="letter"), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(UserError, match=refused):
        prepare([source], resolve_model("pico"), tmp_path / "store", 256)
    assert not (tmp_path / "store").exists()
