"""One rank of a local run: `python -m recipes.worker RUN.json`, started by `recipes/nemotron_lora.py`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from nano3.cli import run
from recipes.settings import Run


def quiet() -> None:
    """Keeps the screen for the run's own lines: NeMo and its dependencies say a hundred others before the first step.

    Errors still come through, and NeMo writes its own log files under OUT/nemo.
    """
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("lightning", "pytorch_lightning", "megatron", "nv_one_logger", "nemo_run")):
            logging.getLogger(name).setLevel(logging.ERROR)


def main() -> int:
    """Builds the recipe from the run's JSON and runs it to the end."""
    task = Run.from_json(Path(sys.argv[1]).read_text())
    os.environ["NANO3_CPU"] = "1" if task.cpu else "0"
    logging.disable(logging.WARNING)  # while importing, when no logger can be told yet
    from nano3 import cpu

    cpu.enable()  # before NeMo is imported
    import fiddle
    from lightning.pytorch.utilities.exceptions import SIGTERMException
    from nemo.utils import logging as nemo_logging

    from recipes.nemotron_lora import nemotron_3_nano_lora

    recipe = nemotron_3_nano_lora(task)
    logging.disable(logging.NOTSET)
    nemo_logging.set_verbosity(logging.ERROR)
    quiet()
    try:
        fiddle.build(recipe)()
    except SIGTERMException:  # a SystemExit without a code, which would pass for success
        return 128 + signal.SIGTERM
    return 0


if __name__ == "__main__":
    run(main)
