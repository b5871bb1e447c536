"""Tier (b): NF4 on the device of this process beside NF4 on the CPU, for all matrices of pico.

python -m tests.gpu.nf4          -> rows
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from nano3.arch import Arch, resolve_model
from nano3.nf4 import Nf4, quantize
from nano3.tensor_names import linear_tensors
from tests.gpu.record import Row, say


def rows(device: str) -> list[Row]:
    """Codes and 8-bit scales that differ, the largest relative difference of FP32 scales, and of the values in BF16 of
    equal codes and scales (`torch.ops.bitsandbytes.dequantize_4bit` on a GPU)."""
    folder = resolve_model("pico")
    tensors = load_file(folder / "model.safetensors")
    codes, scale, values = 0, 0.0, 0.0
    for name in sorted(linear_tensors(Arch.load(folder))):
        here = quantize(tensors[name])
        there = Nf4(tuple(b.to(device) for b in here.buffers()), here.shape, here.first, here.stride, here.skip)
        anew = quantize(tensors[name].to(device))
        for one in ("packed", "scale8"):
            codes += int((getattr(here, one) != getattr(anew, one).cpu()).sum())
        scale = max(scale, float(((anew.scale.cpu() - here.scale) / here.scale).abs().max()))
        wanted = here.values(torch.bfloat16).float()
        values = max(values, float((there.values(torch.bfloat16).cpu().float() - wanted).abs().max()))
    return [
        Row("NF4: bytes of codes and 8-bit scales of pico", codes, 0, "that differ from the CPU's"),
        Row("NF4: FP32 scales of pico", scale, 1e-6),
        Row("NF4: dequantized values of pico", values, 0, "largest difference from the CPU's"),
    ]


if __name__ == "__main__":
    for row in rows("cuda" if torch.cuda.is_available() else "cpu"):
        say(row)
