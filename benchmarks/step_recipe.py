"""Worker of bench_step.py: the whole recipe, as `recipes/nemotron_lora.py --local` runs it, one step at a time."""

from __future__ import annotations

import os
from typing import Any

os.environ["NANO3_CPU"] = "1"

from nano3 import cpu

cpu.enable()

import fiddle  # noqa: E402
import lightning.pytorch as pl  # noqa: E402
from lockstep import Job, Server  # noqa: E402

from finetune.command import parser, resolve  # noqa: E402
from nano3.quiet import quiet  # noqa: E402
from recipes.nemotron_lora import nemotron_3_nano_lora  # noqa: E402


def recipe_of(job: Job) -> Any:
    """The recipe as the command line would give it."""
    arguments = ["--model", job.base, "--data", job.data, "--out", f"{job.out}/recipe", "--local"]
    settings = {
        "lora.rank": job.rank,
        "lora.alpha": job.alpha,
        "lora.experts": job.experts,
        "train.seq_length": job.seq_length,
        "train.steps": job.steps,
        "train.seed": job.seed,
        "train.global_batch": 1,
        "train.warmup": 0,
    }
    run, _ = resolve(parser().parse_args([*arguments, *(f"{key}={value}" for key, value in settings.items())]))
    return nemotron_3_nano_lora(run)


class Lockstep(pl.Callback):
    """Holds Lightning's loop between two steps until the driver asks for the next. Last of the callbacks.

    A step goes from the end of the last one to its own end, so everything in between counts: fetching the batch, the
    other callbacks, logging.
    """

    def __init__(self, server: Server) -> None:
        self.server = server

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        del trainer
        self.server.ready(parameters=sum(p.numel() for p in pl_module.parameters() if p.requires_grad))
        self._wait()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.server.done(float(trainer.callback_metrics["reduced_train_loss"]))
        self._wait()

    def _wait(self) -> None:
        if not self.server.wait():
            os._exit(0)  # the driver has seen enough: no adapter is wanted


def main() -> None:
    server = Server()
    run = fiddle.build(recipe_of(server.job))
    quiet()
    # A world of one rank, on a port of the kernel's choice that nobody needs to know.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    run.keywords["trainer"].callbacks.append(Lockstep(server))
    run()


if __name__ == "__main__":
    main()
