"""An adapter that waits for a mark as PEFT's Activated LoRA: it answers as ours does, or it is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.adapter import export, import_peft
from conversion.adapters.unmerged import with_adapter
from data_prep.steps.rows import step_rows
from evaluation.generation import encode_prompts, load_tokenizer, write_answers
from evaluation.hf_model import load_reference
from nano3.arch import resolve_model
from nano3.cli import UserError
from nano3.gate import mark_ids
from nano3.targets import PRESETS
from tests.conversion.test_merge import FORMAT_2, write_adapter
from tests.conversion.test_peft_export import random_values

peft = pytest.importorskip("peft")

PICO = resolve_model("pico")
QUESTIONS, LONGEST = 100, 12


def adapter(folder: Path, mark: str) -> Path:
    config = json.loads((PICO / "config.json").read_text())
    kind: dict[str, Any] = {"experts": "none", **FORMAT_2, "mark": mark_ids(PICO, mark)}
    return write_adapter(folder, random_values, PRESETS["peft"], config=config, **kind)


def prompts() -> list[list[int]]:
    """Questions, and the reasoning that a model has written up to the mark, that included."""
    tokenizer, rows = load_tokenizer(str(PICO)), list(step_rows(QUESTIONS, 1))
    begun = [row["messages"][1]["reasoning_content"].partition("[VERIFY]")[0] + "[V" for row in rows]
    heads = encode_prompts(tokenizer, [row["messages"][:1] for row in rows], thinking=True)
    tails = tokenizer(begun, add_special_tokens=False)["input_ids"]
    return [head + tail for head, tail in zip(heads, tails, strict=True)]


@pytest.mark.full
def test_peft_answers_a_hundred_questions_as_ours_does(tmp_path: Path):
    source, asked = adapter(tmp_path / "adapter", "V"), prompts()
    export(source, tmp_path / "peft", "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["alora_invocation_tokens"] == mark_ids(
        PICO, "V"
    )
    ours, plain = (load_reference(PICO, torch.float32) for _ in range(2))
    with_adapter(source, PICO)(ours)
    expected = write_answers(ours, asked, LONGEST, progress=False)
    assert expected != write_answers(plain, asked, LONGEST, progress=False), "the adapter has a say"
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    found = write_answers(_Positional(theirs), asked, LONGEST, progress=False)
    assert len(found) == QUESTIONS
    assert found == expected


class _Positional:
    """PEFT's `generate` looks for the mark in `input_ids`, which it wants by name."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, model.device

    def generate(self, tokens: torch.Tensor, **settings: Any) -> Any:
        return self.model.generate(input_ids=tokens, **settings)


def test_a_mark_of_several_tokens_and_other_readers_are_refused(tmp_path: Path):
    """PEFT begins with a mark's first token, ours with its last: only for one token they agree."""
    several, one = adapter(tmp_path / "several", "[VERIFY]"), adapter(tmp_path / "one", "V")
    for source, reader in ((several, "peft"), (one, "vllm"), (one, "peft-legacy")):
        with pytest.raises(UserError, match=f"{reader} cannot represent an adapter that acts from its mark on"):
            export(source, tmp_path / "out", reader)
        assert not (tmp_path / "out").exists()
    export(one, tmp_path / "peft", "peft")
    with pytest.raises(UserError, match=r"alora_invocation_tokens=.* an adapter of a kind that we do not read"):
        import_peft(tmp_path / "peft", PICO, tmp_path / "back")
