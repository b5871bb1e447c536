"""Training that begins with an adapter from elsewhere: an earlier run's, or one imported from Hugging Face PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nano3.checkpoints.adapter_checkpoint import load_adapter
from nano3.checkpoints.base_identity import recorded_sha256
from nano3.documents import read_json
from nano3.sealed_folder import check_seal
from nano3.training.evaluation import refuse_other_adapter


class InitialAdapter(pl.Callback):
    """Fills the adapters before the first step of a run; a run that goes on has its checkpoint's.

    The optimizer starts fresh. Under BF16 its FP32 masters start from the values rounded to BF16, as those of a fresh
    adapter do.

    Args:
        folder: an adapter folder, of any parallel layout.
        facts: what `lora.json` must say for the adapter to be one that the model was built for.
        base: NeMo checkpoint with the base weights.
    """

    def __init__(self, folder: str, facts: dict[str, Any], base: str) -> None:
        self.folder, self.facts, self.base = Path(folder), facts, Path(base)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses a damaged adapter, or another than the settings describe, before any weight is read."""
        del pl_module, stage
        if trainer.is_global_zero:  # one rank reads it for all
            check_seal(self.folder, required=True)
        info = read_json(self.folder / "lora.json", dict[str, Any], "copy the adapter again")
        refuse_other_adapter(str(self.folder), info, {**self.facts, "base_sha256": recorded_sha256(self.base)})

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        # Not earlier: only now NeMo has made the adapters and the optimizer.
        if trainer.global_step > 0:
            return
        load_adapter(pl_module, self.folder)
        for optimizer in trainer.optimizers:
            mcore = optimizer.mcore_optimizer  # type: ignore[attr-defined]
            for part in getattr(mcore, "chained_optimizers", [mcore]):
                if not getattr(part, "is_stub_optimizer", False):  # no parameter of its kind on this rank
                    part.reload_model_params()
        if trainer.is_global_zero:
            print(f"training starts from the adapter {self.folder}", flush=True)
