"""Merges a LoRA adapter into its base model, streaming: no GPU, no model in memory.

    python conversion/merge_lora.py BASE_HF ADAPTER OUT

BASE_HF is the Hugging Face folder (or preset) that was tuned, ADAPTER the folder that training wrote, or an adapter of
Hugging Face PEFT. OUT becomes a
Hugging Face folder that plain transformers loads, none of this project's code needed. Deltas are added in FP32 and each
tensor keeps its dtype; what the adapter does not target is copied bit for bit, config.json and tokenizer too.
OUT/certificate.json says so tensor by tensor; conversion/certify.py recomputes it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.certificate import Claim, folder_sha256, norm_ratio, previous_certificate, write_certificate
from conversion.certificate_json import BALANCE
from conversion.folders import HF_KIND, copy_files, refuse_overlap, require_adapter
from conversion.identity import refuse_other_base
from conversion.peft_names import CONFIG as PEFT_CONFIG
from conversion.rewrite import STEP_BYTES, Change, Passage, rewrite
from conversion.safetensors_io import HFFolder, side_files
from conversion.scan import scan
from conversion.training_run import training_facts
from conversion.work import check_room, work_folder
from nano3.arch import resolve_model
from nano3.cli import check_output, run

if TYPE_CHECKING:
    import torch

    from conversion.adapter_folder import Adapter, Contribution


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
    if not (adapter_folder / PEFT_CONFIG).is_file():
        require_adapter(adapter_folder)
    with HFFolder(base) as hf:
        from conversion.adapter_folder import Adapter

        adapter = Adapter(adapter_folder, hf.arch)
        same_routers = adapter.check_base(hf.rows)
        side = side_files(base)
        needed = hf.layout.total_bytes + sum((base / path).stat().st_size for path in side)
        check_room(out, needed)
        before, _ = scan(hf)
        refuse_other_base(base, before, adapter.info.base_sha256, adapter_folder)
        previous_certificate(base, before)
        declared = _claim(adapter, {})
        job = {"tool": "merge", "base": {name: fact.sha256 for name, fact in before.items()}, **declared.facts}
        with work_folder(out, HF_KIND, job | {"layout": hf.layout.to_json()}, needed) as work:
            copy_files(base, side, work.folder)
            written = rewrite(hf, work, hf.layout, _changes(adapter), {}, "merge")
            changes = {name: note for name, note in written.notes.items() if note is not None}
            certificate = write_certificate(work.folder, base, before, written.facts, _claim(adapter, changes))
    changed = certificate["totals"]["changed"]
    biases = len(adapter.router_biases())
    return Summary(len(certificate["tensors"]), len(changes) - biases, same_routers, biases, changed)


def _claim(adapter: Adapter, changes: dict[str, dict[str, Any]]) -> Claim:
    info = adapter.info
    facts: dict[str, Any] = {"sha256": folder_sha256(adapter.folder)}
    facts |= {name: getattr(info, name) for name in ("rank", "alpha", "targets", "experts", "rslora", "dora")}
    facts["modules"] = sorted(adapter.modules)
    run = training_facts(adapter.folder)
    return Claim("merge", changes, {"adapter": facts, "router": info.router, "training": run})


def _changes(adapter: Adapter) -> dict[str, Change]:
    """What becomes of every tensor that the adapter targets."""
    changes: dict[str, Change] = {
        name: partial(_adapt, adapter, parts) for name, parts in adapter.contributions().items()
    }
    return changes | {name: partial(_replace, bias) for name, bias in adapter.router_biases().items()}


def _replace(bias: torch.Tensor, passage: Passage) -> dict[str, Any]:
    """Writes a correction bias that training moved."""
    old = passage.read(0, len(bias))
    new = bias.to(old.dtype)
    passage.write(0, new)
    return {"by": [BALANCE], "relative_change": norm_ratio(_squares(new - old), _squares(old))}


def _adapt(adapter: Adapter, parts: list[Contribution], passage: Passage) -> dict[str, Any]:
    """Writes one targeted tensor with its new values; says which modules and how large the change is."""
    change = whole = 0.0
    step = max(1, STEP_BYTES // (4 * passage.entry.shape[1]))  # in FP32
    for part in parts:
        for begin in range(0, part.count, step):
            old = passage.read(part.start + begin, min(step, part.count - begin))
            new = adapter.merged(replace(part, first=part.first + begin), old).to(old.dtype)
            passage.write(part.start + begin, new)
            change += _squares(new.float() - old.float())
            whole += _squares(old)
    return {"by": sorted({part.path for part in parts}), "relative_change": norm_ratio(change, whole)}


def _squares(value: torch.Tensor) -> float:
    return float(value.float().square().sum())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("base", metavar="BASE_HF", help="Hugging Face model folder, or a preset name such as pico")
    parser.add_argument(
        "adapter", metavar="ADAPTER", type=Path, help="adapter folder (lora.json and weights/), or one of PEFT"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="Hugging Face model folder to write")
    args = parser.parse_args()
    summary = merge(resolve_model(args.base), args.adapter, args.out)
    print(f"{args.out}: {summary}")
    return 0


if __name__ == "__main__":
    run(main)
