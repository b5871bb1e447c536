"""Merges a LoRA adapter into its base model, streaming: no GPU, no model in memory.

    python conversion/merge_lora.py BASE ADAPTER OUT [--nemo]

BASE is the model that was tuned: a Hugging Face folder (Qwen3's too), a preset, or a NeMo checkpoint. ADAPTER is the
folder that training wrote, or one of Hugging Face PEFT. OUT becomes a Hugging Face folder that plain transformers
loads, none of this project's code needed; with --nemo a NeMo checkpoint, from which training starts on any layout.
Deltas are added in FP32 and each tensor keeps its dtype; what the adapter does not target is copied bit for bit,
config.json and tokenizer too. An adapter that was trained on a base in 4 bits is added to the original weights; --base
dequantized adds it to the weights that it saw, and then every linear layer changes.
OUT/certificate.json says so tensor by tensor; conversion/certify.py recomputes it.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
    from nano3.outputs import check_output
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.adapters.lora_json import training_facts
from conversion.adapters.peft_names import CONFIG as PEFT_CONFIG
from conversion.certificates.certificate import Claim, previous_certificate, write_certificate
from conversion.checkpoint.model_folder import named_model, open_model, side_files
from conversion.checkpoint.output_folder import (
    HF_KIND,
    NEMO_KIND,
    UnfinishedOutput,
    add_push,
    check_room,
    copy_files,
    refuse_overlap,
    require_adapter,
    unfinished_output,
)
from conversion.checkpoint.pieces import CHUNK_BYTES
from conversion.checkpoint.plan import make_plan
from conversion.checkpoint.safetensors_writer import Passage, rewrite
from conversion.checkpoint.tensor_digests import Fact, content_hash, scan
from conversion.hf_to_nemo import write_checkpoint
from conversion.identity import record
from conversion.push import Hub
from nano3.hf_config import is_plain

if TYPE_CHECKING:
    from conversion.adapters.adapter_folder import Adapter, Merged


@dataclass
class Summary:
    """What a merge did, in tensors. A targeted tensor is identical when its dtype swallowed the whole delta."""

    total: int
    targeted: int
    same_routers: bool | None
    """False: the adapter records none. None: the model has none."""
    balanced: int = 0
    """Correction biases of routers that training moved and the merge replaced."""
    changed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.total} tensors: {self.targeted} targeted, {self.changed} changed, "
            f"{self.total - self.changed} identical bit for bit" + self._of_routers()
        )

    def _of_routers(self) -> str:
        if self.same_routers is None:
            return ""
        found = "are those of the training run" if self.same_routers else "not compared, the adapter records none"
        moved = f"; {self.balanced} correction biases moved in training (router=balance) and replaced"
        return f"; routers {found}" + moved * bool(self.balanced)


def merge(
    base: Path, adapter_folder: Path, out: Path, nemo: bool = False, context: bool = True, dequantized: bool = False
) -> Summary:
    """Writes base + adapter to `out`. Every tensor of both is checked before one is written; raises `UserError`.

    `nemo`: a NeMo checkpoint in place of a Hugging Face folder, with NeMo's own `context/` unless told otherwise.
    `dequantized`: onto the base as NF4 has it, for an adapter that was trained on that.
    """
    kind = NEMO_KIND if nemo else HF_KIND
    # Refuse what cannot be right before a tensor is read: that takes minutes for a real model.
    refuse_overlap(out, base, adapter_folder)
    check_output(out, kind)
    if is_plain(base):
        return _merge_plain(base, adapter_folder, out, nemo or dequantized)
    if not (adapter_folder / PEFT_CONFIG).is_file():
        require_adapter(adapter_folder)
    with open_model(base) as model:
        from conversion.adapters.adapter_folder import Adapter, Merged

        # Adapter and base fit by name and shape, and the disk has room.
        adapter = Adapter(adapter_folder, model.arch)
        adapter.info.refuse_gate(adapter_folder, "a merge")
        same_routers = adapter.check_base(model.rows)
        if dequantized and adapter.info.base_quantization is None:
            raise UserError(f"--base dequantized: {adapter_folder} was not trained on a quantized base; leave it out")
        side = side_files(model.side)
        needed = model.layout.total_bytes + sum((model.side / path).stat().st_size for path in side)
        check_room(out, needed)
        # One pass over the base: NaN, and whether it is the one that was tuned and still what its certificate says.
        before, _ = scan(model)
        adapter.info.refuse_other_base(base, content_hash(before), adapter_folder)
        previous_certificate(base, before)
        # What decides the bytes of the output is the job: a killed merge is resumed only by the same one.
        merged, facts = Merged(model, adapter, dequantized), _facts(adapter, dequantized)
        job = {"tool": "merge", "base": {name: fact.sha256 for name, fact in before.items()}, **facts}
        job |= {"layout": model.layout.to_json(), "chunk": CHUNK_BYTES if nemo else None}
        with unfinished_output(out, kind, job, needed) as work:
            after, changes = _write_nemo(work, merged, context) if nemo else _write_hf(work, merged)
            certificate = write_certificate(work.folder, base, before, after, Claim("merge", changes, facts))
            if nemo:
                record(work.folder, after, certificate["base"])
    biases = len(adapter.router_biases())
    changed = certificate["totals"]["changed"]
    return Summary(len(certificate["tensors"]), len(changes) - biases, same_routers, biases, changed)


def _merge_plain(base: Path, adapter: Path, out: Path, otherwise: bool) -> Summary:
    """Of a model that is tuned in plain transformers. Raises `UserError` when it is to be merged `otherwise`."""
    from conversion.adapters.plain_merge import merge_plain

    if otherwise:
        raise UserError(f"{base} is tuned in plain transformers: leave out --nemo and --base")
    certificate = merge_plain(base, adapter, out)
    targeted = len(certificate["adapter"]["modules"])
    return Summary(len(certificate["tensors"]), targeted, None, changed=certificate["totals"]["changed"])


def _facts(adapter: Adapter, dequantized: bool) -> dict[str, Any]:
    """What the certificate says of the merge as a whole."""
    facts = {"adapter": adapter.certified(), "router": adapter.info.router, "training": training_facts(adapter.folder)}
    onto = {"merged_onto": "dequantized" if dequantized else "original"}
    return facts | (onto if adapter.info.base_quantization else {})


Written = tuple[dict[str, Fact], dict[str, dict[str, Any]]]
"""Facts of all tensors as they were written, and what changed of the targeted ones."""


def _write_hf(work: UnfinishedOutput, merged: Merged) -> Written:
    base = merged.base
    copy_files(base.side, side_files(base.side), work.folder)
    changes = {name: partial(_adapt, merged) for name in merged.targeted}
    written = rewrite(base, work, base.layout, changes, {}, "merge")
    return written.facts, {name: written.notes[name] for name in merged.targeted}


def _adapt(merged: Merged, passage: Passage) -> dict[str, Any]:
    """Writes one targeted tensor with its new values; says which modules changed it, and how much."""
    for begin, count in merged.steps(passage.name, passage.entry.rows):
        passage.write(begin, merged.new_rows(passage.name, begin, passage.read(begin, count)))
    return merged.change(passage.name)


def _write_nemo(work: UnfinishedOutput, merged: Merged, context: bool) -> Written:
    facts = write_checkpoint(work, merged, make_plan(merged.arch, merged.dtypes, merged.carried), context)
    return facts, {name: merged.change(name) for name in merged.targeted}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("base", metavar="BASE", help="Hugging Face folder, NeMo checkpoint, or a preset such as pico")
    parser.add_argument(
        "adapter", metavar="ADAPTER", type=Path, help="adapter folder (lora.json and weights/), or one of PEFT"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="model folder to write")
    parser.add_argument("--nemo", action="store_true", help="write a NeMo checkpoint, not a Hugging Face folder")
    parser.add_argument(
        "--base",
        dest="onto",
        choices=["original", "dequantized"],
        default="original",
        help="of an adapter that was trained on a base in 4 bits (lora.base=nf4): add it to the original weights "
        "(default), or to the dequantized ones",
    )
    add_push(parser)
    args = parser.parse_args()
    if args.nemo and args.push:
        raise UserError("--push uploads Hugging Face folders; leave out --nemo or --push")
    hub = Hub(args.push) if args.push else None  # refuses at once what would fail after hours
    dequantized = args.onto == "dequantized"
    summary = merge(named_model(args.base), args.adapter, args.out, args.nemo, dequantized=dequantized)
    print(f"{args.out}: {summary}")
    if hub is not None:
        print(hub.upload(args.out))
    return 0


if __name__ == "__main__":
    run(main)
