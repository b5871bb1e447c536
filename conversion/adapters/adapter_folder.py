"""A LoRA adapter folder, ours or PEFT's: read, checked against its base, turned into rows of Hugging Face's tensors.

`lora.json` says what kind of adapter it is (`lora_json.py`); `weights/` is Megatron torch_dist. Each module has
`linear_in` A (rank, in) and `linear_out` B (out, rank), rows in Megatron's order; its delta is scale * B @ A, in
FP32. One adapter serves all routed experts of a layer, or each has its own: (experts, rank, in) and (experts, out,
rank). A PEFT folder is read under the same names (`peft_folder.py`).
Under DoRA a row of the merged weight is the row of W + delta, scaled to the length that `magnitude` has for it.
`Merged` is base + adapter as a model of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conversion.adapters.lora_json import read_lora_json
from conversion.adapters.peft_folder import PeftFolder
from conversion.adapters.peft_names import CONFIG as PEFT_CONFIG
from conversion.certificates.certificate import folder_sha256, norm_ratio
from conversion.certificates.certificate_json import BALANCE, DEQUANTIZED
from conversion.checkpoint.model_folder import ModelFolder, RowFolder
from conversion.checkpoint.output_folder import WEIGHTS
from conversion.checkpoint.pieces import STEP_BYTES, row_steps
from conversion.checkpoint.safetensors_layout import check_tensors, torch_dtype
from conversion.checkpoint.torch_dist import RowReader, TorchDistReader
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.digest import combine, layer_digest
from nano3.tensor_names import VOCABULARY_KEYS, adaptable, adapter_key, adapter_shapes, linear_tensors

if TYPE_CHECKING:
    from nano3.nf4 import Nf4

CERTIFIED = ("rank", "alpha", "targets", "experts", "rslora", "dora")
"""Settings of an adapter that its merge's certificate names."""
_ROUTER = ("weight", "e_score_correction_bias")

Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""A (rank, in), B (out, rank) and the magnitude (out,), FP32."""


@dataclass(frozen=True)
class Contribution:
    """Rows `start` to `start + count` of a Hugging Face tensor are rows `first` and following of an adapted module, of
    its routed expert `expert` if it is one."""

    path: str
    start: int
    count: int
    first: int
    expert: int = 0


def is_peft(folder: Path) -> bool:
    """Whether the folder is an adapter as Hugging Face PEFT writes them."""
    return (folder / PEFT_CONFIG).is_file()


class Adapter:
    """An adapter that fits `arch`. Raises `UserError` when it is incomplete, broken, or of another model."""

    def __init__(self, folder: Path, arch: Arch) -> None:
        self.folder, self.arch = folder, arch
        self._reader: TorchDistReader | PeftFolder
        if is_peft(folder):
            self._reader = PeftFolder(folder, arch)
            self.info = self._reader.info
        else:
            self.info = read_lora_json(folder)
            self._reader = TorchDistReader(folder / WEIGHTS)
        self._check_arch()
        self.sizes = self.info.sizes(arch)
        linears = adaptable(arch)
        self.modules = {path: linears[path] for path in self.sizes}
        self._check_tensors()
        self.factors = lru_cache(maxsize=4)(self._read_factors)
        """(path, expert) -> A, B and magnitude of a module, of one expert where each has its own."""

    def _check_arch(self) -> None:
        if self.info.base_config is None:
            return
        recorded = Arch.from_config(self.info.base_config, f"{self.folder}'s base_config")
        differences = recorded.differences(self.arch)
        if differences:
            raise UserError(f"adapter {self.folder} belongs to another model than the base: {'; '.join(differences)}")

    def _check_tensors(self) -> None:
        expected = {
            self._key(path, name): self._padded(path, name, shape)
            for path in self.modules
            for name, shape in self._shapes(path).items()
        }
        if self.info.router == "balance":
            expected |= {self._bias_key(number): (self.arch.n_routed_experts,) for number in self.arch.moe_layers}
        check_tensors(f"adapter {self.folder}", self._reader.shapes, expected)
        for key in expected:
            self._reader.dtype(key)  # refuses what is not floating point
            if not torch.isfinite(self._reader.whole(key)).all():
                raise UserError(f"adapter {self.folder}: {key} holds NaN or infinity; the training diverged")

    def check_base(self, rows: RowReader) -> bool:
        """Compares the routers of the base, read by `rows`, with those that training recorded.

        Two checkpoints of one architecture (the Base and the post-trained model) pass every check of shapes; their
        routers tell them apart. Returns False when the adapter records none; raises `UserError` when they differ.
        Training in BF16 holds an FP32 router's weight rounded and its bias as it is: both readings of a weight count.
        """
        if isinstance(self._reader, PeftFolder):
            self._reader.check_base(rows)
        recorded = self.info.router_sha256
        if not recorded:
            return False
        if recorded in (self.routers_sha256(rows, rounded) for rounded in (False, True)):
            return True
        raise UserError(
            f"adapter {self.folder} was trained on another checkpoint of this architecture: the base's routers are not "
            "those that it records (router_sha256); give the base that was tuned"
        )

    def routers_sha256(self, rows: RowReader, rounded: bool = False) -> str:
        """The hash of the routers of a base, read by `rows`, as training records it; `rounded` as training in BF16."""
        held = {}
        for number in self.arch.moe_layers:
            names = (f"backbone.layers.{number}.mixer.gate.{name}" for name in _ROUTER)
            weight, bias = (rows(name, 0, self.arch.n_routed_experts) for name in names)
            held[number] = layer_digest(weight.bfloat16() if rounded else weight, bias)
        return combine(held)

    @property
    def facts(self) -> dict[str, Any]:
        """Of a PEFT adapter the `lora.json` that it was exported from; {} when another tool wrote it."""
        return self._reader.facts if isinstance(self._reader, PeftFolder) else {}

    def certified(self) -> dict[str, Any]:
        """What a certificate says of the adapter that was merged: content, settings, the modules that it adapts."""
        said = {name: getattr(self.info, name) for name in CERTIFIED} | {"modules": sorted(self.modules)}
        some = {name: getattr(self.info, name) for name in ("combined", "base_quantization")}
        return {"sha256": folder_sha256(self.folder), **said, **{name: fact for name, fact in some.items() if fact}}

    def contributions(self) -> dict[str, list[Contribution]]:
        """Hugging Face tensor name -> which of its rows change, and where their new values come from."""
        result: dict[str, list[Contribution]] = {}
        for path, linear in self.modules.items():
            begin = 0
            for block in linear.blocks:  # those of routed experts follow one another
                expert, first = divmod(begin, linear.rows)
                part = Contribution(path, block.start, block.count, first, expert)
                result.setdefault(block.name, []).append(part)
                begin += block.count
        return result

    def router_biases(self) -> dict[str, torch.Tensor]:
        """Correction biases that training moved (`router=balance`), FP32, by the name of the tensor they replace."""
        if self.info.router != "balance":
            return {}
        return {
            f"backbone.layers.{number}.mixer.gate.{_ROUTER[1]}": self._reader.whole(self._bias_key(number)).float()
            for number in self.arch.moe_layers
        }

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor as our own folders store it: key -> (dtype in safetensors' word, shape)."""
        return {key: (self._reader.dtype(key), shape) for key, shape in self._reader.shapes.items()}

    def tensor(self, key: str) -> torch.Tensor:
        """One of `tensors`, whole."""
        return self._reader.whole(key)

    def dtype(self, path: str, name: str) -> str:
        """Dtype of a module's tensors that begin with `name` (`linear_in`, ...), in safetensors' word."""
        first = next(full for full in self._shapes(path) if full.startswith(name))
        return self._reader.dtype(self._key(path, first))

    def merged(self, part: Contribution, old: torch.Tensor) -> torch.Tensor:
        """The new values of the rows `old`, (count, in), that `part` names, FP32."""
        low, high, magnitude = self.factors(part.path, part.expert)
        rows = slice(part.first, part.first + len(old))
        old = old.float()
        new = old + self.sizes[part.path].scale * (high[rows] @ low)
        if magnitude is None:
            return new
        lengths = new.norm(dim=1)
        scale = torch.where(old.any(dim=1), magnitude[rows] / lengths.clamp_min(torch.finfo(torch.float32).tiny), 1)
        return new * scale[:, None]

    def _read_factors(self, path: str, expert: int) -> Factors:
        low, *rest = (self._read(path, name, expert) for name in self._shapes(path))
        parts = max(1, len(self.modules[path].sections))
        return low, torch.cat(rest[:parts]), torch.cat(rest[parts:]) if self.info.dora else None

    def _read(self, path: str, name: str, expert: int) -> torch.Tensor:
        """A tensor of one expert's adapter, padded rows left out; of a module with one adapter the whole tensor."""
        shape = self._shapes(path)[name]
        offset = (0,) * len(shape)
        stacked = self._each(path) or (name == "magnitude" and self.modules[path].experts)
        if stacked:
            offset, shape = (expert, *offset[1:]), (1, *shape[1:])
        value = self._reader.read(self._key(path, name), offset, shape).float()
        return value[0] if stacked else value

    def _each(self, path: str) -> bool:
        return self.info.experts == "each" and self.modules[path].experts > 0

    def _shapes(self, path: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a module's tensors, padded rows left out: A, then B, then the magnitude."""
        return adapter_shapes(self.modules[path], self.sizes[path].rank, self._each(path), self.info.dora)

    def _key(self, path: str, name: str) -> str:
        return adapter_key(path, self.modules[path], name)

    def _bias_key(self, number: int) -> str:
        return f"module.decoder.layers.{number}.mlp.router.expert_bias"

    def _padded(self, path: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape as stored: tensors with a row for each token may have rows of padding behind them."""
        stored = self._reader.shapes.get(self._key(path, name))
        if f"{path}.weight" in VOCABULARY_KEYS and name != "linear_in.weight" and stored and stored[0] > shape[0]:
            return stored[0], *shape[1:]
        return shape


class Merged(RowFolder):
    """The merged model. `adapter` fits `base`; deltas are added in FP32, and each tensor keeps its dtype.

    `dequantized`: onto what the linear layers are after NF4, those without an adapter too.
    Rows of one tensor come from one thread at a time, each once; tensors may have threads of their own.
    """

    def __init__(self, base: ModelFolder, adapter: Adapter, dequantized: bool = False) -> None:
        self.base, self.path, self.side = base, base.path, base.side
        self.arch, self.layout = base.arch, base.layout
        self.adapter = adapter
        self._parts, self._biases = adapter.contributions(), adapter.router_biases()
        self._in_nf4 = linear_tensors(base.arch) if dequantized else frozenset()
        self._last = threading.local()
        self.targeted = tuple(dict.fromkeys((*self._parts, *self._biases, *sorted(self._in_nf4))))
        """Tensors that may change; all others are those of the base, bit for bit."""
        self._sums = {name: [0.0, 0.0] for name in self.targeted}
        self._seen = dict.fromkeys(self.targeted, 0)

    def fill_rows(self, buffer: memoryview, name: str, start: int) -> None:
        """Fills `buffer` with merged rows `start` and following."""
        import torch

        entry = self.layout.entries[name]
        self.base.read_into(buffer, name, start * entry.row_bytes)
        if name in self._seen:
            rows = torch.frombuffer(buffer, dtype=torch_dtype(entry.dtype)).view(-1, *entry.shape[1:])
            for begin, count in self.steps(name, len(rows)):
                part = rows[begin : begin + count]
                part.copy_(self.new_rows(name, start + begin, part))

    def new_rows(self, name: str, start: int, old: torch.Tensor) -> torch.Tensor:
        """What becomes of the rows `old`, which begin at row `start` of a targeted tensor; in their dtype."""
        frozen = old
        if name in self._in_nf4:
            frozen = self._frozen(name).cut(start, len(old), slice(0, old.shape[1])).values(old.dtype)
        new = self._biases[name][start : start + len(old)].to(old.dtype) if name in self._biases else frozen.clone()
        for part in self._parts.get(name, ()):
            low, high = max(start, part.start), min(start + len(old), part.start + part.count)
            if low < high:
                moved = replace(part, first=part.first + low - part.start)
                new[low - start : high - start] = self.adapter.merged(moved, frozen[low - start : high - start])
        self._sums[name][0] += _squares(new.float() - old.float())
        self._sums[name][1] += _squares(old)
        self._seen[name] += len(old)
        return new

    def _frozen(self, name: str) -> Nf4:
        """A whole tensor in NF4; the last one is kept, as a thread takes one tensor after the other."""
        from nano3.nf4 import quantize  # here: it loads Numba, and most merges are onto the original weights

        if getattr(self._last, "name", None) != name:
            try:
                self._last.value = quantize(self.base.rows(name, 0, self.layout.entries[name].rows))
            except ValueError as error:
                raise UserError(f"{self.path}: {name}: {error}; merge onto the original weights") from error
            self._last.name = name
        found: Nf4 = self._last.value
        return found

    def steps(self, name: str, rows: int) -> Iterator[tuple[int, int]]:
        """(first, number) of the rows of a targeted tensor that are computed in one go, in FP32."""
        width = self.layout.entries[name].shape[1:] or (1,)
        return row_steps(rows, 4 * width[0], STEP_BYTES)

    def change(self, name: str) -> dict[str, Any]:
        """What the certificate says of a targeted tensor: changed by which modules, and how much.

        Computes it anew where the rows have not passed: a killed merge had written them.
        """
        rows = self.layout.entries[name].rows
        if self._seen[name] != rows:
            self._sums[name], self._seen[name] = [0.0, 0.0], 0
            for begin, count in self.steps(name, rows):
                self.new_rows(name, begin, self.base.rows(name, begin, count))
        modules = {part.path for part in self._parts.get(name, ())} | ({DEQUANTIZED} if name in self._in_nf4 else set())
        modules = modules or {BALANCE}
        return {"by": sorted(modules), "relative_change": norm_ratio(*self._sums[name])}


def _squares(value: torch.Tensor) -> float:
    return float(value.float().square().sum())
