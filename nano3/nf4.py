"""NF4 with double quantization: 4.13 bits a weight, the codes, scales and values of bitsandbytes 0.50, bit for bit.

A tensor is quantized in its flattened order. Blocks of 64 values have one absmax each, and a value becomes the nearest
of 16 numbers times that. The absmaxes, less their mean, are quantized again: blocks of 256 of them have an FP32 scale
each, and one becomes the nearest of 256 numbers times that (QLoRA, arXiv 2305.14314, section 3).

The mean is over the whole tensor, and blocks cross its rows. So a tensor is quantized whole and cut afterwards
(`Nf4.cut`): a rank that quantizes its own share trains another model.

Rounding is to the nearest, as bitsandbytes' CUDA kernels round. Its CPU kernel looks 8-bit scales up in a table of
65,536 values, so it has the neighbouring code where a value is near the middle of two.
On a CPU the work runs in compiled loops. On a GPU `torch.ops.bitsandbytes.dequantize_4bit` makes the values; that call
is compared with the loops on a CPU, and not verified on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nano3.cpu.arrays import array
from nano3.cpu.nf4_loops import nearest_codes, values_of
from nano3.kept_dtypes import keep_dtype

BLOCK, NESTED = 64, 256
"""Values that share an absmax; absmaxes that share a scale."""
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution, zero among them (QLoRA, appendix E)."""

Coder = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Values (n,) FP32, sorted numbers of a code, values of a block -> codes (n,) uint8 and absmax (blocks,)."""


@lru_cache(maxsize=8)
def nf4_code(device: str = "cpu") -> Tensor:
    """`CODE`, (16,) FP32."""
    return torch.tensor(CODE, device=device)


@lru_cache(maxsize=8)
def dynamic_code(device: str = "cpu") -> Tensor:
    """(256,) FP32: seven decades up to 1 of both signs, each with twice the numbers of the one below; 0 and 1.

    Dettmers, arXiv 1511.04561; bitsandbytes' `create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)`.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1, device="cpu")
        middles = (bounds[:-1] + bounds[1:]) / 2
        found += [sign * number for sign in (1, -1) for number in (10 ** (decade - 6) * middles).tolist()]
    return torch.tensor(sorted(found), device=device)


