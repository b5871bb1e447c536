"""Every reader, fed with changed copies of what it should read; only a `UserError` may come out.

    python -m tests.helpers.fuzz --inputs 20000 [READER ...]

tests/project/test_fuzz.py does the same with few inputs. Inputs are drawn by hypothesis from fixed seeds: the same
numbers give the same inputs. Each input may take 10 s of CPU time, and all of them 1 GB of memory; what takes a minute
by the clock is stopped. An input that fails is kept in tests/fuzz_failures/READER/, and those kept there are tried
first, each time.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from conversion.adapters.lora_json import parse_lora_json
from conversion.adapters.peft_config import read_peft_config
from conversion.certificates.certificate_json import certificate_text, parse_certificate, sealed
from conversion.certificates.consistency import contradictions
from conversion.certificates.model_card import model_card
from conversion.check_server import Completion, Models, Tokens
from conversion.checkpoint.safetensors_layout import FileLayout
from conversion.checkpoint.torch_dist import TorchDistReader
from conversion.checkpoint.torch_dist_writer import BACKENDS
from conversion.fp8.golden_file import Golden
from conversion.fp8.selection import Selection
from conversion.lint_export import QuantFile
from launch.chain.records import Records
from launch.slurm.cluster import Cluster
from nano3.arch import PRESETS, Arch
from nano3.checkpoint_metadata import read_metadata
from nano3.checkpoints.base_identity import read_base
from nano3.checkpoints.checkpoint_folder import read_state
from nano3.cli import UserError
from nano3.documents import parse_json, read_json
from nano3.fp8_emulation import ActivationScales
from nano3.pack_index import PackFacts
from nano3.pickles import load_state, saved_tensor
from nano3.safetensors_header import parse_index
from nano3.sealed_folder import check_seal, owner_of, seal
from nano3.token_store import TokenStore
from nano3.training.journal import read_rows
from tests.helpers.fuzz_readers import SHA, Reader, as_bytes, in_new_folder, run_readers

KEPT = Path(__file__).parents[1] / "fuzz_failures"
SECONDS = 10
"""Of CPU time: the clock also counts what other processes take."""
PATIENCE = 60
"""Seconds by the clock after which an input is stopped."""
GIB = 1 << 30


def _fact(shape: list[int]) -> dict[str, Any]:
    return {"dtype": "BF16", "shape": shape, "sha256": SHA}


def _certificate() -> bytes:
    line = {"what": "changed", "input": _fact([2, 3]), "output": {**_fact([2, 3]), "sha256": "f" * 64}}
    line |= {"by": ["decoder.layers.0.mixer.in_proj"], "relative_change": 0.5}
    content = {
        "format": 3,
        "kind": "merge",
        "base": {"sha256": SHA, "name": "a/b", "revision": "unknown"},
        "input": {"sha256": SHA, "tensors": 1},
        "output": {"sha256": SHA, "tensors": 1},
        "adapter": {"sha256": SHA, "rank": 4, "alpha": 8.0, "targets": ["in_proj"], "modules": line["by"]},
        "training": {"steps": 6, "data": {"name": "store", "tokens": 5}, "settings": {"train": {"lr": 0.1}}},
        "totals": {"changed": 1},
        "tools": {"torch": "2"},
        "files": {"config.json": SHA},
        "tensors": {"backbone.layers.0.mixer.in_proj.weight": line},
        "proof": {"claimed": ["training"]},
        "previous": None,
    }
    return certificate_text(sealed(content)).encode()


def _read_certificate(folder: Path) -> None:
    content = parse_certificate(folder)
    model_card(content)
    contradictions(content, Arch.load(PRESETS["pico"]))


def _safetensors() -> bytes:
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    header["b"] = {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(14)


def _checkpoint(folder: Path) -> bytes:
    """A torch_dist checkpoint of one tensor; its `.metadata`."""
    import torch.distributed.checkpoint as dcp

    dcp.save({"module.a": torch.arange(6.0).view(2, 3)}, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps(BACKENDS))
    return (folder / ".metadata").read_bytes()


def _chunk(folder: Path) -> bytes:
    _checkpoint(folder)
    return next(folder.glob("*.distcp")).read_bytes()


def _whole_tensor(folder: Path) -> None:
    TorchDistReader(folder).whole("module.a")


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _described() -> bytes:
    import zipfile

    with zipfile.ZipFile(io.BytesIO(_saved(torch.zeros(2, 3)))) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _read_described(folder: Path) -> None:
    try:
        saved_tensor((folder / "data.pkl").read_bytes())
    except pickle.UnpicklingError as error:
        raise UserError(str(error)) from None


def _golden(folder: Path) -> bytes:
    import numpy as np

    tokens, zeros = [np.array([1, 2, 3])], [np.zeros(3, dtype=np.float32)]
    facts = {"model_sha256": "0" * 64, "planted": [], "experts": {"reached": 0, "of": 0}}
    Golden(["abc"], tokens, zeros, zeros, {"no FP8": zeros}, facts).write(folder / "g.safetensors")
    return (folder / "g.safetensors").read_bytes()


def _sealed(folder: Path) -> bytes:
    (folder / "a.txt").write_text("a")
    seal(folder)
    return (folder / "files.json").read_bytes()


def _store(folder: Path) -> None:
    for name, size in (("tokens.bin", 40), ("loss_mask.bin", 10), ("stages.bin", 10), ("documents.idx", 24)):
        (folder / name).write_bytes(bytes(size))
    (folder / "sources.bin").write_bytes(bytes(8))
    (folder / "origins.bin").write_bytes(bytes(16))


def _manifest(folder: Path) -> bytes:
    _store(folder)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    counts = {"documents": 2, "tokens": 10, "supervised_tokens": 5}
    content = {
        **{"format": "token-store", "version": 3, **counts, "longest_document": 5, "max_token_id": 9},
        **{"sources": {"a": counts}, "weights": [1.0, 0.5], "tokenizer": {"sha256": SHA, "vocab_size": 10}},
        "files": {name: {"dtype": "u1", "bytes": size, "sha256": SHA} for name, size in sizes.items()},
        "origins": ["a.jsonl"],
    }
    return as_bytes(content)


def _read_store(folder: Path) -> None:
    store = TokenStore(folder)
    assert len(store) >= 0
    assert store.parts[0].weights[0] == 0
    assert store.source_names


SELECTION = b"quantize: ['backbone.layers.*']\nkeep: ['*.o_proj']\nkv_cache: true\n"
CLUSTER = b"account: a\npartition: p\ntime: '04:00:00'\nworkdir: /w\nlogs: /l\nhardware: cpu\nenvironment: {A: b}\n"
PACKS = {
    **{"format": "pack-index", "version": 1, "store_sha256": SHA, "seq_length": 512, "pad_multiple": 1},
    **{"packs": 3, "documents": 3, "positions": 9, "supervised_positions": 4},
}
LORA = {
    **{"format": 2, "rank": 4, "alpha": 8.0, "rank_pattern": ["in_proj:2"], "alpha_pattern": [], "rslora": False},
    **{"dora": False, "targets": ["in_proj"], "experts": "shared", "router": "frozen", "base_config": {"a": [1]}},
    **{"base_sha256": SHA, "router_sha256": None, "base_quantization": "nf4"},
}
PEFT = {
    **{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {r"layers\.(0|1)\..*": 2}, "bias": "none"},
    **{"alpha_pattern": {"k_proj": 3.0}, "use_rslora": False, "target_parameters": ["experts.up_proj"]},
}
STATE = {"format": 2, "step": 4, "samples": 8, "layout": {"ranks": 1, "tp": 1}, "identity": {"base": "a", "lr": 0.1}}
STAGES = [{"name": "train", "commands": [["python", "x.py"]], "output": "out", "inputs": ["a"]}]
REPLY = {"choices": [{"prompt_logprobs": [None, {"5": {"logprob": -0.5, "rank": 1}}]}]}


def _peft(folder: Path) -> None:
    config = read_peft_config(folder)
    config.scale_of("model.layers.0.mixer.k_proj")
    config.targets("model.experts.up_proj")


def readers() -> dict[str, Reader]:
    """Name -> reader, of every format that comes from disk or network."""
    pico = Arch.load(PRESETS["pico"])
    return {
        "config.json": Reader("config.json", (PRESETS["pico"] / "config.json").read_bytes(), Arch.load),
        "lora.json": Reader(
            "lora.json", as_bytes(LORA), lambda f: parse_lora_json(read_json(f / "lora.json", dict), "lora.json")
        ),
        "adapter_config.json": Reader("adapter_config.json", as_bytes(PEFT), _peft),
        "certificate.json": Reader("certificate.json", _certificate(), _read_certificate),
        "safetensors": Reader("model.safetensors", _safetensors(), FileLayout.read),
        "index": Reader(
            "i.json",
            as_bytes({"metadata": {"total_size": 5}, "weight_map": {"a": "b.safetensors"}}),
            lambda f: parse_index((f / "i.json").read_bytes(), f / "i.json"),
        ),
        "safetensors.json": Reader(
            "safetensors.json",
            FileLayout.make({"a": ("F32", (2,))}).to_json().encode(),
            lambda f: FileLayout.from_json((f / "safetensors.json").read_bytes(), "safetensors.json"),
        ),
        "manifest.json": Reader("manifest.json", in_new_folder(_manifest), _read_store, _store),
        "packs.json": Reader("packs.json", as_bytes(PACKS), lambda f: read_json(f / "packs.json", PackFacts)),
        "files.json": Reader(
            "files.json", in_new_folder(_sealed), check_seal, lambda f: (f / "a.txt").write_text("a") and None
        ),
        "nano3.json": Reader("nano3.json", as_bytes({"kind": "hf-model", "sealed": False}), owner_of),
        "base.json": Reader("base.json", as_bytes({"sha256": SHA, "base": {"name": "a", "revision": "b"}}), read_base),
        "state.json": Reader("training/state.json", as_bytes(STATE), read_state),
        "metrics.jsonl": Reader(
            "m.jsonl", b'{"step": 1, "loss": NaN}\n{"step": 2}\n', lambda f: read_rows(f / "m.jsonl")
        ),
        "pipeline.json": Reader("pipeline.json", as_bytes(STAGES), lambda f: Records(f).planned()),
        "fp8_activations.json": Reader(
            "fp8_activations.json", as_bytes({"inputs": {"a": 0.5}, "cache": {"b": 0.1}}), ActivationScales.read
        ),
        "hf_quant_config.json": Reader(
            "q.json",
            as_bytes({"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}),
            lambda f: read_json(f / "q.json", QuantFile),
        ),
        "cluster.yaml": Reader("cluster.yaml", CLUSTER, lambda f: Cluster.load(f / "cluster.yaml").seconds),
        "selection.yaml": Reader("s.yaml", SELECTION, lambda f: Selection.from_yaml(pico, f / "s.yaml")),
        "golden": Reader("g.safetensors", in_new_folder(_golden), lambda f: Golden.read(f / "g.safetensors")),
        ".metadata": Reader(".metadata", in_new_folder(_checkpoint), lambda f: read_metadata(f / ".metadata")),
        "chunk": Reader("__0_0.distcp", in_new_folder(_chunk), _whole_tensor, lambda f: _checkpoint(f) and None),
        "data.pkl": Reader("data.pkl", _described(), _read_described),
        "run.pt": Reader(
            "run.pt", _saved({"step": 4, "t": torch.ones(2)}), lambda f: load_state(f / "run.pt", "run.pt")
        ),
        "server: models": Reader(
            "r.json",
            as_bytes({"data": [{"id": "m"}]}),
            lambda f: parse_json((f / "r.json").read_bytes(), Models, "server"),
        ),
        "server: completion": Reader(
            "r.json", as_bytes(REPLY), lambda f: parse_json((f / "r.json").read_bytes(), Completion, "server")
        ),
        "server: tokens": Reader(
            "r.json",
            as_bytes({"tokens": [1, 2]}),
            lambda f: parse_json((f / "r.json").read_bytes(), Tokens, "server"),
        ),
        **run_readers(),
    }


EDITS = ("replace", "insert", "cut", "end", "flip", "repeat")
PIECES = [
    *(b"[" * 300, b"{" * 300, b"[" * 70 + b"]" * 70, b'{"a":' * 70, b"9" * 5000, b"1e999", b"-1", b"NaN", b"Infinity"),
    *(b"null", b"true", b'""', b'"\\ud800"', b"\xff\xfe", b"\x00", b"\r\n", b"../../x", b"*a*a*a*a*b", b"(a+)+$"),
    *(b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"&a [*a]", b"<<: *a", b"!!python/name:os.system", b"- " * 200, b": "),
    *(
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93",
        b"R",
        b"r\xff\xff\xff\xff",
        b"\x8d" + b"\xff" * 8,
    ),
]
"""What is put into a file, besides random bytes."""
ODD: list[Any] = [
    *(None, True, 0, -1, 1, 2**31, 2**53 + 1, 10**30, 0.0, -0.5, 1e300, float("nan"), float("inf"), "", "x", "../x"),
    *("\x00\n", "\ud800", "a" * 5000, "(a+)+$", [], {}, [[]], [None], {"": None}, {"__float__": [1]}, [1] * 20),
]
"""What is put in place of a value of a document."""


def _deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def changed(reader: Reader) -> st.SearchStrategy[bytes]:
    """Changed copies of a reader's good file: bytes cut, swapped, put in; of JSON also other values in any place."""
    good = reader.good
    piece = st.sampled_from(PIECES) | st.binary(max_size=12)
    edit = st.tuples(st.sampled_from(EDITS), st.integers(0, len(good)), piece)
    raw = st.lists(edit, min_size=1, max_size=5).map(lambda edits: _edited(good, edits))
    try:
        document = json.loads(good)
    except ValueError:
        return raw | st.binary(max_size=300)
    value = st.sampled_from(ODD) | st.integers(60, 70).map(_deep) | st.integers() | st.floats() | st.text(max_size=5)
    places = list(_places(document))
    swap = st.tuples(st.sampled_from(places), st.sampled_from(("set", "drop", "add")), value)
    return raw | st.lists(swap, min_size=1, max_size=3).map(lambda swaps: _swapped(document, swaps))


