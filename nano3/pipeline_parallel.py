"""How many layers each pipeline stage gets. Imports neither torch nor NeMo.

Megatron-Core's hybrid stack takes a number of layers for the first stage, one for the last, and deals the rest out in
equal numbers (mamba_block.py, `_select_layers_for_pipeline_parallel`). Without them it gives every stage
layers // stages and drops the remainder without a word, so we always name both.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

from nano3.arch import Arch


def layer_costs(arch: Arch) -> list[int]:
    """Multiplications per token of every layer's matrices: its parameters, of routed experts those that a token meets.

    With frozen weights both passes are proportional to it; what grows with the sequence (attention's scores, the
    scan's) is small beside it at this model's widths and left out.
    """
    costs = [0] * len(arch.pattern)
    for name, spec in arch.tensors().items():
        if name.startswith("backbone.layers."):
            share = arch.num_experts_per_tok / arch.n_routed_experts if spec.family == "routed_experts" else 1
            costs[int(name.split(".")[2])] += round(spec.count * share)
    return costs


def output_cost(arch: Arch) -> int:
    """Multiplications per token of the output layer, which the last stage has on top; looking up embeddings is free."""
    return arch.vocab_size * arch.hidden_size


def stage_sizes(arch: Arch, pp: int) -> tuple[int, ...]:
    """Layers of every stage, first to last, all of them together; the slowest stage is as fast as it can be.

    Raises:
        ValueError: more stages than layers.
    """
    layers = len(arch.pattern)
    if not 1 <= pp <= layers:
        raise ValueError(f"{pp} pipeline stages for {layers} layers")
    before = [0, *accumulate(layer_costs(arch))]

    def slowest(sizes: tuple[int, ...]) -> tuple[int, int]:
        ends = [0, *accumulate(sizes)]
        costs = [before[stop] - before[start] for start, stop in pairwise(ends)]
        costs[-1] += output_cost(arch)
        return max(costs), sum(cost * cost for cost in costs)

    return min(_divisions(layers, pp), key=slowest)


def _divisions(layers: int, pp: int) -> Iterator[tuple[int, ...]]:
    """Every way to give the first and the last stage their own number and the others an equal one."""
    if pp == 1:
        yield (layers,)
    elif pp == 2:
        yield from ((first, layers - first) for first in range(1, layers))
    else:
        for middle in range(1, (layers - 2) // (pp - 2) + 1):
            rest = layers - middle * (pp - 2)
            yield from ((first, *(middle,) * (pp - 2), rest - first) for first in range(1, rest))


def pipeline_kwargs(arch: Arch, pp: int) -> dict[str, int]:
    """Fields of Megatron-Core's configuration that give every stage its layers; none for a single stage."""
    if pp == 1:
        return {}
    sizes = stage_sizes(arch, pp)
    return {"num_layers_in_first_pipeline_stage": sizes[0], "num_layers_in_last_pipeline_stage": sizes[-1]}
