"""LoRA adapters for others, and from them: our checkpoint <-> Hugging Face PEFT. No GPU, no model in memory.

    python conversion/adapter.py export ADAPTER OUT --for peft
    python conversion/adapter.py import PEFT_FOLDER OUT --base BASE_HF
    python conversion/adapter.py accept ADAPTER

`export` writes adapter_config.json and adapter_model.safetensors for one reader: `peft` (PEFT on transformers 5, whose
routed experts are stacked), `peft-legacy` (the model's own code for transformers 4: names `backbone.*`, one module for
each expert) or `vllm`. What the reader cannot represent is an error. `import` writes an adapter folder of ours from any
of them; it merges, and training goes on from it with lora.init_from=OUT. `accept` records what an adapter folder holds
now, after you changed it on purpose: one that is not what was written is refused by every other command.
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
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.adapters.lora_json import read_lora_json
from conversion.adapters.peft_names import CONFIG, CONSUMERS, FACTS, check_consumer
from conversion.adapters.peft_names import WEIGHTS as PEFT_WEIGHTS
from conversion.certificates.certificate import folder_sha256
from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.output_folder import progress, refuse_overlap, require_adapter, unfinished_output
from conversion.checkpoint.pieces import in_parallel
from conversion.checkpoint.safetensors_layout import FileLayout, TensorTable, make_header
from conversion.checkpoint.safetensors_writer import SafetensorsWriter
from conversion.checkpoint.tensor_digests import content_hash, facts_of
from nano3.arch import Arch, resolve_model
from nano3.documents import read_json
from nano3.sealed_folder import MARKER, seal, sealed

if TYPE_CHECKING:
    from conversion.adapters.adapter_folder import Adapter

PEFT_KIND = "peft-adapter"


def export(folder: Path, out: Path, consumer: str) -> int:
    """Writes our adapter `folder` for `consumer`; returns the bytes of the weights. `UserError` before it writes."""
    refuse_overlap(out, folder)
    check_output(out, PEFT_KIND)
    info = read_lora_json(folder)
    assert info.base_config is not None  # `read_lora_json` demands it
    arch = Arch.from_config(info.base_config, f"{folder}/lora.json")
    check_consumer(consumer, arch, info, info.sizes(arch))
    from conversion.adapters.adapter_folder import Adapter
    from conversion.adapters.peft_export import config, pieces

    adapter = Adapter(folder, arch)
    made = {piece.key: piece for piece in pieces(adapter, consumer)}
    table: TensorTable = {name: (piece.dtype, piece.shape) for name, piece in made.items()}
    facts = json.dumps(read_json(folder / "lora.json", dict[str, Any], "copy the adapter again"))
    layout = FileLayout({PEFT_WEIGHTS: make_header(list(table), table, {FACTS: facts})}, None)

    def do(name: str) -> None:
        value = made[name].make()
        writer.write(name, 0, value)
        writer.done(name)
        bar.update(value.nbytes)

    job = {"tool": "export", "for": consumer, "adapter": folder_sha256(folder)}
    with unfinished_output(out, PEFT_KIND, job, layout.total_bytes) as work:
        work.hide(CONFIG).write_text(json.dumps(config(adapter, consumer), indent=1) + "\n")
        with SafetensorsWriter(work, layout) as writer, progress(layout.total_bytes, "export") as bar:
            in_parallel(writer.todo, do)
    return layout.total_bytes


def import_peft(folder: Path, base: Path, out: Path) -> Adapter:
    """Writes the PEFT adapter `folder` of the model `base` as one of ours. `UserError` before anything is written."""
    from conversion.adapters.adapter_folder import Adapter, is_peft
    from conversion.adapters.adapter_writer import KIND, write_adapter

    refuse_overlap(out, folder, base)
    check_output(out, KIND)
    if not is_peft(folder):
        raise UserError(f"{folder} has no {CONFIG}; give an adapter folder of Hugging Face PEFT")
    with HFFolder(base) as hf:
        adapter = Adapter(folder, hf.arch)
        adapter.check_base(hf.rows)
        found = facts_of(hf)
        adapter.info.refuse_other_base(base, content_hash(found), folder)
        facts = adapter.facts or {
            "format": 2,
            **asdict(adapter.info),
            "base_config": hf.config,
            "base_sha256": content_hash(found),
            "router_sha256": adapter.routers_sha256(hf.rows),
        }
    write_adapter(out, {name: adapter.tensor(name) for name in adapter.tensors()}, facts)
    return adapter


def accept(folder: Path) -> list[str]:
    """Seals an adapter folder as it is now; returns the files that are other than they were, came, or went.

    Raises:
        UserError: it is no adapter.
    """
    read_lora_json(folder, as_is=True)
    try:
        before = sealed(folder) or {}
    except UserError:  # damaged, or from a version that had no hashes
        before = {}
    seal(folder)
    after = sealed(folder) or {}
    return [name for name in sorted({*after, *before} - {MARKER}) if before.get(name) != after.get(name)]


def parser() -> argparse.ArgumentParser:
    """The three commands."""
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parse = argparse.ArgumentParser(description=__doc__, **style)
    commands = parse.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="our adapter -> Hugging Face PEFT or vLLM", **style)
    out.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter folder that training wrote")
    out.add_argument("out", metavar="OUT", type=Path, help="PEFT adapter folder to write")
    out.add_argument("--for", dest="consumer", choices=CONSUMERS, required=True, help="who is to load it")
    back = commands.add_parser("import", help="a PEFT adapter -> ours, to merge it or to train on", **style)
    back.add_argument("peft", metavar="PEFT_FOLDER", type=Path, help="folder with adapter_config.json")
    back.add_argument("out", metavar="OUT", type=Path, help="adapter folder to write")
    back.add_argument(
        "--base", required=True, metavar="BASE_HF", help="Hugging Face folder (or preset) of the base that it adapts"
    )
    again = commands.add_parser("accept", help="record what an adapter holds after you changed it on purpose", **style)
    again.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter folder of ours")
    return parse


def main() -> int:
    args = parser().parse_args()
    if args.command == "accept":
        changed = accept(args.adapter)
        print(f"{args.adapter}: accepted; {'changed: ' + ', '.join(changed) if changed else 'nothing had changed'}")
    elif args.command == "export":
        require_adapter(args.adapter)
        size = export(args.adapter, args.out, args.consumer)
        print(f"{args.out}: adapter for {args.consumer}, {size / 1e6:.1f} MB")
    else:
        adapter = import_peft(args.peft, resolve_model(args.base), args.out)
        print(f"{args.out}: adapter of {len(adapter.sizes)} modules; train on with lora.init_from={args.out}")
    return 0


if __name__ == "__main__":
    run(main)
