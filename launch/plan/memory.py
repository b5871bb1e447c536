"""The memory plan: what every rank of a layout needs, item by item, before anything is submitted.

    plan = plan_memory(Workload(arch, layout, ranks=16, seq_length=4096, global_batch=128, adapters=adapters))
    print(plan.table(HARDWARE["h100"]))

Imports neither torch nor NeMo. Weights and adapters are exact. Gradients, optimizer and kept activations are closed
formulas, within 10 % of what CPU ranks measure. Contexts, buffers of NCCL and fragmentation are margins: constants
below, never measured here. What stands behind each line: docs/memory.md. Not verified on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm

from launch.plan.activations import Batch, by_letter, in_loss, kept, transients
from launch.plan.hardware import GIB, Gpu
from launch.plan.layout import Layout
from launch.plan.weights import FP32, Adapters, Held, adapter_weights, linears, stage_layers, weights
from nano3.arch import LETTERS, Arch
from nano3.cli import UserError

CUDA_CONTEXT = GIB
"""Margin: CUDA context, loaded kernels, cuBLAS's and Transformer Engine's workspaces."""
NCCL_PER_GROUP = GIB // 4
"""Margin: buffers of one communicator between more than one rank."""
FRAGMENTATION = 0.08
"""Margin: share of everything that is allocated and freed in a step. PyTorch's expandable segments are assumed to be on
(PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True), as the Slurm scripts set them."""
IMBALANCE = 1.5
"""Tokens that the busiest rank's experts get over an even share, on average over its layers. A router that was trained
to balance 128 experts on other data is assumed; the plan also says how much imbalance would still fit."""


@dataclass(frozen=True)
class Workload:
    """What is trained, and on how many ranks."""

    arch: Arch
    layout: Layout
    ranks: int
    seq_length: int
    global_batch: int
    adapters: Adapters | None
    """None: every weight is trained."""
    micro_batch: int = 1
    bf16: bool = True
    """BF16 with FP32 gradients and the distributed optimizer; otherwise FP32 without it."""
    imbalance: float = IMBALANCE
    recompute: tuple[str, ...] = ()
    loss_chunk: int = 0
    """As the setting train.loss_chunk."""
    nf4: bool = False
    """The frozen linear layers are in 4 bits."""

    @property
    def value(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else FP32

    @property
    def micro_batches(self) -> int:
        """Micro batches of a step on every rank."""
        return max(1, self.global_batch // (self.micro_batch * self.layout.dp(self.ranks)))

    @property
    def batch(self) -> Batch:
        """One micro batch. A rank of ep cannot get more than all tokens, ep times an even share."""
        imbalance = min(self.imbalance, self.layout.ep)
        return Batch(
            seq_length=self.seq_length,
            adapters=self.adapters,
            value=self.value,
            micro_batch=self.micro_batch,
            imbalance=imbalance,
            recompute=self.recompute,
            loss_chunk=self.loss_chunk,
            fused_permute=self.bf16,
        )


@dataclass(frozen=True)
class RankPlan:
    """Bytes of one rank of a pipeline stage, by item."""

    stage: int
    items: dict[str, int]

    @property
    def total(self) -> int:
        """All items."""
        return sum(self.items.values())

    def largest(self) -> str:
        """The item that takes most."""
        return max(self.items, key=lambda name: self.items[name])


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of every pipeline stage; all ranks of a stage need the same, but for their experts' luck."""

    work: Workload
    stages: tuple[RankPlan, ...]

    @property
    def tightest(self) -> RankPlan:
        """The stage that needs most."""
        return max(self.stages, key=lambda plan: plan.total)

    def fits(self, gpu: Gpu) -> bool:
        """Whether every rank's items fit into the GPU's memory."""
        return self.tightest.total <= gpu.memory

    def largest_imbalance(self, gpu: Gpu) -> float | None:
        """The imbalance of experts up to which the layout fits, at most that of one rank getting every token; None if
        it does not fit even when all get the same."""
        low, high = 1.0, float(self.work.layout.ep)
        if not self._at(low).fits(gpu):
            return None
        if self._at(high).fits(gpu):
            return high
        while high - low > 0.01:
            middle = (low + high) / 2
            low, high = (middle, high) if self._at(middle).fits(gpu) else (low, middle)
        return low

    def _at(self, imbalance: float) -> MemoryPlan:
        return plan_memory(replace(self.work, imbalance=imbalance))

    def table(self, gpu: Gpu) -> str:
        """GiB by item and pipeline stage, and what is left."""
        names = list(self.stages[0].items)
        head = "  " + f"{'GiB per rank':<34}" + "".join(f"{f'stage {plan.stage}':>10}" for plan in self.stages)
        rows = [
            f"  {name:<34}" + "".join(f"{plan.items[name] / GIB:10.2f}" for plan in self.stages)
            for name in names
            if any(plan.items[name] for plan in self.stages)
        ]
        total = f"  {'total':<34}" + "".join(f"{plan.total / GIB:10.2f}" for plan in self.stages)
        left = "".join(f"{(gpu.memory - plan.total) / GIB:10.2f}" for plan in self.stages)
        return "\n".join([head, *rows, total, f"  {f'left of {gpu.memory_gib} ({gpu.name})':<34}{left}"])


def plan_memory(work: Workload) -> MemoryPlan:
    """Raises `UserError` for numbers that no plan can be made of."""
    if work.imbalance < 1:
        raise UserError(f"imbalance {work.imbalance} must be at least 1, an even share for every rank")
    return MemoryPlan(work, tuple(_stage(work, stage) for stage in range(work.layout.pp)))


