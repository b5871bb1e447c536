"""The router stays as the base model has it, or nearly: hashed at the start, at every save and at the end.

`router=frozen`: the router's weight is frozen like every base weight. Its correction bias is a buffer, which
"freezing" does not reach; what holds it still is an update rate of 0. The hash covers both.

`router=balance`: the weight is frozen and hashed, and the bias goes on moving towards equal load, as in the model's own
training. Selection then differs from the base's, so the bias belongs to the adapter and is saved and merged with it.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from annotated_types import MaxLen, MinLen
from megatron.core import parallel_state
from megatron.core.models.mamba import MambaModel
from megatron.core.ssm.mamba_block import MambaStack
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn
from typing_extensions import TypedDict

from nano3.digest import combine, layer_digest
from nano3.documents import Sha256, check
from nano3.pickles import REMEDY

BALANCE_RATE = 1e-3
"""Step of the bias: up for experts with fewer tokens than the average of the global batch, down for those with more.
Auxiliary-loss-free balancing (arXiv 2408.15664), and Megatron-Core's default `moe_router_bias_update_rate`."""

Digests = dict[int, tuple[str, str]]
"""Layer number -> SHA-256 of the weight and of the bias."""


def routers(model: nn.Module) -> dict[int, TopKRouter]:
    """The routers of this rank's pipeline stage, by global layer number from 0."""
    return {
        layer.layer_number - 1: layer.mlp.router
        for stack in model.modules()
        if isinstance(stack, MambaStack)
        for layer in stack.layers
        if isinstance(getattr(layer, "mlp", None), MoELayer)
    }


def balances(model: nn.Module) -> bool:
    """Whether the correction biases of the model move (`router=balance`)."""
    (core,) = [module for module in model.modules() if isinstance(module, MambaModel)]
    return core.config.moe_router_bias_update_rate > 0


def all_routers(model: nn.Module) -> tuple[Digests, str]:
    """The digests of all routers by layer, and one over them all, over all pipeline stages; every rank must call it.

    Raises:
        RuntimeError: two ranks hold different routers for the same layer.
    """
    mine = {
        number: (layer_digest(router.weight), layer_digest(router.expert_bias), whole_digest(router))
        for number, router in routers(model).items()
    }
    everyone: list[dict[int, tuple[str, str, str]]] = [mine]
    if dist.is_initialized():
        everyone = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
    whole: dict[int, tuple[str, str, str]] = {}
    for rank, held in enumerate(everyone):
        for number, digests in held.items():
            if whole.setdefault(number, digests) != digests:
                raise RuntimeError(f"rank {rank} holds another router in layer {number} than the ranks before it")
    layers = {number: digests[:2] for number, digests in whole.items()}
    return layers, combine({number: digests[2] for number, digests in whole.items()})


def whole_digest(router: TopKRouter) -> str:
    """The digest that an adapter records of a router."""
    return layer_digest(router.weight, router.expert_bias)


class RouterState(TypedDict):
    """What a checkpoint holds of the guard: `layers` is number -> hashes of weight and bias."""

    digest: Sha256 | None
    layers: dict[int, Annotated[list[Sha256], MinLen(2), MaxLen(2)]]


class RouterGuard(pl.Callback):
    """Hashes the routers before the first step, at every save and after the last step; a difference ends the run.

    `digest` is that of the base's routers, weights and biases, in either mode; a run that goes on keeps it.

    Args:
        router: `frozen`, or `balance`, which lets the biases move.
    """

    def __init__(self, router: Literal["frozen", "balance"] = "frozen") -> None:
        self.router = router
        self.digest: str | None = None
        self.layers: Digests = {}
        self._biases: dict[int, torch.Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """What the routers were when the run first started."""
        return {"digest": self.digest, "layers": {number: list(digests) for number, digests in self.layers.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`. Raises `UserError` for what is none."""
        check(state_dict, RouterState, "the checkpoint's hashes of the routers", REMEDY)
        self.digest = state_dict["digest"]
        self.layers = {number: (weight, bias) for number, (weight, bias) in state_dict["layers"].items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._biases = {number: router.expert_bias.clone() for number, router in routers(pl_module).items()}
        if self.digest is None:
            self.layers, self.digest = all_routers(pl_module)
        else:
            self.check(pl_module)  # now still the base's, before the checkpoint's biases are read
        if self.router == "balance" and trainer.is_global_zero:
            print(BALANCE_NOTICE, flush=True)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Logs how far the biases are from the base's: `router_bias_norm`, the L2 norm over all layers."""
        del trainer
        if self.router == "balance":
            pl_module.log("router_bias_norm", self._distance(pl_module), batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        del trainer
        self.check(pl_module)

    def check(self, model: nn.Module) -> None:
        """Raises `RuntimeError` when the routers are not what they were at the start; every rank must call it.

        Of a balanced router only the weight must be. Ranks must hold the same biases in either mode.
        """
        now = all_routers(model)[0]
        parts = ("weight", "correction bias") if self.router == "frozen" else ("weight",)
        moved = [
            f"the {part} of layer {number}"
            for number, digests in sorted(now.items())
            for place, part in enumerate(parts)
            if digests[place] != self.layers[number][place]
        ]
        if moved:
            raise RuntimeError(
                f"the frozen router moved during training: {', '.join(moved[:5])}{' ...' if len(moved) > 5 else ''} "
                "changed since the start; nothing is saved. Something writes to the routers: report this as a bug, or "
                "train with router=balance if the biases are meant to move"
            )

    def _distance(self, model: nn.Module) -> torch.Tensor:
        """L2 norm of all biases minus those of the start, over all pipeline stages."""
        squares = [
            (router.expert_bias - self._biases[number]).square().sum() for number, router in routers(model).items()
        ]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=torch.cuda.current_device())
        group = parallel_state.get_pipeline_model_parallel_group()
        if dist.get_world_size(group) > 1:
            dist.all_reduce(total, group=group)
        return total.sqrt()


BALANCE_NOTICE = (
    f"router=balance: the routers' correction biases move by {BALANCE_RATE:g} a step towards equal load. They are part "
    "of the adapter: merge it (conversion/merge_lora.py), since nothing else applies them"
)


def require_router(trainer: pl.Trainer, model: nn.Module) -> None:
    """Before every save: raises `RuntimeError` when the run's guard finds another router than at the start."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RouterGuard):
            callback.check(model)


def count_documents_only(model: MambaModel) -> None:
    """Makes the routers count the tokens of documents for the bias, and not padding.

    Megatron-Core 0.16.1 counts every position unless it is given a padding mask, and given one it fails: the mask (s,)
    is put beside the routing map (s, experts) without a dimension of its own, and under sequence parallelism each rank
    has a part of the sequence but the whole mask.
    """
    for router in routers(model).values():
        router._apply_expert_bias = partial(_count, router)


def _count(router: Any, routing_map: torch.Tensor, padding_mask: torch.Tensor) -> None:
    """Adds a micro batch's choices (s, experts) to the step's counts; `padding_mask` (whole s,) is True for padding."""
    if not torch.is_grad_enabled():  # a validation, or the first of two runs of a recomputed layer
        return
    document = ~padding_mask
    if len(document) != len(routing_map):  # sequence parallel
        group = parallel_state.get_tensor_model_parallel_group()
        document = document.chunk(group.size())[group.rank()]
    with torch.no_grad():
        router.local_tokens_per_expert += (routing_map & document[:, None]).sum(dim=0)
