"""What a calibration has seen so far and how far it is, on disk: a killed one goes on where it was."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

_FILE = "seen.json"


@dataclass
class Seen:
    """The state between two blocks of samples in a layer.

    `layer` is the one in work and `blocks` how many have passed it; `largest` is the largest absolute value that each
    quantizer saw ("LAYER.path" -> value), `counts` how many tokens each routed expert of a layer got ("LAYER" -> list).
    """

    layer: int = 0
    blocks: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Seen | None:
        """What `save` wrote into `folder`; None when nothing did."""
        try:
            return cls(**json.loads((folder / _FILE).read_text()))
        except FileNotFoundError:
            return None

    def save(self, folder: Path) -> None:
        """Replaces the file in `folder`. It is on the disk when this returns."""
        new = folder / f"{_FILE}.new"
        with open(new, "w") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, folder / _FILE)

    def add(self, quantizer: str, value: float) -> None:
        """Takes the larger of `value` and what is known; what is no number stays seen."""
        self.largest[quantizer] = float(np.maximum(self.largest.get(quantizer, 0.0), value))
