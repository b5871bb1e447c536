"""Reads an FP8 checkpoint as vLLM, SGLang, TensorRT-LLM and transformers would, and says who would misread it.

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
from typing import Annotated, Any, NamedTuple

from annotated_types import MaxLen
from typing_extensions import TypedDict

from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.pieces import row_steps
from conversion.checkpoint.safetensors_layout import FP8
from conversion.fp8.readers import READERS, Reader, loaded_modules
from conversion.fp8.selection import SCALES, matrices, scale_problem
from nano3.documents import Name, check, read_json
from nano3.sealed_folder import check_seal

EVERYONE = "every reader"
BY_CONFIG = ", ".join(reader.name for reader in READERS if reader.keys)
"""Those who take config.json's word."""
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
    """What vLLM and SGLang read of config.json's `quantization_config`."""

    quant_method: Name | None
    quant_algo: Name | None
    kv_cache_scheme: dict[str, Any] | None
    ignore: Annotated[list[Name], MaxLen(100_000)] | None
    exclude_modules: Annotated[list[Name], MaxLen(100_000)] | None


class Settings(NamedTuple):
    """What both configurations say: hf_quant_config.json's `quantization`, config.json's `quantization_config`."""

    file: dict[str, Any]
    config: dict[str, Any] | None

    @property
    def kv_cache(self) -> str | None:
        """The cache's algorithm; where config.json says nothing of quantization, by the file, as for its readers."""
        return self.file.get("kv_cache_quant_algo") if self.config is None else _config_kv_cache(self.config)

    def excluded(self, reader: Reader) -> list[str]:
        """The list of excluded modules that a reader takes."""
        if self.config is None or not reader.keys:
            return self.file.get("exclude_modules") or []
        return next((self.config[key] or [] for key in reader.keys if key in self.config), [])


def _config_kv_cache(config: dict[str, Any]) -> str | None:
    return "FP8" if config.get("kv_cache_scheme") else None


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
        settings, problems = _settings(folder, hf)
        return [
            *_changes(folder),
            *problems,
            *_dtypes(hf, coded),
            *_scales(hf, coded, settings),
            *_excludes(hf, coded, settings),
            *_codes(hf),
        ]


def _changes(folder: Path) -> list[Finding]:
    """Whether the folder is not what was written, whatever else is right with it."""
    try:
        check_seal(folder)
    except UserError as error:
        return [(EVERYONE, str(error))]
    return []


def _settings(folder: Path, hf: HFFolder) -> tuple[Settings, list[Finding]]:
    """What the two configurations say, and what is wrong with that."""
    problems: list[Finding] = []
    path, remedy = folder / "hf_quant_config.json", "quantize the model again"
    told: dict[str, Any] = {}
    if path.is_file():
        told = dict(read_json(path, QuantFile, remedy)["quantization"])
    else:
        problems.append(("TensorRT-LLM", "hf_quant_config.json is missing"))
    ours: Any = None
    if hf.quantization is not None:
        ours = check(hf.quantization, QuantizationConfig, f"{folder}/config.json: quantization_config", remedy)
        if ours.get("quant_method") != "modelopt":
            problems.append(
                (BY_CONFIG, f"config.json: quantization_config.quant_method is {ours.get('quant_method')!r}")
            )
        problems += _differences(told, ours)
    for what, needed in (("quant_algo", ("FP8",)), ("kv_cache_quant_algo", (None, "FP8"))):
        if told.get(what) not in needed:
            problems.append(
                (EVERYONE, f"hf_quant_config.json: {what} is {told.get(what)!r}, and what is on disk is FP8")
            )
    if "hybrid_override_pattern" not in hf.config:
        problems.append(("vLLM", "config.json has no hybrid_override_pattern, from which vLLM builds the layers"))
    return Settings(told, ours), problems


def _differences(told: dict[str, Any], ours: dict[str, Any]) -> Iterator[Finding]:
    """Where hf_quant_config.json and config.json say different things."""
    lists = [ours[key] for key in ("ignore", "exclude_modules") if key in ours]
    for what, first, second in (
        ("quant_algo", told.get("quant_algo"), ours.get("quant_algo")),
        ("KV cache", told.get("kv_cache_quant_algo"), _config_kv_cache(ours)),
        ("excluded modules", sorted(told.get("exclude_modules") or []), sorted((lists or [None])[0] or [])),
    ):
        if first != second:
            yield EVERYONE, f"hf_quant_config.json and config.json differ in {what}"
    if "ignore" not in ours and "exclude_modules" in ours:
        yield "vLLM before 0.33", "config.json has exclude_modules and no ignore: every module would be read as FP8"


