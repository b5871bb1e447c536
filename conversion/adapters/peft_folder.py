"""A Hugging Face PEFT adapter folder, read as if it were ours: the same keys, shapes and `LoraInfo`.

q, k and v become one `linear_qkv`: with one A where theirs are equal, as in what `conversion/adapter.py` exports; else
their A lie above one another and B has a block of columns for each, the same delta at the sum of their ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch

from conversion.adapters.lora_json import LoraInfo, describe, parse_lora_json
from conversion.adapters.peft_file import MAGNITUDE, A, B, Module, PeftFile
from conversion.adapters.peft_names import CONFIG, WEIGHTS, parts
from conversion.checkpoint.torch_dist import RowReader
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.sealed_folder import check_seal
from nano3.tensor_names import adapter_key, adapter_shapes

_KINDS = {"linear_in": A, "linear_out": B, "magnitude": MAGNITUDE}


class PeftFolder:
    """Reads `folder` as an adapter of `arch`, tensor by tensor, under our keys.

    Raises `UserError` when it is broken, incomplete or of another model, and for a kind of adapter that we have not.
    """

    def __init__(self, folder: Path, arch: Arch) -> None:
        check_seal(folder)
        self.folder, self.arch = folder, arch
        self._file = PeftFile(folder, arch)
        self.facts = facts = self._file.facts
        self._shared = facts.get("experts") == "shared"
        self._ranks = {path: self._rank(path) for path in self._file.modules}
        self.info = self._recorded(parse_lora_json(facts, f"{folder / WEIGHTS}'s header")) if facts else self._new()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._makers: dict[str, tuple[str, Callable[[], torch.Tensor]]] = {}
        for path in self._file.modules:
            self._register(path)
        self._whole = lru_cache(maxsize=4)(self._make)

    def dtype(self, key: str) -> str:
        """Dtype of a tensor in safetensors' word."""
        return self._makers[key][0]

    def whole(self, key: str) -> torch.Tensor:
        """A whole tensor."""
        return self._whole(key)

    def read(self, key: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The box of `size` at `offset` of a tensor."""
        return self._whole(key)[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]

    def check_base(self, rows: RowReader) -> None:
        """Raises `UserError` when weights that PEFT stored along (embedding, output layer) are not the base's."""
        for tensor, key in self._file.base_copies.items():
            stored = self._file.stored(key)
            if not torch.equal(stored, rows(tensor, 0, stored.shape[0]).to(stored.dtype)):
                raise UserError(f"{self.folder}: {key} is not the base's {tensor}: another base, or it was trained too")

    def _rank(self, path: str) -> int:
        """The rank as one module of ours."""
        modules = self._file.modules[path]
        if self._file.linears[path].experts or self._one_a(path):
            return modules[0].rank
        return sum(module.rank for module in modules)

    def _one_a(self, path: str) -> bool:
        """Whether all parts of a module are adapted, with the same A."""
        first, *others = self._file.modules[path]
        if len(others) + 1 < len(parts(self._file.linears[path])):
            return False
        low = self._file.get(first, A)
        return all(module.rank == first.rank and torch.equal(self._file.get(module, A), low) for module in others)

    def _new(self) -> LoraInfo:
        """What a `lora.json` would say of an adapter that another tool wrote."""
        config, sizes = self._file.config, {}
        for path, rank in self._ranks.items():
            module = self._file.modules[path][0]
            ratio = rank / module.rank
            sizes[path] = rank, module.alpha * (math.sqrt(ratio) if config.rslora else ratio)
        return describe(self.arch, sizes, config.rslora, config.dora)

    def _recorded(self, info: LoraInfo) -> LoraInfo:
        """What our export recorded in the header, if the adapter still is that."""
        sizes = info.sizes(self.arch)
        for path in [*sizes, *self._ranks]:
            if path not in sizes or path not in self._ranks or sizes[path].rank != self._ranks[path]:
                raise UserError(f"{self.folder}: {path} is not what the header of {WEIGHTS} says; export it again")
            scale = self._file.modules[path][0].scale
            if not math.isclose(sizes[path].scale, scale, rel_tol=1e-9):
                raise UserError(
                    f"{self.folder}: {CONFIG} gives {path} the scale {scale:g}, the header of {WEIGHTS} "
                    f"{sizes[path].scale:g}; undo the change, or export the adapter again"
                )
        return info

    def _register(self, path: str) -> None:
        """Enters the tensors of one module."""
        linear, first = self._file.linears[path], self._file.modules[path][0]
        each = linear.experts > 0 and not self._shared
        begin: dict[str, int] = {}
        for name, shape in adapter_shapes(linear, self._ranks[path], each, self._file.config.dora).items():
            base = name.split(".")[0]
            rows = shape[-1] if base == "magnitude" else shape[-2]
            cut = slice(begin.get(base, 0), begin.get(base, 0) + rows)
            begin[base] = cut.stop
            key = adapter_key(path, linear, name)
            self.shapes[key] = shape
            make = partial(self._experts if linear.experts else self._dense, path, _KINDS[base], cut)
            self._makers[key] = self._file.dtype(first, _KINDS[base]), make

    def _make(self, key: str) -> torch.Tensor:
        return self._makers[key][1]().contiguous()

    def _dense(self, path: str, kind: str, cut: slice) -> torch.Tensor:
        """A (rank, in), or the rows `cut` of B (out, rank) or of the magnitude (out,)."""
        modules, one_a = self._file.modules[path], self._one_a(path)
        values = [self._file.get(module, kind) for module in modules]
        if kind == A:
            return values[0] if one_a else torch.cat(values)
        rows = self._file.linears[path].rows
        result = values[0].new_zeros((rows, self._ranks[path]) if kind == B else rows)
        column = 0
        for module, value in zip(modules, values, strict=True):
            width = self._ranks[path] if one_a else module.rank
            columns = (slice(column, column + width),) if kind == B else ()
            # One module has one scale, the first part's; B takes what a part's own scale is more (a power of two).
            own = value * (module.scale / modules[0].scale) if kind == B else value
            _fill(result, columns, module, own)
            column += 0 if one_a else width
        return result[cut]

    def _experts(self, path: str, kind: str, cut: slice) -> torch.Tensor:
        """The same of all experts, stacked; one of them where our export made copies of a shared adapter."""
        del cut  # grouped experts have no sections
        modules, experts = self._file.modules[path], self._file.linears[path].experts
        value = self._file.get(modules[0], kind)
        if modules[0].part is not None:
            by_number = sorted(modules, key=lambda module: module.part.expert or 0 if module.part else 0)
            stacked = torch.stack([self._file.get(module, kind) for module in by_number])
        elif kind == A:
            stacked = value.view(experts, -1, value.shape[1])
        else:
            stacked = value.view(value.shape[0], -1, experts).permute(2, 0, 1)
        if not self._shared or kind == MAGNITUDE:
            return stacked
        if not (stacked == stacked[0]).all():
            raise UserError(f"{self.folder}: experts of {path} differ, and the header of {WEIGHTS} says they share one")
        return stacked[0]


def _fill(result: torch.Tensor, columns: tuple[slice, ...], module: Module, value: torch.Tensor) -> None:
    """Puts the rows of one part where our module has them."""
    assert module.part is not None
    begin = 0
    for first, count in module.part.spans:
        result[(slice(first, first + count), *columns)] = value[begin : begin + count]
        begin += count
