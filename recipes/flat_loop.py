"""The LoRA run as one flat loop on Megatron-Core's own machinery: to be read, and to try an idea in.

    python recipes/flat_loop.py --model pico --data runs/demo/train --local --ranks 2 train.seq_length=1024

Teaches what lies under nemotron_lora.py, step by step. Data: any token store. Cost: the same, without checkpoints to
resume from. Result: the losses of its first steps (tests/recipes/test_flat_loop.py), OUT/adapter and metrics.jsonl.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from finetune.command import main
from finetune.settings import Run
from nano3.arch import Arch
from nano3.cli import UserError, run
from recipes.nemotron_lora import settings


def flat_loop(run: Run) -> Any:
    """The recipe: what every rank calls once to train."""
    lora, layout, router = run.settings.lora, run.settings.layout, run.settings.router
    other = [layout.pp * layout.etp > 1, router != "frozen", run.bf16 or run.nf4, lora.dora, lora.plus_ratio != 1]
    if any(other) or lora.init_from or lora.mark or run.validation or run.settings.stages.weights != "uniform":
        raise UserError("pp, etp, balance, BF16/NF4, DoRA, LoRA+, init, mark, stages, validation: see nemotron_lora.py")
    return partial(train, run)


def train(run: Run) -> None:
    """Trains from the first step to the last and writes the adapter; every rank calls it."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from finetune.configuration import lora_json
    from finetune.packed_data import packs_of_rank
    from nano3.checkpoints.adapter_checkpoint import save_adapter
    from nano3.checkpoints.base_identity import recorded_sha256
    from nano3.router import all_routers
    from nano3.training.rates import factor

    # 1. The frozen model with its adapters, AdamW over these alone, and this rank's packs.
    one, out, steps = run.settings.train, Path(run.out), run.settings.train.total_steps
    model, optimizer, sums = build(run)
    copies, routers = parallel_state.get_data_parallel_world_size(), all_routers(model)
    packs = packs_of_rank(run, parallel_state.get_data_parallel_rank(), copies)
    with (out / "metrics.jsonl").open("w") as metrics:
        for step in range(steps):
            # 2. The rate of this step; no gradients yet.
            rate = one.lr * factor(step, one.schedule, steps, one.warmup_steps, one.decay, one.min_lr / one.lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.zero_grad_buffer()
            optimizer.zero_grad()
            sums.zero_()
            # 3. Forward and backward, pack by pack; then Megatron-Core adds the ranks up and divides by all tokens.
            get_forward_backward_func()(forward_step_func=partial(forward, sums), data_iterator=packs, model=[model],
                num_microbatches=one.global_batch // copies, seq_length=one.seq_length, micro_batch_size=1)  # fmt: skip
            # 4. One step of AdamW, and the mean loss over the tokens of all ranks.
            norm = float(optimizer.step()[1])
            dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            row = {"step": step + 1, "loss": float(sums[0] / sums[1]), "lr": rate, "grad_norm": norm}
            if dist.get_rank() == 0:
                print(json.dumps(row), file=metrics, flush=True)
                print(f"step {step + 1}/{steps}  loss {row['loss']:.4f}", flush=True)
    # 5. The adapter, if the routers are what they were.
    assert all_routers(model) == routers, "training changed a router"
    facts = {"steps": steps, "router_sha256": routers[1], "base_sha256": recorded_sha256(Path(run.base))}
    save_adapter(model, out / "adapter", lora_json(run) | facts)


def build(run: Run) -> tuple[Any, Any, Any]:
    """The adapted model, its optimizer, and a place for a step's sums of (loss, weights) on this rank, (2,) FP64."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from nano3.lora.lora import Nano3LoRA
    from nano3.model import nano3_config

    one, lora, layout, arch = run.settings.train, run.settings.lora, run.settings.layout, Arch.load(run.model)
    sizes: dict[str, Any] = {"tensor_model_parallel_size": layout.tp, "context_parallel_size": layout.cp}
    sizes |= {"expert_model_parallel_size": layout.ep, "expert_tensor_parallel_size": 1}
    torch.distributed.init_process_group("gloo" if run.cpu else "nccl")
    torch.cuda.set_device(torch.distributed.get_rank() % run.ranks_per_node)
    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(one.seed)
    sizes["sequence_parallel"] = layout.sequence_parallel
    config = nano3_config(arch, one.seq_length, False, recompute=one.recompute, loss_chunk=one.loss_chunk, **sizes)
    model = config.configure_model(None)
    state = dist_checkpointing.load(model.sharded_state_dict(prefix="module."), f"{run.base}/weights")
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    sums = torch.zeros(2, dtype=torch.float64).cuda()
    config.finalize_model_grads_func = lambda model, _, **groups: finalize_model_grads(model, sums[1].clone(), **groups)
    adapted = Nano3LoRA(modules=lora.paths(arch), **lora.kind(), dropout=lora.dropout, seed=one.seed)(model.train())
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), adapted)
    adam = OptimizerConfig(lr=one.lr, weight_decay=one.weight_decay, adam_beta2=one.beta2, clip_grad=one.clip)
    return wrapped, get_megatron_optimizer(adam, [wrapped]), sums


def forward(sums: Any, packs: Any, model: Any) -> tuple[Any, Any]:
    """Megatron-Core's forward step: token losses (1, s) of the next pack, and what makes (sum, number, report)."""
    from nano3.model import packed_data_step, packed_forward_step

    def loss(losses: Any) -> tuple[Any, Any, dict[str, Any]]:
        total, weight = (losses * batch["loss_mask"]).sum(), batch["loss_mask"].sum()
        sums.add_(sums.new_tensor([float(total), float(weight)]))
        return total, weight.int(), {}

    batch = packed_data_step(packs)
    return packed_forward_step(model, batch), loss


if __name__ == "__main__":
    run(lambda: main(__doc__, settings, flat_loop))
