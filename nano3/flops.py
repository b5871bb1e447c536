"""Floating-point operations of a LoRA step, from the architecture alone. Imports neither torch nor NeMo.

Model FLOPs, not hardware FLOPs: what the mathematics needs, whatever a kernel or recomputation adds. A multiply and an
add are two. Norms, activations and the softmax are left out, as everybody does. The derivation: docs/tracking.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nano3.arch import Arch
from nano3.targets import EMBEDDING, OUTPUT

SCAN = 5
"""FLOPs of the state-space recurrence per token, channel and state: decay * h, + x * B (two), and C . h (two)."""


def linears(arch: Arch) -> dict[str, tuple[int, int, int]]:
    """Linear layers by Megatron-Core's path: inputs, outputs, and how often a token passes (experts: the chosen).

    The embedding is among them for the sake of its adapter; looking up its rows costs nothing.
    """
    hidden, top = arch.hidden_size, arch.num_experts_per_tok
    attention = arch.num_attention_heads * arch.head_dim
    keys = arch.num_key_value_heads * arch.head_dim
    found = {EMBEDDING: (arch.vocab_size, hidden, 1)}
    for number, letter in enumerate(arch.layers):
        layer = f"decoder.layers.{number}."
        if letter == "M":
            rows = sum(size for _, size in arch.mamba_sections)
            found[f"{layer}mixer.in_proj"] = (hidden, rows, 1)
            found[f"{layer}mixer.out_proj"] = (arch.mamba_inner_size, hidden, 1)
        elif letter == "*":
            found[f"{layer}self_attention.linear_qkv"] = (hidden, attention + 2 * keys, 1)
            found[f"{layer}self_attention.linear_proj"] = (attention, hidden, 1)
        else:
            parts = [("mlp.", arch.intermediate_size, 1)]
            if letter == "E":
                parts = [
                    ("mlp.experts.", arch.moe_intermediate_size, top),
                    ("mlp.shared_experts.", arch.moe_shared_expert_intermediate_size, 1),
                ]
                found[f"{layer}mlp.router"] = (hidden, arch.n_routed_experts, 1)
            for name, width, times in parts:
                found[f"{layer}{name}linear_fc1"] = (hidden, width, times)
                found[f"{layer}{name}linear_fc2"] = (width, hidden, times)
    found[OUTPUT] = (hidden, arch.vocab_size, 1)
    return found


def forward_flops(arch: Arch, documents: Sequence[int]) -> tuple[float, float]:
    """FLOPs of the base model's forward pass over documents of these lengths in tokens.

    Returns:
        Those of layers with weights (linear layers, convolution, skip), and those between activations (attention,
        recurrence). The first have frozen weights: their backward pass costs as much again, for the gradient of the
        input alone. The second have two gradients for every product: twice as much.
    """
    tokens = sum(documents)
    weights = sum(2 * i * o * times for path, (i, o, times) in linears(arch).items() if path != EMBEDDING)
    channels = sum(rows for _, rows in arch.conv_sections)
    mamba = len(arch.mamba_layers)
    weights += mamba * 2 * (channels * arch.conv_kernel + arch.mamba_inner_size)
    recurrence = mamba * SCAN * arch.mamba_inner_size * arch.ssm_state_size
    # A token attends to half of its document on average: scores and their sum over values, 2 * l²/2 * width each.
    attention = len(arch.attention_layers) * 2 * arch.num_attention_heads * arch.head_dim
    return float(weights * tokens), float(recurrence * tokens + attention * sum(length**2 for length in documents))


def adapter_flops(arch: Arch, ranks: Mapping[str, int], tokens: int) -> float:
    """FLOPs of the adapters' forward pass over `tokens`: 2 * rank * (in + out) a token; `ranks` by module path."""
    known = linears(arch)
    total = 0
    for path, rank in ranks.items():
        inputs, outputs, times = known[path]
        total += 2 * rank * times * (outputs if path == EMBEDDING else inputs + outputs)
    return float(total * tokens)


def step_flops(arch: Arch, ranks: Mapping[str, int], documents: Sequence[int]) -> float:
    """FLOPs of a LoRA training step over documents of these lengths.

    2 x the layers with frozen weights, 3 x what is between activations, 3 x the adapters (whose weights learn).

    Args:
        arch: the model.
        ranks: of the adapters, by module path (`nano3.targets.sizes`).
        documents: tokens of each document in the global batch, padding left out.
    """
    weights, between = forward_flops(arch, documents)
    return 2 * weights + 3 * between + 3 * adapter_flops(arch, ranks, sum(documents))


class StepFlops:
    """`step_flops` of one model and its adapters.

    Args:
        model: folder with the model's config.json.
        ranks: of the adapters, by module path.
    """

    def __init__(self, model: str, ranks: dict[str, int]) -> None:
        self.arch, self.ranks = Arch.load(model), ranks

    def __call__(self, documents: Sequence[int]) -> float:
        """FLOPs of a step over documents of these lengths."""
        return step_flops(self.arch, self.ranks, documents)
