"""Run as a script by tests/test_conversion.py: what megatron-core's own model wants from a checkpoint, and loads of it.

python -m tests.megatron_probe plan CONFIG...            keys, shapes and objects of the model on the meta device
torchrun ... -m tests.megatron_probe load NEMO_FOLDER TP EP   loads the checkpoint and saves this rank's parameters
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from nano3 import cpu

cpu.enable()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from nano3.arch import Arch  # noqa: E402
from nano3.core import build_mcore_model, transformer_kwargs  # noqa: E402
from nano3.cpu.cuda import redirected_to  # noqa: E402


def build(arch: Arch, tp: int = 1, ep: int = 1) -> Any:
    config = TransformerConfig(
        **transformer_kwargs(arch),
        params_dtype=torch.bfloat16,
        bf16=True,
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
        sequence_parallel=tp > 1,
    )
    return build_mcore_model(config, arch.pattern, arch.vocab_size, arch.max_position_embeddings)


def plan(configs: list[str]) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(0)
    result = []
    for config in configs:
        arch = Arch.load(config)
        with redirected_to("meta"), torch.device("meta"):
            model = build(arch)
        tensors, objects = {}, []
        for entry in model.sharded_state_dict(prefix="module.").values():
            for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
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
    model = build(Arch.load(Path(folder) / "hf"), tp, ep)
    state = dist_checkpointing.load(model.sharded_state_dict(prefix="module."), f"{folder}/weights")
    loaded = {key.removeprefix("module."): value for key, value in state.items()}
    model.load_state_dict(loaded)
    values = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    torch.save(values, f"{folder}/rank{dist.get_rank()}.pt")
    dist.barrier()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.argv[1] == "plan":
        plan(sys.argv[2:])
    else:
        load(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
