"""QLoRA of Qwen3 on one consumer GPU, in plain transformers, PEFT and bitsandbytes: outside the Megatron path.

    python data_prep/prepare.py --input TRAIN.jsonl --tokenizer QWEN3 --out STORE --seq-length 2048
    python recipes/qwen3_qlora.py --model QWEN3 --data STORE --validation HELD --out OUT
    python conversion/merge_lora.py QWEN3 OUT/adapter OUT/merged
    python evaluation/evaluate.py QWEN3 --questions Q.jsonl --thinking --out OUT/scores-base.json
    python evaluation/evaluate.py OUT/merged --questions Q.jsonl --thinking --out OUT/scores.json
    python evaluation/report.py OUT

Teaches what QLoRA is without this repository's model: NF4 base, packed documents, exact loss mask, early stopping.
Data: stores made with Qwen3's tokenizer. Cost: one GPU; not measured.
Result: OUT/adapter, PEFT's form, of the best validation. Killed, the same command resumes from the last validation.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch

from finetune import plain_model as plain
from finetune.plain_run import PlainRun, described, open_run
from nano3.training.rates import factor


def parser() -> argparse.ArgumentParser:
    """Paths, and the few numbers that matter."""
    form = argparse.RawDescriptionHelpFormatter
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
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
    parse.add_argument("--validate-every", type=int, default=20, help="steps between checkpoints (default: 20)")
    parse.add_argument("--patience", type=int, default=3, help="validations without a better one before it stops")
    parse.add_argument("--lora", action="store_true", help="leave the base in 16 bit: LoRA, to compare")
    parse.add_argument("--seed", type=int, default=1234, help="of adapters, dropout and the order of packs")
    return parse


def train(args: argparse.Namespace, folder: PlainRun) -> None:
    """Trains from where the run in `folder` is until the last step, or until validation gets no better."""
    # 1. The data: which packs each step has.
    data = plain.checked_packs(args.data, args.seq_length, args.model)
    held = plain.checked_packs(args.validation, args.seq_length, args.model) if args.validation else None
    data.store.check_trainable()
    order = plain.order_of_packs(len(data), args.epochs, args.batch, args.seed)
    # 2. The frozen base with its adapters, and the proof that packed documents do not see each other.
    torch.manual_seed(args.seed)
    model = plain.with_lora(plain.load_base(args.model, not args.lora), args.rank, 2 * args.rank, args.dropout).train()
    moved = plain.prove_isolation(model, data)
    print(f"{len(order)} steps of {args.batch} packs; another document moves a document's logits by {moved:.1e}")
    # 3. The checkpoint of a killed run, where there is one.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    folder.resume(model, optimizer)
    for step in range(folder.progress.step, len(order)):
        if folder.progress.since >= args.patience:
            break
        # 4. One step, and now and then a validation: the best adapter is kept, and all that resuming needs.
        rate = args.lr * factor(step, "cosine", len(order), len(order) // 10, 0, 0.0)
        row = {"step": step + 1, **one_step(model, optimizer, [data[number] for number in order[step]], rate)}
        due = (step + 1) % args.validate_every == 0 or step + 1 == len(order)
        if due and held is not None:
            row["validation_loss"] = plain.mean_loss(model, held)
        folder.report(row)
        if due:
            folder.keep(model, optimizer, step + 1, row.get("validation_loss"))


def one_step(model: Any, optimizer: torch.optim.Optimizer, packs: list[dict[str, Any]], rate: float) -> dict[str, Any]:
    """One optimizer step on the mean loss over all supervised tokens of `packs`, however they are grouped."""
    begin, loss, group = time.monotonic(), 0.0, optimizer.param_groups[0]
    weight = sum(float(pack["loss_mask"].sum()) for pack in packs)
    for pack in packs:
        part = plain.weighted_loss(model, pack) / weight
        part.backward()
        loss += float(part.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(group["params"], 1.0))
    if not math.isfinite(loss + norm):
        raise UserError(f"loss {loss}, gradient norm {norm}; lower --lr. The last checkpoint stays")
    group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    speed = sum(len(pack["tokens"]) for pack in packs) / (time.monotonic() - begin)
    memory = plain.peak_memory_gb()
    return {"loss": loss, "grad_norm": norm, "lr": rate, "tokens_per_second": speed, "memory_gb": memory}


def main() -> int:
    args = parser().parse_args()
    with open_run(args.out, *described(args)) as folder:
        train(args, folder)
    print(f"{args.out}/adapter: that of step {folder.progress.best_step} of {folder.progress.step}")
    return 0


if __name__ == "__main__":
    run(main)
