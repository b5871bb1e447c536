"""What leaves training data: each reason on rows made for it, with counts and examples, and what must stay."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.chat_rows import ChatRows
from data_prep.clean import clean
from data_prep.drops import EXAMPLES, Drops
from data_prep.overlap import compared_text, overlap_of_files
from data_prep.quality import Limits, repetition
from nano3.cli import UserError
from nano3.conversations import conversation
from nano3.rows import about_file
from tests.helpers.data_fixtures import row, write_jsonl

ROOT = Path(__file__).parents[2]
DEFAULT = Limits()
WORDS = [f"{a}{b}" for a in "bcdfghklmnprst" for b in ("al", "en", "ir", "os", "um", "atol", "ebin", "ikor")]


def text(seed: int, words: int = 40) -> str:
    """Words that no other seed has in this order."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def changed(words: str, places: list[int]) -> str:
    """The same text with some words replaced."""
    parts = words.split()
    for place in places:
        parts[place] = "other"
    return " ".join(parts)


def cleaned(
    tmp_path: Path, rows: list[dict], limits: Limits = DEFAULT, exclude: tuple[str, ...] = ()
) -> tuple[list, dict]:
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    about = clean(ChatRows(path), tmp_path / "out.jsonl", limits, exclude)
    kept = [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert about["rows"] == len(kept) == len(rows) - sum(drop["rows"] for drop in about["drops"])
    return kept, {drop["reason"]: drop for drop in about["drops"]}


def named(identity: str, question: str, answer: str = "a", **more) -> dict:
    return row(question, answer) | {"id": identity} | more


def test_near_duplicates_are_confirmed_by_their_exact_index(tmp_path: Path) -> None:
    """40 words give 38 3-grams. One other word in the middle changes three of them: 35 / 41 = 0.854. Two that stand
    apart change six: 32 / 44 = 0.727."""
    base = text(1)
    rows = [
        named("first", base),
        named("copy", base.upper()),
        named("near", changed(base, [20])),
        named("far", changed(base, [10, 25])),
        named("new", text(2)),
    ]
    kept, drops = cleaned(tmp_path, rows)
    assert kept == ["first", "far", "new"]
    assert {reason: drop["rows"] for reason, drop in drops.items()} == {
        "exact duplicate of a row before": 1,
        "near duplicate of a row before": 1,
    }
    assert drops["near duplicate of a row before"]["examples"][0]["where"].endswith("in.jsonl:3")
    assert cleaned(tmp_path, rows, Limits(near=0.7))[0] == ["first", "new"]
    assert cleaned(tmp_path, rows, Limits(near=0.9))[0] == ["first", "near", "far", "new"]
    assert cleaned(tmp_path, rows, Limits(near=2))[0] == ["first", "near", "far", "new"]


def test_the_same_question_with_another_answer_is_no_copy(tmp_path: Path) -> None:
    """Of a free answer many may be right, of a choice one: the two rows contradict each other and both leave."""
    free = [named("1", text(1), "Berlin"), named("2", text(1), "Paris")]
    assert cleaned(tmp_path, free, Limits(near=2)) == (["1", "2"], {})
    choice = [row | {"answer": row["messages"][1]["content"]} for row in (*free, named("3", text(2)))]
    kept, drops = cleaned(tmp_path, choice)
    assert kept == ["3"]
    assert drops["the same question has another answer elsewhere"]["rows"] == 2
    assert cleaned(tmp_path, choice, Limits(consistent=False, near=2))[0] == ["1", "2", "3"]


def test_wording_that_all_questions_share_makes_no_duplicates(tmp_path: Path) -> None:
    """Thirty words of template and six of one's own: with the template three quarters of the 3-grams are shared."""
    template = text(99, 30)
    rows = [named(str(n), f"{template} {text(n, 6)}") for n in range(30)]
    kept, drops = cleaned(tmp_path, rows, Limits(near=0.6))
    assert (len(kept), drops) == (30, {})


def test_lengths_and_repetition(tmp_path: Path) -> None:
    said = text(5, 12)
    rows = [
        named("short", "one two", "three"),
        named("long", text(1, 60), "a"),
        named("loop", text(2), f"{said} {said} {said} {said}"),
        named("fine", text(3), said),
    ]
    kept, drops = cleaned(tmp_path, rows, Limits(fewest_words=4, most_words=100))
    assert kept == ["long", "fine"]
    # 48 words give 39 runs of 10, of which the 12 different ones come first: 27 / 39 = 69 % were there before.
    assert set(drops) == {"fewer than 4 words", "an answer of which more than 30% repeats"}
    looped = conversation(rows[2], "x:1", "x")
    assert repetition(looped) == pytest.approx(27 / 39)
    assert cleaned(tmp_path, rows, Limits(most_words=50))[1]["more than 50 words"]["rows"] == 3  # 61, 88 and 52


def test_held_out_questions_leave_and_are_listed(tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [named("h1", text(1)), named("h2", text(2))])
    rows = [named("1", text(1), "other"), named("2", changed(text(2), [20])), named("3", text(3))]
    kept, drops = cleaned(tmp_path, rows, exclude=(str(held),))
    assert kept == ["3"]
    assert {reason: drop["rows"] for reason, drop in drops.items()} == {
        "exact duplicate of a question of held.jsonl": 1,
        "near duplicate of a question of held.jsonl": 1,
    }
    command = [sys.executable, str(ROOT / "data_prep" / "check_overlap.py"), str(tmp_path / "in.jsonl"), str(held)]
    result = subprocess.run([*command, "--list", str(tmp_path / "pairs.jsonl")], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()] == [
        {"kind": "exact", "training": "1", "held_out": "h1"},
        {"kind": "near", "training": "2", "held_out": "h2"},
    ]
    assert overlap_of_files(tmp_path / "out.jsonl", held).near == []


def test_options_that_are_not_in_the_question_are_compared_too() -> None:
    fields = named("1", "Which of these?", "B", choices=["of these?", "red", "blue"])
    assert compared_text(conversation(fields, "x:1", "x")) == "Which of these? red blue"
    assert compared_text(conversation(named("1", "Which?"), "x:1", "x")) == "Which?"


def test_every_reason_keeps_three_examples_and_its_count() -> None:
    drops = Drops()
    for number in range(5):
        drops.add("too long", f"x:{number}", "word " * 100)
    drops.add("odd", "x:9", "y")
    long, _ = drops.facts()
    assert (long["reason"], long["rows"], len(long["examples"])) == ("too long", 5, EXAMPLES)
    assert all(len(example["text"]) <= 70 for example in long["examples"])
    assert drops.total == 6
    assert drops.lines()[0] == "  left out, too long: 5"
    assert drops.lines()[-1] == "    x:9: y"


def test_the_script_says_what_it_dropped_and_why(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [named("1", text(1)), named("2", text(1))])
    out = tmp_path / "out.jsonl"
    command = [sys.executable, str(ROOT / "data_prep" / "clean.py"), str(path), "--out"]
    result = subprocess.run([*command, str(out)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "out.jsonl: 1 rows stay, 1 left out" in result.stdout
    assert "left out, exact duplicate of a row before: 1" in result.stdout
    assert json.loads(about_file(out).read_text())["limits"]["near"] == 0.8
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.about.json"]
    for arguments in ([str(path)], [str(out), "--near", "0"], ["x.txt"]):
        result = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)


def test_nothing_is_written_when_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is left of in"):
        cleaned(tmp_path, [named("1", "a")], Limits(fewest_words=9))
    assert not (tmp_path / "out.jsonl").exists()
