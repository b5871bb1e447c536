"""What a pipeline's folder remembers of its stages: the plan, how each ended, and which job has it.

OUT/pipeline.json is the plan. OUT/stages/NAME.json says how a stage ended, with what commands and inputs;
OUT/stages/NAME.job is the number of the Slurm job that was last given it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from launch.chain import shards
from launch.chain.stages import NAMES, TRAIN, Stage
from nano3.cli import UserError
from nano3.documents import Name, Sha256, Text, read_json
from nano3.file_digests import remembered_sha256
from nano3.file_system import LOCK
from nano3.outputs import alone, fresh_file

KIND = "pipeline"
"""Of the folder (see `nano3.outputs.fresh_output`)."""


class StageRow(TypedDict):
    """A stage in pipeline.json."""

    name: Name
    commands: list[list[Text]]
    output: Text
    inputs: list[Text]


class FinishedStage(TypedDict):
    """stages/NAME.json."""

    commands: list[list[Text]]
    inputs: dict[Text, Sha256]
    exit_code: int


@dataclass
class Result:
    """Exit code of a stage; not 0 until its commands have ended well."""

    code: int = 1


class Records:
    """Of the pipeline in the folder `out`."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / "stages"

    def plan(self, stages: tuple[Stage, ...]) -> None:
        """Writes the plan, for the jobs and for `status`."""
        rows = [
            {
                "name": stage.name,
                "commands": stage.commands,
                "output": str(stage.output),
                "inputs": list(map(str, stage.inputs)),
            }
            for stage in stages
        ]
        self._write(self.out / "pipeline.json", rows)

    def planned(self) -> tuple[Stage, ...]:
        """The plan as it was written. Raises `UserError` where there is none."""
        path = self.out / "pipeline.json"
        if not path.is_file():
            raise UserError(f"{self.out} holds no pipeline; give the --out of launch/pipeline.py run")
        rows = read_json(path, list[StageRow], "plan the pipeline again with launch/pipeline.py run")
        return tuple(
            Stage(
                row["name"],
                tuple(map(tuple, row["commands"])),
                Path(row["output"]),
                tuple(map(Path, row["inputs"])),
            )
            for row in rows
        )

    def unfinished(self, stages: tuple[Stage, ...], again: str | None = None) -> tuple[Stage, ...]:
        """The first stage that is not finished, or `again`, and all after it.

        Raises:
            UserError: a finished stage that would now be another one, by its commands or the user's files; or one that
                is finished though one before it is not.
        """
        last = len(stages)
        if again:
            last = sum(NAMES.index(stage.name) < NAMES.index(again) for stage in stages)
        first = next((number for number, stage in enumerate(stages) if not self._ended_well(stage)), len(stages))
        first = min(first, last)
        for stage in stages[:first]:
            self._refuse_other(stage)
        late = [stage.name for stage in stages[first:] if self._ended_well(stage)]
        if late and first < last:
            raise UserError(
                f"stage {late[0]} is finished but {stages[first].name} before it is not, or its output is gone; do both"
                f" over with --again {stages[first].name}, or choose another --out"
            )
        return stages[first:]

    def refuse_other_jobs(self, stages: tuple[Stage, ...], alive: Mapping[int, str]) -> None:
        """Raises `UserError` for a stage among the jobs `alive` that was planned with other commands than now."""
        queued = [stage for stage in stages if self.job(stage) in alive]
        before = {stage.name: stage.commands for stage in self.planned()} if queued else {}
        for stage in queued:
            job = self.job(stage)
            if job is not None and before.get(stage.name) != stage.commands:
                raise UserError(
                    f"stage {stage.name} is job {job}, {alive[job]}, with other settings; give those again, or cancel "
                    f"it first: scancel {job}"
                )

    def forget(self, name: str, alive: Mapping[int, str]) -> None:
        """Makes a stage and all after it unfinished; a training run's folder stays beside, under another name.

        Raises:
            UserError: one of them is among the jobs `alive`, or trains here.
        """
        if NAMES.index(name) <= NAMES.index(TRAIN):
            self._refuse_training()
        array = [shards.NAME] if name == NAMES[0] else []
        for later in (*array, *NAMES[NAMES.index(name) :]):
            job = self._job(later)
            if job in alive:
                raise UserError(f"stage {later} is job {job}, which is queued or runs; cancel it first: scancel {job}")
            for kind in ("json", "job"):
                (self.folder / f"{later}.{kind}").unlink(missing_ok=True)
        run = self.out / "lora"
        if NAMES.index(name) <= NAMES.index(TRAIN) and run.exists():
            number = next(number for number in range(1, 10_000) if not (self.out / f"lora.{number}").exists())
            os.rename(run, self.out / f"lora.{number}")

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[Result]:
        """Records how the stage ends, and how long it took; until then it is unfinished, whatever was recorded before.

        A training may outlive whoever waits for it. So its settings are recorded when it begins, and its adapter says
        that it ended; unless one is there already, of which nobody knows what it was made with.

        Raises:
            UserError: a training that was begun earlier is still at work.
        """
        if stage.name == TRAIN:
            self._refuse_training()
        self.folder.mkdir(parents=True, exist_ok=True)
        started, inputs = time.monotonic(), _states(stage)
        (self.folder / f"{stage.name}.json").unlink(missing_ok=True)
        if stage.name == TRAIN and not stage.output.exists():
            self._begun(stage, inputs)
        result = Result()
        try:
            yield result
        finally:
            seconds = round(time.monotonic() - started, 1)
            facts = {"exit_code": result.code, "seconds": seconds, "ended": time.strftime("%Y-%m-%d %H:%M:%S")}
            self._write(self.folder / f"{stage.name}.json", self._identity(stage, inputs) | facts)

    def submitted(self, stage: Stage, job: int) -> None:
        """Remembers the job of a stage."""
        (self.folder / f"{stage.name}.json").unlink(missing_ok=True)
        if stage.name == TRAIN:
            self._begun(stage, _states(stage))
        self._remember(stage.name, job)

    def submitted_shards(self, job: int) -> None:
        """Remembers the array that prepares the data."""
        self._remember(shards.NAME, job)

    def _remember(self, name: str, job: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(self.folder / f"{name}.job", job)

    def shards_job(self) -> int | None:
        """The array that was last given the data; None where it was prepared by one process."""
        return self._job(shards.NAME)

    def job(self, stage: Stage) -> int | None:
        """The job that was last given the stage."""
        return self._job(stage.name)

    def describe(self, stage: Stage, alive: Mapping[int, str]) -> str:
        """How a stage stands, for people; `alive` are the jobs in the queue."""
        found, job = self._read(stage), self.job(stage)
        if self._ended_well(stage):
            took = f" in {found['seconds']:,} s, {found['ended']}" if "seconds" in found else ""
            return f"finished{took}: {stage.output}"
        if job is not None and job in alive:
            return f"job {job} {alive[job]}"
        if found.get("exit_code"):
            return f"FAILED with exit code {found['exit_code']}, {found['ended']}" + (f", job {job}" if job else "")
        return f"job {job} ended and did not finish it; see its log" if job else "to do"

    def _begun(self, stage: Stage, inputs: dict[str, str]) -> None:
        """Of a training, which knows nothing of pipelines: finished once its adapter is there."""
        self._write(self.folder / f"{stage.name}.json", self._identity(stage, inputs) | {"exit_code": 0})

    def _refuse_training(self) -> None:
        run = self.out / "lora"
        if (run / LOCK).exists():
            with alone(run, f"a training that was begun earlier still writes to {run}; wait until it ends"):
                pass

    def _ended_well(self, stage: Stage) -> bool:
        return self._read(stage).get("exit_code") == 0 and stage.output.exists()

    def _refuse_other(self, stage: Stage) -> None:
        found, now = self._read(stage), self._identity(stage, _states(stage))
        if found["commands"] != now["commands"]:
            what = "was run with other settings"
        elif found["inputs"] != now["inputs"]:
            changed = [path for path, state in now["inputs"].items() if found["inputs"].get(path) != state]
            what = f"was run before {changed[0]} changed"
        else:
            return
        raise UserError(
            f"stage {stage.name} is finished, but {what}; do it and what follows over with --again {stage.name}, or "
            "choose another --out"
        )

    def _identity(self, stage: Stage, inputs: dict[str, str]) -> dict[str, Any]:
        return {"commands": [list(command) for command in stage.commands], "inputs": inputs}

    def _read(self, stage: Stage) -> dict[str, Any]:
        path = self.folder / f"{stage.name}.json"
        remedy = f"remove the file to do stage {stage.name} again"
        return dict(read_json(path, FinishedStage, remedy)) if path.is_file() else {}

    def _job(self, name: str) -> int | None:
        try:
            return int((self.folder / f"{name}.job").read_text())
        except (OSError, ValueError):
            return None

    def _write(self, path: Path, content: Any) -> None:
        with fresh_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")


def _states(stage: Stage) -> dict[str, str]:
    """SHA-256 of the user's files; what did not change since it was hashed is not read again."""
    return {str(path): digest for path, digest in remembered_sha256(stage.inputs).items()}
