"""The page of any run, its error analysis and its lineage: from files alone, and nothing judged again."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from conversion.certificates.certificate import folder_sha256
from evaluation.compare import main as compare_main
from evaluation.comparison import compare
from evaluation.error_analysis import by_length, by_subject, changed, outcomes
from evaluation.lineage import lineage, parts_of
from evaluation.lineage import main as lineage_main
from evaluation.report import report
from evaluation.result_file import read_result, results_in, write_result
from nano3.cli import UserError
from tests.helpers.tiny_store import tiny_store

OUTCOMES = ("right", "wrong", "ambiguous", "unfinished")


def row(number: int, outcome: str) -> dict:
    return {
        "id": str(number),
        "source": "medmcqa",
        "subject": "Skin" if number % 4 == 0 else "Dental",
        "question": "Which <b>one</b>?" + " and" * number,
        "expected": "A",
        "answer": "A" if outcome == "right" else "<script>B</script>",
        "correct": outcome == "right",
        "outcome": outcome,
        "finished": outcome != "unfinished",
    }


def result(right: int, name: str) -> dict:
    """40 questions, the first `right` of them right, the rest failing in turn."""
    rows = [row(n, "right" if n < right else OUTCOMES[1 + n % 3]) for n in range(40)]
    return {"kind": "evaluation-result", "model": name, "n": 40, "correct": right, "answers": rows}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with a store, metrics, an adapter's lora.json, and two results; its base is gone."""
    out, store = tmp_path / "run", tiny_store(tmp_path / "store", 3, 5, 50)
    (out / "adapter").mkdir(parents=True)
    (out / "run.json").write_text(json.dumps({"model": "pico", "base": str(tmp_path / "gone"), "data": str(store)}))
    (out / "adapter" / "lora.json").write_text(json.dumps({"rank": 4, "steps": 30, "base_sha256": "b" * 64}))
    norms = {"adapter_norm/decoder.layers.0.mixer.in_proj": 0.5, "expert_load/1": [3, 0, 1]}
    metrics = [
        {"step": n, "loss": 1 / n, "lr": 1e-3, "loss/a": 1.0, "loss/b": 2.0, "grad_norm": math.nan, "tokens": 10}
        for n in range(1, 31)
    ]
    metrics[-1] |= norms
    (out / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in metrics))
    (out / "scores-base.json").write_text(json.dumps(result(10, "base")))
    (out / "scores.json").write_text(json.dumps(result(30, "tuned")))
    return out


def test_the_page_of_a_run(folder):
    html = report(folder).read_text()
    tree = ElementTree.fromstring(html[html.index("<main>") : html.index("</body>")])
    titles = [title.text for title in tree.iter("h2")]
    for title in ("Scores", "What changed: scores", "How answers fail: scores", "Training", "Lineage", "Next"):
        assert title in titles
    for text in ("25.0%", "75.0%", "+50.0 points on 40 questions", "20 wrong before and right after, 0 the other way"):
        assert text in html
    for text in ("Loss by source", "Skin *", "it is not there any more", "in_proj", "expert 2: 1", "p = 1.9e-06"):
        assert text in html
    assert "<script" not in html
    assert "<b>one" not in html
    assert "nan" not in html.lower().replace("nano3", "")
    assert "prefers-color-scheme: dark" in html


def test_the_page_of_a_run_that_was_killed_while_it_wrote_a_step(folder):
    whole = report(folder).read_text()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    assert report(folder).read_text() == whole


def test_verdicts_are_read_and_not_judged_again(folder):
    """A verdict that no judge would give stands as it is."""
    changed_result = result(30, "tuned")
    changed_result["answers"][0] |= {"correct": False, "outcome": "wrong", "answer": "A"}
    (folder / "scores.json").write_text(json.dumps(changed_result))
    html = report(folder).read_text()
    assert "20 wrong before and right after, 1 the other way" in html


def test_a_folder_with_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        report(tmp_path)


def test_errors_by_subject_and_length():
    rows = result(10, "base")["answers"]
    assert outcomes(rows) == {"right": 10, "wrong": 10, "format": 0, "ambiguous": 10, "unparsed": 0, "unfinished": 10}
    assert {name: sum(counts.values()) for name, counts in by_subject(rows).items()} == {"Dental": 30, "Skin": 10}
    assert {name: sum(counts.values()) for name, counts in by_length(rows).items()} == {"0 to 50": 9, "50 to 200": 31}
    fixed, broken = changed(result(10, "base"), result(30, "tuned"))
    assert ([old["id"] for old, _ in fixed], broken) == ([str(n) for n in range(10, 30)], [])
    old = [{"correct": True}, {"correct": False, "finished": False}, {"correct": False, "finished": True}]
    assert [name for name, count in outcomes(old).items() if count] == ["right", "wrong", "unfinished"]


def test_a_changed_store_breaks_the_lineage(folder, monkeypatch, capsys):
    links = {link.name: link for link in lineage(parts_of(folder))}
    assert links["store"].problem == ""
    assert links["store"].says.startswith("3 documents, ")
    assert links["adapter"].problem == ""
    store = Path(json.loads((folder / "run.json").read_text())["data"])
    tokens = bytearray((store / "tokens.bin").read_bytes())
    tokens[0] ^= 1
    (store / "tokens.bin").write_bytes(tokens)
    monkeypatch.setattr(sys, "argv", ["lineage.py", str(folder)])
    assert lineage_main() == 1
    assert "tokens.bin" in capsys.readouterr().out


def test_a_result_of_another_adapter_breaks_the_lineage(folder):
    """Its model is not in the chain; and then it is, with an adapter that is not, and with the one that is."""
    adapter = folder_sha256(folder / "adapter")

    def found(**hashes: str) -> str:
        (folder / "scores.json").write_text(json.dumps(result(30, "tuned") | hashes))
        return str(next(link for link in lineage(parts_of(folder)) if link.path.name == "scores.json"))

    assert "whose hash was not recorded: ok" in found()
    assert "FAILED, of a model that is not in this chain" in found(model_sha256="a" * 64)
    assert "source" in (with_other := found(model_sha256="b" * 64, adapter_sha256="c" * 64))
    assert f"FAILED, with the adapter {'c' * 16}, which is not in this chain" in with_other
    assert "of source with the adapter: ok" in found(model_sha256="b" * 64, adapter_sha256=adapter)


def test_a_result_with_long_answers_is_read(folder):
    long = result(30, "tuned")
    long["answers"][0]["answer"] = "x" * (17 << 20)
    write_result(long, folder / "scores.json")
    assert read_result(folder / "scores.json") == long
    assert set(results_in(folder)) == {folder / "scores.json", folder / "scores-base.json"}


def test_the_comparison_of_two_files(folder, monkeypatch, capsys):
    command = ["compare.py", str(folder / "scores-base.json"), str(folder / "scores.json")]
    monkeypatch.setattr(sys, "argv", command)
    assert compare_main() == 0
    said = capsys.readouterr().out
    assert "gain   +50.00 points" in said
    assert "Skin *" in said
    assert compare(result(10, "base"), result(30, "tuned"))["fixed"] == 20
    (folder / "scores.json").write_text('{"kind": "evaluation-result", "n": 1, "answers": [{"id": 3}]}')
    with pytest.raises(UserError, match=r"answers\[0\].id is 3"):
        compare_main()
