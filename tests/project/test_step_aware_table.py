"""benchmarks/step_aware_table.py: its task, its arithmetic by hand, and one seed of the whole table, small."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from data_prep.steps.grammar import parse
from data_prep.steps.graph import recomputed, show
from evaluation.generation import encode_prompts, load_tokenizer
from evaluation.step_measures import Judged
from nano3.arch import resolve_model
from pico.pretrain import IGNORED
from pico.tokenizer import build_tokenizer

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("step_aware_table")


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("step_aware_task")


def test_problems_compute_and_injected_errors_are_flagged(task):
    rows = list(task.rows(300, 1, 0.5))
    assert 110 < sum("executed" in row["trace"] for row in rows) < 190
    for row in rows:
        written = parse(row["messages"][1]["reasoning_content"])
        assert recomputed(written.trace) == written.verified
        assert (written.flagged is not None) == ("executed" in row["trace"])
        assert row["answer"] == show(written.verified["s3"])
    branches = sum("add s1 s1" in one or "add s2 s2" in one for one in (r["messages"][0]["content"] for r in rows))
    assert 60 < branches < 140


def test_the_base_learns_no_verdict_of_verify_and_reads_prompts_as_it_is_asked(task):
    tokenizer = build_tokenizer()
    texts = []
    for tokens, labels in itertools.islice(task.examples(tokenizer, 0, "traces"), 200):
        texts.append(tokenizer.decode(tokens, skip_special_tokens=False))
        if "[VERIFY]" in texts[-1]:
            assert " wrong" not in texts[-1]
            learnt = tokenizer.decode([label for label in labels if label != IGNORED], skip_special_tokens=False)
            assert " ok" not in learnt
            assert "[VERIFY]" in learnt
    assert 20 < sum("[VERIFY]" in text for text in texts) < 90
    traced = next(text for text in texts if "[VERIFY]" in text)
    asked = traced.split("user\n")[1].split("<|im_end|>")[0]
    (prompt,) = encode_prompts(load_tokenizer(str(resolve_model("pico"))), [[{"role": "user", "content": asked}]], True)
    assert traced.startswith(tokenizer.decode(prompt, skip_special_tokens=False))


def test_the_base_of_values_never_meets_a_verify(task):
    """Its documents are traces up to EXECUTE, values of a plan, and verdicts below a question that has the values."""
    tokenizer = build_tokenizer()
    kinds = {"[EXECUTE]": 0, " ok": 0}
    for tokens, labels in itertools.islice(task.examples(tokenizer, 0, "values"), 200):
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        learnt = tokenizer.decode([label for label in labels if label != IGNORED], skip_special_tokens=False)
        assert "[VERIFY]" not in text
        assert ("ok" in learnt or "wrong" in learnt) == (" ok" in text or " wrong" in text)
        assert not ("[EXECUTE]" in text and (" ok" in text or " wrong" in text))
        for word in kinds:
            kinds[word] += word in text
    assert 20 < kinds["[EXECUTE]"] < 60
    assert 40 < kinds[" ok"] < 90


def test_a_contrast_by_hand(table):
    """Two seeds, one pair of cells each: 0.1 and 0.3 more; Student's t of one degree is 12.706."""

    def cell(adapters: str, seed: int) -> object:
        return table.Cell("uniform", adapters, True, seed)

    shares = {cell("single", 1): 0.5, cell("dual", 1): 0.6, cell("single", 2): 0.2, cell("dual", 2): 0.5}
    measured = {one: {"given_j": {"n": 9, "share": share}} for one, share in shares.items()}
    found = table.contrast(measured, ("given_j",), table.FACTORS["two adapters"])
    assert found["n"] == 2
    assert found["share"] == pytest.approx(0.2)
    assert found["ci95"] == pytest.approx([0.2 - 1.2706, 0.2 + 1.2706], abs=1e-3)
    assert table.contrast(measured, ("given_j",), table.FACTORS["injected errors"]) == {"n": 0}
    assert table.shown({"n": 0}) == "none (n 0)"
    assert table.shown({"n": 4, "share": 0.5, "ci95": [0.15, 0.85]}) == "50.0 (15.0 to 85.0), n 4"


def test_every_seed_has_the_twelve_cells(table):
    cells = list(table.cells(3))
    assert len({cell.name for cell in cells}) == 12
    assert len({table.label(cell) for cell in cells}) == 12
    assert {cell.weights for cell in table.cells(3, ["fixed"])} == {"fixed"}
    assert len(list(table.cells(3, ["fixed"]))) == 4


def test_a_killed_run_has_tables_of_what_is_done(table, tmp_path, capsys):
    """Two seeds of one cell: 1 of 2 and 2 of 2 answers are right, and nothing else was asked."""
    for seed, right in ((1, [True, False]), (2, [True, True])):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        own = [asdict(Judged("", final, 1.0, 3, 3, final)) for final in right]
        answers = {"own": own, "injected": [], "right_execute": [], "interventions": {"changes": [], "keeps": []}}
        cell = table.Cell("fixed", "dual", True, seed)
        kept = {"cell": vars(cell), "cpu_seconds": {"training": 2.0, "answers": 1.0}, "answers": answers}
        (folder / f"{cell.name}.json").write_text(json.dumps(kept))
    table.report({"cpu_seconds": 4.0}, tmp_path)
    result, said = json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out
    assert result["cpu_seconds"] == 10
    assert result["pooled"]["fixed, dual, with errors"]["own"]["accuracy_final"]["count"] == 3
    assert [(row["cell"], row["seed"]) for row in result["rows"]] == [
        ("fixed, dual, with errors", seed) for seed in (1, 2)
    ]
    assert "| 75.0 (30.1 to 95.4), n 4 |" in said
    assert "J none (n 0)" in said


@pytest.mark.full
def test_one_seed_of_the_whole_table(tmp_path):
    """Too short for any measure to mean something; that each cell trains, merges, is asked and is counted."""
    command = [sys.executable, str(FOLDER / "step_aware_table.py"), "--seeds", "1", "--steps", "2", "--questions", "4"]
    command += ["--base-tokens", "20000", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out/results.json").read_text())
    assert len(result["rows"]) == len(result["pooled"]) == 12
    for row in result["rows"]:
        assert row["own"]["n"] == 4
        assert row["injected"]["n"] <= row["right_execute"]["n"] == 4
    assert set(result["contrasts"]) == {"injected errors", "two adapters", "fixed weights", "dynamic weights"}
    assert done.stdout.count("| uniform, single, with errors |") == 2
    assert not list((tmp_path / "out").glob("seed-1/*/adapter"))
