"""Run by tests/conversion/test_conversion.py: what megatron-core's own model wants from a checkpoint, and loads of it.

python -m tests.helpers.megatron_probe plan CONFIG...        keys, shapes and objects of the model on the meta device
RANK=... python -m tests.helpers.megatron_probe load NEMO_FOLDER TP EP   loads it and saves this rank's parameters
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.helpers.mcore_model import build, sharded_parts  # first: it switches the CPU backend on

# isort: split

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from nano3.arch import Arch
from nano3.cpu.cuda import redirected_to


def plan(configs: list[str]) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(0)
    result = []
    for config in configs:
        arch = Arch.load(config)
        with redirected_to("meta"), torch.device("meta"):
            model = build(arch, arch.max_position_embeddings)
        tensors, objects = {}, []
        for part in sharded_parts(model):
            if isinstance(part, ShardedObject):
                objects.append(part.unique_key)
            else:
                tensors[part.key] = list(part.global_shape)
        result.append({"tensors": tensors, "objects": objects})
    print(json.dumps(result))


def load(folder: str, tp: int, ep: int) -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1
    )
    model_parallel_cuda_manual_seed(0)
    arch = Arch.load(Path(folder) / "hf")
    model = build(arch, arch.max_position_embeddings, tp=tp, ep=ep)
    state = dist_checkpointing.load(model.sharded_state_dict(prefix="module."), f"{folder}/weights")
    loaded = {key.removeprefix("module."): value for key, value in state.items()}
    model.load_state_dict(loaded)
    values = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    torch.save(values, f"{folder}/rank{dist.get_rank()}.pt")
    dist.barrier()


if __name__ == "__main__":
    if sys.argv[1] == "plan":
        plan(sys.argv[2:])
    else:
        load(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
