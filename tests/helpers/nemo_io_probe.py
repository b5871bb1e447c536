"""Run by tests/conversion/test_conversion.py: NeMo's own import, restore and export of a tiny model.

python -m tests.helpers.nemo_io_probe HF NEMO BACK
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from conversion import nemo_io  # first: it switches the CPU backend on before NeMo is imported

# isort: split

import nemo.lightning as nl
from nemo.collections import llm

from nano3.arch import Arch
from nano3.model import nano3_model


def main(hf: str, nemo: str, back: str) -> None:
    vocabulary = Arch.load(hf).vocab_size
    model = nano3_model(hf, 64, bf16=True)
    on_gpu = SimpleNamespace(enabled=lambda: False)
    with mock.patch("nano3.model.cpu", on_gpu):  # what is proved on CPU ranks is the unfused loss, so GPUs take it too
        assert not nano3_model(hf, 64, bf16=True).config.cross_entropy_loss_fusion
    llm.import_ckpt(model, source=f"hf://{hf}", output_path=Path(nemo))
    assert model.tokenizer.vocab_size == vocabulary

    fresh = nano3_model(hf, 64, bf16=True)
    trainer = nl.Trainer(accelerator="cpu", devices=1, logger=False, strategy=nl.MegatronStrategy())
    nl.AutoResume(restore_config=nl.RestoreConfig(path=nemo)).setup(trainer, fresh)
    assert trainer.strategy.restore_config.path == nemo
    assert fresh.tokenizer.text_to_ids("ab") == model.tokenizer.text_to_ids("ab")

    context = nl.io.load_context(Path(nemo), subpath="model")
    assert context.config.vocab_size == vocabulary
    assert context.tokenizer.vocab_size == vocabulary

    llm.export_ckpt(path=Path(nemo), target="hf", output_path=Path(back))
    assert issubclass(nemo_io.HFExporter, nl.io.ModelConnector)


if __name__ == "__main__":
    main(*sys.argv[1:])
