"""What every layout computes: the model, the batches, the weights. The same on all of them, by construction."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm
from typing import Any, Literal

import torch

from nano3.arch import Arch
from nano3.gate import open_positions

VOCABULARY = 120
"""Not a multiple of anything: its padding differs from layout to layout."""
PACK = 64
PACKS: tuple[tuple[int, ...], ...] = ((8, 16, 40), (64,), (24, 8, 32), (8, 8, 8, 8, 32))
"""Lengths of the documents in the packs of a global batch: the shortest that context parallel 4 can cut, and a pack of
one document, among others. All are multiples of 8 = 2 * cp, so that all layouts see the same batch."""
STEPS = 3
MARK = (5, 3)
"""Tokens of the mark that gated adapters wait for; one third into every document."""
RANK, ALPHA = 4, 8.0
"""Of the adapters."""
PATTERN = "MEM*EM*EME"
"""Ten layers: three stages do not divide them."""
ARCH = Arch(
    pattern=PATTERN, vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=16, n_groups=4, conv_kernel=4, chunk_size=16,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, moe_shared_expert_intermediate_size=40,
    intermediate_size=48, max_position_embeddings=PACK, routed_scaling_factor=2.5, layer_norm_epsilon=1e-5,
    initializer_range=0.05,
)  # fmt: skip
"""Two KV heads: tensor parallel 4 has more ranks than that."""
NF4_WIDTHS: dict[str, Any] = {
    "hidden_size": 64, "head_dim": 32, "mamba_head_dim": 16, "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 192, "intermediate_size": 128,
}  # fmt: skip
"""Rows of whole blocks of 64, which NF4 can cut: some by 2 between blocks, the shared expert's 192 amid one."""


@dataclass(frozen=True)
class Sizes:
    """Parallel sizes of one layout; `ranks` is the fewest that it fits on with `dp` batches at a time."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1

    @classmethod
    def parse(cls, text: str) -> Sizes:
        """From "tp2.ep2"; "one" is a single rank."""
        if text == "one":
            return cls()
        parts = [(part.rstrip("0123456789"), part) for part in text.split(".")]
        if not all(name in cls.__dataclass_fields__ and part != name for name, part in parts):
            raise ValueError(f"layout {text!r}: write sizes of tp, pp, cp, ep, etp, dp, such as tp2.ep2")
        return cls(**{name: int(part.removeprefix(name)) for name, part in parts})

    @property
    def kwargs(self) -> dict[str, int]:
        """The sizes in Megatron-Core's words: of its configuration, and of `initialize_model_parallel`."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
        }

    @property
    def ranks(self) -> int:
        return lcm(self.tp * self.pp * self.cp * self.dp, self.ep * self.etp * self.pp)

    @property
    def copies(self) -> int:
        """Data-parallel size of everything but the routed experts."""
        return self.ranks // (self.tp * self.pp * self.cp)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        dtype: of weights and activations, FP64 or FP32.
        adapters: "shared", "each" (one per routed expert), "dora" or "gated" (from a mark on, none on routed experts);
            "none": all parameters are trained instead.
        dispatcher: how tokens get to their experts, Megatron-Core's "alltoall" or "allgather".
        distributed: whether data-parallel ranks share the optimizer's state: Megatron-Core's distributed optimizer,
            which takes no FP64.
        recompute: what the backward pass computes again, in the words of `nano3/recompute.py`.
        loss_chunk: positions whose logits exist at a time, 0 all (`nano3/chunked_loss.py`).
        pattern: of the layers.
        nf4: whether the linear layers are frozen in 4 bits; the model is wider then.
        seed: of weights and batches.
        adam_epsilon: None for Megatron-Core's 1e-8, and 1e-4 where adapters are "gated" in FP32: only tokens behind the
            mark reach them, some of their gradients lie below 1e-8, and Adam would divide rounding by rounding.
        packs: document lengths of the packs of a global batch.
    """

    dtype: torch.dtype = torch.float64
    adapters: Literal["shared", "each", "dora", "gated", "none"] = "shared"
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    distributed: bool = False
    recompute: tuple[str, ...] = ()
    loss_chunk: int = 0
    pattern: str = PATTERN
    nf4: bool = False
    seed: int = 0
    adam_epsilon: float | None = None
    packs: tuple[tuple[int, ...], ...] = PACKS

    @property
    def plain(self) -> Case:
        """What the case is compared with on one rank: nothing that only has a say in where and when it is computed."""
        return replace(self, dispatcher="alltoall", distributed=False, recompute=(), loss_chunk=0)

    @property
    def epsilon(self) -> float:
        """Adam's, which it adds to the size of a gradient."""
        if self.adam_epsilon is not None:
            return self.adam_epsilon
        return 1e-4 if self.adapters == "gated" and self.dtype == torch.float32 else 1e-8

    @cached_property
    def arch(self) -> Arch:
        return replace(ARCH, pattern=self.pattern, **(NF4_WIDTHS if self.nf4 else {}))

    def batch(self, step: int, number: int) -> dict[str, torch.Tensor]:
        """Pack `number` of the global batch of `step`, on the host; about a third of the tokens are not supervised."""
        lengths = self.packs[number]
        generator = torch.Generator().manual_seed(1000 * self.seed + 100 * step + number)
        tokens, labels = torch.randint(0, VOCABULARY, (2, 1, sum(lengths)), generator=generator)
        boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
        extra = {}
        if self.adapters == "gated":
            for start, length in zip(boundaries.tolist(), lengths, strict=False):
                tokens[0, start + length // 3 : start + length // 3 + 2] = torch.tensor(MARK)
            extra = {"gate": open_positions(tokens, MARK, boundaries[:-1])}
        return extra | {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": (torch.rand(tokens.shape, generator=generator) > 0.3).float(),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seqlens": boundaries,
            "max_seqlen": torch.tensor(max(lengths)),
        }

    def whole(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The whole tensor that a checkpoint would have under `key`, FP64; a function of key, shape and seed only."""
        digest = hashlib.sha256(f"{self.seed}:{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        rows = VOCABULARY if is_vocabulary(key) else shape[0]
        normal = torch.randn(rows, *shape[1:], generator=generator, dtype=torch.float64)
        value = _scaled(key, normal)
        return torch.cat([value, value.new_zeros(shape[0] - rows, *shape[1:])])


def is_vocabulary(key: str) -> bool:
    """Whether the first axis of the tensor is the (padded) vocabulary."""
    return key.endswith(("word_embeddings.weight", "output_layer.weight"))


def _scaled(key: str, normal: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers to sane weights: positive decays, norms around one, scores far from ties."""
    if key.endswith("A_log"):
        return normal.abs().add(0.5).log()
    if key.endswith("dt_bias"):
        return normal * 0.5 - 2
    if "norm" in key.rsplit(".", 2)[-2] or key.endswith(("layer_norm_weight", ".D")):
        return 1 + 0.1 * normal
    return normal * (0.3 if "router" in key or "word_embeddings" in key else 0.1)