def _dtypes(hf: HFFolder, coded: set[str]) -> Iterator[Finding]:
    known = matrices(hf.arch)
    for module in sorted(coded - set(known)):
        yield EVERYONE, f"{module} is FP8, but no reader runs it in FP8"
    for name in hf.arch.tensors():
        if name.endswith(PRECISE) and hf.dtypes[name] != "F32":
            yield EVERYONE, f"{name} is {hf.dtypes[name]}; the published model has it in F32"


def _scales(hf: HFFolder, coded: set[str], settings: Settings) -> Iterator[Finding]:
    """Every FP8 matrix has its two scales, the cache its own where it is FP8; all are finite and positive."""
    wanted = {f"{module}.{scale}" for module in coded for scale in SCALES}
    found = {name for name in hf.layout.entries if name.endswith("_scale")}
    cache = {name for name in found - wanted if name.endswith(("k_scale", "v_scale"))}
    for name in sorted(wanted - found):
        yield EVERYONE, f"{name} is missing"
    for name in sorted(found - wanted - cache):
        yield EVERYONE, f"{name} is not expected: nothing on disk is scaled by it"
    for reader in READERS:
        yield from ((reader.name, problem) for problem in _cache_problems(hf, cache, settings, reader))
    for name in sorted(found & (wanted | cache)):
        entry = hf.layout.entries[name]
        problem = scale_problem(entry.dtype, entry.shape, float(hf.rows(name, 0, 1).view(-1)[0]))
        if problem is not None:
            yield EVERYONE, f"{name} {problem}"


def _cache_problems(hf: HFFolder, cache: set[str], settings: Settings, reader: Reader) -> Iterator[str]:
    """What one reader makes of the names of the KV cache's scales."""
    if reader.cache_scale is None:
        return
    layers = hf.arch.attention_layers
    places = {f"model.layers.{number}.mixer.attn.{which}_scale" for number in layers for which in "kv"}
    for name in sorted(cache):
        if reader.cache_scale(name) not in places:
            yield f"{name} is not expected: it finds no place for it"
        elif settings.kv_cache != "FP8":
            yield f"{name} is not expected: the KV cache is not FP8"
    if settings.kv_cache == "FP8":
        yield from reader.cache_problems(layers, cache)


def _excludes(hf: HFFolder, coded: set[str], settings: Settings) -> Iterator[Finding]:
    for reader in READERS:
        excluded = settings.excluded(reader)
        for module, parts in loaded_modules(hf.arch).items():
            on_disk = {part in coded for part in parts}
            if len(on_disk) > 1:
                yield reader.name, f"{module} is partly FP8 and partly not; it is one module there"
            elif problem := _misread(reader.excludes(module, excluded), on_disk.pop()):
                yield reader.name, f"{module} {problem}"
    modules = {name.rpartition(".")[0] for name in hf.arch.tensors()}
    modules |= {module.rpartition(".experts.")[0] + ".experts" for module in modules if ".experts." in module}
    for name in sorted({name for reader in READERS for name in settings.excluded(reader)}):
        if "*" not in name and not name.startswith("re:") and name not in modules:
            yield EVERYONE, f"excluded module {name!r} names nothing in this model"


def _misread(excluded: bool | None, coded: bool) -> str | None:
    """What is wrong with a reader's decision about a module, given whether it is FP8 on disk."""
    if excluded is None:
        return "cannot be decided: the reader stops with an error at the excluded modules"
    if excluded and coded:
        return "is FP8 on disk and would be read as BF16: the excluded modules match it"
    if not excluded and not coded:
        return "is not FP8 on disk and would be read as FP8: no excluded module matches it"
    return None


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
            f"nothing wrong: {', '.join(reader.name for reader in READERS)} read it as it is. Plain transformers "
            "cannot read FP8 of this kind (it takes codes for numbers): give it what conversion/dequantize.py makes of "
            "the folder"
        )
    return 1 if findings else 0


if __name__ == "__main__":
    run(main)
