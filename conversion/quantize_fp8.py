"""Selective FP8 quantization of a merged model, streaming: no GPU, no model in memory.

    python conversion/quantize_fp8.py MERGED_HF OUT --calibration STORE

The published recipe of the model by default: attention, the Mamba layers that feed it, convolutions, routers, norms,
embeddings and lm_head stay as they are, everything else and the KV cache becomes FP8 E4M3 with static scales. STORE is
a token store (data_prep/prepare.py) of what the model will see; its documents set the activations' scales. OUT is a
unified Hugging Face checkpoint in NVIDIA ModelOpt's format. --selection FILE.yaml chooses other matrices. A killed run
leaves its work beside OUT, and the same command resumes from it.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
    from nano3.outputs import check_output
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import hashlib
import json
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.certificates.certificate import Claim, norm_ratio, previous_certificate, write_certificate
from conversion.checkpoint.model_folder import HFFolder, side_files
from conversion.checkpoint.output_folder import (
    HF_KIND,
    UnfinishedOutput,
    add_push,
    check_room,
    copy_files,
    refuse_overlap,
    unfinished_output,
)
from conversion.checkpoint.pieces import STEP_BYTES, row_steps
from conversion.checkpoint.safetensors_layout import FileLayout
from conversion.checkpoint.safetensors_writer import Change, Passage, rewrite
from conversion.checkpoint.tensor_digests import Fact, scan
from conversion.fp8.selection import E4M3_MAX, KV_SCALES, Selection, require_experts
from conversion.push import Hub
from nano3.arch import Arch, resolve_model
from nano3.hf_config import read_config
from nano3.store_contents import check_store
from nano3.token_store import TokenStore

if TYPE_CHECKING:
    import torch

    from conversion.fp8.calibrate import Activations

WAITS = (OSError, MemoryError, RuntimeError)
"""What may pass, such as a full disk or a GPU without memory: days of calibration wait for it."""


def to_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FP8 codes of `weight` (any shape) at `scale` (), FP32: as ModelOpt's export computes them, bit for bit.

    The division stays in the weight's own dtype (a BF16 weight gives a BF16 quotient, rounded once more than from
    FP32), which decides 2.8 % of the codes.
    """
    import torch

    return (weight / scale).to(torch.float8_e4m3fn)


def weight_scales(largest: dict[str, float], selection: Selection) -> dict[str, torch.Tensor]:
    """amax / 448 of every chosen matrix, FP32; 1 for a matrix of zeros. `largest` has every tensor's amax."""
    import torch

    names = [name for name in largest if name.endswith(".weight") and name.removesuffix(".weight") in selection.chosen]
    return {name: torch.tensor(largest[name] or E4M3_MAX) / E4M3_MAX for name in names}


def quantize(source: Path, out: Path, selection: Selection, samples: list[Any]) -> Activations:
    """Calibrates, then writes the FP8 checkpoint `out`; returns what calibration found. Raises `UserError`.

    What a killed run left is gone on with, from the layer and the samples that it was at, or one that met `WAITS`.
    """
    from conversion.fp8.calibrate import calibrate, scratch_bytes

    refuse_overlap(out, source)
    with HFFolder(source) as hf:
        layout = FileLayout.make(selection.table(hf.dtypes, hf.carried))
        needed = max(layout.total_bytes, scratch_bytes(hf, samples))
        check_room(check_output(out, HF_KIND), needed)
        before, largest = scan(hf)
        scales = weight_scales(largest, selection)
        previous_certificate(source, before)
        with unfinished_output(out, HF_KIND, _job(before, layout, selection, samples), needed, WAITS) as work:
            with _progress(len(hf.arch.layers) * sum(map(len, samples))) as bar:
                found = calibrate(hf, selection, samples, work, bar.update)
            write(hf, before, scales, selection, found, work)
    return found


