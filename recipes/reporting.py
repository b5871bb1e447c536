"""What a run reports, as parts of the recipe: metrics and their views, and advice when memory runs out."""

from __future__ import annotations

from pathlib import Path

import nemo_run as run

from launch.overrides import flatten
from nano3.arch import Arch
from nano3.flops import StepFlops
from nano3.targets import select, sizes
from nano3.training.details import StepDetails
from nano3.training.memory_advice import MemoryAdvice
from nano3.training.progress import Progress
from nano3.training.views import TensorBoard, WeightsAndBiases
from recipes.settings import Run


def progress(task: Run) -> run.Config:
    """The callback that shows and writes a run's metrics."""
    log, out = task.settings.log, Path(task.out)
    views = []
    if log.tensorboard:
        views.append(run.Config(TensorBoard, folder=str(out / "tensorboard")))
    if log.wandb != "off":
        config = {**flatten(task.settings), "model": Path(task.model).name, "nodes": task.nodes, "ranks": task.ranks}
        views.append(
            run.Config(
                WeightsAndBiases,
                folder=task.out,
                mode=log.wandb,
                project=log.project,
                name=log.name or out.name,
                config=config,
            )
        )
    return run.Config(
        Progress,
        folder=task.out,
        every=log.every,
        steps=task.settings.train.steps,
        flops=run.Config(StepFlops, model=task.model, ranks=adapter_ranks(task)),
        divergence=task.settings.train.divergence,
        details=run.Config(StepDetails),
        views=views,
    )


def adapter_ranks(task: Run) -> dict[str, int]:
    """The rank of every adapter, by module path."""
    lora = task.settings.lora
    paths = select(Arch.load(task.model), lora.chosen_targets(), lora.experts)
    return {path: size.rank for path, size in sizes(paths, lora.rank, lora.alpha, lora.rank_pattern).items()}


def memory_advice(task: Run) -> run.Config:
    """The callback that says what to change when memory runs out."""
    train, layout = task.settings.train, task.settings.layout
    recompute = ",".join(train.recompute) or "none"
    remedies = [f"lower train.seq_length ({train.seq_length})"]
    if "full" not in train.recompute:
        remedies.append(f"set train.recompute=full (now {recompute}; its values: docs/tracking.md)")
    remedies.append(f"spread the model wider (layout.ep={layout.ep}, layout.tp={layout.tp}, layout.pp={layout.pp})")
    if train.precision == "fp32":
        remedies.append("use train.precision=bf16")
    return run.Config(MemoryAdvice, remedies="; ".join(remedies))
