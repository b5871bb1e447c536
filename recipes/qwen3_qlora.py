"""QLoRA of Qwen3 on one consumer GPU, in plain transformers, PEFT and bitsandbytes: outside the Megatron path.

    python data_prep/prepare.py --input TRAIN.jsonl --tokenizer QWEN3 --out STORE --seq-length 2048
    python recipes/qwen3_qlora.py --model QWEN3 --data STORE --validation HELD --out OUT

Teaches what QLoRA is without this repository's model: NF4 base, packed documents, exact loss mask, early stopping.
Data: token stores made with Qwen3's tokenizer. Cost: one GPU; not measured on one.
Result: OUT/adapter, PEFT's form, of the best validation, and OUT/metrics.jsonl. A killed run leaves nothing.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, fresh_output, run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from finetune import plain_model as plain
from nano3.training.rates import factor


def parser() -> argparse.ArgumentParser:
    """Paths, and the few numbers that matter."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the base, 16 bit")
    parse.add_argument("--data", type=Path, required=True, help="token store to train on")
    parse.add_argument("--validation", type=Path, help="token store that decides the best adapter, and when to stop")
    parse.add_argument("--out", type=Path, required=True, help="folder to write")
    parse.add_argument("--seq-length", type=int, default=2048, help="positions of a pack, as prepared (default: 2048)")
    parse.add_argument("--batch", type=int, default=8, help="packs of a step (default: 8)")
    parse.add_argument("--epochs", type=float, default=3.0, help="passes over the data (default: 3)")
    parse.add_argument("--rank", type=int, default=16, help="of the adapters; alpha is twice it (default: 16)")
    parse.add_argument("--dropout", type=float, default=0.05, help="on the adapters' input (default: 0.05)")
    parse.add_argument("--lr", type=float, default=2e-4, help="highest learning rate, of a cosine (default: 2e-4)")
    parse.add_argument("--validate-every", type=int, default=20, help="steps between validations (default: 20)")
    parse.add_argument("--patience", type=int, default=3, help="validations without a better one before it stops")
    parse.add_argument("--lora", action="store_true", help="leave the base in 16 bit: LoRA, to compare")
    parse.add_argument("--seed", type=int, default=1234, help="of adapters, dropout and the order of packs")
    return parse


def train(args: argparse.Namespace, out: Path) -> str:
    """Writes adapter and metrics into `out`; returns the last words."""
    # 1. The data, and how many steps it makes.
    data = plain.checked_packs(args.data, args.seq_length, args.model)
    held = plain.checked_packs(args.validation, args.seq_length, args.model) if args.validation else None
    data.store.check_trainable()
    steps = math.ceil(args.epochs * len(data) / args.batch)
    rng, warmup = np.random.default_rng(args.seed), steps // 10
    order = np.concatenate([rng.permutation(len(data)) for _ in range(math.ceil(steps * args.batch / len(data)))])
    # 2. The frozen base with its adapters, and the proof that packed documents do not see each other.
    torch.manual_seed(args.seed)
    model = plain.with_lora(plain.load_base(args.model, not args.lora), args.rank, 2 * args.rank, args.dropout).train()
    several = [number for number in range(min(len(data), 64)) if len(data.documents(number)) > 1]
    moved = plain.require_isolation(model, data[several[0]]) if several else 0.0
    print(f"{steps} steps of {args.batch} packs; another document moves a document's logits by {moved:.1e}", flush=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    best, since, ended = math.inf, 0, "the last adapter"
    with (out / "metrics.jsonl").open("w") as metrics:
        for step in range(steps):
            # 3. One step: the mean loss over all supervised tokens of its packs, however they are grouped.
            begin, packs = time.monotonic(), [data[n] for n in order[step * args.batch : (step + 1) * args.batch]]
            weight, loss = sum(float(pack["loss_mask"].sum()) for pack in packs), 0.0
            optimizer.param_groups[0]["lr"] = args.lr * factor(step, "cosine", steps, warmup, 0, 0.0)
            for pack in packs:
                part = plain.weighted_loss(model, pack) / weight
                part.backward()
                loss += float(part.detach())
            norm = float(torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0))
            if not math.isfinite(loss + norm):
                raise UserError(f"step {step + 1}: loss {loss}, gradient norm {norm}; lower --lr. Nothing is written")
            optimizer.step()
            optimizer.zero_grad()
            speed = len(packs) * args.seq_length / (time.monotonic() - begin)
            row: dict[str, float] = {"step": step + 1, "loss": loss, "grad_norm": norm, "tokens_per_second": speed}
            row |= {"lr": optimizer.param_groups[0]["lr"], "memory_gb": plain.peak_memory_gb()}
            # 4. The adapter of the best validation stays; without a better one for a while the run ends.
            if held is not None and ((step + 1) % args.validate_every == 0 or step + 1 == steps):
                row["validation_loss"] = plain.mean_loss(model, held)
                since = 0 if row["validation_loss"] < best else since + 1
                if not since:
                    best, ended = row["validation_loss"], f"the adapter of step {step + 1}"
                    model.save_pretrained(out / "adapter")
            print(json.dumps(row), file=metrics, flush=True)
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
            if since >= args.patience:
                break
    if held is None:
        model.save_pretrained(out / "adapter")
    return ended


def main() -> int:
    args = parser().parse_args()
    with fresh_output(args.out, "qlora-run") as out:
        ended = train(args, out)
    print(f"{args.out}/adapter: {ended}")
    return 0


if __name__ == "__main__":
    run(main)
