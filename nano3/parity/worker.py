"""One rank of one layout: builds its part of the model, trains three steps, writes what it saw.

Megatron-Core's own schedule, data-parallel wrapper, gradient reduction and optimizer; of NeMo only the adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from nano3 import cpu

cpu.enable()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.distributed.finalize_model_grads import finalize_model_grads  # noqa: E402
from megatron.core.models.mamba import MambaModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from nano3.chunked_loss import install_chunked_loss  # noqa: E402
from nano3.context_parallel import cut_batch  # noqa: E402
from nano3.core import build_mcore_model, packed_seq_params, transformer_kwargs  # noqa: E402
from nano3.etp_replicas import then_equal_copies  # noqa: E402
from nano3.gate import Gate  # noqa: E402
from nano3.nf4_base import quantize_linears  # noqa: E402
from nano3.parity.case import ALPHA, MARK, PACK, RANK, STEPS, Case, Sizes  # noqa: E402
from nano3.parity.shards import fill, hf_reader, shards  # noqa: E402
from nano3.pipeline_parallel import pipeline_kwargs  # noqa: E402
from nano3.recompute import install_recompute, recompute_kwargs  # noqa: E402
from nano3.targets import PRESETS, adaptable_modules, is_routed, select  # noqa: E402


def config_of(case: Case, sizes: Sizes) -> TransformerConfig:
    """Megatron-Core's configuration of the case on a layout."""
    kwargs = transformer_kwargs(case.arch) | pipeline_kwargs(case.arch, sizes.pp) | recompute_kwargs(case.recompute)
    kwargs["moe_token_dispatcher_type"] = case.dispatcher
    if case.dtype == torch.float64:
        kwargs["moe_router_dtype"] = "fp64"
    return TransformerConfig(
        **kwargs,
        params_dtype=case.dtype,
        pipeline_dtype=case.dtype,
        **sizes.kwargs,
        sequence_parallel=sizes.tp > 1,
        calculate_per_token_loss=True,
        finalize_model_grads_func=then_equal_copies(finalize_model_grads),
    )


