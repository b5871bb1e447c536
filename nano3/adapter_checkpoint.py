"""Writes the adapter that a run ends with: Megatron-Core's `torch_dist` with adapter tensors only, and `lora.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.models.mamba import MambaModel
from torch import nn

from nano3.cli import fresh_output
from nano3.router import RouterGuard, balances

KIND = "lora-adapter"


def adapter_state(model: nn.Module) -> dict[str, Any]:
    """The sharded state of this rank's adapters, keys with the prefix `module.` and global layer numbers."""
    (core,) = [module for module in model.modules() if isinstance(module, MambaModel)]
    state = core.sharded_state_dict(prefix="module.")
    moving = (".mlp.router.expert_bias",) if balances(model) else ()
    return {key: value for key, value in state.items() if ".adapter." in key or key.endswith(moving)}


def save_adapter(model: nn.Module, out: Path, facts: dict[str, Any]) -> None:
    """Writes the folder `out` from all ranks, whole or not at all: `weights/`, and `lora.json` with `facts`."""
    state = adapter_state(model)
    if dist.get_rank() > 0:
        folder = [""]
        dist.broadcast_object_list(folder, src=0)
        _save(state, Path(folder[0]))
        dist.barrier()
        return
    with fresh_output(out, KIND) as temporary:
        (temporary / "weights").mkdir()
        dist.broadcast_object_list([str(temporary / "weights")], src=0)
        _save(state, temporary / "weights")
        (temporary / "lora.json").write_text(json.dumps({"format": 1, **facts}, indent=1) + "\n")
    dist.barrier()


def _save(state: dict[str, Any], folder: Path) -> None:
    # One thread: with more, PyTorch's writer starts processes, which costs more than adapters are worth.
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(state, str(folder), sharded_strategy=strategy)


class SaveAdapter(pl.Callback):
    """Writes the adapter when training has ended.

    Args:
        out: the folder to write.
        facts: for `lora.json`: rank, alpha, dropout, targets, experts, modules, base_config.
    """

    def __init__(self, out: str, facts: dict[str, Any]) -> None:
        self.out, self.facts = out, facts

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        guards = [callback for callback in trainer.callbacks if isinstance(callback, RouterGuard)]  # type: ignore[attr-defined]
        save_adapter(
            pl_module,
            Path(self.out),
            {**self.facts, "steps": trainer.global_step, "router_sha256": guards[0].digest if guards else None},
        )
