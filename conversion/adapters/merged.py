"""Base + adapter as a model of its own: every row as the merge has it, and how much each tensor changed on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from conversion.certificates.certificate import norm_ratio
from conversion.certificates.certificate_json import BALANCE
from conversion.checkpoint.hf_folder import ModelFolder, RowFolder, torch_dtype
from conversion.checkpoint.pieces import STEP_BYTES, row_steps

if TYPE_CHECKING:
    import torch

    from conversion.adapters.adapter_folder import Adapter


class Merged(RowFolder):
    """The merged model. `adapter` fits `base`; deltas are added in FP32, and each tensor keeps its dtype.

    Rows of one tensor come from one thread at a time, each once; tensors may have threads of their own.
    """

    def __init__(self, base: ModelFolder, adapter: Adapter) -> None:
        self.base, self.path, self.side = base, base.path, base.side
        self.arch, self.layout = base.arch, base.layout
        self.adapter = adapter
        self._parts, self._biases = adapter.contributions(), adapter.router_biases()
        self.targeted = (*self._parts, *self._biases)
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
        new = self._biases[name][start : start + len(old)].to(old.dtype) if name in self._biases else old.clone()
        for part in self._parts.get(name, ()):
            low, high = max(start, part.start), min(start + len(old), part.start + part.count)
            if low < high:
                moved = replace(part, first=part.first + low - part.start)
                new[low - start : high - start] = self.adapter.merged(moved, old[low - start : high - start])
        self._sums[name][0] += _squares(new.float() - old.float())
        self._sums[name][1] += _squares(old)
        self._seen[name] += len(old)
        return new

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
        modules = {part.path for part in self._parts.get(name, ())} or {BALANCE}
        return {"by": sorted(modules), "relative_change": norm_ratio(*self._sums[name])}


def _squares(value: torch.Tensor) -> float:
    return float(value.float().square().sum())
