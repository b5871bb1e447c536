"""Reads an FP8 checkpoint as vLLM, TensorRT-LLM and transformers would, and says who would misread it.

    python conversion/lint_export.py DIR

Checks that every tensor of the model is there and whole, that scales and codes are numbers, that the two configurations
say the same, and that each reader's rules make exactly those modules FP8 that are FP8 on disk. Exit code 0 when
nothing is wrong, 1 with one line per finding and the reader concerned, 2 when DIR cannot be examined.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MaxLen
from typing_extensions import TypedDict

from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.pieces import row_steps
from conversion.checkpoint.safetensors_layout import FP8
from conversion.fp8.readers import READERS, loaded_modules, vllm_cache_scale
from conversion.fp8.selection import KV_SCALES, SCALES, matrices, scale_problem
from nano3.documents import Name, check, read_json
from nano3.sealed_folder import check_seal

EVERYONE = "every reader"
VLLM = "vLLM"
PRECISE = (".A_log", ".e_score_correction_bias")
"""Tensors that the published checkpoint has in FP32."""

Finding = tuple[str, str]
"""Who would misread the folder, and what is wrong."""


class Quantization(TypedDict, total=False):
    """What TensorRT-LLM reads of hf_quant_config.json."""

    quant_algo: Name | None
    kv_cache_quant_algo: Name | None
    exclude_modules: Annotated[list[Name], MaxLen(100_000)] | None


class QuantFile(TypedDict):
    """hf_quant_config.json."""

    quantization: Quantization


class QuantizationConfig(TypedDict, total=False):
    """What vLLM reads of config.json's `quantization_config`."""

    quant_method: Name | None
    quant_algo: Name | None
    kv_cache_scheme: dict[str, Any] | None
    ignore: Annotated[list[Name], MaxLen(100_000)] | None


