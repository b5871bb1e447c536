"""What the stages around a training need of a CPU node: import, merge, calibration and FP8 export. Imports no torch.

Disk is exact. Import, merge and export stream: their memory does not grow with the model. Calibration holds one layer
and one sample; its formulas are up to a third above what was measured. See docs/memory.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.plan.hardware import GIB
from nano3.arch import Arch

MIB = 1 << 20
PROCESS = GIB
"""Margin: Python with torch, transformers and ModelOpt (0.72 GiB when measured)."""
THREADS, CHUNK, STEP = 8, 64 * MIB, 16 * MIB
"""Of the streaming scripts: threads at most, bytes of a thread's buffer, bytes of a piece of arithmetic
(conversion/checkpoint/pieces.py; tests/launch/test_plan_export.py holds them equal)."""
BLOCK_TOKENS = 16384
"""Of a block of hidden states (conversion/fp8/layerwise.py; held equal likewise)."""
PIECES = 6
"""Pieces that a thread has in work: old and new values, a delta, their FP32 copies, a temporary."""
FP32 = 4
BYTES = {"BF16": 2, "F32": 4}


@dataclass(frozen=True)
class StagePlan:
    """Bytes of a stage: memory at its peak, output, and files that are gone before it is written."""

    name: str
    memory: int
    disk: int
    scratch: int = 0


def plan_export(arch: Arch, samples: int = 1024, tokens: int = 4096) -> tuple[StagePlan, ...]:
    """The stages of a model whose files have the expected dtypes; calibration on `samples` of `tokens` at most.

    A dense model is not quantized.
    """
    stream = PROCESS + THREADS * (CHUNK + PIECES * STEP)
    layers = [calibration_bytes(arch, number, tokens) for number in range(len(arch.pattern))]
    twice = min(samples, -(-BLOCK_TOKENS // tokens))  # the block in work
    hidden_states = (samples + twice) * (2 * tokens * arch.hidden_size + 128)
    model = model_bytes(arch)
    quantize = StagePlan("quantize", max(stream, PROCESS + max(layers)), fp8_bytes(arch), hidden_states)
    copies = (StagePlan("import", stream, model), StagePlan("merge", stream, model))
    return (*copies, quantize) if arch.moe_layers else copies


def table(arch: Arch) -> str:
    """The plan in GiB, a line for each stage."""
    head = f"  {'on CPU nodes, GiB':<34}{'memory':>10}{'output':>10}{'for a while':>13}"
    rows = [
        f"  {plan.name:<34}{plan.memory / GIB:10.2f}{plan.disk / GIB:10.2f}{plan.scratch / GIB:13.2f}"
        for plan in plan_export(arch)
    ]
    return "\n".join([head, *rows])


def model_bytes(arch: Arch) -> int:
    """All tensors of the model as a Hugging Face folder has them; headers not counted."""
    return sum(spec.count * BYTES[spec.dtype] for spec in arch.tensors().values())


def fp8_bytes(arch: Arch) -> int:
    """The same after the published FP8 recipe: all matrices of layers that neither attend nor feed attention, with two
    scales for each, and two for the cache of each attention layer."""
    kept = {*arch.attention_layers, *arch.feeding_mamba_layers}
    total = 2 * FP32 * len(arch.attention_layers)
    for name, spec in arch.tensors().items():
        coded = name.endswith("_proj.weight") and int(name.split(".")[2]) not in kept
        total += spec.count + 2 * FP32 if coded else spec.count * BYTES[spec.dtype]
    return total


def calibration_bytes(arch: Arch, number: int, tokens: int) -> int:
    """One layer's calibration: its weights in BF16, and a sample's activations.

    Activations, FP32 values for each token, by transformers' formulas on a CPU: Mamba's B, C and states of every head
    and its inner values; the widest matrices of an MoE layer. Coefficients are rounded up from measurements.
    """
    prefix = f"backbone.layers.{number}."
    weights = sum(2 * spec.count for name, spec in arch.tensors().items() if name.startswith(prefix))
    widths = 8 * arch.hidden_size
    if arch.pattern[number] == "M":
        widths += 6 * arch.mamba_num_heads * arch.ssm_state_size + 12 * arch.mamba_inner_size
    elif arch.pattern[number] == "E":
        widths = 2 * (arch.hidden_size + arch.moe_shared_expert_intermediate_size + arch.moe_intermediate_size)
    elif arch.pattern[number] == "-":
        widths = 2 * (arch.hidden_size + arch.intermediate_size)
    return weights + FP32 * tokens * widths
