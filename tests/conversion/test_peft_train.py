"""A run of the recipe that starts from an adapter which Hugging Face PEFT made, on two ranks; and what comes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.adapter import export, import_peft
from conversion.checkpoint.torch_dist import TorchDistReader
from conversion.hf_to_nemo import convert
from conversion.merge_lora import merge
from data_prep.packing import build_packs
from evaluation.hf_model import load_reference
from finetune.initial import adopt
from finetune.settings import CheckpointSettings, LogSettings, LoraSettings, Settings, TrainSettings
from launch.plan.layout import Layout
from nano3.token_store import TokenStore
from tests.conversion.test_peft_export import logits
from tests.conversion.test_peft_import import EXPERTS, LINEAR, foreign
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_run import metrics, run, write_run
from tests.helpers.tiny_store import tiny_store

peft = pytest.importorskip("peft")

SEQ_LENGTH = 64


def launch(folder: Path, name: str, ranks: int, lora: LoraSettings, steps: int) -> Path:
    """A short run on `folder/nemo` and `folder/store`; its output."""
    settings = Settings(
        layout=Layout(ep=ranks),
        lora=lora,
        train=TrainSettings(steps=steps, warmup=0, global_batch=2, seq_length=SEQ_LENGTH, lr=1e-3),
        checkpoint=CheckpointSettings(every=2),
        log=LogSettings(tensorboard=False, wandb="off"),
    )
    return run(write_run(folder, name, ranks, settings))


@pytest.mark.full
def test_an_adapter_of_peft_trains_on(tmp_path: Path):
    """It starts with the loss of the merged model, learns, goes on where it was, merges and exports like any other."""
    base = tiny_hf_folder(tmp_path / "hf", torch_dtype="float32", vocab_size=133)
    foreign(base, tmp_path / "peft", target_modules=LINEAR, target_parameters=EXPERTS)
    import_peft(tmp_path / "peft", base, tmp_path / "adapter")
    lora = LoraSettings(init_from=str(tmp_path / "adapter"))
    adopt(lora)
    for folder, source in ((tmp_path, base), (tmp_path / "of-merged", tmp_path / "of-merged" / "hf")):
        if source != base:
            merge(base, tmp_path / "peft", source)
        convert(source, folder / "nemo", context=False)
        tiny_store(folder / "store", documents=20, longest=30, vocab_size=133)
        build_packs(TokenStore(folder / "store"), SEQ_LENGTH)
    out = launch(tmp_path, "run", 2, lora, steps=4)
    fresh = launch(tmp_path / "of-merged", "run", 1, LoraSettings(rank=4), steps=1)
    first = metrics(out)[0]["loss"]
    assert first == pytest.approx(metrics(fresh)[0]["loss"], rel=1e-5)

    ours, began = (TorchDistReader(folder / "weights") for folder in (out / "adapter", tmp_path / "adapter"))
    assert ours.shapes == began.shapes
    for key in began.shapes:
        change = (ours.whole(key) - began.whole(key)).abs().max()
        assert 0 < change < 0.02, key  # four steps of Adam, from where it began
    lora_json = [json.loads((folder / "lora.json").read_text()) for folder in (out / "adapter", tmp_path / "adapter")]
    assert lora_json[0]["targets"] == lora_json[1]["targets"]

    shutil.move(
        out / "adapter", tmp_path / "finished"
    )  # as if it had been killed after step 2, whose checkpoint is there
    run(tmp_path / "run.json")
    again, finished = (TorchDistReader(folder / "weights") for folder in (out / "adapter", tmp_path / "finished"))
    assert all(torch.equal(again.whole(key), finished.whole(key)) for key in finished.shapes)

    merge(base, out / "adapter", tmp_path / "merged")
    export(out / "adapter", tmp_path / "exported", "peft")
    expected = logits(load_reference(tmp_path / "merged", torch.float32))
    model = peft.PeftModel.from_pretrained(load_reference(base, torch.float32), tmp_path / "exported")
    assert (logits(model) - expected).abs().max() < 1e-5
    assert load_file(tmp_path / "merged/model.safetensors").keys() == load_file(base / "model.safetensors").keys()
