"""Training and answers of one cell of step_aware_table.py, each in a fork of the process that has imported NeMo.

Every training is the recipe itself (recipes/step_aware_lora.py) on one CPU rank; what a fork does reaches no other.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from finetune import command
from finetune.recipe_file import recipe_of
from finetune.settings import CheckpointSettings, LogSettings, LoraSettings, Settings, StageSettings, TrainSettings
from launch.plan.layout import Layout
from recipes.step_aware_lora import MARK, step_aware_lora

SEQ_LENGTH = 2048
RANK = 32
"""Of the one adapter; two have half of it each, so that both ways train as many numbers."""
WEIGHTS = {
    "uniform": StageSettings(),
    "fixed": StageSettings(weights="fixed", verify=4.0),
    "dynamic": StageSettings(weights="dynamic"),
}
ADAPTERS = ("single", "dual")


@dataclass(frozen=True)
class Cell:
    """One cell: how stages are weighed, how many adapters there are, whether the traces have errors; and its seed."""

    weights: str
    adapters: str
    injected: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{self.weights}-{self.adapters}-{'injected' if self.injected else 'right'}-{self.seed}"


def import_all() -> None:
    """What forks share: transformers' model code on its own formulas first, then NeMo on the CPU backend."""
    from evaluation import hf_model
    from nano3 import cpu

    hf_model._import_without_stand_ins()
    os.environ["NANO3_CPU"] = "1"
    cpu.enable()
    import finetune.configuration
    import finetune.worker  # noqa: F401


class Fork:
    """Does `work` in a fork whose words go to the file `log`, and hands over what it returns."""

    def __init__(self, work: Callable[[], Any], log: Path) -> None:
        self.log = log
        self._reading, writing = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            self._do(work, writing)
        os.close(writing)

    def _do(self, work: Callable[[], Any], writing: int) -> None:
        """In the fork; never returns."""
        code = 1
        # Megatron-Core's saving spawns a process, which would import the script that runs here again, for seconds.
        sys.modules["__main__"].__file__ = None
        try:
            with self.log.open("w") as said:
                for number in (1, 2):
                    os.dup2(said.fileno(), number)
            with os.fdopen(writing, "wb") as answer:
                answer.write(pickle.dumps(work()))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def result(self) -> Any:
        """Waits for it. Raises `RuntimeError` with the end of its words where it failed."""
        with os.fdopen(self._reading, "rb") as answer:
            told = answer.read()
        if os.waitpid(self._pid, 0)[1]:
            raise RuntimeError(f"{self.log} ends:\n{self.log.read_text()[-2000:]}")
        return pickle.loads(told)


def in_fork(work: Callable[[], Any], log: Path) -> Any:
    """What `work` returns in a fork."""
    return Fork(work, log).result()


def settings(cell: Cell, steps: int, rate: float, rank: int, stages: StageSettings, mark: str = "") -> Settings:
    """Of one adapter of a cell."""
    return Settings(
        layout=Layout(ep=1),
        lora=LoraSettings(rank=rank, alpha=2.0 * rank, preset="peft", mark=mark),
        train=TrainSettings(
            steps=steps,
            warmup=0.05,
            lr=rate,
            weight_decay=0.0,
            global_batch=1,
            seq_length=SEQ_LENGTH,
            recompute=[],
            seed=cell.seed,
        ),
        log=LogSettings(every=20, wandb="off", tensorboard=False),
        checkpoint=CheckpointSettings(every=0, minutes=0),
        stages=stages,
    )


def train(model: Path, nemo: Path, data: Path, out: Path, defaults: Callable[[], Settings]) -> Path:
    """Trains one adapter of the Hugging Face folder `model`, whose NeMo checkpoint is `nemo`; returns its folder."""
    from finetune import worker
    from finetune.run_local import KIND, write_run
    from launch.local import rendezvous_store, world_of
    from nano3.outputs import claim

    flags = ["--model", str(model), "--base", str(nemo), "--data", str(data), "--out", str(out), "--local"]
    run, _ = command.resolve(command.parser().parse_args(flags), defaults, recipe_of(step_aware_lora))
    claim(out, KIND)
    write_run(run)

    def rank() -> None:
        store = rendezvous_store()
        os.environ.update(world_of(1, store.port), RANK="0", LOCAL_RANK="0")
        sys.argv = ["worker", str(out / "run.json")]
        assert worker.main() == 0, "the run ended early"

    in_fork(rank, out / "log.txt")
    return out / "adapter"


def train_cell(cell: Cell, base: Path, nemo: Path, data: Path, out: Path, steps: int, rate: float) -> tuple[Path, Path]:
    """Trains what a cell has; returns the model and the adapter that goes beside its weights.

    Two adapters are trained one after the other as the recipe does, each for half of the steps: one for all but
    VERIFY, which is merged, and one that waits for the mark.
    """
    stages = WEIGHTS[cell.weights]
    if cell.adapters == "single":
        return base, train(base, nemo, data, out / "adapter", partial(settings, cell, steps, rate, RANK, stages))
    from conversion.hf_to_nemo import convert
    from conversion.merge_lora import merge

    first = replace(stages, weights="fixed" if stages.weights == "uniform" else stages.weights, verify=0.0)
    reasoning = train(base, nemo, data, out / "first", partial(settings, cell, steps // 2, rate, RANK // 2, first))
    merged = out / "merged"
    in_fork(partial(_merge, merge, convert, base, reasoning, merged), out / "merge.txt")
    later = partial(settings, cell, steps - steps // 2, rate, RANK // 2, stages, MARK)
    return merged, train(merged, out / "merged-nemo", data, out / "second", later)


def _merge(merge: Any, convert: Any, base: Path, adapter: Path, merged: Path) -> None:
    merge(base, adapter, merged)
    convert(merged, merged.with_name("merged-nemo"), context=False)


def answers(model: Path, adapter: Path | None, questions: list[Any], log: Path) -> Any:
    """`evaluation.steps.answers_of` the model with the adapter beside its weights."""

    def ask() -> Any:
        from evaluation.models import HFModel, beside
        from evaluation.steps import answers_of

        return answers_of(HFModel(model, thinking=True, prepare=beside(adapter, model)), questions)

    return in_fork(ask, log)