def _job(before: dict[str, Fact], layout: FileLayout, selection: Selection, samples: list[Any]) -> dict[str, Any]:
    """What decides the bytes of the output: sources, layout, selection, samples, and who calculates."""
    import torch

    from conversion.fp8.layerwise import BLOCK_TOKENS

    tokens = hashlib.sha256(json.dumps([sample.tolist() for sample in samples]).encode()).hexdigest()
    return {
        "tool": "quantize",
        "source": {name: fact.sha256 for name, fact in before.items()},
        "layout": layout.to_json(),
        "selection": [sorted(selection.chosen), selection.kv_cache],
        "samples": [tokens, BLOCK_TOKENS],
        "libraries": {name: version(name) for name in ("torch", "transformers", "nvidia-modelopt")},
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def write(
    hf: HFFolder,
    before: dict[str, Fact],
    scales: dict[str, torch.Tensor],
    selection: Selection,
    found: Activations,
    work: UnfinishedOutput,
) -> None:
    """Writes the FP8 checkpoint of `hf`, whose tensors are `before`, with its certificate into `work`."""
    layout, added = FileLayout.make(selection.table(hf.dtypes, hf.carried)), _scalars(selection, scales, found)
    copy_files(hf.path, side_files(hf.path), work.folder)
    _write_configs(hf.path, work.folder, selection)
    changes: dict[str, Change] = {name: partial(_quantize, scale) for name, scale in scales.items()}
    written = rewrite(hf, work, layout, changes, added, "quantize")
    notes = {name: note for name, note in written.notes.items() if note is not None}
    facts = {"selection": sorted(selection.chosen), "kv_cache": selection.kv_cache, "tokens": found.tokens}
    certified = Claim("quantization", notes, {"calibration": facts})
    write_certificate(work.folder, hf.path, before, written.facts, certified)


def _progress(tokens: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=tokens, desc="calibrate", unit="tok", unit_scale=True, mininterval=0.5, disable=None)


def _quantize(scale: torch.Tensor, passage: Passage) -> dict[str, Any]:
    """Writes the codes of one matrix; returns its scale and the norm of the error over its own."""
    error = whole = 0.0
    rows, width = passage.entry.shape
    for start, count in row_steps(rows, 4 * width, STEP_BYTES):  # in FP32
        old = passage.read(start, count)
        codes = to_codes(old, scale)
        passage.write(start, codes)
        values = old.float()
        error += float((codes.float() * scale - values).square().sum())
        whole += float(values.square().sum())
    return {"scale": float(scale), "relative_error": norm_ratio(error, whole)}


def _scalars(selection: Selection, scales: dict[str, torch.Tensor], found: Activations) -> dict[str, torch.Tensor]:
    """All scales of the checkpoint, one value each."""
    import torch

    result = {}
    for module in selection.chosen:
        result[f"{module}.weight_scale"] = scales[f"{module}.weight"].view(1)
        result[f"{module}.input_scale"] = torch.tensor([found.inputs[module]]) / E4M3_MAX
    for number in selection.kv_layers:
        for part, name in zip("kv", KV_SCALES, strict=True):
            result[f"backbone.layers.{number}.mixer.{name}"] = torch.tensor([found.cache[number, part]]) / E4M3_MAX
    return result


def _write_configs(source: Path, folder: Path, selection: Selection) -> None:
    """config.json as it was with `quantization_config`, and hf_quant_config.json, which says the same."""
    producer = version("nvidia-modelopt")
    config = read_config(source)
    config["quantization_config"] = selection.quantization_config(producer)
    for name, content in (("config.json", config), ("hf_quant_config.json", selection.hf_quant_config(producer))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _model(source: Path, config_suffices: bool) -> tuple[Arch, dict[str, str]]:
    """The architecture, and every tensor's dtype: as the files say, or as expected where a config.json is all."""
    if config_suffices and not list(source.glob("*.safetensors")):
        arch = Arch.load(source)
        return arch, {name: spec.dtype for name, spec in arch.tensors().items()}
    with HFFolder(source) as hf:
        return hf.arch, hf.dtypes


def calibration_samples(store: TokenStore, count: int, longest: int = 4096) -> list[Any]:
    """Token ids of `count` documents spread evenly over the store, the first `longest` of each."""
    count = min(count, len(store))
    return [store.document(number * len(store) // count)[0][:longest] for number in range(count)]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("source", metavar="MERGED_HF", help="Hugging Face model folder, unquantized")
    parse.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parse.add_argument("--calibration", metavar="STORE", type=Path, help="token store whose documents set the scales")
    parse.add_argument("--samples", type=int, default=1024, help="documents of it (default: 1024, as published)")
    parse.add_argument("--tokens", type=int, default=4096, help="tokens of each document at most (default: 4096)")
    parse.add_argument("--selection", metavar="FILE.yaml", type=Path, help="what to quantize instead (docs/fp8.md)")
    parse.add_argument("--dry-run", action="store_true", help="print what each layer becomes, and stop")
    add_push(parse)
    return parse


def main() -> int:
    args = parser().parse_args()
    hub = Hub(args.push) if args.push else None  # refuses at once what would fail after hours
    source = resolve_model(args.source)
    if args.samples < 1 or args.tokens < 1:
        raise UserError("--samples and --tokens must be at least 1")
    if args.calibration is None and not args.dry_run:
        raise UserError("no calibration data: give --calibration STORE, a token store made by data_prep/prepare.py")
    arch, dtypes = _model(source, args.dry_run)
    require_experts(arch, args.source)
    selection = Selection.from_yaml(arch, args.selection) if args.selection else Selection.published(arch)
    print(selection.describe(dtypes), flush=True)
    if args.dry_run:
        return 0
    store = TokenStore(args.calibration)
    check_store(store)
    store.check_tokenizer(source)
    largest = store.manifest["max_token_id"]
    if largest >= arch.vocab_size:
        raise UserError(f"{store.folder} has token {largest}, but the model's vocabulary ends at {arch.vocab_size - 1}")
    found = quantize(source, args.out, selection, calibration_samples(store, args.samples, args.tokens))
    idle = sum(found.idle.values())
    print(
        f"calibrated on {found.tokens:,} tokens; {idle} of {arch.n_routed_experts * len(found.idle)} experts saw none"
    )
    print(f"{args.out}: FP8 checkpoint; check it with conversion/lint_export.py")
    if hub is not None:
        print(hub.upload(args.out))
    return 0


if __name__ == "__main__":
    run(main)
