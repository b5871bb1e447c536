"""The range of a number in a setting, declared beside its default: `lr: Annotated[float, Range(0, 1, above=True)]`."""

from __future__ import annotations

from dataclasses import dataclass

MOST_STEPS = 1_000_000_000
"""More steps than any run takes; a larger number is a slip of the hand."""
SEED_BITS = 31
"""Seeds have at most so many bits: what NumPy, PyTorch and Megatron-Core all take, with room for what they add."""


@dataclass(frozen=True)
class Range:
    """From `least` to `most`, both included unless `above` or `below` says otherwise; 0 too where `zero` allows it."""

    least: float
    most: float
    above: bool = False
    """`least` itself is excluded."""
    below: bool = False
    """`most` itself is excluded."""
    zero: bool = False
    """0 is allowed beside the range: it switches something off, or has it derived."""
    why: str = ""
    """What goes wrong outside, in words that end the message."""

    def holds(self, value: float) -> bool:
        """Whether `value` is in the range."""
        if self.zero and value == 0:
            return True
        over = value > self.least if self.above else value >= self.least
        return over and (value < self.most if self.below else value <= self.most)

    def words(self) -> str:
        """The range in words, such as `above 0 and at most 1`."""
        least = f"{'above' if self.above else 'at least'} {self.least:,.10g}"
        most = f"{'below' if self.below else 'at most'} {self.most:,.10g}"
        return f"{least} and {most}" + (", or 0" if self.zero else "")
