"""Selective FP8 quantization of a merged model, streaming: no GPU, no model in memory.

    python conversion/quantize_fp8.py MERGED_HF OUT --calibration STORE

The published recipe of the model by default: attention, the Mamba layers that feed it, convolutions, routers, norms,
embeddings and lm_head stay as they are, everything else and the KV cache becomes FP8 E4M3 with static scales. STORE is
a token store (data_prep/prepare.py) of what the model will see; its documents set the activations' scales. OUT is a
unified Hugging Face checkpoint in NVIDIA ModelOpt's format. --selection FILE.yaml chooses other matrices.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.certificate import Work, norm_ratio, previous_certificate, write_certificate
from conversion.folders import HF_KIND, copy_files, progress, refuse_overlap, require_space
from conversion.fp8 import E4M3_MAX, KV_SCALES, Selection
from conversion.identity import hf_facts
from conversion.layout import Layout
from conversion.plan import row_steps
from conversion.safetensors_io import HFFolder, SafetensorsWriter, side_files
from nano3.arch import Arch, resolve_model
from nano3.cli import UserError, check_output, fresh_output, run
from nano3.token_store import TokenStore

if TYPE_CHECKING:
    import torch

    from conversion.calibrate import Activations


def to_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FP8 codes of `weight` (any shape) at `scale` (), FP32: as ModelOpt's export computes them, bit for bit.

    The division stays in the weight's own dtype (a BF16 weight gives a BF16 quotient, rounded once more than from
    FP32), which decides 2.8 % of the codes.
    """
    import torch

    return (weight / scale).to(torch.float8_e4m3fn)


def weight_scales(hf: HFFolder, selection: Selection) -> dict[str, torch.Tensor]:
    """amax / 448 of every chosen matrix, FP32; 1 for a matrix of zeros. Every tensor of the model is read on the way.

    Raises `UserError` naming a tensor with NaN or infinity.
    """
    import torch

    scales = {}
    with progress(hf.layout.total_bytes, "check") as bar:
        for name, entry in hf.layout.entries.items():
            amax = torch.zeros(())
            for start, count in row_steps(entry.rows, entry.row_bytes):
                largest = hf.rows(name, start, count).abs().amax().float()
                if not torch.isfinite(largest):
                    raise UserError(f"{hf.path}: {name} holds NaN or infinity; the training or the merge went wrong")
                amax = torch.maximum(amax, largest)
            bar.update(entry.stop - entry.start)
            if name.removesuffix(".weight") in selection.chosen and name.endswith(".weight"):
                scales[name] = amax / E4M3_MAX if amax > 0 else torch.ones(())
    return scales


def quantize(source: Path, out: Path, selection: Selection, samples: list[Any]) -> Activations:
    """Calibrates, then writes the FP8 checkpoint `out`; returns what calibration found. Raises `UserError`."""
    from conversion.calibrate import calibrate, scratch_bytes

    refuse_overlap(out, source)
    check_output(out, HF_KIND)
    with HFFolder(source) as hf:
        layout = Layout.make(selection.table(hf.dtypes))
        side = side_files(source)
        require_space(out, layout.total_bytes + scratch_bytes(hf, samples))
        before, scales = hf_facts(hf), weight_scales(hf, selection)
        previous_certificate(source, before)
        with _layers(len(hf.arch.layers)) as bar:
            found = calibrate(hf, selection, samples, out, bar.update)
        with fresh_output(out, HF_KIND) as folder:
            copy_files(source, side, folder)
            _write_configs(source, folder, selection)
            with SafetensorsWriter(folder, layout) as writer, progress(hf.layout.total_bytes, "quantize") as bar:
                _write_scalars(selection, scales, found, writer)
                changes = _write_tensors(hf, scales, writer, bar)
            facts = {"selection": sorted(selection.chosen), "kv_cache": selection.kv_cache, "tokens": found.tokens}
            with HFFolder(folder, quantized=True) as written:
                work = Work("quantization", changes, {"calibration": facts})
                write_certificate(folder, source, before, hf_facts(written), work)
    return found


def _layers(count: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=count, desc="calibrate", unit="layer", mininterval=0.5, disable=None)


def _write_tensors(
    hf: HFFolder, scales: dict[str, torch.Tensor], writer: SafetensorsWriter, bar: Any
) -> dict[str, Any]:
    """Writes every tensor; returns the scale of the quantized ones and the norm of their error over their own."""
    changes: dict[str, Any] = {}
    for name, entry in hf.layout.entries.items():
        error = whole = 0.0
        for start, count in row_steps(entry.rows, entry.row_bytes):
            rows = hf.rows(name, start, count)
            if name in scales:
                codes = to_codes(rows, scales[name])
                error += float((codes.float() * scales[name] - rows.float()).square().sum())
                whole += float(rows.float().square().sum())
                rows = codes
            writer.write(name, start, rows)
        if name in scales:
            changes[name] = {"scale": float(scales[name]), "relative_error": norm_ratio(error, whole)}
        bar.update(entry.stop - entry.start)
    return changes


def _write_scalars(
    selection: Selection, scales: dict[str, torch.Tensor], found: Activations, writer: SafetensorsWriter
) -> None:
    import torch

    for module in selection.chosen:
        writer.write(f"{module}.weight_scale", 0, scales[f"{module}.weight"].view(1))
        writer.write(f"{module}.input_scale", 0, torch.tensor([found.inputs[module]]) / E4M3_MAX)
    for number in selection.kv_layers:
        for part, name in zip("kv", KV_SCALES, strict=True):
            scale = torch.tensor([found.cache[number, part]]) / E4M3_MAX
            writer.write(f"backbone.layers.{number}.mixer.{name}", 0, scale)


def _write_configs(source: Path, folder: Path, selection: Selection) -> None:
    """config.json as it was with `quantization_config`, and hf_quant_config.json, which says the same."""
    producer = version("nvidia-modelopt")
    config = json.loads((source / "config.json").read_text())
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


def _samples(store: TokenStore, count: int, longest: int, vocabulary: int) -> list[Any]:
    """The first tokens of documents spread evenly over the store."""
    largest = store.manifest["max_token_id"]
    if largest >= vocabulary:
        raise UserError(f"{store.folder} has token {largest}, but the model's vocabulary ends at {vocabulary - 1}")
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
    return parse


def main() -> int:
    args = parser().parse_args()
    source = resolve_model(args.source)
    if args.samples < 1 or args.tokens < 1:
        raise UserError("--samples and --tokens must be at least 1")
    if args.calibration is None and not args.dry_run:
        raise UserError("no calibration data: give --calibration STORE, a token store made by data_prep/prepare.py")
    arch, dtypes = _model(source, args.dry_run)
    selection = Selection.from_yaml(arch, args.selection) if args.selection else Selection.published(arch)
    print(selection.describe(dtypes), flush=True)
    if args.dry_run:
        return 0
    store = TokenStore(args.calibration)
    store.check_tokenizer(source)
    found = quantize(source, args.out, selection, _samples(store, args.samples, args.tokens, arch.vocab_size))
    idle = sum(found.idle.values())
    print(
        f"calibrated on {found.tokens:,} tokens; {idle} of {arch.n_routed_experts * len(found.idle)} experts saw none"
    )
    print(f"{args.out}: FP8 checkpoint; check it with conversion/lint_export.py")
    return 0


if __name__ == "__main__":
    run(main)
