"""The callback of an evaluation: it loads the adapter, if there is one, and writes what a validation found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nano3.checkpoints.adapter_checkpoint import load_adapter
from nano3.checkpoints.base_identity import recorded_sha256
from nano3.cli import UserError
from nano3.documents import read_json
from nano3.outputs import fresh_file
from nano3.sealed_folder import check_seal

NOT_IN_THE_MODEL = ("dropout", "plus_ratio")
"""Facts of `lora.json` that decide how an adapter was trained, and not what it computes."""

UNRECORDED: dict[str, Any] = {"mark": []}
"""What adapters are that say nothing of it: those of versions that did not know it."""


class Evaluation(pl.Callback):
    """Loads `adapter` before the first batch and writes `results`, JSON, after the last.

    Args:
        results: the file to write.
        adapter: an adapter folder, or None for the base alone.
        base: NeMo checkpoint with the base weights.
        facts: what `lora.json` must say for the adapter to be the one that the model was built for.
    """

    def __init__(self, results: str, adapter: str | None, base: str, facts: dict[str, Any]) -> None:
        self.results, self.adapter, self.base, self.facts = Path(results), adapter, Path(base), facts
        self.loaded = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses another adapter than the settings describe, before any weight is read."""
        del pl_module, stage
        trainer.validate_loop.verbose = False  # a table of the same numbers
        if self.adapter is not None:
            if trainer.is_global_zero:  # one rank reads it for all
                check_seal(Path(self.adapter), required=True)
            info = read_json(Path(self.adapter) / "lora.json", dict[str, Any], "copy the adapter again")
            refuse_other_adapter(self.adapter, info, {**self.facts, "base_sha256": recorded_sha256(self.base)})

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        # Not earlier: NeMo adds the adapters when the epoch starts, and then they are still in training mode.
        if self.loaded:
            return
        if self.adapter is not None:
            load_adapter(pl_module, Path(self.adapter))
        trainer.model.eval()  # type: ignore[union-attr]
        self.loaded = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        del pl_module
        if trainer.is_global_zero:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
            facts = {"adapter": self.adapter, "validation": data.validation, "packs": data.validation_packs}
            with fresh_file(self.results) as temporary:
                temporary.write_text(json.dumps({**facts, **numbers}, indent=1) + "\n")


def refuse_other_adapter(folder: str, info: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises `UserError` naming what `lora.json` says otherwise than the model that was built."""
    info = UNRECORDED | info
    differences = [
        f"{name} is {info.get(name)!r} there and {value!r} here"
        for name, value in wanted.items()
        if name not in NOT_IN_THE_MODEL and info.get(name) != value
    ]
    if differences:
        raise UserError(
            f"the adapter {folder} does not fit: {'; '.join(text[:200] for text in differences)}. "
            "Give the base and the key=value settings that it was trained with"
        )
