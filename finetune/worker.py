"""One rank of a run or evaluation, on this machine or in a Slurm job: `python -m finetune.worker RUN.json`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from finetune.recipe_file import load_recipe
from finetune.settings import Run
from launch.local import die_with_parent
from nano3.cli import run
from nano3.quiet import quiet, quiet_imports
from nano3.training import supervision


def main() -> int:
    """Builds the recipe from the run's JSON and runs it to the end."""
    die_with_parent()  # torch.distributed.run gives every rank a session of its own, where nothing else would end it
    run = Run.from_json(Path(sys.argv[1]).read_text())
    os.environ["NANO3_CPU"] = "1" if run.cpu else "0"
    # The backend first: NeMo binds to the CUDA libraries, or to their stand-ins, when it is imported.
    with quiet_imports():
        from nano3 import cpu

        cpu.enable()  # before NeMo is imported
        # From here on somebody watches whether this rank still answers; the imports take many seconds.
        patience = run.settings.supervision
        supervisor = supervision.start(patience.silent_seconds, patience.stuck_minutes, patience.slow)
        import fiddle
        from lightning.pytorch.utilities.exceptions import SIGTERMException
        from torch.distributed.checkpoint.api import CheckpointException

        from finetune.eval_only import evaluation_recipe
        from nano3.checkpoint_metadata import check_folder, unreadable

        make = load_recipe(run.recipe, Path(run.out))
        recipe = evaluation_recipe(run, make) if run.eval_only else make(run)
    quiet()
    if not run.nf4:
        check_folder(Path(run.base) / "weights")  # before NeMo opens it
    try:
        fiddle.build(recipe)()
    except CheckpointException as error:
        raise unreadable(error, f"the model {run.base}, or a checkpoint of this run,") from error
    except SIGTERMException:  # a SystemExit without a code, which would pass for success
        return 128 + signal.SIGTERM
    finally:
        if supervisor is not None:
            supervisor.finish()
    return 0


if __name__ == "__main__":
    run(main)
