"""Run by tests/nano3/test_recompute.py: saved bytes, loss and gradients of one step with every kind of recompute.

python -m tests.helpers.recompute_probe OUT.json
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
from megatron.core import parallel_state  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from nano3.arch import Arch  # noqa: E402
from nano3.core import build_mcore_model, transformer_kwargs  # noqa: E402
from nano3.lora.lora import Nano3LoRA  # noqa: E402
from nano3.recompute import install_recompute, recompute_kwargs  # noqa: E402
from nano3.router import routers  # noqa: E402
from nano3.targets import PRESETS as TARGETS  # noqa: E402
from nano3.targets import select  # noqa: E402
from nano3.training.expert_load import ExpertLoad  # noqa: E402
from tests.helpers.tiny import TINY_CONFIG  # noqa: E402

BOUNDS = (0, 10, 24, 64)
"""Three documents in a pack of 64 tokens."""
RANK = 4
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"recompute": ["full"]},
    "mamba": {"recompute": ["mamba"]},
    "moe": {"recompute": ["moe"]},
    "moe_act": {"recompute": ["moe_act"]},
    "shared_experts": {"recompute": ["shared_experts"]},
    "layernorm": {"recompute": ["layernorm"]},
    "three and mamba": {"recompute": ["moe_act", "shared_experts", "layernorm", "mamba"]},
    "none, dropout": {"dropout": 0.25},
    "full, dropout": {"recompute": ["full"], "dropout": 0.25},
    "moe, dropout": {"recompute": ["moe"], "dropout": 0.25},
    "none, first layer without adapter": {"targets": ["*.experts.*", "linear_qkv"]},
    "moe, first layer without adapter": {"recompute": ["moe"], "targets": ["*.experts.*", "linear_qkv"]},
    "moe, first layer without adapter, fault": {
        "recompute": ["moe"],
        "targets": ["*.experts.*", "linear_qkv"],
        "fault": True,
    },
    "Megatron-Core's full": {"megatron": FULL},
    "Megatron-Core's core_attn": {
        "megatron": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    },
}


def build(arch: Arch, case: dict[str, Any]) -> torch.nn.Module:
    """The tiny model with adapters whose B is not zero; the same weights in every case."""
    model_parallel_cuda_manual_seed(0)
    torch.manual_seed(0)
    recompute = case.get("recompute", [])
    settings = {**recompute_kwargs(recompute), **case.get("megatron", {})}
    config = TransformerConfig(**transformer_kwargs(arch), params_dtype=torch.float32, **settings)
    model = build_mcore_model(config, arch.pattern, arch.vocab_size, BOUNDS[-1])
    if not case.get("fault"):
        install_recompute(model, recompute)
    modules = select(arch, case.get("targets", TARGETS["all"]), "shared")
    lora = Nano3LoRA(modules=modules, rank=RANK, alpha=2.0 * RANK, dropout=case.get("dropout", 0.0))
    model = lora(model)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
    return model.train()


class Saved:
    """Adds up what the decoder's forward pass keeps for its backward pass, parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
        self.kept: dict[int, torch.UntypedStorage] = {}
        self.bytes = 0
        self.context = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        model.decoder.register_forward_pre_hook(lambda *_: self.context.__enter__())
        model.decoder.register_forward_hook(self._leave)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.kept[storage._cdata] = storage
        return tensor

    def _leave(self, *_: Any) -> None:
        self.context.__exit__(None, None, None)
        self.bytes = sum(storage.nbytes() for storage in self.kept.values())  # what was discarded has 0 bytes now
        self.kept.clear()


def step(arch: Arch, case: dict[str, Any]) -> dict[str, Any]:
    """One forward and backward pass."""
    model = build(arch, case)
    saved, load = Saved(model), ExpertLoad()
    load.start(model)
    tokens = torch.randint(0, 100, (1, BOUNDS[-1] + 1), generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=40, max_seqlen_kv=40)
    positions = torch.cat([torch.arange(int(length)) for length in bounds.diff()])[None]
    model_parallel_cuda_manual_seed(7)
    torch.manual_seed(7)
    loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:], packed_seq_params=packed).sum()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {
        "bytes": saved.bytes,
        "loss": loss.item(),
        "gradients": gradients,
        "experts": load.stop(),
        "megatron": {n: router.local_tokens_per_expert.tolist() for n, router in routers(model).items()},
    }


def main() -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    arch = Arch.from_config(TINY_CONFIG)
    results: dict[str, Any] = {}
    references: dict[str, dict[str, torch.Tensor]] = {}
    for name, case in CASES.items():
        found = step(arch, case)
        gradients = found.pop("gradients")
        plain = references.setdefault(", ".join(name.split(", ")[1:2]), gradients)
        missing = [n for n, gradient in gradients.items() if gradient is None]
        errors = [float((gradients[n] - plain[n]).abs().max()) for n in plain if n not in missing]
        results[name] = {**found, "missing": missing, "error": max(errors, default=None)}
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