def _stage(work: Workload, stage: int) -> RankPlan:
    base = list(weights(work.arch, work.layout, stage, work.value, work.nf4))
    trained = trained_tensors(work, stage)
    adapters = 0 if work.adapters is None else parameter_bytes(work, trained)
    items = {"weights": sum(held.nbytes for held in base), "adapters": adapters}
    items["gradients (FP32)"] = gradient_bytes(work, trained)
    items["optimizer"] = optimizer_bytes(work, trained)
    activations = _activations(work, stage)
    items |= activations
    if work.nf4:
        items["a weight dequantized"] = _dequantized(work, stage)
    items["fragmentation (margin)"] = round(FRAGMENTATION * sum(activations.values()))
    items["CUDA context (margin)"] = CUDA_CONTEXT
    items["NCCL buffers (margin)"] = NCCL_PER_GROUP * groups(work.layout, work.ranks)
    return RankPlan(stage, items)


def trained_tensors(work: Workload, stage: int) -> list[Held]:
    """What learns on a rank of a stage."""
    if work.adapters is None:
        return [held for held in weights(work.arch, work.layout, stage, work.value) if not held.buffer]
    return list(adapter_weights(work.arch, work.layout, stage, work.value, work.adapters))


def parameter_bytes(work: Workload, trained: list[Held]) -> int:
    """Bytes of trained parameters. The distributed optimizer moves them into buffers that divide evenly."""
    return sum(_padded(work, counts) * size for (_, size), counts in _buffers(trained).items())


def gradient_bytes(work: Workload, trained: list[Held]) -> int:
    """FP32 gradients of all of it, on every rank: Megatron's distributed optimizer shards states, not gradients."""
    return sum(_padded(work, counts) * FP32 for counts in _buffers(trained).values())


def optimizer_bytes(work: Workload, trained: list[Held]) -> int:
    """Adam's two FP32 moments, and an FP32 copy of what is not FP32 itself; with BF16 a share of each, over the ranks
    that hold the same parameters (for experts of their own, the expert data-parallel ranks)."""
    total = 0
    for (per_expert, size), counts in _buffers(trained).items():
        states = 2 * FP32 + (FP32 if size != FP32 else 0)
        total += sum(counts) * states // (_copies(work, per_expert) if work.bf16 else 1)
    return total


def _buffers(trained: list[Held]) -> dict[tuple[bool, int], list[int]]:
    """Megatron's flat buffers: (belongs to single experts, bytes per value) -> values of each tensor."""
    found: dict[tuple[bool, int], list[int]] = {}
    for held in trained:
        found.setdefault((held.per_expert, held.size), []).extend([held.count] * held.tensors)
    return found


def _copies(work: Workload, per_expert: bool) -> int:
    return work.layout.expert_dp(work.ranks) if per_expert else work.layout.dp(work.ranks) * work.layout.cp


def _padded(work: Workload, counts: list[int]) -> int:
    """Values of a buffer. For the distributed optimizer each tensor starts at a multiple of 64 values and the whole is
    a multiple of ranks and 128 (param_and_grad_buffer.py)."""
    if not work.bf16:
        return sum(counts)
    multiple = lcm(128, work.layout.dp(work.ranks) * work.layout.cp)
    return -(-sum(-(-count // 64) * 64 for count in counts) // multiple) * multiple


def _activations(work: Workload, stage: int) -> dict[str, int]:
    """Kept activations of the micro batches in flight, logits, and the peak of what is in work beside them.

    Under 1F1B stage i has pp - i micro batches between forward and backward. Two moments compete for the peak: the loss
    (probabilities and BF16 logits, of a chunk where it is in chunks), and the backward pass of the hungriest layer once
    the logits are gone, plus, where it is computed again, what it then keeps.
    """
    stage_kept = kept(work.arch, work.layout, stage, work.batch)
    flying = min(work.layout.pp - stage, work.micro_batches)
    need = dict(transients(work.arch, work.layout, work.batch))
    backward = max(
        need[letter] + max(0, full - now)
        for (letter, now), full in zip(stage_kept.layers, stage_kept.without_recompute, strict=True)
    )
    loss = in_loss(work.arch, work.layout, work.batch) if stage == work.layout.pp - 1 else 0
    beyond = max(backward, loss) - stage_kept.logits
    kinds = by_letter(stage_kept.layers)
    items = {f"kept by {LETTERS[letter]}": kinds.get(letter, 0) * flying for letter in LETTERS}
    return items | {"kept by the head": stage_kept.head * flying, "logits": stage_kept.logits, "in work": beyond}


def _dequantized(work: Workload, stage: int) -> int:
    """The largest weight of a stage in 16 bits: one at a time, of one expert, while its product is computed."""
    layers = stage_layers(work.arch, work.layout, stage)
    found = (one for number, letter in layers for one in linears(work.arch, work.layout, number, letter))
    return max(linear.inputs * linear.outputs for linear in found) * work.value


def groups(layout: Layout, ranks: int) -> int:
    """Communicators of more than one rank that a step uses: world, tp, pp, cp, data with cp, ep, ep with tp, expert
    data, all that hold one model (the gradient's norm)."""
    sizes = (
        ranks,
        layout.tp,
        layout.pp,
        layout.cp,
        layout.dp(ranks) * layout.cp,
        layout.ep,
        layout.ep * layout.etp if layout.etp > 1 else 1,
        layout.expert_dp(ranks),
        layout.tp * layout.pp,
    )
    return sum(size > 1 for size in sizes)
