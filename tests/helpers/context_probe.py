"""Run by tests/nano3/test_context_parallel.py: Megatron-Core without NeMo, all parameters trained, several ranks.

python -m tests.helpers.context_probe OUT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from nano3.parity import worker  # first: it switches the CPU backend on
from nano3.parity.processes import on_ranks

# isort: split

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.ssm.mamba_mixer import MambaMixer

from nano3.context_parallel import cut_batch
from nano3.cpu.te.partition import partitioned_indices
from nano3.parity.case import PACK, Case, Sizes
from nano3.parity.shards import assemble

FP64 = Case(adapters="none", pattern="M*EM")
FP32 = replace(FP64, dtype=torch.float32)
LEAKS = {
    "cp2": ((4, 20, 40), (24, 4, 36), (64,)),
    "cp2.ep2": ((4, 20, 40),),
    "tp2": ((7, 24, 33), (64,)),
    "pp2": ((7, 24, 33), (64,)),
}
"""Packs by layout; the second document, or the only one, is the one whose loss is asked about."""


def positions(case: Case, sizes: Sizes, number: int) -> torch.Tensor:
    """Where in the pack this rank's tokens are, after context parallelism."""
    batch = case.batch(0, number) | {"where": torch.arange(PACK)[None]}
    return cut_batch(batch, sizes.cp, parallel_state.get_context_parallel_rank())["where"][0]


def token_losses(case: Case, sizes: Sizes) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(positions, losses of their tokens) of every pack, forward only."""
    worker.keep_fp64_loss()
    model, found = worker.build(case, sizes), []
    for number in range(len(case.packs)):
        batch = cut_batch(case.batch(0, number), sizes.cp, parallel_state.get_context_parallel_rank())
        with torch.no_grad():
            output, _ = worker.forward_step([], iter([batch]), model)
        found.append((positions(case, sizes, number), output[0]))
    return found


def leak(case: Case, sizes: Sizes, number: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(positions, largest gradient at each) of one document's loss with respect to the embedded input."""
    model = worker.build(case, sizes)
    model.config.finalize_model_grads_func = None
    batch = case.batch(0, number)
    start, stop = batch["cu_seqlens"].tolist()[1:3] if len(case.packs[number]) > 1 else (0, PACK)
    batch["loss_mask"][:] = 0
    batch["loss_mask"][0, start:stop] = 1
    batch = cut_batch(batch, sizes.cp, parallel_state.get_context_parallel_rank())
    seen: list[torch.Tensor] = []
    if model.pre_process:
        model.embedding.register_forward_hook(lambda _m, _i, out: (out.retain_grad(), seen.append(out))[0])
    get_forward_backward_func()(
        forward_step_func=partial(worker.forward_step, []),
        data_iterator=iter([batch]),
        model=[model],
        num_microbatches=1,
        seq_length=PACK,
        micro_batch_size=1,
    )
    if not seen:
        return None
    where = positions(case, sizes, number).chunk(sizes.tp)[parallel_state.get_tensor_model_parallel_rank()]
    return where, seen[0].grad.abs().amax((1, 2))


def together(parts: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Values of the whole pack from (positions, values) of all ranks."""
    whole = torch.full((PACK,), float("nan"), dtype=torch.float64)
    for where, values in parts:
        whole[where.long()] = values.double()
    assert not whole.isnan().any()
    return whole


def layout_losses(case: Case, name: str) -> torch.Tensor:
    ranks = on_ranks(Sizes.parse(name), token_losses, case, Sizes.parse(name))
    return torch.cat([together(rank[number] for rank in ranks) for number in range(len(case.packs))])


def training(case: Case, name: str) -> dict[str, Any]:
    ranks = on_ranks(Sizes.parse(name), worker.train, case, Sizes.parse(name))
    values, drift = assemble(rank["gradients"] for rank in ranks)
    return {"gradients": values, "drift": drift, "loss": ranks[0]["losses"][0], "norm": ranks[0]["norms"][0]}


def compare(case: Case, name: str, expected: dict[str, Any]) -> dict[str, Any]:
    """Largest errors of a layout; of tensors that are FP32 in either precision (A_log, D) apart."""
    found = training(case, name)
    errors = {
        key: float((found["gradients"][key] - value).abs().max() / value.abs().max())
        for key, value in expected["gradients"].items()
    }
    coarse = {key for key in errors if key.endswith(("A_log", ".D"))}
    return {
        "loss": abs(found["loss"] / expected["loss"] - 1),
        "norm": abs(found["norm"] / expected["norm"] - 1),
        "gradient": max(error for key, error in errors.items() if key not in coarse),
        "fp32_gradient": max((errors[key] for key in coarse), default=0.0),
        "tensors": len(errors),
        "drift": found["drift"],
    }


def cut_as_a_whole(batch: dict[str, torch.Tensor], size: int, rank: int) -> dict[str, torch.Tensor]:
    """The fault of NeMo's `gpt_data_step`: the pack is cut into 2 * cp pieces, not each document."""
    index = partitioned_indices(torch.tensor([0, PACK], dtype=torch.int32), PACK, size, rank)
    return {key: value[:, index] if value.shape == (1, PACK) else value for key, value in batch.items()}


def swapped(batch: dict[str, torch.Tensor], size: int, rank: int) -> dict[str, torch.Tensor]:
    """Every rank holds another one's slices."""
    return cut_batch(batch, size, (rank + 1) % size)


def leaks(name: str, packs: tuple[tuple[int, ...], ...]) -> list[list[float]]:
    case, result = replace(FP64, packs=packs), []
    for number in range(len(packs)):
        parts = on_ranks(Sizes.parse(name), leak, case, Sizes.parse(name), number)
        result.append(together(part for part in parts if part is not None).tolist())
    return result


def main() -> None:
    wide, result = training(FP32, "one"), {"errors": {}, "faults": {}}
    for name in ("cp2", "tp2.cp2.ep2"):
        result["errors"][f"fp32 {name}"] = compare(FP32, name, wide)
    exact = training(FP64, "one")
    for name in ("cp2", "cp4", "cp2.ep2", "tp2.cp2.ep2"):
        result["errors"][f"fp64 {name}"] = compare(FP64, name, exact)
    for fault in (cut_as_a_whole, swapped):
        with patch.object(worker, "cut_batch", fault):
            result["faults"][fault.__name__] = compare(FP64, "cp2", exact)
    losses = {name: layout_losses(FP64, name) for name in ("one", "cp2", "cp4")}
    result["token_losses"] = {name: float((losses[name] - losses["one"]).abs().max()) for name in ("cp2", "cp4")}
    result["leaks"] = {name: leaks(name, packs) for name, packs in LEAKS.items()}
    with patch.object(MambaMixer, "_create_packed_seq_idx", lambda _m, _p, tokens: torch.zeros(1, tokens).int()):
        result["planted_leak"] = leaks("cp2", LEAKS["cp2"][:1])[0]
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
