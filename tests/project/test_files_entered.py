"""How many files a reader enters who follows a value or a command; docs/architecture.md says what is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conversion import merge_lora
from conversion.hf_to_nemo import convert
from data_prep.packing import build_packs
from evaluation import evaluate
from nano3.token_store import TokenStore, tokenizer_sha256
from tests.conversion.test_merge import write_adapter
from tests.conversion.test_merge_nemo import randomize
from tests.helpers.files_entered import WAYS, FilesEntered
from tests.helpers.rank_server import server
from tests.helpers.tiny import TINY_CONFIG, tiny_hf_folder
from tests.helpers.tiny_store import tiny_store

MOST = {"--data": 10, "layout.ep": 8, "a merge": 25, "a prompt": 9}


def check(name: str, files: dict[str, str]) -> None:
    print(name, len(files), *files)  # the figures of docs/architecture.md: pytest -s
    assert len(files) <= MOST[name], f"{name} enters {len(files)} files: {json.dumps(files, indent=1)}"


def test_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = tiny_hf_folder(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", randomize, config=TINY_CONFIG)
    monkeypatch.setattr("sys.argv", ["merge_lora.py", str(base), str(adapter), str(tmp_path / "merged")])
    with FilesEntered().watching() as entered:
        merge_lora.main()
    assert {"conversion/merge_lora.py", "conversion/checkpoint/safetensors_writer.py"} <= entered.files.keys()
    check("a merge", entered.files)


@pytest.mark.full
def test_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tests.evaluation.test_evaluation import folder as made

    folder = made.__wrapped__(type("Factory", (), {"mktemp": lambda _self, name: tmp_path / name})())
    rows = [[("user", f"{number} + 2 ="), ("assistant", str(number + 2))] for number in range(12)]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    asked = [str(folder), "--questions", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "result.json")]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *asked])
    with FilesEntered(WAYS["a prompt"]).watching() as entered:
        evaluate.main()
    assert {"evaluation/judging/questions.py", "evaluation/generation.py"} <= entered.files.keys()
    check("a prompt", entered.files)


@pytest.mark.full
@pytest.mark.parametrize("name", ["--data", "layout.ep"])
def test_a_value_of_the_command_line(tmp_path: Path, name: str):
    source = tiny_hf_folder(tmp_path / "hf", dtypes={"": "F32"}, hybrid_override_pattern="MEM*E")
    convert(source, tmp_path / "nemo", context=False)
    tiny_store(tmp_path / "store", documents=20, longest=30, vocab_size=128, tokenizer=tokenizer_sha256(source))
    build_packs(TokenStore(tmp_path / "store"), 64)
    codes = server().ranks("tests.helpers.files_entered", [str(tmp_path), name], 1, tmp_path / "logs")
    assert codes == [0], (tmp_path / "logs" / "rank0.log").read_text()[-3000:]
    files = json.loads((tmp_path / f"{name}.json").read_text())
    assert {file for file, *_ in WAYS[name]} | {"finetune/worker.py", "finetune/command.py"} <= files.keys()
    check(name, files)
