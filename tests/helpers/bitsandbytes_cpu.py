"""How bitsandbytes 0.50 quantizes on a CPU, where that is not to the nearest; and its results in our form."""

from __future__ import annotations

import torch
from torch import Tensor

from nano3.nf4 import NESTED, Nf4, quantize


def code_scales(values: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """A `Coder` as the CPU kernel is one: a value goes to the nearest of 65,536 places, each of which has a code."""
    parts = torch.nn.functional.pad(values, (0, -len(values) % block)).view(-1, block)
    absmax = parts.abs().amax(-1)
    places = torch.tensor(-1.0) + (2.0 * torch.arange(65536, dtype=torch.float32)) / torch.tensor(65535.0)
    table = torch.bucketize(places, (code[:-1] + code[1:]) * 0.5).to(torch.uint8)
    scaled = (parts * (1.0 / absmax)[:, None]).clamp_(-1, 1)
    place = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).to(torch.int32).clamp_(0, 65535)
    codes = table[place.long()]
    codes[absmax == 0] = 0
    return codes.view(-1)[: len(values)], absmax


def quantized(weight: Tensor) -> Nf4:
    """A tensor as bitsandbytes' CPU backend has it, by our code."""
    return quantize(weight, code_scales)


def theirs(weight: Tensor) -> dict[str, Tensor]:
    """What bitsandbytes makes of a tensor: packed, scale8, scale, offset, and the values in FP32 and BF16."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert state.state2.blocksize == NESTED
    found = {"packed": packed, "scale8": state.absmax, "scale": state.state2.absmax, "offset": state.offset}
    # As one row: where a row is no multiple of 64, the CPU kernel of 0.50.0 gives blocks the scales of others.
    state.shape = (1, weight.numel())
    for dtype in (torch.float32, torch.bfloat16):
        state.dtype = dtype
        found[str(dtype)] = dequantize_4bit(packed, state).view(weight.shape)
    return found


def ours(weight: Tensor) -> dict[str, Tensor]:
    """The same by our code, with the CPU kernel's rounding of scales."""
    nf4 = quantized(weight)
    return dict(nf4.named_buffers()) | {str(dtype): nf4.values(dtype) for dtype in (torch.float32, torch.bfloat16)}
