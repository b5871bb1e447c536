"""Adapters that never learn stop the run by name, instead of finishing as the base model.

A target can be wrapped and yet be dead: outside the graph, cut off by a detach, missing from the optimizer. B starts at
zero, so in the first step only B can receive a gradient; once B has moved, A must receive one too.

An expert's own adapter is asked only when the expert had something to learn from: tokens whose output had a
gradient, which those of padding, or behind the last supervised token, have not. Where no gradient reaches the layer at
all its tokens count instead: then it is the layer that is cut off.

Nothing needs to be kept over a restart: whatever is alive shows it in every step, and the last of the three is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn

from nano3.cli import UserError
from nano3.lora.adapter_walk import Adapted, Matrix, adapted_layers, matrices

STEPS_OF_GRACE = 3
"""By the end of this step every A must have had a gradient and must have changed."""


class RoutedTokens:
    """Which experts of a layer had something to learn from in the current step."""

    def __init__(self, layer: Adapted) -> None:
        experts, device = layer.base.num_gemms, next(layer.adapter.parameters()).device
        self.tokens = torch.zeros(experts, dtype=torch.bool, device=device)
        self.gradients, self.reached = torch.zeros_like(self.tokens), False
        self.handle = layer.wrapper.register_forward_hook(self._forward)

    def clear(self) -> None:
        """For the next step."""
        self.tokens.zero_()
        self.gradients.zero_()
        self.reached = False

    @property
    def learns(self) -> torch.Tensor:
        """(local experts,) whether each should have learned."""
        return self.gradients if self.reached else self.tokens

    def _forward(self, module: nn.Module, inputs: tuple[torch.Tensor, Sequence[int]], output: Any) -> None:
        if not module.training:
            return
        splits = torch.as_tensor(inputs[1], device=self.tokens.device)
        self.tokens |= splits > 0
        if output[0].requires_grad:
            expert = torch.repeat_interleave(torch.arange(len(splits), device=splits.device), splits)
            output[0].register_hook(lambda gradient: self._backward(gradient, expert))

    def _backward(self, gradient: torch.Tensor, expert: torch.Tensor) -> None:
        self.reached = True
        self.gradients[expert[gradient.detach().flatten(1).any(1)]] = True


class AdapterLiveness(pl.Callback):
    """After step 1 every B must be non-zero, by step 3 every A must have had a gradient and have changed."""

    def __init__(self) -> None:
        self.alive: dict[str, torch.Tensor] = {}
        self.expected: dict[str, bool] = {}
        self._matrices: list[tuple[Matrix, RoutedTokens | None]] = []
        self._sums: dict[nn.Parameter, list[int]] = {}
        self._outs: dict[str, bool] = {}
        self._handles: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step >= STEPS_OF_GRACE:
            return
        if not self._handles:
            self._watch_all(pl_module)
        for tokens in {id(tokens): tokens for _, tokens in self._matrices if tokens is not None}.values():
            tokens.clear()
        # An A can only learn in a step that begins with a B that is not zero.
        self._outs = {_pair(matrix): _nonzero(matrix) for matrix, _ in self._matrices if matrix.is_out}

    def _watch_all(self, model: nn.Module) -> None:
        for layer in adapted_layers(model):
            tokens = RoutedTokens(layer) if layer.routed else None
            if tokens is not None:
                self._handles.append(tokens.handle)
            for matrix in matrices(layer):
                parameter = matrix.parameter
                self.alive[matrix.name] = torch.zeros((), dtype=torch.bool, device=parameter.device)
                self._handles.append(parameter.register_hook(self._watch(matrix)))
                self._matrices.append((matrix, tokens))
                self._sums.setdefault(parameter, _checksums(parameter))

    def _watch(self, matrix: Matrix) -> Any:
        def hook(gradient: torch.Tensor) -> None:
            part = gradient if matrix.row is None else gradient[matrix.row]
            self.alive[matrix.name] |= part.detach().count_nonzero() > 0

        return hook

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        del pl_module
        if not self._handles:
            return
        step = trainer.global_step
        for matrix, tokens in self._matrices:
            learns = True if tokens is None else bool(_of(tokens.learns, matrix))
            ready = matrix.is_out or self._outs.get(_pair(matrix), True)
            self.expected[matrix.name] = self.expected.get(matrix.name, False) or (learns and ready)
        if step == 1:
            self._require({m.name: _nonzero(m) for m, _ in self._matrices if m.is_out}, step)
        if step >= STEPS_OF_GRACE:
            changed = {p: _checksums(p) != before for p, before in self._sums.items()}
            self._require({m.name: changed[m.parameter] for m, _ in self._matrices}, step)
            for handle in self._handles:
                handle.remove()
            for kept in (self._handles, self._matrices, self._sums, self.alive, self.expected):
                kept.clear()  # type: ignore[attr-defined]

    def _require(self, moved: dict[str, bool], step: int) -> None:
        """A matrix from which one rank expects it must be alive, and have moved, on one of the ranks that hold it."""
        mine = {name: (self.expected[name], bool(self.alive[name]), value) for name, value in moved.items()}
        everyone: list[dict[str, tuple[bool, bool, bool]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        together: dict[str, tuple[bool, ...]] = {}
        for held in everyone:
            for name, flags in held.items():
                together[name] = tuple(a or b for a, b in zip(flags, together.get(name, (False,) * 3), strict=True))
        dead = [name for name, (expected, alive, value) in together.items() if expected and not (alive and value)]
        if dead:
            names = ", ".join(name.split("decoder.", 1)[-1] for name in dead[:5])
            raise UserError(
                f"after step {step} {len(dead)} of {len(together)} adapter matrices have learned nothing: {names}; "
                "the run would end as the base model. Leave these targets out (lora.targets), or report this as a bug"
            )


def _pair(matrix: Matrix) -> str:
    """The name that A and B of one adapter have in common."""
    return matrix.name.replace(".linear_in.", ".").replace(".linear_out.", ".")


def _nonzero(matrix: Matrix) -> bool:
    return bool(matrix.parameter.detach().count_nonzero() > 0)


def _of(learns: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Whether the expert of `matrix` learns; any, for one that all experts share."""
    return learns.any() if matrix.expert is None else learns[matrix.expert]


def _checksums(parameter: nn.Parameter) -> list[int]:
    """Of the bits of a parameter and of the optimizer's FP32 copy, in which a step too small for BF16 is seen."""
    copies = [parameter, getattr(parameter, "main_param", None)]
    return [_checksum(copy.detach()) for copy in copies if copy is not None]


def _checksum(tensor: torch.Tensor) -> int:
    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    bits = tensor.reshape(-1).view(integers).long()
    return int((bits * torch.arange(1, 2 * bits.numel(), 2, device=bits.device)).sum())
