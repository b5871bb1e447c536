"""Context parallelism of packed sequences: a rank's share of a batch.

Transformer Engine's attention and Megatron-Core's Mamba mixer both expect every *document* cut over the ranks, in the
order of `partitioned_indices`; cutting the pack as a whole in the same way would mix documents up.
"""

from __future__ import annotations

from torch import Tensor

from nano3.cpu.te.partition import partitioned_indices


def cut_batch(batch: dict[str, Tensor], cp_size: int, rank: int) -> dict[str, Tensor]:
    """This rank's share of a packed batch.

    What has one value per position, (1, s), is cut to (1, s / cp_size): tokens, labels, loss mask, position ids.
    `cu_seqlens` and `max_seqlen` stay those of the whole pack, as attention and the Mamba mixer want them.
    """
    if cp_size == 1:
        return batch
    positions = batch["tokens"].shape[1]
    index = partitioned_indices(batch["cu_seqlens"], positions, cp_size, rank)
    return {key: value[:, index] if value.shape == (1, positions) else value for key, value in batch.items()}