def lint(folder: Path) -> list[Finding]:
    """Everything that is wrong with an FP8 checkpoint. Raises `UserError` when it is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give an FP8 checkpoint")
    try:
        hf = HFFolder(folder, quantized=True, as_is=True)
    except UserError as error:
        return [(EVERYONE, str(error))]
    with hf:
        coded = {name.removesuffix(".weight") for name, entry in hf.layout.entries.items() if entry.dtype == FP8}
        if not coded and hf.quantization is None:
            raise UserError(f"{folder} is not quantized: no FP8 tensors and no quantization_config")
        config, problems = _configs(folder, hf)
        return [
            *_changes(folder),
            *problems,
            *_dtypes(hf, coded),
            *_scales(hf, coded, config),
            *_excludes(hf, coded, config),
            *_codes(hf),
        ]


def _changes(folder: Path) -> list[Finding]:
    """Whether the folder is not what was written, whatever else is right with it."""
    try:
        check_seal(folder)
    except UserError as error:
        return [(EVERYONE, str(error))]
    return []


def _configs(folder: Path, hf: HFFolder) -> tuple[dict[str, Any], list[Finding]]:
    """What hf_quant_config.json says, and where it and config.json differ."""
    problems: list[Finding] = []
    path, remedy = folder / "hf_quant_config.json", "quantize the model again"
    told: dict[str, Any] = {}
    if path.is_file():
        told = dict(read_json(path, QuantFile, remedy)["quantization"])
    else:
        problems.append(("TensorRT-LLM", "hf_quant_config.json is missing"))
    ours: Any = check(hf.quantization or {}, QuantizationConfig, f"{folder}/config.json: quantization_config", remedy)
    if ours.get("quant_method") != "modelopt":
        problems.append((VLLM, f"config.json: quantization_config.quant_method is {ours.get('quant_method')!r}"))
    for what, first, second in (
        ("quant_algo", told.get("quant_algo"), ours.get("quant_algo")),
        ("KV cache", told.get("kv_cache_quant_algo"), "FP8" if ours.get("kv_cache_scheme") else None),
        ("excluded modules", sorted(told.get("exclude_modules") or []), sorted(ours.get("ignore") or [])),
    ):
        if first != second:
            problems.append((EVERYONE, f"hf_quant_config.json and config.json differ in {what}"))
    for what, needed in (("quant_algo", ("FP8",)), ("kv_cache_quant_algo", (None, "FP8"))):
        if told.get(what) not in needed:
            problems.append(
                (EVERYONE, f"hf_quant_config.json: {what} is {told.get(what)!r}, and what is on disk is FP8")
            )
    if "hybrid_override_pattern" not in hf.config:
        problems.append((VLLM, "config.json has no hybrid_override_pattern, from which vLLM builds the layers"))
    return told, problems


def _dtypes(hf: HFFolder, coded: set[str]) -> Iterator[Finding]:
    known = matrices(hf.arch)
    for module in sorted(coded - set(known)):
        yield EVERYONE, f"{module} is FP8, but no reader runs it in FP8"
    for name in hf.arch.tensors():
        if name.endswith(PRECISE) and hf.dtypes[name] != "F32":
            yield EVERYONE, f"{name} is {hf.dtypes[name]}; the published model has it in F32"


def _scales(hf: HFFolder, coded: set[str], config: dict[str, Any]) -> Iterator[Finding]:
    """Every FP8 matrix has its two scales, the cache its own where it is FP8; all are finite and positive."""
    cached = hf.arch.attention_layers if config.get("kv_cache_quant_algo") == "FP8" else ()
    cache = {f"backbone.layers.{number}.mixer.{name}" for number in cached for name in KV_SCALES}
    wanted = {f"{module}.{scale}" for module in coded for scale in SCALES} | cache
    found = {name for name in hf.layout.entries if name.endswith("_scale")}
    for name in sorted(wanted - found):
        yield (VLLM, f"{name} is missing: 1.0 would be used") if name in cache else (EVERYONE, f"{name} is missing")
    for name in sorted(found - wanted):
        lost = name.endswith((".k_scale", ".v_scale")) and vllm_cache_scale(name) is None
        why = "vLLM finds no place for it and uses 1.0" if lost else "nothing on disk is scaled by it"
        yield (VLLM if lost else EVERYONE), f"{name} is not expected: {why}"
    for name in sorted(found & wanted):
        entry = hf.layout.entries[name]
        problem = scale_problem(entry.dtype, entry.shape, float(hf.rows(name, 0, 1).view(-1)[0]))
        if problem is not None:
            yield EVERYONE, f"{name} {problem}"


def _excludes(hf: HFFolder, coded: set[str], config: dict[str, Any]) -> Iterator[Finding]:
    excluded = config.get("exclude_modules") or []
    for reader in READERS:
        for module, parts in loaded_modules(hf.arch).items():
            on_disk = {part in coded for part in parts}
            if len(on_disk) > 1:
                yield reader.name, f"{module} is partly FP8 and partly not; it is one module there"
            elif reader.excludes(module, excluded) == on_disk.pop():
                yield (
                    reader.name,
                    (
                        f"{module} is FP8 on disk and would be read as BF16: the excluded modules match it"
                        if parts[0] in coded
                        else f"{module} is not FP8 on disk and would be read as FP8: no excluded module matches it"
                    ),
                )
    modules = {name.rpartition(".")[0] for name in hf.arch.tensors()}
    for name in excluded:
        if "*" not in name and not name.startswith("re:") and name not in modules:
            yield EVERYONE, f"excluded module {name!r} names nothing in this model"


def _codes(hf: HFFolder) -> Iterator[Finding]:
    """No NaN in any tensor. E4M3 has two NaN codes, 0x7F and 0xFF, and no infinity."""
    import torch

    for name, entry in hf.layout.entries.items():
        for start, count in row_steps(entry.rows, entry.row_bytes):
            rows = hf.rows(name, start, count)
            bad = (rows.view(torch.uint8) & 0x7F == 0x7F) if entry.dtype == FP8 else ~torch.isfinite(rows)
            if bad.any():
                yield EVERYONE, f"{name} holds {int(bad.sum())} values that are no numbers"
                break


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="FP8 checkpoint, a Hugging Face folder")
    findings = lint(parser.parse_args().folder)
    for reader, problem in findings:
        print(f"{reader}: {problem}")
    if not findings:
        print(
            "nothing wrong: vLLM and TensorRT-LLM read it as it is. Plain transformers cannot read FP8 of this kind "
            "(it takes codes for numbers): give it what conversion/dequantize.py makes of the folder"
        )
    return 1 if findings else 0


if __name__ == "__main__":
    run(main)
