"""One rank of a layout comparison: the real recipe for one step, its adapter's gradients written as an adapter.

Started by tests/test_parity.py: python -m tests.parity_worker RUN.json INITIAL GRADIENTS
Rank 0 of a one-rank run writes the random adapter INITIAL; every other run starts from it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from nano3 import cpu

cpu.enable()

import lightning.pytorch as pl  # noqa: E402
import nemo_run  # noqa: E402
import torch  # noqa: E402

from recipes.settings import Run  # noqa: E402


class Probe(pl.Callback):
    """Starts from a given adapter with B not zero, and saves gradients in place of the trained adapter."""

    def __init__(self, initial: str, gradients: str) -> None:
        self.initial, self.gradients = Path(initial), Path(gradients)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        # Not earlier: NeMo adds the adapters and makes the optimizer when the first epoch starts.
        from megatron.core import dist_checkpointing

        from nano3.adapter_checkpoint import adapter_state, save_adapter

        if not self.initial.exists():
            with torch.no_grad():
                for _, parameter in self._adapters(pl_module):
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
            save_adapter(pl_module, self.initial, {})
        state = dist_checkpointing.load(adapter_state(pl_module), str(self.initial / "weights"))
        (core,) = [m for m in pl_module.modules() if type(m).__name__ == "MambaModel"]
        missing = core.load_state_dict({k.removeprefix("module."): v for k, v in state.items()}, strict=False)
        assert not missing.unexpected_keys, missing.unexpected_keys
        trainer.optimizers[0].mcore_optimizer.reload_model_params()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        from nano3.adapter_checkpoint import save_adapter

        del trainer

        with torch.no_grad():
            for _, parameter in self._adapters(pl_module):
                parameter.copy_(parameter.main_grad)
        save_adapter(pl_module, self.gradients, {})

    @staticmethod
    def _adapters(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in module.named_parameters() if ".adapter." in name]


def forget_a_reduction() -> None:
    """A fault that users have met: gradients of shared adapters that stay on their expert-parallel rank."""
    from nano3 import lora

    make = lora.SharedExpertsAdapter.__init__

    def init(self: Any, *args: Any) -> None:
        make(self, *args)
        for parameter in self.parameters():
            parameter.allreduce = False

    lora.SharedExpertsAdapter.__init__ = init


def main() -> None:
    import fiddle
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    from recipes.lora_recipe import lora_recipe

    if os.environ.get("FAULT") == "reduction":
        forget_a_reduction()
    task = Run.from_json(Path(sys.argv[1]).read_text())
    recipe = lora_recipe(task)
    sent = Path(sys.argv[1]).with_suffix(".recipe")
    if sent.exists():  # written by another process: NeMo-Run's serialization must survive the trip
        assert ZlibJSONSerializer().deserialize(sent.read_text()) == recipe, "the rebuilt recipe differs"
    else:
        for other in Path(sys.argv[1]).parent.glob("*.json"):
            text = ZlibJSONSerializer().serialize(lora_recipe(Run.from_json(other.read_text())))
            other.with_suffix(".recipe").write_text(text)
    recipe.trainer.callbacks.insert(0, nemo_run.Config(Probe, initial=sys.argv[2], gradients=sys.argv[3]))
    fiddle.build(recipe)()


if __name__ == "__main__":
    main()
