"""Run by tests/nano3/test_parity_suite.py: the suite with a deliberate fault in one layout at a time.

python -m tests.helpers.parity_faults OUT.json   -> {fault: row}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from nano3.parity import worker  # first: it switches the CPU backend on

# isort: split

import torch
from megatron.core import parallel_state
from megatron.core.ssm.mamba_mixer import MambaMixer

from nano3 import chunked_loss, nf4_base
from nano3.context_parallel import cut_batch
from nano3.etp_replicas import MARK
from nano3.gate import Gate
from nano3.lora import adapters, expert_adapters
from nano3.parity.case import Sizes
from nano3.parity.comparison import as_json, compare, run
from nano3.parity.layouts import parse_layouts


def a_missing_reduction() -> Any:
    """Shared adapters whose gradients stay on their expert-parallel rank."""
    make = expert_adapters.SharedExpertsAdapter.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        for parameter in self.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]

    return patch.object(expert_adapters.SharedExpertsAdapter, "__init__", init)


def a_wrong_section_split() -> Any:
    """in_proj's B cut as one matrix over tensor-parallel ranks: each section's part lands in another section."""
    make = adapters.DenseAdapter.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.sections = tuple(sorted(self.sections, key=lambda section: section[0] != "dt"))

    return patch.object(adapters.DenseAdapter, "__init__", init)


def a_swapped_slice() -> Any:
    """Context-parallel ranks that hold each other's pieces."""
    return patch.object(worker, "cut_batch", lambda batch, size, rank: cut_batch(batch, size, (rank + 1) % size))


def a_leaked_document() -> Any:
    """Mamba's state and convolution go on over the documents' edges."""
    return patch.object(MambaMixer, "_create_packed_seq_idx", lambda _m, _p, tokens: torch.zeros(1, tokens).int())


def a_missing_exchange() -> Any:
    """Ranks with slices of one expert that keep the gradient of its adapter's whole A to themselves."""
    return patch.object(expert_adapters, "copy_to_tensor_model_parallel_region", lambda low, **_: low)


def a_copy_counted_twice() -> Any:
    """Copies of an expert's whole A that each count in the gradient's norm."""
    mark = expert_adapters.ExpertsAdapter._mark
    return patch.object(
        expert_adapters.ExpertsAdapter, "_mark", lambda self, parameter, **_: mark(self, parameter, cut=True)
    )


def quantized_after_cutting() -> Any:
    """Ranks that quantize their own part of a tensor, as if it were one."""

    def cut(self: Any, name: str, start: int, count: int, columns: slice) -> Any:
        return self._quantizer(self._read(name)[start : start + count, columns])

    return patch.object(nf4_base._Units, "cut", cut)


def a_gate_one_token_late() -> Any:
    """Ranks whose gate opens and closes one position behind its place."""
    enter = Gate.enter
    return patch.object(Gate, "enter", lambda self, positions: enter(self, positions.roll(1, 1)))


def another_micro_batchs_gate() -> Any:
    """Layers that are computed again with the gate of whichever micro batch came last."""
    return patch.object(Gate, "leave", lambda _self, _output: None)


def a_label_of_the_position_before() -> Any:
    """Chunks of the loss of which the first position has the label before its own."""
    whole = chunked_loss.chunk_by_chunk

    def shifted(model: Any, hidden: Any, labels: torch.Tensor, positions: int, learns: bool) -> Any:
        labels = labels.clone()
        labels[:, positions::positions] = labels[:, positions - 1 : -1 : positions]
        return whole(model, hidden, labels, positions, learns)

    return patch.object(chunked_loss, "chunk_by_chunk", shifted)


def a_chunk_without_its_mask() -> Any:
    """Chunks of the loss in which padded vocabulary takes probability: the output layer's hooks do not run."""
    whole = chunked_loss.chunk_by_chunk

    def bare(model: Any, *arguments: Any) -> Any:
        loss = model.compute_language_model_loss
        return whole(
            SimpleNamespace(output_layer=model.output_layer.forward, compute_language_model_loss=loss), *arguments
        )

    return patch.object(chunked_loss, "chunk_by_chunk", bare)


def a_chunk_that_is_not_added_up() -> Any:
    """Tensor-parallel ranks that keep the gradient of their own part of the vocabulary."""
    return patch.object(
        chunked_loss, "reduce_scatter_to_sequence_parallel_region", lambda whole, group: whole.chunk(2)[group.rank()]
    )


def another_order(finalize: Callable[..., None]) -> Callable[..., None]:
    """`finalize`, and then another last bit on every rank but the first of those with slices of the same experts."""

    def run(model: list, *arguments: Any, **options: Any) -> None:
        finalize(model, *arguments, **options)
        for parameter in model[0].parameters():
            if getattr(parameter, MARK, False):
                parameter.main_grad *= 1 + parallel_state.get_expert_tensor_parallel_rank() * 1e-15

    return run


def a_last_bit_of_another_order() -> Any:
    """Ranks whose reductions add up in another order than the first's; nobody makes their copies equal."""
    return patch.object(worker, "then_equal_copies", another_order)


def mended() -> Any:
    """The same other order, and the copies made equal behind it."""
    then_equal = worker.then_equal_copies
    return patch.object(worker, "then_equal_copies", lambda finalize: then_equal(another_order(finalize)))


FAULTS: dict[Callable[[], Any], str] = {
    a_missing_reduction: "ep2",
    a_wrong_section_split: "tp2",
    a_swapped_slice: "cp2",
    a_leaked_document: "cp2",
    a_missing_exchange: "etp2+each",
    a_copy_counted_twice: "etp2+each",
    quantized_after_cutting: "tp2+nf4",
    a_gate_one_token_late: "tp2+gated",
    another_micro_batchs_gate: "pp2+gated+full",
    a_label_of_the_position_before: "cp2+chunked",
    a_chunk_without_its_mask: "tp2+chunked",
    a_chunk_that_is_not_added_up: "tp2+chunked",
    a_last_bit_of_another_order: "etp2+each",
    mended: "etp2+each",
}


def main() -> None:
    rows, layouts = {}, {wanted.text: wanted for wanted in parse_layouts(dict.fromkeys(FAULTS.values()))}
    cases = {text: replace(wanted.case, pattern="ME*M") for text, wanted in layouts.items()}
    alone = {case: run(case, Sizes()) for case in dict.fromkeys(cases.values())}

    def compared(text: str) -> dict[str, Any]:
        case, sizes = cases[text], layouts[text].sizes
        return as_json(compare(text, case, sizes, run(case, sizes), alone[case]))

    for text in layouts:
        rows[text] = compared(text)
    for fault, text in FAULTS.items():
        with fault():
            rows[fault.__name__] = compared(text)
    Path(sys.argv[1]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
