"""Run by tests/nano3/test_tracking.py: a run that reports `last` steps, from where `metrics.jsonl` is to go on.

With `lose` W&B's own process is killed before the last step.

python -m tests.helpers.tracked_run FOLDER FIRST LAST finish|kill|lose
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from nano3.training.journal import Journal
from nano3.training.trackers import TensorBoard, WeightsAndBiases


def process_of_wandb() -> int:
    """The child of this process that W&B has started (proc(5))."""
    children = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    (found,) = [int(pid) for pid in children if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


def main() -> None:
    folder, after, last, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    views = [TensorBoard(f"{folder}/tensorboard"), WeightsAndBiases(folder, "offline", "project", "name", {"lr": 1.0})]
    journal = Journal(Path(folder), views)
    journal.open(after)
    for step in range(after + 1, last + 1):
        if end == "lose" and step == last:
            os.kill(process_of_wandb(), signal.SIGKILL)
            time.sleep(0.5)  # its socket is seen to be closed a moment later
        journal.write({"step": step, "time": 1000.0 + step, "loss": 1.0 / step, "expert_load/1": [step, 0, 3]})
        if step % 2 == 0:
            journal.write({"step": step, "time": 1000.5 + step, "validation_loss": 2.0 / step})
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    journal.close()


if __name__ == "__main__":
    main()