def nearest(values: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The `Coder` of this module: every value over its block's absmax becomes the nearest number."""
    blocks, middles = -(-len(values) // block), (code[:-1] + code[1:]) / 2
    if values.device.type in ("cpu", "meta"):
        codes = torch.empty(len(values), dtype=torch.uint8, device=values.device)
        absmax = torch.empty(blocks, device=values.device)
        if values.is_meta:  # only how much there would be
            return codes, absmax
        # Whole blocks and the short one at the end are two calls: the loop takes blocks of one size.
        whole = len(values) // block
        for low, high, first in ((0, whole * block, 0), (whole * block, len(values), whole)):
            if low < high:
                last = whole if first < whole else blocks
                arrays = (array(t) for t in (values[low:high], middles, codes[low:high], absmax[first:last]))
                nearest_codes(*arrays)
        return codes, absmax
    parts = pad(values, (0, -len(values) % block)).view(-1, block)
    absmax = parts.abs().amax(-1)
    scaled = (parts * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    return torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8).view(-1)[: len(values)], absmax


class Nf4(nn.Module):
    """A tensor in NF4, or some rows and columns of it; blocks that the cut goes through are whole.

    `lines` are the rows. Where a row is no multiple of 64, there is one line, the rows one after the other.

    Buffers: packed (lines, 32 * blocks) uint8, two codes a byte; scale8 (lines, blocks) uint8; scale (nested blocks,)
    and offset () FP32, which stay FP32 when the model around is cast.

    Args:
        shape: (rows, columns) of the values.
        first: number of the first block in the tensor's order.
        stride: blocks from one line to the next.
        skip: values before the first one in every line.
    """

    packed: Tensor
    scale8: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(
        self, tensors: tuple[Tensor, Tensor, Tensor, Tensor], shape: tuple[int, int], first: int, stride: int, skip: int
    ) -> None:
        super().__init__()
        for name, tensor in zip(("packed", "scale8", "scale", "offset"), tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.shape, self.first, self.stride, self.skip = shape, first, stride, skip
        keep_dtype(self, ("scale", "offset"))

    def cut(self, start: int, count: int, columns: slice) -> Nf4:
        """Rows `start` to `start + count` and some columns of a whole tensor.

        Raises:
            ValueError: columns are cut, and a row is no multiple of 64.
        """
        rows, width = self.shape
        if (start, count, columns) == (0, rows, slice(0, width)):
            return self
        if width % BLOCK:
            if columns != slice(0, width):
                raise ValueError(
                    f"columns of a tensor in NF4 are cut where a row is a multiple of {BLOCK}, not {width}"
                )
            return self._blocks(slice(0, 1), start * width, (start + count) * width, (count, width))
        lines = slice(start, start + count)
        return self._blocks(lines, columns.start, columns.stop, (count, columns.stop - columns.start))

    def _blocks(self, lines: slice, begin: int, end: int, shape: tuple[int, int]) -> Nf4:
        """The blocks of some lines that values `begin` to `end` of a line are in, copied: the whole can be dropped."""
        low, high = begin // BLOCK, -(-end // BLOCK)
        first = lines.start * self.stride + low
        last = (lines.stop - 1) * self.stride + high - 1
        tensors = (
            self.packed[lines, low * BLOCK // 2 : high * BLOCK // 2].clone(),
            self.scale8[lines, low:high].clone(),
            self.scale[first // NESTED : last // NESTED + 1].clone(),
            self.offset.clone(),
        )
        return Nf4(tensors, shape, first, self.stride, begin - low * BLOCK)

    def absmax(self) -> Tensor:
        """(lines, blocks) FP32."""
        lines, blocks = self.scale8.shape
        device = self.scale8.device
        begins = torch.arange(lines, device=device)[:, None] * self.stride + self.first
        at = (begins + torch.arange(blocks, device=device)) // NESTED - self.first // NESTED
        return dynamic_code(str(device))[self.scale8.int()] * self.scale[at] + self.offset

    def values(self, dtype: torch.dtype) -> Tensor:
        """(rows, columns), a tensor of its own."""
        lines, blocks = self.scale8.shape
        columns = self.shape[0] * self.shape[1] // lines
        if self.packed.device.type == "cpu":
            wide = torch.empty(lines, blocks * BLOCK)
            arrays = (array(tensor) for tensor in (self.packed, self.scale8, self.scale))
            codes = array(nf4_code()), array(dynamic_code())
            values_of(*arrays, np.float32(self.offset.item()), *codes, (self.first, self.stride), array(wide))
        else:
            wide = values_by_bitsandbytes(self.packed, self.absmax(), dtype)
        return wide[:, self.skip : self.skip + columns].reshape(self.shape).to(dtype).contiguous()

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())


def values_by_bitsandbytes(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """(lines, 64 * blocks) by bitsandbytes' kernel for the device."""
    import bitsandbytes  # noqa: F401  # registers the operator; not needed on a CPU

    shape = (absmax.shape[0], absmax.shape[1] * BLOCK)
    return torch.ops.bitsandbytes.dequantize_4bit(packed.view(-1, 1), absmax.view(-1), BLOCK, "nf4", shape, dtype)


@torch.no_grad()
def quantize(weight: Tensor, code_scales: Coder = nearest) -> Nf4:
    """A whole tensor (rows, columns), FP32, BF16 or FP16, in NF4.

    `code_scales` codes the absmaxes. The mean is PyTorch's on a CPU, whose last bit may depend on the number of
    threads.

    Raises:
        ValueError: a number of values that is no multiple of 64, or values that are no finite numbers.
    """
    rows, columns = weight.shape
    if weight.numel() % BLOCK:
        raise ValueError(f"{weight.numel()} values are no multiple of {BLOCK}, which NF4 needs")
    if not weight.is_meta and not weight.isfinite().all():
        raise ValueError("values that are infinite or no numbers")
    codes, absmax = nearest(weight.flatten().float(), nf4_code(str(weight.device)), BLOCK)
    offset = absmax.cpu().mean().to(weight.device) if weight.device.type != "meta" else absmax.mean()
    scale8, scale = code_scales(absmax - offset, dynamic_code(str(weight.device)), NESTED)
    lines = 1 if columns % BLOCK else rows
    packed = ((codes[::2] << 4) | codes[1::2]).view(lines, -1)
    scale8 = scale8.view(lines, -1)
    return Nf4((packed, scale8, scale, offset), (rows, columns), 0, scale8.shape[1], 0)
