"""What stands in a box, by hand."""

import pytest

from nano3.boxed import boxes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"none, and \boxes{1}", []),
        (r"\boxed{1} then \boxed{\{2\}}", ["1", r"\{2\}"]),
        (r"\fbox{3}, \boxed 4, so $\boxed4$ and \boxed 5.", ["3", "4", "4", "5"]),
        (r"\boxed{ {6} }, \boxed {7}", ["{6}", "7"]),
        (r"\boxed{8} \boxed{\frac{1}{2", ["8", None]),
        (r"\boxed{x = \boxed{9}}", ["9"]),
        (r"\boxed{\text{a \} b}}", [r"\text{a \} b}"]),
        (r"\boxed{a \\} b}", [r"a \\"]),
        (r"\boxed{}", [""]),
    ],
)
def test_boxes(text: str, expected: list) -> None:
    assert boxes(text) == expected
