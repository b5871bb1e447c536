"""TensorBoard and Weights & Biases as views of a run's metrics (nano3/training/journal.py)."""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from nano3.cli import UserError
from nano3.training.journal import Row

NOT_SHOWN = ("step", "time")


class TensorBoard:
    """Event files in `folder`, written anew at every start.

    Args:
        folder: of the event files; what it holds is replaced.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.writer: Any = None

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(self.folder, ignore_errors=True)
        self.writer = SummaryWriter(str(self.folder))

    def add(self, row: Row) -> None:
        for name, value in row.items():
            if name in NOT_SHOWN:
                continue
            if isinstance(value, list):
                self._bars(name, value, row)
            else:
                self.writer.add_scalar(name, value, row["step"], walltime=row["time"])

    def _bars(self, name: str, counts: list[int], row: Row) -> None:
        """One bar for each expert number."""
        weighted = [index * count for index, count in enumerate(counts)]
        self.writer.add_histogram_raw(
            name,
            min=0,
            max=len(counts) - 1,
            num=sum(counts),
            sum=sum(weighted),
            sum_squares=sum(index * part for index, part in enumerate(weighted)),
            bucket_limits=[index + 0.5 for index in range(len(counts))],
            bucket_counts=counts,
            global_step=row["step"],
            walltime=row["time"],
        )

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One W&B run, through every restart: its id is in `folder/wandb/run-id`.

    Offline, a start replaces the folder of the start before, whose rows it shows again; so `wandb sync` finds one run
    with every step once. Online, rows that the server has are not sent again: a resumed run repeats its steps exactly.

    Args:
        folder: of the run; W&B writes into `folder/wandb`.
        mode: offline (no account, no network) or online.
        project, name: as W&B shows the run.
        config: the run's settings, shown beside it.
    """

    def __init__(self, folder: str, mode: str, project: str, name: str, config: dict[str, Any]) -> None:
        self.folder, self.mode, self.project, self.name, self.config = Path(folder), mode, project, name, config
        self.run: Any = None
        self.sent = 0

    def open(self) -> None:
        """Raises `UserError` when W&B does not start."""
        import wandb

        number = self._id()
        if self.mode == "offline":
            for old in (self.folder / "wandb").glob(f"offline-run-*-{number}"):
                shutil.rmtree(old)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its crash reports, which would go to a third party
        try:
            self.run = wandb.init(
                dir=str(self.folder),
                mode=self.mode,  # type: ignore[arg-type]
                id=number,
                project=self.project,
                name=self.name,
                config=self.config,
                resume="allow" if self.mode == "online" else None,
                settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"Weights & Biases did not start: {reason}. Run `wandb login` on this machine, or take "
                "log.wandb=offline and `wandb sync` later, or log.wandb=off"
            ) from error
        self.sent = self.run.starting_step

    def _id(self) -> str:
        """The run's id, made at its first start."""
        path = self.folder / "wandb" / "run-id"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name("run-id.tmp")
            aside.write_text(uuid.uuid4().hex[:12])
            os.replace(aside, path)
        return path.read_text()

    def add(self, row: Row) -> None:
        if self.run is None or row["step"] < self.sent:
            return
        import wandb

        shown = {name: value for name, value in row.items() if name not in NOT_SHOWN}
        for name, value in shown.items():
            if isinstance(value, list):
                shown[name] = wandb.Histogram(np_histogram=(np.array(value), np.arange(len(value) + 1)))
        self._told(lambda: self.run.log({**shown, "_timestamp": row["time"]}, step=row["step"]), row["step"])

    def close(self) -> None:
        if self.run is not None:
            self._told(self.run.finish, None)

    def _told(self, tell: Callable[[], Any], step: int | None) -> None:
        """Tells W&B something. When its process has ended, one line says so, and the run goes on without this view."""
        import wandb

        try:
            tell()
        except Exception as error:  # OSError after `kill -9`; a view may not cost the run, whatever its reason
            self.run = None
            with suppress(Exception):
                wandb.teardown()  # it would try again when Python ends, and show a traceback
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            where = "at the end of the run" if step is None else f"at step {step}"
            print(
                f"note: Weights & Biases ended {where} ({reason}). The run goes on without it; metrics.jsonl has every "
                "step, and a run that resumes shows them all again",
                file=sys.stderr,
                flush=True,
            )
