"""How fast a layout should train: an estimate from the GPU's peaks, and how far off it is on published rows.

    estimate(work, HARDWARE["h100"]).tokens_per_second        # per GPU

Imports neither torch nor NeMo. A micro batch costs, on the busiest rank of the slowest pipeline stage, the time of its
matrix products, plus its traffic to memory, plus what it sends; and never less than the host needs to launch it. The
constants below stand for everything else. `PUBLISHED` holds the rows they are judged by: nothing here was measured by
us, and the two host constants were chosen on three of these rows. Not verified on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from launch.plan.activations import kept
from launch.plan.hardware import HARDWARE, Gpu
from launch.plan.layout import Layout
from launch.plan.memory import Workload
from launch.plan.weights import Adapters, stage_layers, weights
from nano3.arch import Arch
from nano3.flops import forward_flops, linears
from nano3.targets import OUTPUT, PRESETS, is_routed, select

GEMM = 0.6
"""Share of the BF16 peak that matrix products reach, large ones and the experts' small ones together."""
FP8_GAIN = 1.3
"""Speed of FP8 training over BF16 in the same products; the published gains are 1.2 to 1.5, far below the peaks' 2."""
MEMORY = 0.7
"""Share of the memory bandwidth that norms, activations, permutations and the scan reach."""
TRAFFIC = 6
"""Times that a kept byte is moved: written and read forward, read twice backward, its gradient written and read."""
LINK = 0.7
"""Share of NVLink's or the network's bandwidth that collectives reach."""
HOST_LAYER = 8.2e-3
"""Seconds that the host needs for a layer, forward and backward, without CUDA graphs: from full SFT on 8 GB200."""
HOST_ADAPTER = 1.0e-3
"""Seconds more for each adapter: from the two published LoRA rows."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step by cause, on the busiest rank, and what follows."""

    compute: float
    memory: float
    exchange: float
    """All-to-all of the experts, gathers and scatters of tensor and context parallelism."""
    host: float
    """What the host needs beyond all that; zero where the GPU is the slower one."""
    bubble: float
    """Idle at the ends of the pipeline."""
    tokens: int
    """Tokens of a step on all ranks, padding included."""
    ranks: int

    @property
    def seconds(self) -> float:
        """A step."""
        return self.compute + self.memory + self.exchange + self.host + self.bubble

    @property
    def tokens_per_second(self) -> float:
        """Per GPU."""
        return self.tokens / self.seconds / self.ranks

    def shares(self) -> str:
        """Where a step's time goes, in words."""
        parts = {name: getattr(self, name) for name in ("compute", "memory", "exchange", "host", "bubble")}
        return ", ".join(f"{name} {part / self.seconds:.0%}" for name, part in parts.items() if part > 0)


def estimate(work: Workload, gpu: Gpu, fp8: bool = False) -> Estimate:
    """One step of `work` on this GPU. Documents are taken to be as long as a pack, the dearest case."""
    stages = [_micro_batch(work, gpu, fp8, stage) for stage in range(work.layout.pp)]
    slowest = max(stages, key=sum)
    many = work.micro_batches
    compute, memory, exchange, host = (part * many for part in slowest)
    return Estimate(
        compute=compute,
        memory=memory,
        exchange=exchange,
        host=host,
        bubble=sum(slowest) * (work.layout.pp - 1),
        tokens=work.global_batch * work.seq_length,
        ranks=work.ranks,
    )


def _micro_batch(work: Workload, gpu: Gpu, fp8: bool, stage: int) -> tuple[float, float, float, float]:
    """Seconds of a micro batch in a stage: compute, memory, exchange, and what the host needs beyond these."""
    arch, layout = work.arch, work.layout
    share = stage_share(arch, layout, stage)
    speed = gpu.bf16 * GEMM * (FP8_GAIN if fp8 else 1.0)
    compute = _flops(work) * share / (layout.tp * layout.cp) / speed
    held = kept(arch, layout, stage, replace(work.batch, recompute=(), loss_chunk=0))
    read = 2 * sum(item.nbytes for item in weights(arch, layout, stage, work.value))
    memory = (TRAFFIC * held.total + read) / (gpu.hbm * MEMORY)
    exchange = _exchange(work, gpu) * share
    layers = len(held.layers)
    adapters = 0 if work.adapters is None else len(work.adapters.ranks) * layers / len(arch.pattern)
    host = (HOST_LAYER * layers + HOST_ADAPTER * adapters) * (1 + _again(work, stage) / 3)
    return compute, memory, exchange, max(0.0, host - compute - memory - exchange)


def _again(work: Workload, stage: int) -> float:
    """The share of a stage's layers whose forward pass is launched twice; forward is a third of the host's time."""
    letters = [letter for _, letter in stage_layers(work.arch, work.layout, stage)]
    twice = {"full": "M*E-", "mamba": "M", "moe": "E"}
    repeated = {letter for name in work.recompute for letter in twice.get(name, "")}
    return sum(letter in repeated for letter in letters) / len(letters)


