"""Adapters that act from a mark on: where a gate is open, and how it reaches the adapters of a micro batch. Torch only.

    y = W x + g * scale * B (A x)

g is 1 for the *input* positions from the last token of the mark to the end of the turn, else 0: that position is the
first that knows of the mark, and the token behind it the first that the adapter has a say in. The mark's own tokens
are computed without the adapter, also in the cache. So a model may switch it on when it has written the mark, and
need not compute anything again. This is Activated LoRA (arXiv 2504.12397), for a mark of any number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nano3.cli import UserError
from nano3.messages import TURN_ENDS


def mark_ids(folder: Path | str, mark: str) -> list[int]:
    """The tokens of a mark by the tokenizer in `folder`, none of no mark. Raises `UserError` for one without tokens."""
    from nano3.token_store import open_tokenizer

    if not mark:
        return []
    ids: list[int] = open_tokenizer(folder).encode(mark, add_special_tokens=False).ids
    if not ids or set(ids) & set(TURN_ENDS):
        raise UserError(f"lora.mark={mark!r} is no text that can stand in a turn (tokens {ids}); give another")
    return ids


def open_positions(tokens: torch.Tensor, mark: Sequence[int], starts: torch.Tensor | None = None) -> torch.Tensor:
    """Where the gate is open, (rows, s) bool: from a mark's last token to the token before the end of its turn.

    Args:
        tokens: (rows, s) int64.
        mark: its tokens.
        starts: first position of each document, (documents,), ascending from 0; a mark of one opens nothing in the
            next. None: every row is one.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    first = torch.zeros_like(places)
    if starts is not None:
        own = torch.bucketize(places[0], starts.to(places), right=True) - 1
        first = starts.to(places)[own].expand(tokens.shape)
    complete = places - first >= len(mark) - 1
    for back, token in enumerate(reversed(mark)):
        complete = complete & (tokens.roll(back, 1) == token)
    ended = torch.isin(tokens, torch.tensor(TURN_ENDS, device=tokens.device))
    last_mark = torch.where(complete, places, -1).cummax(1).values
    last_end = torch.where(ended, places, -1).cummax(1).values
    return last_mark > torch.maximum(last_end, first - 1)


class Gate:
    """What is open for the micro batch that is computed now; one for all gated adapters of a model."""

    def __init__(self) -> None:
        self._now: torch.Tensor | None = None

    def enter(self, positions: torch.Tensor) -> None:
        """Of the micro batch whose forward pass begins: (rows, s) of this context-parallel rank, bool or numbers."""
        self._now = positions

    def leave(self, output: torch.Tensor) -> None:
        """Makes the gate this micro batch's again when its backward pass begins, which starts from `output`.

        Layers that are computed again then ask for it, and other micro batches may have passed in between.
        """
        mine = self._now
        if output.requires_grad:
            output.register_hook(lambda _gradient: self._again(mine))

    def through(self, positions: torch.Tensor, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A whole forward pass of a micro batch, with all that its backward pass needs: `enter`, `forward`, `leave`."""
        self.enter(positions)
        output = forward()
        self.leave(output)
        return output

    def _again(self, positions: torch.Tensor | None) -> None:
        self._now = positions

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """(s, 1, n) in Megatron-Core, (rows, s, n) in transformers, or their positions in one row: with zeros where the
        gate is closed."""
        assert self._now is not None, "a gated adapter was called outside of a micro batch"
        flat = value.flatten(0, -2)
        assert len(flat) == self._now.numel(), f"{len(flat)} positions, and a gate of {self._now.numel()}"
        return (flat * self._now.reshape(-1, 1).to(value.dtype)).view(value.shape)
