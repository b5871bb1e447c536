"""Run by tests/nano3/test_model.py: Megatron-Core's model on one rank, its logits, its gradients, its guards.

python -m tests.helpers.model_probe NEMO_FOLDER ADAPTER OUT.safetensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nano3 import cpu

cpu.enable()

import torch  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from nano3.arch import Arch  # noqa: E402
from nano3.checkpoints.adapter_checkpoint import adapter_state, save_adapter  # noqa: E402
from nano3.lora.lora import Nano3LoRA  # noqa: E402
from nano3.router import RouterGuard  # noqa: E402
from nano3.targets import PRESETS, select  # noqa: E402
from tests.helpers.mcore_model import build, join_alone  # noqa: E402

LENGTHS = (7, 1, 12, 20)
"""Documents of the pack: a short one, one of a single token, and two that cross a chunk of the scan."""


def load(folder: Path) -> tuple[torch.nn.Module, Arch]:
    arch = Arch.load(folder / "hf")
    model = build(arch, 128, torch.float32).eval()
    state = dist_checkpointing.load(model.sharded_state_dict(prefix="module."), str(folder / "weights"))
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model, arch


def packed(lengths: tuple[int, ...]) -> PackedSeqParams:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    longest = max(lengths)
    return PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)


def logits(model: torch.nn.Module, tokens: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """(tokens,) packed documents -> (tokens, vocabulary)."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return model(tokens[None], positions, None, packed_seq_params=packed(lengths))[0]


def leak(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What document 2 knows of the others: gradients of its loss, and its logits when the others change."""
    start, stop = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    seen: list[torch.Tensor] = []
    hook = model.embedding.register_forward_hook(lambda _m, _i, out: seen.append(out.requires_grad_()) or None)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    before = logits(model, tokens, LENGTHS)
    hook.remove()
    loss = before[start : stop - 1].log_softmax(-1).gather(1, tokens[start + 1 : stop, None]).sum()
    (gradient,) = torch.autograd.grad(loss, seen[0])
    other = tokens.clone()
    other[:start] = (other[:start] + 5) % 100
    other[stop:] = (other[stop:] + 7) % 100
    after = logits(model, other, LENGTHS)
    return {"leak.gradient": gradient[:, 0], "leak.moved": (before - after)[start:stop].abs().max()}


def main() -> None:
    nemo, adapter, out = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    join_alone()
    model, arch = load(nemo)
    tokens = torch.randint(0, 100, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    results = {"tokens": tokens, **leak(model, tokens)}
    # PyTorch picks another kernel, with other rounding, for weights that want gradients: freeze before comparing bits.
    model.requires_grad_(False)
    with torch.no_grad():
        results["base"] = logits(model, tokens, LENGTHS)
        modules = select(arch, PRESETS["all"], "shared")
        model = _with_adapter(model, modules)
        results["fresh"] = logits(model, tokens, LENGTHS)  # B is zero: nothing may change
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.normal_(0, 0.1)
        results["adapted"] = logits(model, tokens, LENGTHS)
    facts = {
        "format": 2,
        "rank_pattern": [],
        "alpha_pattern": [],
        "rslora": False,
        "dora": False,
        "rank": 4,
        "alpha": 8.0,
        "targets": list(PRESETS["all"]),
        "experts": "shared",
    }
    save_adapter(model, adapter, {**facts, "base_config": json.loads((nemo / "hf/config.json").read_text())})
    results["adapters"] = torch.tensor(len(adapter_state(model)))
    results["guard"] = torch.tensor(_guard_fires(model) if arch.moe_layers else _guard_is_idle(model))
    results["cast"] = torch.tensor(_bias_survives_a_cast(model))
    save_file({name: value.detach().contiguous() for name, value in results.items()}, out)


def _with_adapter(model: torch.nn.Module, modules: list[str]) -> torch.nn.Module:
    lora = Nano3LoRA(modules=modules, rank=4, alpha=8.0)
    return lora(model)


def _guard_fires(model: torch.nn.Module) -> bool:
    """The guard passes an untouched router, and stops when a correction bias moves by 1e-3."""
    guard = RouterGuard()
    guard.on_train_start(None, model)
    guard.on_train_end(None, model)
    router = next(module for module in model.modules() if hasattr(module, "expert_bias"))
    router.expert_bias[0] += 1e-3
    try:
        guard.on_train_end(None, model)
    except RuntimeError:
        return True
    return False


def _guard_is_idle(model: torch.nn.Module) -> bool:
    """A model without routers passes the guard, with the digest of none."""
    guard = RouterGuard()
    guard.on_train_start(None, model)
    guard.on_train_end(None, model)
    return guard.layers == {}


def _bias_survives_a_cast(model: torch.nn.Module) -> bool:
    """A cast to BF16 leaves A_log and D, and router bias and counts if there are any, as they were, bit for bit; it
    casts everything else."""
    routers = [module for module in model.modules() if hasattr(module, "expert_bias")][:1]
    mixer = next(module for module in model.modules() if hasattr(module, "A_log"))

    def exact() -> list[torch.Tensor]:
        counted = [tensor for router in routers for tensor in (router.expert_bias, router.local_tokens_per_expert)]
        return [mixer.A_log, mixer.D, *counted]

    with torch.no_grad():
        before = [tensor.fill_(0.123456789).clone() for tensor in exact()]
    model.bfloat16()
    after = [*exact(), mixer.cp.A_log_cp1, mixer.cp.D_cp1]
    kept = all(torch.equal(now, then) for now, then in zip(after, [*before, *before[:2]], strict=True))
    cast = [mixer.dt_bias, mixer.conv1d.weight, model.output_layer.weight, *(router.weight for router in routers)]
    return kept and {tensor.dtype for tensor in cast} == {torch.bfloat16}


if __name__ == "__main__":
    main()
