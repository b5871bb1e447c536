"""Run by tests/nano3/test_te_signatures.py: records what megatron-core asks of the Transformer Engine stand-in.

    python -m tests.helpers.te_calls OUT.json

Builds the tiny model on megatron-core's stock spec, runs it forward and backward, packed and not, and asks for its
checkpoint layout. Writes the stand-in's names and signatures, and every call into it that comes from megatron-core.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nano3 import cpu
from nano3.cpu.te import modules as te_modules

CALLS: set[tuple[str, str, int, tuple[str, ...]]] = set()


def called_by_megatron() -> bool:
    """Whether the call that is being recorded comes from megatron-core or NeMo, perhaps through torch's machinery."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("torch", "contextlib", "functools", __name__)):
            return name.startswith(("megatron", "nemo"))
        frame = frame.f_back  # type: ignore[assignment]
    return False


def recorded(owner: str, name: str, function: Callable, bound: bool) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        if called_by_megatron():
            CALLS.add((owner, name, len(args) - bound, tuple(sorted(keywords))))
        return function(*args, **keywords)

    return call


def describe(function: Callable, bound: bool) -> list[list[str]]:
    """[name, kind, default or ''] of every parameter, without self."""
    parameters = list(inspect.signature(function).parameters.values())[bound:]
    return [[p.name, p.kind.name, "" if p.default is p.empty else repr(p.default)] for p in parameters]


def record_class(owner: str, cls: type) -> dict[str, list[list[str]]]:
    """Wraps the class's own methods in place; returns their signatures. Static methods and properties are left out."""
    signatures = {}
    for name, function in list(vars(cls).items()):
        public = name == "__init__" or not name.startswith("_")
        if isinstance(function, types.FunctionType) and public:
            signatures[name] = describe(function, bound=True)
            setattr(cls, name, recorded(owner, name, function, bound=True))
    return signatures


def record_standin() -> dict[str, dict[str, Any]]:
    """{module: {name: None | signature of a function | {method: signature}}}, recording from now on."""
    te_modules.install()
    offered: dict[str, dict[str, Any]] = {}
    seen: dict[int, dict[str, Any]] = {}
    for module_name in [
        m for m in sys.modules if m.split(".")[0] in ("transformer_engine", "transformer_engine_torch")
    ]:
        module = sys.modules[module_name]
        names = offered.setdefault(module_name, {})
        for name, value in list(vars(module).items()):
            if name.startswith("_"):
                continue
            where = f"{module_name}.{name}"
            if isinstance(value, type) and value.__module__.startswith("nano3"):
                if id(value) not in seen:
                    seen[id(value)] = record_class(where, value)
                names[name] = seen[id(value)]
            elif isinstance(value, types.FunctionType):
                names[name] = describe(value, bound=False)
                setattr(module, name, recorded(where, "", value, bound=False))
            else:
                names[name] = None
    te_modules.install = lambda: None  # type: ignore[assignment]  # enable() must not undo the recording
    return offered


def run_model() -> None:
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nano3.arch import Arch
    from nano3.core import build_mcore_model, transformer_kwargs
    from tests.helpers.tiny import TINY_CONFIG

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(0)
    arch = Arch.from_config(TINY_CONFIG)
    config = TransformerConfig(**transformer_kwargs(arch))
    model = build_mcore_model(config, arch.pattern, arch.vocab_size, 64)
    tokens = torch.randint(0, arch.vocab_size, (1, 16))
    cu_seqlens = torch.tensor([0, 5, 16], dtype=torch.int32)
    bounds = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens, "max_seqlen_q": 11, "max_seqlen_kv": 11}
    for packed in (None, PackedSeqParams(qkv_format="thd", **bounds)):
        logits = model(tokens, torch.arange(16)[None], None, packed_seq_params=packed)
        logits.float().sum().backward()
    model.sharded_state_dict(prefix="module.")
    model.load_state_dict(model.state_dict())


def main() -> None:
    offered = record_standin()
    cpu.enable()
    run_model()
    Path(sys.argv[1]).write_text(json.dumps({"offered": offered, "calls": sorted(CALLS)}))


if __name__ == "__main__":
    main()
