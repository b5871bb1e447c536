"""The fingerprint of the routers: training records it, the merge compares it. Torch only, no Megatron, no NeMo."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def layer_digest(*tensors: torch.Tensor) -> str:
    """SHA-256 over a router's tensors as FP32 bytes: weight (experts, hidden), correction bias (experts,), or both."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def combine(layers: Mapping[int, str]) -> str:
    """One SHA-256 over the layers' digests in layer order, the number of each layer included."""
    text = "".join(f"{number}:{digest}\n" for number, digest in sorted(layers.items()))
    return hashlib.sha256(text.encode()).hexdigest()