def _edited(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for what, place, piece in edits:
        place = min(place, len(data))
        if what == "replace":
            data = data[:place] + piece + data[place + len(piece) :]
        elif what == "insert":
            data = data[:place] + piece + data[place:]
        elif what == "cut":
            data = data[:place] + data[place + max(1, len(piece)) :]
        elif what == "end":
            data = data[:place]
        elif what == "flip" and place < len(data):
            data = data[:place] + bytes([data[place] ^ (piece[0] if piece else 1)]) + data[place + 1 :]
        elif what == "repeat":
            data = data[:place] + data[place : place + 40] + data[place:]
    return data


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def _swapped(document: Any, swaps: list[tuple[tuple[Any, ...], str, Any]]) -> bytes:
    document = copy.deepcopy(document)
    for path, what, odd in swaps:
        value = copy.deepcopy(odd)
        if not path:
            document = value if what == "set" else document
            continue
        try:
            holder = document
            for key in path[:-1]:
                holder = holder[key]
            if what == "drop":
                del holder[path[-1]]
            elif what == "set" or not isinstance(holder, dict):
                holder[path[-1]] = value
            else:
                holder["added"] = value
        except (LookupError, TypeError):
            continue  # an earlier swap took this place away
    return json.dumps(document).encode()


def _passes(reader: Reader, place: Path) -> bool:
    """Whether the reader takes what lies in its place; False for a `UserError`. Raises whatever else comes of it."""
    before = sorted(os.listdir(place))
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    begun, passed = time.process_time(), True
    try:
        reader.read(place)
    except UserError:
        passed = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert time.process_time() - begun < SECONDS, "a reader took too long"
    assert sorted(os.listdir(place)) == before, "a reader wrote something"
    return passed


def fuzz(name: str, reader: Reader, inputs: int) -> int:
    """Tries what was kept, then `inputs` drawn ones; returns how many were read without an error. Raises for the first
    input from which anything but a `UserError` comes."""
    read = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        reader.beside(place)
        (place / reader.file).parent.mkdir(exist_ok=True)

        def attempt(data: bytes) -> None:
            nonlocal read
            (place / reader.file).write_bytes(data)
            try:
                read += _passes(reader, place)
            except BaseException:
                keep = KEPT / name.replace(" ", "").replace(":", "-")
                keep.mkdir(parents=True, exist_ok=True)
                (keep / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
                raise

        (place / reader.file).write_bytes(reader.good)
        reader.read(place)  # must pass; what it imports takes its time once
        attempt(reader.good)
        for kept in sorted((KEPT / name.replace(" ", "").replace(":", "-")).glob("*")):
            attempt(kept.read_bytes())

        @seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        @settings(
            max_examples=inputs,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(changed(reader))
        def run(data: bytes) -> None:
            attempt(data)

        run()
    return read


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"an input took longer than {PATIENCE} s")


def prepare() -> None:
    """The time limit; main thread only."""
    signal.signal(signal.SIGALRM, _too_long)


def memory() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help="only these (default: all)")
    parser.add_argument("--inputs", type=int, default=20_000, help="inputs for each reader (default: 20,000)")
    args = parser.parse_args()
    prepare()
    start = memory()
    for name, reader in readers().items():
        if args.readers and name not in args.readers:
            continue
        begun = time.monotonic()
        read = fuzz(name, reader, args.inputs)
        print(
            f"{name}: {args.inputs:,} inputs in {time.monotonic() - begun:.0f} s, {read:,} read, the rest refused",
            flush=True,
        )
    print(f"peak memory {memory() / 1e6:.0f} MB, of it {start / 1e6:.0f} MB before the first input")
    return 0


if __name__ == "__main__":
    sys.exit(main())
