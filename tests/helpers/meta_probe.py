"""Run by tests/nano3/test_meta.py: builds every rank of a layout on the meta device and counts what it owns.

python -m tests.helpers.meta_probe MODEL 1 4,tp=2,ep=2 ...   -> JSON {layout: {"ranks": parameters, "owned": values}}
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from tests.helpers.mcore_model import build, sharded_parts  # first: it switches the CPU backend on

# isort: split

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from nano3.arch import Arch, resolve_model
from nano3.cpu.cuda import redirected_to


@contextmanager
def rank_of(rank: int, world: int, sizes: dict[str, int]) -> Iterator[None]:
    """Within, this process is one rank of a layout, and everything that is built is on the meta device."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.get("tp", 1),
        pipeline_model_parallel_size=sizes.get("pp", 1),
        expert_model_parallel_size=sizes.get("ep", 1),
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(0)
    with redirected_to("meta"), torch.device("meta"):
        yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def count(arch: Arch, rank: int, world: int, sizes: dict[str, int]) -> tuple[int, int]:
    """(parameters that this rank holds, values of which it owns the first replica)."""
    with rank_of(rank, world, sizes):
        model = build(arch, 8192, **sizes)
        parts = list(sharded_parts(model))
    owned = sum(
        math.prod(part.local_shape)
        for part in parts
        if isinstance(part, ShardedTensor) and set(_flat(part.replica_id)) == {0}
    )
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
