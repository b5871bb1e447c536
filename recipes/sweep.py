"""Many runs of one recipe with other settings: a sweep by Optuna, here or on Slurm, ranked by validation loss.

    python recipes/sweep.py --model pico --data runs/demo/train --validation runs/demo/validation --local --ranks 2 \
        --try lora.rank=4,8,16 --try train.lr=1e-4..1e-2:log --out runs/sweep \
        train.steps=60 train.seq_length=1024 layout.ep=2
    python recipes/sweep.py --recipe recipes/reasoning_lora.py --try lora.rank=8,16,32 --try train.lr=1e-5..1e-4:log \
        --cluster cluster.yaml --jobs 8 --base BASE --data mixture.yaml --validation STORE --out runs/sweep

Teaches which settings to take, instead of a model. Data: a recipe's, and a validation store. Cost: that of --trials
runs, less what --prune-after ends early. Result: OUT/trials/N, a run of the recipe each; OUT/report.html and
OUT/results.json, ranked. The same command resumes a sweep that was killed: a trial that was running goes on from its
own checkpoints, and the trials to come are those that would have come. With more --trials it goes further.
"""

from __future__ import annotations

try:
    from nano3.cli import run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

from finetune.sweep_command import main

if __name__ == "__main__":
    run(lambda: main(__doc__))
