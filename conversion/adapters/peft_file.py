"""The files of a Hugging Face PEFT adapter, checked against a model: which of its modules are ours, and their tensors.

Whatever is missing, unknown, or of another shape or rank is refused by name when the folder is opened; tensors are read
one at a time.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from conversion.adapters.peft_config import read_peft_config
from conversion.adapters.peft_names import (
    CONFIG,
    FACTS,
    FUSED,
    KINDS,
    PARAMETERS,
    PREFIX,
    WEIGHTS,
    Part,
    parts,
    tensor_name,
)
from conversion.checkpoint.safetensors_layout import PLAIN_BYTES, some
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.documents import parse_json
from nano3.targets import EMBEDDING
from nano3.tensor_names import Linear, adaptable

A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.(?P<kind>{'|'.join(KINDS)})(\.weight)?")
_BASE = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+?)(\.base_layer)?\.weight")
_TRANSPOSED = {A: "lora_embedding_B", B: "lora_embedding_A"}
"""An embedding's matrices: those of a linear layer with its weight transposed."""


@dataclass(frozen=True)
class Module:
    """One adapted module of the file: the keys of its tensors by kind, its rank, alpha and scale.

    `part` is what it covers of our module at `path`; None for the stacked experts of a layer.
    """

    name: str
    path: str
    part: Part | None
    keys: dict[str, str]
    rank: int
    alpha: float
    scale: float


