"""Run by tests/launch/test_memory_plan.py: bytes that megatron-core's own model holds, and keeps for backward.

python -m tests.helpers.memory_probe OUT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from nano3.parity import worker  # first: it switches the CPU backend on
from nano3.parity.processes import on_ranks

# isort: split

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.experts import TEGroupedMLP
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore

from nano3.arch import Arch, resolve_model
from nano3.chunked_loss import install_chunked_loss
from nano3.core import build_mcore_model
from nano3.cpu.cuda import redirected_to
from nano3.lora.lora import Nano3LoRA
from nano3.nf4_base import quantize_linears
from nano3.parity.case import PACK, PATTERN, Case
from nano3.parity.shards import fill, hf_reader
from nano3.recompute import install_recompute, recompute_kwargs
from nano3.targets import PRESETS, VOCABULARY, select
from tests.helpers.mcore_model import build
from tests.helpers.memory_cases import DENSE_LAYOUTS, LAYOUTS, NF4_LAYOUTS, RUNS, TINY, VARIANT_LAYOUTS, VARIANTS


def parallel(name: str, rank: int) -> worker.Sizes:
    """Joins a fake world in this layout as `rank`."""
    sizes = worker.Sizes.parse(name)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=sizes.ranks)
    parallel_state.initialize_model_parallel(**sizes.kwargs, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(0)
    return sizes


def on_meta(arch: Arch, name: str) -> torch.Tensor:
    """A whole Hugging Face tensor without values."""
    return torch.empty(arch.tensors()[name].shape, device="meta")


def held(model: torch.nn.Module) -> int:
    """Bytes of what a checkpoint of this rank would hold, and of persistent state besides."""
    tensors = list(model.parameters()) + list(model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def lora(arch: Arch, preset: str = "all", vocabulary: bool = False, **settings: Any) -> Nano3LoRA:
    targets = [*PRESETS[preset], *(path.rsplit(".")[-1] for path in VOCABULARY)] if vocabulary else PRESETS[preset]
    experts = settings.get("experts", "shared")
    made = Nano3LoRA(modules=select(arch, list(targets), experts), **settings)
    return made


def meta_bytes(arch: Arch, name: str) -> list[dict[str, int]]:
    """Of one rank of every pipeline stage: bytes of the model, and of each variant's adapters where asked for."""
    found = []
    sizes = worker.Sizes.parse(name)
    for stage in range(sizes.pp):
        parallel(name, stage * (sizes.ranks // sizes.pp))
        result = {}
        for variant, settings in {"": {}, **(VARIANTS if name in VARIANT_LAYOUTS else {})}.items():
            with redirected_to("meta"), torch.device("meta"):
                model = build(arch, 8192, tp=sizes.tp, pp=sizes.pp, cp=sizes.cp, ep=sizes.ep, etp=sizes.etp)
                if variant:
                    model = lora(arch, **settings)(model)
            if not variant:
                result["weights"] = held(model)
                if name in NF4_LAYOUTS:
                    quantize_linears(model, arch, partial(on_meta, arch))
                    result["nf4"] = held(model)
            else:
                trained = [p for p in model.parameters() if p.requires_grad]
                result[variant] = sum(p.numel() * p.element_size() for p in trained)
        found.append(result)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return found


def measured(case: Case, sizes: worker.Sizes, settings: dict[str, Any] | None, recompute: tuple[str, ...]) -> dict:
    """One training step of this rank; None trains every weight. Bytes, and the routed tokens over an even share."""
    bf16 = case.dtype == torch.bfloat16
    model = tiny_model(case, sizes, settings, recompute)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=bf16)
    wrapped = DistributedDataParallel(model.config, ddp, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-3, bf16=bf16, params_dtype=case.dtype, use_distributed_optimizer=bf16, clip_grad=0.0
        ),
        [wrapped],
    )
    watch = Watch(model)
    with watch.hooks():
        get_forward_backward_func()(
            forward_step_func=partial(worker.forward_step, []),
            data_iterator=worker.my_batches(case, sizes, 0),
            model=[wrapped],
            num_microbatches=1,
            seq_length=PACK,
            micro_batch_size=1,
        )
    optimizer.step()
    buffers = wrapped.buffers + wrapped.expert_parallel_buffers
    return {
        "weights": held(model) - sum(trained(model)),
        "adapters": sum(b.param_data.nbytes for b in buffers) if bf16 else sum(trained(model)),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(map(state_bytes, getattr(optimizer, "chained_optimizers", [optimizer]))),
        "activations": watch.kept,
        "imbalance": watch.imbalance(case, sizes),
    }


