"""Tier (b): pico through whatever libraries this process has, its logits and adapter gradients written to a file.

    NANO3_CPU=1 python -m tests.gpu.stack NEMO_FOLDER OUT.pt fp32   # the stand-ins, on the CPU: what is compared with
    NANO3_CPU=1 python -m tests.gpu.stack NEMO_FOLDER OUT.pt bf16   # how far BF16 alone goes from it
    NANO3_CPU=0 python -m tests.gpu.stack NEMO_FOLDER OUT.pt bf16   # Transformer Engine, mamba-ssm, causal-conv1d

BF16 only on the GPU, because Transformer Engine has no attention over packed documents in FP32. The files are compared
by tests/gpu/distance.py.
"""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path
from typing import Any

from nano3 import cpu

cpu.enable()

import torch  # noqa: E402

from nano3.arch import Arch  # noqa: E402

LENGTHS = (150, 1, 73, 288)
"""Documents of the pack."""


def build(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model with its weights and adapters that are not zero, on this process's device."""
    from megatron.core import dist_checkpointing

    from nano3.lora.lora import Nano3LoRA
    from nano3.targets import PRESETS, select
    from tests.helpers.mcore_model import build as build_model

    arch = Arch.load(folder / "hf")
    model = build_model(arch, sum(LENGTHS), dtype)
    if not cpu.enabled():
        model = model.cuda()
    state = dist_checkpointing.load(model.sharded_state_dict(prefix="module."), str(folder / "weights"))
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    lora = Nano3LoRA(modules=select(arch, PRESETS["all"], "shared"), rank=16, alpha=32.0)
    model = lora(model)
    with torch.no_grad():
        for name, parameter in adapters(model).items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def adapters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if ".adapter." in name}


def forward_backward(model: Any, device: str, vocabulary: int) -> dict[str, Any]:
    """Logits (tokens, vocabulary) and the adapters' gradients of one packed batch, FP32 on the CPU.

    Padded vocabulary rows are left out: their huge negative logits would be all that a norm sees.
    """
    from nano3.core import packed_seq_params

    total = sum(LENGTHS)
    tokens, labels = torch.randint(3, 300, (2, total), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device),
        "max_seqlen": torch.tensor(max(LENGTHS)),
    }
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].to(device)
    packs = packed_seq_params(batch, 1)
    logits = model(tokens[None], positions, None, packed_seq_params=packs)[0, :, :vocabulary].float()
    torch.nn.functional.cross_entropy(logits, labels).backward()
    gradients = {name: p.grad.float().cpu() for name, p in adapters(model).items() if p.grad is not None}
    return {"logits": logits.detach().cpu(), "gradients": gradients}


def main() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    folder, out, precision = sys.argv[1:]
    device = "cpu" if cpu.enabled() else "cuda"
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    backend = "gloo" if cpu.enabled() else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    model = build(Path(folder), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    torch.save(forward_backward(model, device, Arch.load(Path(folder) / "hf").vocab_size), out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
