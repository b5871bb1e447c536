"""Merges a LoRA adapter into its base model, streaming: no GPU, no model in memory.

    python conversion/merge_lora.py BASE_HF ADAPTER OUT

BASE_HF is the Hugging Face folder (or preset) that was tuned, ADAPTER the folder that training wrote. OUT becomes a
Hugging Face folder that plain transformers loads, none of this project's code needed. Deltas are added in FP32 and each
tensor keeps its dtype; what the adapter does not target is copied bit for bit, config.json and tokenizer too.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.folders import HF_KIND, copy_files, progress, refuse_overlap, require_adapter, require_space
from conversion.identity import refuse_other_base
from conversion.plan import row_steps
from conversion.safetensors_io import HFFolder, SafetensorsWriter, side_files
from nano3.arch import resolve_model
from nano3.cli import check_output, fresh_output, run

if TYPE_CHECKING:
    import torch

    from conversion.adapter import Adapter, Contribution


@dataclass
class Summary:
    """What a merge did, in tensors. A targeted tensor is identical when its dtype swallowed the whole delta."""

    total: int
    targeted: int
    same_routers: bool
    balanced: int = 0
    """Correction biases of routers that training moved and the merge replaced."""
    changed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.total} tensors: {self.targeted} targeted, {self.changed} changed, "
            f"{self.total - self.changed} identical bit for bit; routers "
            + ("are those of the training run" if self.same_routers else "not compared, the adapter records none")
            + (
                f"; {self.balanced} correction biases moved in training (router=balance) and replaced"
                * bool(self.balanced)
            )
        )


def merge(base: Path, adapter_folder: Path, out: Path) -> Summary:
    """Writes base + adapter to `out`. Every tensor of both is checked before one is written; raises `UserError`."""
    refuse_overlap(out, base, adapter_folder)
    check_output(out, HF_KIND)
    require_adapter(adapter_folder)
    with HFFolder(base) as hf:
        from conversion.adapter import Adapter

        adapter = Adapter(adapter_folder, hf.arch)
        same_routers = adapter.check_base(hf.rows)
        refuse_other_base(hf, adapter.info.base_sha256, adapter_folder)
        side = side_files(base)
        require_space(out, hf.layout.total_bytes + sum((base / path).stat().st_size for path in side))
        with fresh_output(out, HF_KIND) as folder:
            copy_files(base, side, folder)
            with SafetensorsWriter(folder, hf.layout) as writer, progress(hf.layout.total_bytes, "merge") as bar:
                return _write(hf, adapter, same_routers, writer, bar)


def _write(hf: HFFolder, adapter: Adapter, same_routers: bool, writer: SafetensorsWriter, bar: Any) -> Summary:
    parts, biases = adapter.contributions(), adapter.router_biases()
    summary = Summary(len(hf.layout.entries), len(parts), same_routers, len(biases))
    for name, entry in hf.layout.entries.items():
        if name in parts:
            summary.changed += _adapt(hf, name, parts[name], adapter, writer)
        elif name in biases:
            old = hf.rows(name, 0, entry.shape[0])
            new = biases[name].to(old.dtype)
            writer.write(name, 0, new)
            summary.changed += not _equal(new, old)
        else:
            for start, count in row_steps(entry.shape[0], entry.row_bytes):
                writer.write(name, start, hf.rows(name, start, count))
        bar.update(entry.stop - entry.start)
    return summary


def _adapt(hf: HFFolder, name: str, parts: list[Contribution], adapter: Adapter, writer: SafetensorsWriter) -> bool:
    """Writes one targeted tensor with its new values; says whether any value changed."""
    changed = False
    row_bytes = 4 * hf.layout.entries[name].shape[1]  # in FP32
    for part in parts:
        for begin, count in row_steps(part.count, row_bytes):
            old = hf.rows(name, part.start + begin, count)
            new = adapter.merged(replace(part, first=part.first + begin), old).to(old.dtype)
            writer.write(name, part.start + begin, new)
            changed |= not _equal(new, old)
    return changed


def _equal(new: torch.Tensor, old: torch.Tensor) -> bool:
    import torch

    return torch.equal(new, old)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("base", metavar="BASE_HF", help="Hugging Face model folder, or a preset name such as pico")
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter folder (lora.json and weights/)")
    parser.add_argument("out", metavar="OUT", type=Path, help="Hugging Face model folder to write")
    args = parser.parse_args()
    summary = merge(resolve_model(args.base), args.adapter, args.out)
    print(f"{args.out}: {summary}")
    return 0


if __name__ == "__main__":
    run(main)