def trained(model: torch.nn.Module) -> list[int]:
    """Bytes of every trained parameter."""
    return [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]


def state_bytes(optimizer: Any) -> int:
    """Adam's moments, and FP32 copies where the model's parameters are not FP32 themselves."""
    inner = optimizer.optimizer
    total = 0
    for group in inner.param_groups:
        for parameter in group["params"]:
            states = [
                value for value in inner.state[parameter].values() if torch.is_tensor(value) and value.numel() > 1
            ]
            total += sum(value.nbytes for value in states)
    for copies in getattr(optimizer, "shard_fp32_from_float16_groups", []):
        total += sum(copy.nbytes for copy in copies if copy is not None)
    return total


class Watch:
    """Storages that autograd keeps, and tokens that reach routed experts."""

    def __init__(self, model: torch.nn.Module) -> None:
        known = [*model.parameters(), *model.buffers()]
        self.weights = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.weights |= {p.main_grad.untyped_storage().data_ptr() for p in known if hasattr(p, "main_grad")}
        self.storages: dict[int, StorageWeakRef] = {}
        self.kept = 0
        self.tokens: list[int] = []
        for module in model.modules():
            if isinstance(module, TEGroupedMLP):
                module.register_forward_pre_hook(lambda _m, inputs: self.tokens.append(inputs[0].shape[0]))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Measures when the first backward pass begins: what was thrown away by then does not count."""
        backward = schedules.backward_step

        def after_forward(*arguments: Any, **settings: Any) -> Any:
            alive = (torch.UntypedStorage._new_with_weak_ptr(reference.cdata) for reference in self.storages.values())
            self.kept = self.kept or sum(storage.nbytes() for storage in alive if storage is not None)
            return backward(*arguments, **settings)

        with patch.object(schedules, "backward_step", after_forward):
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not self.kept and storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = StorageWeakRef(storage)
        return tensor

    def imbalance(self, case: Case, sizes: worker.Sizes) -> float:
        """Routed tokens over an even share; a layer that is computed again counts once."""
        even = PACK // sizes.cp // sizes.tp * case.arch.num_experts_per_tok * sizes.etp
        return sum(self.tokens) / (len(self.tokens) * even) if self.tokens else 1.0


def tiny_model(
    case: Case, sizes: worker.Sizes, settings: dict[str, Any] | None, recompute: tuple[str, ...]
) -> torch.nn.Module:
    """This rank's part of the small model of the parity suite."""
    config = worker.config_of(case, sizes)
    for name, value in recompute_kwargs(recompute).items():
        setattr(config, name, value)
    model = build_mcore_model(
        config,
        case.arch.pattern,
        case.arch.vocab_size,
        PACK,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    if case.nf4:
        quantize_linears(model, case.arch, hf_reader(case))
    install_recompute(model, recompute)
    install_chunked_loss(model, case.loss_chunk)
    model = model if settings is None else lora(case.arch, **TINY | settings)(model)
    fill(model, case)
    return model.train()


def main() -> None:
    result: dict[str, Any] = {"measured": {}, "meta": {}}
    for name, (layout, dtype, settings, recompute) in RUNS.items():
        text, _, pattern = layout.partition("@")
        own = {} if settings is None else {key: settings[key] for key in ("nf4", "loss_chunk") if key in settings}
        adapters = None if settings is None else {key: value for key, value in settings.items() if key not in own}
        case = Case(dtype=getattr(torch, dtype), pattern=pattern or PATTERN, **own)
        sizes = worker.Sizes.parse(text)
        result["measured"][name] = on_ranks(sizes, measured, case, sizes, adapters, recompute)
    arch = Arch.load(resolve_model("nano"))
    for name in [*LAYOUTS, *(name for name in VARIANT_LAYOUTS if name not in LAYOUTS)]:
        result["meta"][name] = meta_bytes(arch, name)
    dense = Arch.load(resolve_model("nano-4b"))
    result["dense"] = {name: meta_bytes(dense, name) for name in DENSE_LAYOUTS}
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
