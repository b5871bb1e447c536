"""Any byte that changes in a folder that we wrote is noticed by the next reader: 100 random places in each kind.

The places that cannot matter are README.md and model_card.md: for people, read by no tool (docs/security.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conversion.adapter import export
from conversion.adapters.adapter_folder import Adapter
from conversion.certificates.certificate_json import read_certificate
from conversion.certify import verify
from conversion.checkpoint.model_folder import HFFolder, open_model
from conversion.checkpoint.output_folder import unfinished_output
from conversion.checkpoint.safetensors_layout import FileLayout
from conversion.checkpoint.tensor_digests import scan
from conversion.fp8.golden_file import Golden
from conversion.fp8.selection import Selection
from conversion.hf_to_nemo import convert
from conversion.lint_export import lint
from conversion.merge_lora import merge
from conversion.quantize_fp8 import weight_scales, write
from data_prep.packing import PackedDataset, build_packs
from nano3.arch import Arch
from nano3.checkpoints.checkpoint_folder import FORMAT, newest, step_folder
from nano3.cli import UserError
from nano3.sealed_folder import PROSE, seal
from nano3.token_store import TokenStore
from tests.conversion.test_merge import write_adapter
from tests.helpers.damage import flip, random_places
from tests.helpers.tiny import TINY_CONFIG, tiny_hf_folder
from tests.helpers.tiny_store import tiny_store

PLACES = 100


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one output of every kind."""
    folder = tmp_path_factory.mktemp("flips")
    tiny_hf_folder(folder / "base")
    convert(folder / "base", folder / "nemo", context=False)
    write_adapter(folder / "adapter", config=TINY_CONFIG)
    merge(folder / "base", folder / "adapter", folder / "merged")
    export(folder / "adapter", folder / "peft", "peft-legacy")
    _quantize(folder / "merged", folder / "fp8")
    tiny_store(folder / "store", documents=40, longest=30, vocab_size=128)
    build_packs(TokenStore(folder / "store"), 64)
    checkpoint = write_adapter(step_folder(folder / "run", 4))
    (checkpoint / "training").mkdir()
    (checkpoint / "training/run.pt").write_bytes(bytes(500))
    state = {"format": FORMAT, "step": 4, "samples": 8, "layout": {"ranks": 1}, "identity": {}}
    (checkpoint / "training/state.json").write_text(json.dumps(state))
    seal(checkpoint)
    tokens, numbers = [np.arange(3)], [np.arange(3, dtype=np.float32)]
    facts = {"model_sha256": "0" * 64, "planted": [], "experts": {"reached": 0, "of": 0}}
    (folder / "golden").mkdir()
    Golden(["text"], tokens, numbers, numbers, {}, facts).write(folder / "golden/file.safetensors")
    return folder


def _quantize(source: Path, out: Path) -> None:
    """An FP8 folder whose activations nobody measured."""
    selection = Selection.published(Arch.load(source))
    inputs = dict.fromkeys(selection.chosen, 1.0)
    cache = {(number, part): 1.0 for number in selection.kv_layers for part in "kv"}
    found: Any = SimpleNamespace(inputs=inputs, cache=cache, tokens=0)
    with HFFolder(source) as hf:
        before, largest = scan(hf)
        layout = FileLayout.make(selection.table(hf.dtypes))
        with unfinished_output(out, "hf-model", {}, layout.total_bytes) as work:
            write(hf, before, weight_scales(largest, selection), selection, found, work)


def _open(folder: Path) -> None:
    with open_model(folder, quantized=True):
        pass


def _refuse(problems: list[Any]) -> None:
    if problems:
        raise UserError(str(problems[0]))


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "an adapter, merged or trained on": ("adapter", lambda folder: Adapter(folder, Arch.from_config(TINY_CONFIG))),
    "a PEFT adapter": ("peft", lambda folder: Adapter(folder, Arch.from_config(TINY_CONFIG))),
    "a checkpoint, gone on from": ("run/checkpoints/step-000004", lambda folder: newest(folder.parents[1])),
    "a NeMo base": ("nemo", _open),
    "a merged model": ("merged", _open),
    "an FP8 folder, read": ("fp8", _open),
    "an FP8 folder, by lint": ("fp8", lambda folder: _refuse(lint(folder))),
    "an FP8 folder, by verify": ("fp8", lambda folder: _refuse(verify(folder))),
    "a store, trained on": ("store", lambda folder: PackedDataset(folder, 64).check_contents()),
    "a pack index": ("store/packs-64", lambda folder: PackedDataset(folder.parent, 64).check_contents()),
    "a file of golden answers": ("golden", lambda folder: Golden.read(folder / "file.safetensors")),
}


@contextmanager
def noticed(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        return
    pytest.fail(f"{what} changed and nobody noticed")


@pytest.mark.parametrize("kind", READERS)
def test_any_byte_that_changes_is_noticed(made: Path, kind: str):
    name, read = READERS[kind]
    folder = made / name
    read(folder)
    for path, place in random_places(folder, PLACES, seed=len(kind), but=PROSE):
        flip(path, place)
        with noticed(f"byte {place} of {path}"):
            read(folder)
        flip(path, place)
    read(folder)


def test_any_byte_of_a_certificate(made: Path):
    """By the certificate alone, whatever the seal of the folder says."""
    path = made / "fp8/certificate.json"
    for place in np.random.default_rng(1).integers(0, path.stat().st_size, PLACES).tolist():
        flip(path, place)
        with noticed(f"byte {place}"):
            read_certificate(path.parent)
        flip(path, place)
    read_certificate(path.parent)