def stage_share(arch: Arch, layout: Layout, stage: int) -> float:
    """A stage's part of the whole model's multiplications."""
    numbers = {str(number) for number, _ in stage_layers(arch, layout, stage)}
    costs = {path: i * o * times for path, (i, o, times) in linears(arch).items() if not path.startswith("embedding")}
    mine = sum(
        cost
        for path, cost in costs.items()
        if (path == OUTPUT and stage == layout.pp - 1) or (path != OUTPUT and path.split(".")[2] in numbers)
    )
    return mine / sum(costs.values())


def _flops(work: Workload) -> float:
    """FLOPs of a micro batch over all ranks that share it, the busiest experts' waiting and recomputation included."""
    arch, tokens = work.arch, work.micro_batch * work.seq_length
    products, between = forward_flops(arch, [work.seq_length] * work.micro_batch)
    routed = sum(2 * i * o * times for path, (i, o, times) in linears(arch).items() if is_routed(path)) * tokens
    products += routed * (work.batch.imbalance - 1)
    forward = products + between
    again = forward if "full" in work.recompute else routed if "moe" in work.recompute else 0.0
    backward = 2 * between + (2 if work.adapters is None else 1) * products
    return forward + backward + again


def _exchange(work: Workload, gpu: Gpu) -> float:
    """Seconds of communication of a micro batch, all layers, forward and backward, nothing overlapped."""
    arch, layout = work.arch, work.layout
    tokens = work.micro_batch * work.seq_length // layout.cp
    hidden = tokens * arch.hidden_size * work.value
    routed = hidden // layout.tp * arch.num_experts_per_tok * work.batch.imbalance
    seconds = len(arch.moe_layers) * 4 * routed * _beyond(layout.ep) / _link(gpu, layout.ep * layout.etp)
    if layout.tp > 1:  # a gather and a scatter, forward and backward; adapters gather once more
        gathers = 4 if work.adapters is None else 6
        seconds += len(arch.pattern) * gathers * hidden * _beyond(layout.tp) / _link(gpu, layout.tp)
    if layout.cp > 1:  # keys and values around the ring; all inputs of the scan change places
        keys = 2 * 2 * arch.num_key_value_heads * arch.head_dim * len(arch.attention_layers)
        inner = sum(rows for _, rows in arch.mamba_sections) + arch.mamba_inner_size
        moved = tokens // layout.tp * work.value * (keys * layout.cp + 2 * inner * len(arch.mamba_layers))
        seconds += moved * _beyond(layout.cp) / _link(gpu, layout.tp * layout.cp)
    if layout.pp > 1:
        seconds += 2 * hidden / _link(gpu, work.ranks)
    return seconds


def _beyond(size: int) -> float:
    """The part of a group's data that leaves a rank."""
    return (size - 1) / size


def _link(gpu: Gpu, span: int) -> float:
    """Bytes per second between ranks of a group that spans so many neighbours."""
    return LINK * (gpu.nvlink if span <= gpu.nvlink_domain else gpu.network)


@dataclass(frozen=True)
class Row:
    """A published figure."""

    what: str
    gpu: str
    work: Workload
    tokens_per_second: float
    fp8: bool
    source: str


def published(arch: Arch) -> list[Row]:
    """Published speeds of this architecture. LoRA and SFT rows are of a sibling with one more prediction head.

    Where a source does not name a micro batch or recomputation, its published recipe does.
    """
    paths = select(arch, PRESETS["all"], "shared")
    lora = Workload(arch, Layout(tp=2, ep=8), 8, 4096, 128, Adapters(dict.fromkeys(paths, 32)), imbalance=1.0)
    full = replace(lora, layout=Layout(ep=8), adapters=None)
    card, summary = "Megatron-Bridge verification card", "Megatron-Bridge performance summary"
    large = replace(full, seq_length=8192, global_batch=512, micro_batch=4)
    spread = replace(large, ranks=16, global_batch=1024, micro_batch=1, recompute=("moe", "layernorm", "moe_act"))
    automodel = replace(full, global_batch=512, micro_batch=4, recompute=("full",))  # its activation_checkpointing
    return [
        Row("LoRA r32, TP2 EP8, 4096", "h100", lora, 3878, False, card),
        Row("LoRA r32, TP2 EP8, 4096", "gb200", lora, 3408, False, card),
        Row("full SFT, TP1 EP8, 4096", "gb200", full, 9644, False, card),
        Row("pretrain FP8, EP8, 8192, 2 nodes", "h100", spread, 14719, True, summary),
        Row("pretrain MXFP8, EP8, 8192, micro batch 4", "b300", large, 37316, True, summary),
        Row("pretrain MXFP8, EP8, 8192, micro batch 4", "gb300", large, 39936, True, summary),
        Row("pretrain BF16, EP8, 4096, micro batch 4", "h100", automodel, 16789, False, "NeMo Automodel"),
    ]


def errors(arch: Arch) -> str:
    """A table of published rows with the estimate and its error."""
    lines = [f"  {'published':<44}{'GPU':<7}{'tok/s/GPU':>10}{'estimate':>10}{'error':>8}"]
    for row in published(arch):
        guess = estimate(row.work, HARDWARE[row.gpu], row.fp8).tokens_per_second
        off = f"{guess / row.tokens_per_second - 1:+.0%}"
        lines.append(f"  {row.what:<44}{row.gpu:<7}{row.tokens_per_second:>10,.0f}{guess:>10,.0f}{off:>8}")
    return "\n".join(lines)
