"""Megatron-Core's model for the scripts that tests run (`*_probe.py`). Importing it switches the CPU backend on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from nano3 import cpu

cpu.enable()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from nano3.arch import Arch  # noqa: E402
from nano3.core import build_mcore_model, transformer_kwargs  # noqa: E402
from nano3.pipeline_parallel import pipeline_kwargs  # noqa: E402


def join_alone() -> None:
    """A process group of one rank, its parallel state, and seeds: what a model's modules ask for."""
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)


def build(
    arch: Arch,
    max_sequence_length: int,
    dtype: torch.dtype = torch.bfloat16,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    ep: int = 1,
    etp: int = 1,
) -> Any:
    """This rank's part of the model in a layout whose parallel groups exist already."""
    config = TransformerConfig(
        **transformer_kwargs(arch),
        **pipeline_kwargs(arch, pp),
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        sequence_parallel=tp > 1,
    )
    return build_mcore_model(
        config,
        arch.pattern,
        arch.vocab_size,
        max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def sharded_parts(model: Any) -> Iterator[Any]:
    """Every sharded tensor and object of the model, factories applied, keys with the prefix `module.`."""
    for entry in model.sharded_state_dict(prefix="module.").values():
        yield from entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
