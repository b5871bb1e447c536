"""One rank of a run or evaluation, on this machine or in a Slurm job: `python -m recipes.worker RUN.json`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from launch.local import die_with_parent
from nano3.cli import run
from nano3.quiet import quiet, quiet_imports
from recipes.settings import Run


def main() -> int:
    """Builds the recipe from the run's JSON and runs it to the end."""
    die_with_parent()  # torch.distributed.run gives every rank a session of its own, where nothing else would end it
    task = Run.from_json(Path(sys.argv[1]).read_text())
    os.environ["NANO3_CPU"] = "1" if task.cpu else "0"
    with quiet_imports():
        from nano3 import cpu

        cpu.enable()  # before NeMo is imported
        import fiddle
        from lightning.pytorch.utilities.exceptions import SIGTERMException

        from recipes.eval_only import evaluation_recipe
        from recipes.nemotron_lora import nemotron_3_nano_lora

        recipe = evaluation_recipe(task) if task.eval_only else nemotron_3_nano_lora(task)
    quiet()
    try:
        fiddle.build(recipe)()
    except SIGTERMException:  # a SystemExit without a code, which would pass for success
        return 128 + signal.SIGTERM
    return 0


if __name__ == "__main__":
    run(main)
