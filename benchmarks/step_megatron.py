"""Worker of bench_step.py: a LoRA step on Megatron-Core's own machinery, without the trainers of NeMo and Lightning.

Model, adapters, data, gradient buffers and optimizer are those of the recipe; the loop around them is this file's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["NANO3_CPU"] = "1"

from nano3 import cpu

cpu.enable()

import fiddle  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from lockstep import Server  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads  # noqa: E402
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from step_recipe import recipe_of  # noqa: E402

from data_prep.epochs import Epochs  # noqa: E402
from data_prep.packing import PackedDataset  # noqa: E402
from finetune.packed_data import collate  # noqa: E402
from nano3.model import packed_data_step, packed_forward_step  # noqa: E402


def parallel_groups_of_one() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)


def build(recipe: Any, base: Path) -> Any:
    """The adapted model in Megatron-Core's data-parallel wrapper, with the base weights, ready to train."""
    config = fiddle.build(recipe.model).config
    model = config.configure_model(None)
    state = dist_checkpointing.load(model.sharded_state_dict(prefix="module."), str(base / "weights"))
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    lora = fiddle.build(recipe.peft)
    config.finalize_model_grads_func = finalize_model_grads
    ddp = fiddle.build(recipe.trainer.strategy.ddp)
    return DistributedDataParallel(config, ddp, lora(model.train()))


def forward(batches: Iterator, model: Any) -> tuple[torch.Tensor, Callable]:
    """Megatron-Core's forward step: per-token losses, and how they become a sum and a count."""
    batch = packed_data_step(batches)

    def reduce(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total, count = (losses * batch["loss_mask"]).sum(), batch["loss_mask"].sum().int()
        return total, count, (total / count).detach()

    return packed_forward_step(model, batch), reduce


def step(model: Any, optimizer: Any, packs: Epochs, number: int) -> float:
    """One pack."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    (loss,) = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter([collate([packs[number]], np.arange(2))]),
        model=[model],
        num_microbatches=1,
        seq_length=packs.packs.facts["seq_length"],
        micro_batch_size=1,
    )
    assert optimizer.step()[0], "the optimizer skipped a step"
    return float(loss)


def main() -> None:
    server = Server()
    job = server.job
    recipe = recipe_of(job)
    parallel_groups_of_one()
    model = build(recipe, Path(job.base))
    optimizer = get_megatron_optimizer(fiddle.build(recipe.optim.config), [model])
    packs = Epochs(PackedDataset(job.data, job.seq_length, 1), job.steps, job.seed, shuffle=True)
    server.ready(parameters=sum(p.numel() for p in model.parameters() if p.requires_grad))
    server.serve(partial(step, model, optimizer, packs))


if __name__ == "__main__":
    main()
