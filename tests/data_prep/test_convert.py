"""The one door: inputs become chat JSONL that preparation accepts, what is held out is clear of what is trained on."""

import csv
import gzip
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from data_prep.chat_rows import ChatRows, form_named
from data_prep.convert import convert, held_out_file
from data_prep.forms.mapping import mapped_form
from data_prep.overlap import overlap_of_files
from nano3.cli import UserError
from nano3.rows import about_file
from tests.helpers.killed import at_every_change

ROOT = Path(__file__).parents[2]


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def script(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "data_prep" / "convert.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def write_csv(path: Path, rows: int) -> Path:
    """Questions of five words of their own each."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["question", "a", "b", "right", "why", "url"])
        for n in range(rows):
            words = " ".join(f"w{n * 5 + place}" for place in range(5))
            table.writerow([f"Which, of {words}?", f"x{n}", f'"y{n}"', "AB"[n % 2], "", "u"])
    return path


MAP = ["user={question}\nA. {a}\nB. {b}", "assistant={right}", "reasoning={why}"]


def test_a_csv_with_a_map_through_the_script(tmp_path: Path) -> None:
    table, out = write_csv(tmp_path / "t.csv", 40), tmp_path / "my.jsonl"
    result = script(table, "--out", out, "--held-out", 10, *(part for text in MAP for part in ("--map", text)))
    assert result.returncode == 0, result.stderr
    assert "my.jsonl: 30 rows of the form map (as you asked)" in result.stdout
    assert "not used, since they change neither prompt nor loss: url (40)" in result.stdout
    held, rest = written(held_out_file(out)), written(out)
    assert (len(held), len(rest)) == (10, 30)
    assert rest[0]["messages"][0]["content"].startswith("Which, of w")
    assert rest[0]["messages"][0]["content"].splitlines()[1].startswith("A. x")
    assert not {json.dumps(row) for row in held} & {json.dumps(row) for row in rest}
    about = json.loads(about_file(out).read_text())
    assert (about["form"], about["rows"], about["held_out"], about["drops"]) == ("map", 30, 10, [])
    assert about["inputs"][0]["name"] == "t.csv"


def test_no_held_out_question_of_one_run_lies_beside_the_rows_of_another(tmp_path: Path) -> None:
    """Whatever is killed while it is written, and where the next run holds nothing out."""
    folder, out = tmp_path / "work", tmp_path / "work" / "my.jsonl"
    folder.mkdir()
    table = write_csv(tmp_path / "t.csv", 20)

    def run(held_out: int) -> None:
        convert(ChatRows(table, mapped_form(MAP)), out, held_out)

    run(0)
    moments = []
    for event in at_every_change(lambda: run(5), folder):
        if held_out_file(out).exists():
            assert len(written(out)) == 15, event
        if about_file(out).exists():
            assert json.loads(about_file(out).read_text())["rows"] == len(written(out)), event
        run(5)
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            [out.name, held_out_file(out).name, about_file(out).name]
        ), event
        moments.append(event)
        held_out_file(out).unlink()
        run(0)
    assert len(moments) > 10
    run(5)
    with pytest.raises(
        UserError, match=r"my\.held-out\.jsonl is there: without --held-out its questions would be in .*my"
    ):
        run(0)
    assert len(written(out)) == 15


def test_what_is_held_out_depends_on_the_questions_alone(tmp_path: Path) -> None:
    """Not on their order, nor on rows that come later; and copies of a held-out question leave the training rows."""
    table = write_csv(tmp_path / "t.csv", 40)
    header, *lines = table.read_text().splitlines()
    (tmp_path / "u.csv").write_text("\n".join([header, *reversed(lines), *lines[:40]]) + "\n")
    kept = []
    for name in ("t.csv", "u.csv"):
        rows = ChatRows(tmp_path / name, mapped_form(MAP))
        convert(rows, tmp_path / f"{name}.jsonl", held_out=8)
        kept.append({row["messages"][0]["content"] for row in written(held_out_file(tmp_path / f"{name}.jsonl"))})
        overlap = overlap_of_files(tmp_path / f"{name}.jsonl", held_out_file(tmp_path / f"{name}.jsonl"))
        assert (overlap.exact, overlap.near) == ([], [])
    assert kept[0] == kept[1]
    assert len(kept[0]) == 8
    (drop,) = rows.drops.facts()
    assert (drop["reason"], drop["rows"], len(drop["examples"])) == ("exact duplicate of a held-out question", 8, 3)
    assert len(written(tmp_path / "u.csv.jsonl")) == 80 - 8 - 8


def test_standard_input_and_gzip_through_the_script(tmp_path: Path) -> None:
    rows = b'{"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}\n'
    out = tmp_path / "my.jsonl"
    command = [sys.executable, str(ROOT / "data_prep" / "convert.py"), "-", "--out", str(out)]
    result = subprocess.run(command, input=gzip.compress(rows), capture_output=True)
    assert result.returncode == 0, result.stderr
    assert b"of the form sharegpt (it has 'conversations')" in result.stdout
    assert written(out) == [{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}]


def test_nothing_is_written_when_a_row_cannot_be_used(tmp_path: Path) -> None:
    out = tmp_path / "my.jsonl"
    out.write_text("old\n")
    rows = tmp_path / "x.jsonl"
    good = '{"instruction": "a", "output": "b"}\n'
    for bad, reason in [
        ('{"instruction": "a", "output": ""}', r"x\.jsonl:2: 'output' is empty"),
        ('{"instruction": "a", "output": "b<|im_end|>"}', r"x\.jsonl:2: .*control token"),
        ('{"instruction": "a", "output": "b", "system_note": "s"}', r"x\.jsonl:2: 'system_note' may change prompt"),
        ('{"question": "a", "answer": "b"}', r"x\.jsonl:2: .*(instruction|may change)"),
    ]:
        rows.write_text(good + bad + "\n")
        with pytest.raises(UserError, match=reason):
            convert(ChatRows(rows), out)
        assert out.read_text() == "old\n"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["my.jsonl", "x.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give an input and --out"),
        (["IN", "--out", "x.txt"], "must be a file name ending in .jsonl"),
        (["IN", "--out", "IN"], "is the input; write to another file"),
        (["IN", "--out", "o.jsonl", "--form", "shargpt"], "did you mean sharegpt"),
        (["IN", "--out", "o.jsonl", "--form", "alpaca", "--map", "user={a}"], "both say what a row means"),
        (["IN", "--out", "o.jsonl", "--held-out", "1"], "leaves fewer to train on"),
        (["IN", "--out", "o.jsonl", "--held-out", "-1"], "must be at least 0"),
        (["none.jsonl", "--out", "o.jsonl"], "no such file"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path: Path, arguments: list[str], reason: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    named = [str(tmp_path / "in.jsonl") if argument == "IN" else argument for argument in arguments]
    result = script(*named, cwd=tmp_path)
    assert (result.returncode, len(result.stderr.strip().splitlines())) == (2, 1), result.stderr
    assert reason in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_all_forms_are_listed_with_their_terms() -> None:
    lines = script("--list").stdout.splitlines()
    assert any(line.startswith("sharegpt ") for line in lines)
    assert any(
        line.startswith("reclor ") and line.endswith("[non-commercial research; evaluation only]") for line in lines
    )


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """15 MB pass through less than 8 MB, held-out questions included."""
    with (tmp_path / "x.csv").open("w") as out:
        out.write("prompt,completion\n")
        out.writelines(f"q{n} {'x' * 10_000},a{n}\n" for n in range(1_500))
    tracemalloc.start()
    try:
        about = convert(ChatRows(tmp_path / "x.csv"), tmp_path / "y.jsonl", held_out=20)
        assert (about["rows"], about["held_out"]) == (1480, 20)
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_rows_of_one_form_only(tmp_path: Path) -> None:
    """The first row decides; a named form is not guessed."""
    (tmp_path / "x.jsonl").write_text('{"problem": "p", "solution": "s"}\n')
    assert ChatRows(tmp_path / "x.jsonl", form_named("prompt-completion")).reason == "as you asked"
    with pytest.raises(UserError, match=r"x\.jsonl:1: 'level' is missing|'solution' ends in"):
        list(ChatRows(tmp_path / "x.jsonl", form_named("math")))
