"""Folders as somebody would send them who wants our commands to run code: every kind of pickle, YAML and template.

What they hold is right but for the code: each is sealed as its writer would seal it, so that a reader gets as far as
the code. The code would run the shell's `true` with `WORD` behind it, then give what the good file gave.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from conversion.adapter import export
from conversion.hf_to_nemo import convert
from conversion.merge_lora import merge
from data_prep.packing import build_packs
from finetune.settings import CheckpointSettings, LogSettings, LoraSettings, Run, Settings, TrainSettings
from nano3.arch import PRESETS
from nano3.checkpoints.checkpoint_folder import step_folder
from nano3.sealed_folder import mark, seal
from nano3.token_store import TokenStore, tokenizer_sha256
from tests.conversion.test_conversion_killed import quantize
from tests.conversion.test_merge import write_adapter
from tests.helpers.tiny import TINY_CONFIG, tiny_hf_folder
from tests.helpers.tiny_run import write_run
from tests.helpers.tiny_store import tiny_store

WORD = "nano3_foreign_code"
"""Stands in everything that the hostile files would do."""
CODE = f"__import__('os').system('true {WORD}')"
YAML = f'!!python/object/apply:eval ["{CODE}"]\n'
TEMPLATE = "{% set word = 'nano3_foreign' %}{{ cycler.__init__.__globals__.os.system('true ' ~ word ~ '_code') }}"
"""The word in two parts: Jinja compiles a template, and runs it in its sandbox."""
FLOAT32 = TINY_CONFIG | {"torch_dtype": "float32"}


class Hostile:
    """Runs a command, then gives what the good pickle gave: its reader goes on as if nothing had been."""

    def __init__(self, good: bytes) -> None:
        self.good = good

    def __reduce__(self) -> Any:
        return eval, (f"({CODE}, __import__('pickle').loads({self.good!r}))[1]",)


def archive() -> bytes:
    """What `torch.save` writes, with the code in it; no smaller than any tensor of the tiny model."""
    buffer = io.BytesIO()
    torch.save({"x": Hostile(pickle.dumps({})), "room": torch.zeros(1 << 15)}, buffer)
    return buffer.getvalue()


def plant(path: Path) -> None:
    """Puts the code into a pickle, or in place of an archive of `torch.save`."""
    pickled = path.suffix not in (".pt", ".bin")
    path.write_bytes(pickle.dumps(Hostile(path.read_bytes())) if pickled else archive())


def plant_in_chunk(weights: Path) -> None:
    """Puts an archive with the code where a tensor of a torch_dist folder lies, and says so in its `.metadata`."""
    metadata = pickle.loads((weights / ".metadata").read_bytes())
    data = archive()
    for place in metadata.storage_data.values():
        with (weights / place.relative_path).open("ab") as file:
            place.offset, place.length = file.tell(), len(data)
            file.write(data)
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


def copy(folder: Path, name: str, *planted: str) -> Path:
    """`folder` beside itself under a name, with the code in some of its files, sealed anew."""
    made = folder.parent / name
    shutil.copytree(folder, made)
    for file in planted:
        plant(made / file)
    seal(made)
    return made


def make(root: Path) -> None:
    """All folders, by the names that tests/helpers/audit_probe.py gives to the commands."""
    hf = tiny_hf_folder(root / "hf", torch_dtype="float32", dtypes={"": "F32"})
    _models_own_code(hf)
    convert(hf, root / "good-nemo", context=False)
    adapter = write_adapter(root / "good-adapter", config=FLOAT32)
    merge(hf, adapter, root / "merged")
    quantize(root / "merged", root / "fp8")
    export(adapter, root / "peft", "peft-legacy")
    store = tiny_store(root / "store", 30, 30, 128, tokenizer=tokenizer_sha256(hf))
    build_packs(TokenStore(store), 64)
    for weights in (root / "good-nemo/weights", adapter / "weights"):
        torch.save({}, weights / "common.pt")
    copy(root / "good-nemo", "nemo", "weights/.metadata", "weights/common.pt")
    copy(root / "good-nemo", "nemo-common", "weights/common.pt")
    copy(adapter, "adapter", "weights/.metadata", "weights/common.pt")
    plant_in_chunk(copy(adapter, "adapter-chunk") / "weights")
    seal(root / "adapter-chunk")
    (root / "peft/adapter_model.safetensors").rename(root / "peft/adapter_model.bin")
    plant(root / "peft/adapter_model.bin")
    seal(root / "peft")
    shutil.copytree(hf, root / "hf-plain")
    (root / "hf-plain/chat_template.jinja").write_text("{{ messages[0].content }}")
    (root / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(PRESETS["pico"] / name, root / "tokenizer")
    (root / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
    _texts(root)
    _runs(root)


def _models_own_code(folder: Path) -> None:
    """What a library would load beside the weights, or run for the model's sake; conversions copy what they copy."""
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(archive())
    (folder / "modeling_own.py").write_text(f"{CODE}\nclass Model: ...\n")
    for name, classes in (
        ("config.json", ("AutoConfig", "AutoModelForCausalLM")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = dict.fromkeys(classes, "modeling_own.Model")
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def _texts(root: Path) -> None:
    for name in ("cluster", "selection", "mixture", "config", "tasks"):
        (root / f"{name}.yaml").write_text(YAML)
    row = {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}], "answer": "2"}
    (root / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (root / "rows.parquet").write_bytes(archive())
    (root / "golden.safetensors").write_bytes(archive())
    (root / "result.json").write_bytes(archive())
    pipeline = root / "pipeline"
    pipeline.mkdir()
    mark(pipeline, "pipeline")
    (pipeline / "pipeline.json").write_bytes(archive())


def _runs(root: Path) -> None:
    """A run that has begun, and one that has ended, on a base with the code in it."""
    for name in ("begun", "ended"):
        shutil.copy(write_training(root, name, "nemo"), root / name / "run.json")
        mark(root / name, "lora-run")
    (root / "ended/metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "tokens": 5}\n')
    shutil.copytree(root / "adapter", root / "ended/adapter")


def write_training(root: Path, name: str, base: str, init_from: str = "", planted: str = "") -> Path:
    """Writes `root/NAME.json`, a run of two steps; with `planted` its folder `root/NAME` has the checkpoint after the
    first step of `root/run`, with the code in that file."""
    settings = Settings(
        lora=LoraSettings(rank=4, alpha=8.0, init_from=str(root / init_from) if init_from else ""),
        train=TrainSettings(steps=2, warmup=0, global_batch=2, seq_length=64),
        checkpoint=CheckpointSettings(every=1, minutes=0),
        log=LogSettings(tensorboard=False, wandb="off"),
    )
    shutil.rmtree(root / name, ignore_errors=True)
    path = write_run(root, name, 1, settings)
    path.write_text(replace(Run.from_json(path.read_text()), base=str(root / base)).to_json())
    if planted:
        first = step_folder(root / name, 1)
        shutil.copytree(step_folder(root / "run", 1), first)
        plant(first / planted)
        seal(first)
    return path
