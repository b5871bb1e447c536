"""Run as a script by tests/test_meta.py: builds every rank of a layout on the meta device and counts what it owns.

python -m tests.meta_probe MODEL 1 4,tp=2,ep=2 ...   -> JSON {layout: {"ranks": parameters, "owned": values}}
"""

from __future__ import annotations

import json
import math
import sys

from nano3 import cpu

cpu.enable()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from nano3.arch import Arch, resolve_model  # noqa: E402
from nano3.core import build_mcore_model, transformer_kwargs  # noqa: E402
from nano3.cpu.cuda import redirected_to  # noqa: E402


def count(arch: Arch, rank: int, world: int, sizes: dict[str, int]) -> tuple[int, int]:
    """(parameters that this rank holds, values of which it owns the first replica)."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    tp, pp, ep = (sizes.get(name, 1) for name in ("tp", "pp", "ep"))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        **transformer_kwargs(arch),
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
        sequence_parallel=tp > 1,
    )
    with redirected_to("meta"), torch.device("meta"):
        model = build_mcore_model(
            config,
            arch.pattern,
            arch.vocab_size,
            8192,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        state = model.sharded_state_dict(prefix="module.")
    owned = sum(
        math.prod(part.local_shape)
        for entry in state.values()
        for part in (entry.build() if isinstance(entry, ShardedTensorFactory) else [entry])
        if isinstance(part, ShardedTensor) and set(_flat(part.replica_id)) == {0}
    )
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return sum(parameter.numel() for parameter in model.parameters()), owned


def _flat(replica_id: int | tuple) -> tuple:
    return replica_id if isinstance(replica_id, tuple) else (replica_id,)


def main() -> None:
    arch, result = Arch.load(resolve_model(sys.argv[1])), {}
    for layout in sys.argv[2:]:
        world, *items = layout.split(",")
        sizes = {name: int(size) for name, size in (item.split("=") for item in items)}
        counts = [count(arch, rank, int(world), sizes) for rank in range(int(world))]
        result[layout] = {"ranks": [held for held, _ in counts], "owned": [owned for _, owned in counts]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
