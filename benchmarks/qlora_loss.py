"""Does a base in 4 bits cost quality? Held-out loss of QLoRA beside LoRA's on the demo's task, pico, several seeds.

    python benchmarks/qlora_loss.py --steps 80 --seeds 1 2 3 --out runs/qlora_loss

Both train by the same recipe with the same settings, data and seeds; only `lora.base` differs. Writes OUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from results import ROOT, conditions, save

from nano3.cli import run
from recipes.demo import prepare_data

SETTINGS = (
    "lora.rank=16", "lora.alpha=32", "train.warmup=10", "train.lr=4e-3", "train.weight_decay=0", "train.global_batch=2",
    "train.seq_length=1024", "train.recompute=", "log.wandb=off", "log.tensorboard=false", "checkpoint.minutes=0",
    "checkpoint.every=0",
)  # fmt: skip
"""The demo's, without checkpoints."""


def held_out_loss(folder: Path, base: str, seed: int, steps: int) -> float:
    """Validation loss after a training run on one CPU rank."""
    out = folder / f"{base}-{seed}"
    command = [sys.executable, "recipes/nemotron_lora.py", "--model", "pico", "--local", "--out", str(out)]
    command += ["--data", str(folder / "train"), "--validation", str(folder / "validation"), *SETTINGS]
    command += [f"train.steps={steps}", f"train.seed={seed}", f"lora.base={base}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return float([row["validation_loss"] for row in rows if row.get("validation_loss") is not None][-1])


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--steps", type=int, default=80, help="of a run (default: %(default)s)")
    parse.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: %(default)s)")
    parse.add_argument("--out", type=Path, default=Path("runs/qlora_loss"), help="(default: %(default)s)")
    args = parse.parse_args()
    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train").exists():
        prepare_data(folder, held_out=150, training=2500, old_training=1500)
    rows = []
    for seed in args.seeds:
        loss = {base: held_out_loss(folder, base, seed, args.steps) for base in ("original", "nf4")}
        rows.append({"seed": seed, **loss, "ratio": loss["nf4"] / loss["original"]})
        print(f"seed {seed}: LoRA {loss['original']:.4f}, QLoRA {loss['nf4']:.4f}, ratio {rows[-1]['ratio']:.4f}")
    ratio = statistics.mean(row["nf4"] for row in rows) / statistics.mean(row["original"] for row in rows)
    print(f"mean over {len(rows)} seeds: QLoRA's held-out loss is {ratio:.4f} of LoRA's")
    save(folder / "results.json", {**conditions(), "steps": args.steps, "ratio": ratio}, rows)


if __name__ == "__main__":
    run(main)
