"""Magnitudes of DoRA, where no layout of the parity suite goes."""

import pytest
import torch

from nano3.lora.dora import Decomposed


class Adapter(Decomposed):
    """Of so many parts, each twice the one before; B is zero."""

    scale = 1.0

    def __init__(self, number: int, routed: bool) -> None:
        super().__init__()
        self.number, self.routed = number, routed

    def parts(self, base: torch.Tensor):
        return [(base * 2**i, torch.ones(1, 2), torch.zeros(2, 1)) for i in range(self.number)]


@pytest.mark.parametrize(
    ("number", "routed", "expected"),
    [(1, False, [5.0, 13.0]), (1, True, [[5.0, 13.0]]), (2, True, [[5.0, 13.0], [10.0, 26.0]])],
    ids=["a layer", "a single expert of a rank", "two experts"],
)
def test_experts_have_a_magnitude_each_and_a_layer_has_one(number, routed, expected):
    adapter, base = Adapter(number, routed), torch.tensor([[3.0, 4.0], [5.0, 12.0]])
    adapter.add_magnitude(base)
    assert adapter.magnitude is not None
    assert adapter.magnitude.tolist() == expected
    assert adapter.row_scale(base).tolist() == torch.ones_like(adapter.magnitude).tolist()