def keep_fp64_loss() -> None:
    """Megatron-Core turns logits to FP32 before the cross entropy; an FP64 comparison would end there."""

    def calculate_logits_max(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.clone()  # the caller subtracts the maximum in place
        return logits, logits.max(-1).values

    VocabParallelCrossEntropy.calculate_logits_max = staticmethod(calculate_logits_max)


def build(case: Case, sizes: Sizes) -> torch.nn.Module:
    """This rank's part of the model with the case's weights and, if asked for, adapters."""
    model = build_mcore_model(
        config_of(case, sizes),
        case.arch.pattern,
        case.arch.vocab_size,
        PACK,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    if case.nf4:
        quantize_linears(model, case.arch, hf_reader(case))  # before adapters: DoRA's lengths are of the frozen weights
    if case.adapters != "none":
        model = adapted(model, case)
    core = next(module for module in model.modules() if isinstance(module, MambaModel))
    install_recompute(core, case.recompute)
    install_chunked_loss(core, case.loss_chunk)
    fill(model, case)
    return model


def adapted(model: torch.nn.Module, case: Case) -> torch.nn.Module:
    """Adapters on every linear layer that the pattern has."""
    from nano3.lora.lora import Nano3LoRA  # imports NeMo, which comparisons of whole models do without

    experts: Literal["each", "shared", "none"] = "each" if case.adapters == "each" else "shared"
    named = {path.rpartition(".")[2] for path in adaptable_modules(case.arch)}
    modules = select(case.arch, [target for target in PRESETS["all"] if target in named], experts)
    dora, gated = case.adapters == "dora", case.adapters == "gated"
    if gated:
        modules, experts = [path for path in modules if not is_routed(path)], "none"
    mark = list(MARK) if gated else []
    return Nano3LoRA(modules=modules, rank=RANK, alpha=ALPHA, experts=experts, dora=dora, mark=mark)(model)


def forward_step(losses: list[torch.Tensor], data: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple:
    """Megatron-Core's contract: the output, and what makes (sum, number, report) of it."""
    batch = next(data)
    forward = partial(
        model,
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        packed_seq_params=packed_seq_params(batch, parallel_state.get_context_parallel_world_size()),
    )
    core = next(module for module in model.modules() if isinstance(module, MambaModel))
    gate: Gate | None = getattr(core, "gate", None)
    output = forward() if gate is None else gate.through(batch["gate"], forward)

    def loss(per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        total = (per_token * batch["loss_mask"]).sum()
        number = batch["loss_mask"].sum()
        losses.append(torch.stack([total.detach().double(), number.double()]))
        return total, number.int(), {}

    return output, loss


def my_batches(case: Case, sizes: Sizes, step: int) -> Iterator[dict[str, torch.Tensor]]:
    """The packs of this data-parallel rank, its context-parallel share of each."""
    share = parallel_state.get_data_parallel_rank()
    for number in range(share, len(case.packs), sizes.copies):
        yield cut_batch(case.batch(step, number), sizes.cp, parallel_state.get_context_parallel_rank())


def watch_ties(model: torch.nn.Module) -> list[float]:
    """Grows by every routing: the smallest gap between a token's last chosen expert and the first that was not."""
    ties: list[float] = []

    def look(router: Any, inputs: tuple) -> None:
        with torch.no_grad():
            scores = router.gating(inputs[0]).sigmoid() + router.expert_bias
            best = scores.flatten(0, -2).topk(router.topk + 1).values
            ties.append(float((best[:, -2] - best[:, -1]).min()))

    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_pre_hook(look)
    return ties


def over_ranks(losses: list[torch.Tensor]) -> float:
    """Mean loss per supervised token of the global batch; ranks that computed no loss add nothing."""
    total = torch.stack(losses).sum(0) if losses else torch.zeros(2, dtype=torch.float64)
    if parallel_state.get_tensor_model_parallel_rank() > 0:
        total = torch.zeros_like(total)  # tensor-parallel ranks all have the same loss
    dist.all_reduce(total)
    return float(total[0] / total[1])


def optimizer_of(case: Case, model: Any) -> Any:
    """Megatron-Core's Adam. Clipping knows FP32 gradients only, so in FP64 there is none."""
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=1e-3, weight_decay=0.1, params_dtype=case.dtype, adam_eps=case.epsilon,
            clip_grad=0.0 if case.dtype == torch.float64 else 0.5, use_distributed_optimizer=case.distributed,
        ),
        [model],
    )  # fmt: skip


def gather_gradients(wrapped: DistributedDataParallel) -> None:
    """Under the distributed optimizer a rank has the sums of its share of a bucket only: fetches the others'."""
    for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            parts = bucket.grad_data.chunk(group.size())
            dist.all_gather(list(parts), parts[group.rank()].clone(), group=group)


def gradients(model: torch.nn.Module, case: Case) -> list:
    """The reduced gradients, placed like the parameters that they belong to."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [parameter.detach().clone() for parameter in trained]
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(parameter.main_grad)  # type: ignore[attr-defined]
        found = shards(model, case.adapters != "none")
        for parameter, value in zip(trained, values, strict=True):
            parameter.copy_(value)
    return found


def train(case: Case, sizes: Sizes) -> dict[str, Any]:
    """Three steps: the losses of each, the first gradients and their norm, the trained parameters, the nearest tie."""
    if case.dtype == torch.float64:
        keep_fp64_loss()
    model = build(case, sizes)
    ties = watch_ties(model)
    config = model.config
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=False, use_distributed_optimizer=case.distributed, overlap_grad_reduce=False
    )
    wrapped = DistributedDataParallel(config, settings, model)
    optimizer = optimizer_of(case, wrapped)
    result: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        get_forward_backward_func()(
            forward_step_func=partial(forward_step, losses),
            data_iterator=my_batches(case, sizes, step),
            model=[wrapped],
            num_microbatches=len(case.packs) // sizes.copies,
            seq_length=PACK,
            micro_batch_size=1,
        )
        result["losses"].append(over_ranks(losses))
        if step == 0:
            if case.distributed:
                gather_gradients(wrapped)
            result["gradients"] = gradients(model, case)
        result["norms"].append(optimizer.step()[1])
    result["trained"] = shards(model, case.adapters != "none")
    result["tie"] = min(ties, default=math.inf)
    return result


def rank_main(work: Callable[..., Any], folder: Path, rank: int, world: int, sizes: Sizes, *arguments: Any) -> None:
    """Joins the group, runs `work(*arguments)` and writes its result to `folder/rank.pt`."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(**sizes.kwargs)
    model_parallel_cuda_manual_seed(1)
    torch.save(work(*arguments), folder / f"{rank}.pt")
    dist.barrier()
