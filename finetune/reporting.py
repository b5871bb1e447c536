"""What a run reports, as parts of the recipe: metrics and their views, and advice when memory runs out."""

from __future__ import annotations

from pathlib import Path

import nemo_run

from finetune.settings import Run
from nano3.arch import Arch
from nano3.flops import StepFlops
from nano3.overrides import flatten
from nano3.targets import OUTPUT
from nano3.training.memory_advice import MemoryAdvice
from nano3.training.progress import Progress
from nano3.training.step_metrics import StepDetails
from nano3.training.trackers import TensorBoard, WeightsAndBiases


def progress(run: Run) -> nemo_run.Config:
    """The callback that shows and writes a run's metrics."""
    log, out = run.settings.log, Path(run.out)
    views = []
    if log.tensorboard:
        views.append(nemo_run.Config(TensorBoard, folder=str(out / "tensorboard")))
    if log.wandb != "off":
        config = {**flatten(run.settings), "model": Path(run.model).name, "nodes": run.nodes, "ranks": run.ranks}
        views.append(
            nemo_run.Config(
                WeightsAndBiases,
                folder=run.out,
                mode=log.wandb,
                project=log.project,
                name=log.name or out.name,
                config=config,
            )
        )
    return nemo_run.Config(
        Progress,
        folder=run.out,
        every=log.every,
        steps=run.settings.train.total_steps,
        flops=nemo_run.Config(StepFlops, model=run.model, ranks=adapter_ranks(run)),
        divergence=run.settings.train.divergence,
        details=nemo_run.Config(StepDetails),
        views=views,
    )


def adapter_ranks(run: Run) -> dict[str, int]:
    """The rank of every adapter, by module path."""
    return {path: size.rank for path, size in run.settings.lora.adapters(Arch.load(run.model)).items()}


def memory_advice(run: Run) -> nemo_run.Config:
    """The callback that says what to change when memory runs out."""
    train, layout = run.settings.train, run.settings.layout
    recompute = ",".join(train.recompute) or "none"
    remedies = [f"lower train.seq_length ({train.seq_length})"]
    if "full" not in train.recompute:
        remedies.append(f"set train.recompute=full (now {recompute}; its values: docs/tracking.md)")
    if not train.loss_chunk and OUTPUT not in adapter_ranks(run):
        remedies.append("set train.loss_chunk=512")
    remedies.append(f"spread the model wider (layout.ep={layout.ep}, layout.tp={layout.tp}, layout.pp={layout.pp})")
    if train.precision == "fp32":
        remedies.append("use train.precision=bf16")
    return nemo_run.Config(MemoryAdvice, remedies="; ".join(remedies))
