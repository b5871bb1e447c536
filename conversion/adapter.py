"""A LoRA adapter folder: read, checked against its base model, turned into weight deltas in Hugging Face's rows.

`lora.json` says rank, alpha, targets and the base's config.json; `weights/` is Megatron torch_dist. Each module
has `linear_in` A (rank, in) and `linear_out` B (out, rank), rows in Megatron's order; its delta is
(alpha / rank) * B @ A, computed in FP32. One adapter serves all routed experts of a layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from conversion.folders import WEIGHTS, require_adapter
from conversion.layout import check_tensors
from conversion.names import Linear, linears
from conversion.plan import PREFIX
from conversion.torch_dist import RowReader, TorchDistReader
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.digest import combine, layer_digest
from nano3.targets import select

_ROUTER = ("weight", "e_score_correction_bias")


@dataclass(frozen=True)
class Contribution:
    """Rows `start` to `start + count` of a Hugging Face tensor get rows `first` and following of a module's delta."""

    path: str
    start: int
    count: int
    first: int


class Adapter:
    """An adapter that fits `arch`. Raises `UserError` when it is incomplete, broken, or of another model."""

    def __init__(self, folder: Path, arch: Arch) -> None:
        self.folder, self.arch = folder, arch
        self.info = _read_info(folder)
        self.rank, self.scale = self.info["rank"], self.info["alpha"] / self.info["rank"]
        recorded = Arch.from_config(self.info["base_config"], f"{folder}/lora.json")
        differences = recorded.differences(arch)
        if differences:
            raise UserError(f"adapter {folder} belongs to another model than the base: {'; '.join(differences)}")
        self.modules = _modules(arch, select(arch, self.info["targets"], self.info["experts"]))
        self._reader = TorchDistReader(folder / WEIGHTS)
        expected = {
            key: shape for path, linear in self.modules.items() for key, shape in self._keys(path, linear).items()
        }
        check_tensors(f"adapter {folder}", self._reader.shapes, expected)
        for key in expected:
            self._reader.dtype(key)  # refuses what is not floating point
            if not torch.isfinite(self._reader.whole(key)).all():
                raise UserError(f"adapter {folder}: {key} holds NaN or infinity; the training diverged")
        self._factors = lru_cache(maxsize=4)(self._read_factors)

    def check_base(self, rows: RowReader) -> bool:
        """Compares the routers of the base, read by `rows`, with those that training recorded.

        Two checkpoints of one architecture (the Base and the post-trained model) pass every check of shapes; their
        routers tell them apart. Returns False when the adapter records none; raises `UserError` when they differ.
        Training in BF16 holds an FP32 router's weight rounded and its bias as it is: both readings of a weight count.
        """
        recorded = self.info.get("router_sha256")
        if not recorded:
            return False
        experts = self.arch.n_routed_experts
        layers = {
            number: [rows(f"backbone.layers.{number}.mixer.gate.{name}", 0, experts) for name in _ROUTER]
            for number in self.arch.moe_layers
        }
        for rounded in (False, True):
            held = {
                number: layer_digest(weight.bfloat16() if rounded else weight, bias)
                for number, (weight, bias) in layers.items()
            }
            if combine(held) == recorded:
                return True
        raise UserError(
            f"adapter {self.folder} was trained on another checkpoint of this architecture: the base's routers are not "
            "those that it records (router_sha256); give the base that was tuned"
        )

    def contributions(self) -> dict[str, list[Contribution]]:
        """Hugging Face tensor name -> what is added to which of its rows."""
        result: dict[str, list[Contribution]] = {}
        for path, linear in self.modules.items():
            begin = 0
            for block in linear.blocks:
                # Blocks of routed experts follow one another, and each gets the whole delta of the shared adapter.
                part = Contribution(path, block.start, block.count, begin % linear.rows)
                result.setdefault(block.name, []).append(part)
                begin += block.count
        return result

    def delta(self, part: Contribution) -> torch.Tensor:
        """The rows of (alpha / rank) * B @ A that `part` names, FP32, (count, in)."""
        low, high = self._factors(part.path)
        return self.scale * (high[part.first : part.first + part.count] @ low)

    def _read_factors(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        low, *high = (self._reader.whole(key).float() for key in self._keys(path, self.modules[path]))
        return low, torch.cat(high)

    def _keys(self, path: str, linear: Linear) -> Mapping[str, tuple[int, ...]]:
        """Keys and shapes of a module's factors: A first, then B, or its sections from top to bottom."""
        layer = path.removesuffix(linear.module)
        prefix = f"{PREFIX}{layer}{linear.module_key}.adapter."
        out = f"{prefix}linear_out.weight"
        keys = {f"{prefix}linear_in.weight": (self.rank, linear.width)}
        if linear.sections:
            return keys | {f"{out}.{section}": (rows, self.rank) for section, rows in linear.sections}
        return keys | {out: (linear.rows, self.rank)}


def _modules(arch: Arch, paths: list[str]) -> dict[str, Linear]:
    """The linear modules at these paths, `decoder.layers.N.<module>`."""
    known = {
        f"decoder.layers.{n}.{linear.module}": linear for n in range(len(arch.layers)) for linear in linears(arch, n)
    }
    return {path: known[path] for path in paths}


def _read_info(folder: Path) -> dict[str, Any]:
    """lora.json, checked field by field."""
    require_adapter(folder)
    try:
        info = json.loads((folder / "lora.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder}/lora.json is not valid JSON ({error}); copy the adapter again") from None
    if not isinstance(info, dict) or info.get("format") != 1:
        raise UserError(f"{folder}/lora.json is not of format 1; use the version of this project that wrote it")
    missing = [name for name in ("rank", "alpha", "targets", "experts", "base_config") if name not in info]
    if missing:
        raise UserError(f"{folder}/lora.json lacks {', '.join(missing)}; copy the adapter again")
    if not isinstance(info["rank"], int) or info["rank"] < 1:
        raise UserError(f"{folder}/lora.json: rank {info['rank']!r} is not a positive integer")
    if not isinstance(info["alpha"], int | float) or not math.isfinite(info["alpha"]):
        raise UserError(f"{folder}/lora.json: alpha {info['alpha']!r} is not a number")
    return info
