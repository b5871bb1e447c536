"""Merges a LoRA adapter into its base model, streaming: no GPU, no model in memory.

    python conversion/merge_lora.py BASE_HF ADAPTER OUT

BASE_HF is the Hugging Face folder (or preset) that was tuned, ADAPTER the folder that training wrote. OUT becomes a
Hugging Face folder that plain transformers loads, none of this project's code needed. Deltas are added in FP32 and each
tensor keeps its dtype; what the adapter does not target is copied bit for bit, config.json and tokenizer too.
OUT/certificate.json says so tensor by tensor; conversion/certify.py recomputes it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.certificate import Work, folder_sha256, norm_ratio, previous_certificate, write_certificate
from conversion.folders import HF_KIND, copy_files, progress, refuse_overlap, require_adapter, require_space
from conversion.identity import hf_facts, refuse_other_base
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
        before = hf_facts(hf)
        refuse_other_base(base, before, adapter.info.base_sha256, adapter_folder)
        previous_certificate(base, before)
        side = side_files(base)
        require_space(out, hf.layout.total_bytes + sum((base / path).stat().st_size for path in side))
        with fresh_output(out, HF_KIND) as folder:
            copy_files(base, side, folder)
            with SafetensorsWriter(folder, hf.layout) as writer, progress(hf.layout.total_bytes, "merge") as bar:
                changes = _write(hf, adapter, writer, bar)
            with HFFolder(folder) as written:
                certificate = write_certificate(folder, base, before, hf_facts(written), _work(adapter, changes))
    changed = certificate["totals"]["changed"]
    biases = len(adapter.router_biases())
    return Summary(len(certificate["tensors"]), len(changes) - biases, same_routers, biases, changed)


def _work(adapter: Adapter, changes: dict[str, dict[str, Any]]) -> Work:
    info = adapter.info
    facts = {"sha256": folder_sha256(adapter.folder), "rank": info.rank, "targets": info.targets}
    return Work("merge", changes, {"adapter": facts, "router": info.router})


def _write(hf: HFFolder, adapter: Adapter, writer: SafetensorsWriter, bar: Any) -> dict[str, dict[str, Any]]:
    """Writes every tensor; returns what the certificate says of those that the adapter targets."""
    parts, biases = adapter.contributions(), adapter.router_biases()
    changes: dict[str, dict[str, Any]] = {}
    for name, entry in hf.layout.entries.items():
        if name in parts:
            size = _adapt(hf, name, parts[name], adapter, writer)
            modules = sorted({part.path for part in parts[name]})
            changes[name] = {"by": modules, "relative_change": size}
        elif name in biases:
            old = hf.rows(name, 0, entry.shape[0])
            new = biases[name].to(old.dtype)
            writer.write(name, 0, new)
            changes[name] = {
                "by": ["router=balance"],
                "relative_change": norm_ratio(_squares(new - old), _squares(old)),
            }
        else:
            for start, count in row_steps(entry.shape[0], entry.row_bytes):
                writer.write(name, start, hf.rows(name, start, count))
        bar.update(entry.stop - entry.start)
    return changes


def _adapt(
    hf: HFFolder, name: str, parts: list[Contribution], adapter: Adapter, writer: SafetensorsWriter
) -> float | None:
    """Writes one targeted tensor with its new values; returns the norm of the change over that of the tensor."""
    change = whole = 0.0
    row_bytes = 4 * hf.layout.entries[name].shape[1]  # in FP32
    for part in parts:
        for begin, count in row_steps(part.count, row_bytes):
            old = hf.rows(name, part.start + begin, count)
            new = adapter.merged(replace(part, first=part.first + begin), old).to(old.dtype)
            writer.write(name, part.start + begin, new)
            change += _squares(new.float() - old.float())
            whole += _squares(old)
    return norm_ratio(change, whole)


def _squares(value: torch.Tensor) -> float:
    return float(value.float().square().sum())


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