class PeftFile:
    """An adapter folder that fits `arch`. Raises `UserError` when it is broken, incomplete or of another model."""

    def __init__(self, folder: Path, arch: Arch) -> None:
        self.folder, self.arch = folder, arch
        self.config = read_peft_config(folder)
        self._file = open_weights(folder / WEIGHTS)
        self.linears = adaptable(arch)
        self._owners = {part.tensor: (path, part) for path, linear in self.linears.items() for part in parts(linear)}
        self.base_copies: dict[str, str] = {}
        """Hugging Face tensor -> key of its copy: PEFT stores embedding and output layer along when it adapts one."""
        found: dict[str, list[Module]] = {}
        for module in self._read_modules():
            found.setdefault(module.path, []).append(module)
        self.modules = {path: found[path] for path in self.linears if path in found}
        """Path of our module -> what the file has for it, in the order of the model."""
        if not self.modules:
            raise UserError(f"{folder / WEIGHTS} holds no adapter")
        for path in self.modules:
            self._check(path)

    @property
    def facts(self) -> dict[str, Any]:
        """The `lora.json` that `conversion/adapter.py export` put into the header; {} when another tool wrote it."""
        text = (self._file.metadata() or {}).get(FACTS)
        where = f"{self.folder / WEIGHTS}: {FACTS} in the header"
        return parse_json(text, dict[str, Any], where, "copy the adapter again") if text else {}

    def get(self, module: Module, kind: str) -> torch.Tensor:
        """A (rank, in), B (out, rank) or the magnitude (out,) of a module; of stacked experts as PEFT stacks them."""
        if module.path == EMBEDDING:
            return self._file.get_tensor(module.keys[_TRANSPOSED[kind]]).T
        return self._file.get_tensor(module.keys[kind])

    def dtype(self, module: Module, kind: str) -> str:
        """Dtype of one of these in safetensors' word."""
        key = module.keys[_TRANSPOSED[kind] if module.path == EMBEDDING else kind]
        return self._file.get_slice(key).get_dtype()

    def stored(self, key: str) -> torch.Tensor:
        """A tensor by its key."""
        return self._file.get_tensor(key)

    def _read_modules(self) -> list[Module]:
        grouped: dict[str, dict[str, str]] = {}
        for key in sorted(self._file.keys()):
            if match := _KEY.fullmatch(key):
                grouped.setdefault(match["module"], {})[match["kind"]] = key
            elif (match := _BASE.fullmatch(key)) and tensor_name(match["module"]) in self._owners:
                self.base_copies[tensor_name(match["module"])] = key
            else:
                raise UserError(f"{self.folder / WEIGHTS} holds {key}, which is no tensor of a LoRA adapter")
        return [self._module(name, keys, grouped) for name, keys in grouped.items()]

    def _module(self, name: str, keys: dict[str, str], names: dict[str, Any]) -> Module:
        part, full = None, name
        if fused := FUSED.fullmatch(name):
            last = self._fused_target(fused["experts"], fused["nested"], names)
            full = f"{fused['experts']}.{PARAMETERS[last]}"
            path = f"decoder.layers.{name.split('.')[2]}.mlp.experts.{last}"
        else:
            path, part = self._owners.get(tensor_name(name), ("", None))
        if path not in self.linears:
            raise UserError(
                f"{self.folder / WEIGHTS} adapts {name}, which this model (pattern {self.arch.pattern}) does not have"
            )
        wanted = set(_TRANSPOSED.values()) if path == EMBEDDING else {A, B}
        wanted |= {MAGNITUDE} if self.config.dora else set()
        if keys.keys() != wanted:
            raise UserError(
                f"{self.folder / WEIGHTS}: {name} has {some(sorted(keys))}; {CONFIG} requires {some(sorted(wanted))}"
            )
        if self.config.dora and (path == EMBEDDING or part is None):
            raise UserError(f"{self.folder}: DoRA of {name} is none that training here knows (lengths by row)")
        config = self.config
        return Module(name, path, part, keys, config.rank_of(full), config.alpha_of(full), config.scale_of(full))

    def _fused_target(self, experts: str, nested: str, names: dict[str, Any]) -> str:
        """Which of our modules the wrapper of stacked experts adapts, by PEFT's order of nesting."""
        if f"{experts}.base_layer" in names and experts in names:
            return "linear_fc1" if nested == ".base_layer" else "linear_fc2"
        targets = [last for last, name in PARAMETERS.items() if self.config.targets(f"{experts}.{name}")]
        if nested or len(targets) != 1:
            raise UserError(
                f"{self.folder}: {WEIGHTS} has one adapter for {experts}, and target_parameters of {CONFIG} name "
                f"{len(targets)} of its two matrices"
            )
        return targets[0]

    def _check(self, path: str) -> None:
        modules, linear = self.modules[path], self.linears[path]
        for module in modules:
            for kind, shape in self._shapes(module, linear).items():
                found = tuple(self._file.get_slice(module.keys[kind]).get_shape())
                if found != shape:
                    raise UserError(
                        f"{self.folder}: {module.keys[kind]} has shape {found}; rank {module.rank} in {CONFIG} and "
                        f"this base require {shape}: an adapter of another rank or base"
                    )
        there = {module.part.expert for module in modules if module.part is not None}
        missing = [f"experts.{number}" for number in range(linear.experts) if there and number not in there]
        if missing:
            raise UserError(f"{self.folder} lacks the adapters of {some(missing)} of {path}, and has other experts'")
        self._check_alike(modules, linear)

    def _check_alike(self, modules: list[Module], linear: Linear) -> None:
        """What becomes one module of ours must be alike in all but the values; the rank may differ of q, k and v.

        Their scales may differ by a power of two: the rows of B take that factor, and not a bit is lost.
        """
        first = modules[0]
        for module in modules:
            exact = not linear.experts and math.frexp(module.scale / first.scale)[0] == 0.5
            for what, mine, other in (
                ("scale", first.scale if exact else module.scale, first.scale),
                ("rank", module.rank if linear.experts else 0, first.rank if linear.experts else 0),
                *((f"dtype of {kind}", self.dtype(module, kind), self.dtype(first, kind)) for kind in (A, B)),
            ):
                if mine != other:
                    raise UserError(
                        f"{self.folder}: {module.name} and {first.name} are one module in Megatron and differ in "
                        f"{what}: {mine} and {other}"
                    )
            if self.dtype(module, A) not in PLAIN_BYTES:
                raise UserError(
                    f"{self.folder}: {module.name} is {self.dtype(module, A)}; known are {some(PLAIN_BYTES)}"
                )
        if self.config.dora and len(modules) < len(parts(linear)):
            names = some(module.name for module in modules)
            raise UserError(f"{self.folder}: DoRA of {names} alone; in Megatron q, k and v have it together")

    def _shapes(self, module: Module, linear: Linear) -> dict[str, tuple[int, ...]]:
        count = linear.experts if module.part is None else 1
        rows = linear.rows if module.part is None else module.part.rows
        low, high = (module.rank * count, linear.width), (rows, module.rank * count)
        if module.path == EMBEDDING:
            return {_TRANSPOSED[A]: low[::-1], _TRANSPOSED[B]: high[::-1]}
        shapes: dict[str, tuple[int, ...]] = {A: low, B: high}
        return shapes | ({MAGNITUDE: (rows,)} if self.config.dora else {})


def open_weights(path: Path) -> Any:
    """The open file of an adapter's weights. Raises `UserError` where it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {WEIGHTS}; save the adapter as safetensors (PEFT's default)")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}): copy the adapter again") from None
