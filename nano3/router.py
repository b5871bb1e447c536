"""The router stays as the base model has it: hashed when training starts and when it ends.

The router's weight is frozen like every base weight. Its correction bias is a buffer, which "freezing" does not reach;
what holds it still is `moe_router_bias_update_rate=0`. The hash covers both.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch.distributed as dist
from megatron.core.ssm.mamba_block import MambaStack
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import nn

from nano3.digest import combine, layer_digest


def router_digest(model: nn.Module) -> str:
    """The digest of all routers of the model, over all pipeline stages; every rank must call it.

    Raises:
        RuntimeError: two ranks hold different routers for the same layer.
    """
    layers = {
        layer.layer_number - 1: layer_digest(layer.mlp.router.weight, layer.mlp.router.expert_bias)
        for stack in model.modules()
        if isinstance(stack, MambaStack)
        for layer in stack.layers
        if isinstance(getattr(layer, "mlp", None), MoELayer)
    }
    everyone: list[dict[int, str]] = [layers]
    if dist.is_initialized():
        everyone = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, layers)
    whole: dict[int, str] = {}
    for rank, held in enumerate(everyone):
        for number, digest in held.items():
            if whole.setdefault(number, digest) != digest:
                raise RuntimeError(f"rank {rank} holds another router in layer {number} than the ranks before it")
    return combine(whole)


class RouterGuard(pl.Callback):
    """Hashes the routers before the first step and after the last; a difference ends the run with an error."""

    def __init__(self) -> None:
        self.digest: str | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        del trainer
        self.digest = router_digest(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        del trainer
        now = router_digest(pl_module)
        if now != self.digest:
            raise RuntimeError(f"the frozen router moved during training: {self.digest} became {now}; nothing is saved")
