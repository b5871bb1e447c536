"""One rank of a local run: `python -m recipes.worker RUN.json`, started by `recipes/nemotron_lora.py`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from nano3.cli import run
from recipes.settings import Run


def main() -> int:
    """Builds the recipe from the run's JSON and runs it to the end."""
    task = Run.from_json(Path(sys.argv[1]).read_text())
    os.environ["NANO3_CPU"] = "1" if task.cpu else "0"
    # NeMo and its dependencies speak a hundred lines before the first step; errors still come through.
    warnings.filterwarnings("ignore")
    os.environ.setdefault("NEMO_LOG_LEVEL", "ERROR")
    from nano3 import cpu

    cpu.enable()  # before NeMo is imported
    import fiddle
    from nemo.utils import logging as nemo_logging

    from recipes.lora_recipe import lora_recipe

    nemo_logging.set_verbosity(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    fiddle.build(lora_recipe(task))()
    return 0


if __name__ == "__main__":
    run(main)
