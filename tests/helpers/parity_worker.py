"""One rank of a layout comparison: the real recipe for one step, its adapter's gradients written as an adapter.

Started by tests/nano3/test_parity.py: python -m tests.helpers.parity_worker RUN.json INITIAL GRADIENTS
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

from finetune.settings import Run  # noqa: E402


class Probe(pl.Callback):
    """Starts from a given adapter with B not zero, and saves gradients in place of the trained adapter."""

    def __init__(self, initial: str, gradients: str, lr: float, plus_ratio: float) -> None:
        self.initial, self.gradients, self.lr, self.plus_ratio = Path(initial), Path(gradients), lr, plus_ratio
        self.before: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        # Not earlier: NeMo adds the adapters and makes the optimizer when the first epoch starts.
        from megatron.core import dist_checkpointing

        from nano3.checkpoints.adapter_checkpoint import adapter_state, save_adapter

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
        self.before = {name: parameter.detach().clone() for name, parameter in self._adapters(pl_module)}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        from nano3.checkpoints.adapter_checkpoint import save_adapter

        if "FAULT" not in os.environ:
            check_replicas(pl_module)
            self._check_rates(pl_module)

        del trainer

        with torch.no_grad():
            for _, parameter in self._adapters(pl_module):
                parameter.copy_(parameter.main_grad)
        save_adapter(pl_module, self.gradients, {})

    def _check_rates(self, pl_module: Any) -> None:
        """Adam's first update is the learning rate (here without decay): LoRA+ multiplies that of every B."""
        for name, parameter in self._adapters(pl_module):
            moved = float((parameter.detach() - self.before[name]).abs().max())
            expected = self.lr * (self.plus_ratio if ".linear_out." in name else 1)
            assert abs(moved / expected - 1) < 1e-2, (name, moved, expected)

    @staticmethod
    def _adapters(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in module.named_parameters() if ".adapter." in name]


def check_replicas(module: torch.nn.Module) -> None:
    """Adapters of routed experts are whole on every rank of a pipeline stage: equal bit for bit after the update."""
    from megatron.core import parallel_state

    from nano3.lora.expert_adapters import SharedExpertsAdapter

    mine = [p.detach() for m in module.modules() if isinstance(m, SharedExpertsAdapter) for p in m.parameters()]
    for group in (parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()):
        for parameter in mine:
            everyone = [torch.empty_like(parameter) for _ in range(group.size())]
            torch.distributed.all_gather(everyone, parameter.contiguous(), group=group)
            assert all(torch.equal(other, parameter) for other in everyone)


def check_the_gpu_recipe(run: Run) -> None:
    """The same recipe for GPUs: BF16 from the first allocation on, distributed optimizer, FP32 gradients."""
    import dataclasses

    import fiddle
    from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides

    from finetune.configuration import lora_recipe
    from nano3.arch import Arch
    from nano3.model import nano3_config

    recipe = lora_recipe(dataclasses.replace(run, cpu=False))
    config = nano3_config(Arch.load(run.model), 64, bf16=True)
    update_config_with_dtype_overrides(fiddle.build(recipe.trainer.plugins).dtype_config, config)
    assert config.bf16, config
    assert config.params_dtype == torch.bfloat16
    assert recipe.trainer.strategy.ddp.use_distributed_optimizer
    assert recipe.trainer.strategy.ddp.grad_reduce_in_fp32
    assert recipe.optim.config.use_distributed_optimizer
    assert recipe.trainer.accelerator == "gpu"


def forget_a_reduction() -> None:
    """A fault that users have met: gradients of shared adapters that stay on their expert-parallel rank."""
    from nano3.lora import lora

    make = lora.SharedExpertsAdapter.__init__

    def init(self: Any, *args: Any) -> None:
        make(self, *args)
        for parameter in self.parameters():
            parameter.allreduce = False

    lora.SharedExpertsAdapter.__init__ = init


def detach_an_adapter() -> None:
    """A fault that no error reports: the adapters of out_proj are computed outside the graph."""
    from nano3.lora import lora

    add_to = lora.DenseAdapter.add_to

    def detached(self: Any, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if not self.base_linear_name.endswith("out_proj"):
            return add_to(self, out, x)
        return out + add_to(self, torch.zeros_like(out), x).detach()

    lora.DenseAdapter.add_to = detached


def main() -> None:
    import fiddle
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    from finetune.configuration import lora_recipe

    {"reduction": forget_a_reduction, "detach": detach_an_adapter, "none": lambda: None}[
        os.environ.get("FAULT", "none")
    ]()
    run = Run.from_json(Path(sys.argv[1]).read_text())
    recipe = lora_recipe(run)
    check_the_gpu_recipe(run)
    sent = Path(sys.argv[1]).with_suffix(".recipe")
    if sent.exists():  # written by another process: NeMo-Run's serialization must survive the trip
        assert ZlibJSONSerializer().deserialize(sent.read_text()) == recipe, "the rebuilt recipe differs"
    else:
        for other in Path(sys.argv[1]).parent.glob("*.json"):
            text = ZlibJSONSerializer().serialize(lora_recipe(Run.from_json(other.read_text())))
            other.with_suffix(".recipe").write_text(text)
    rates = {"lr": run.settings.train.lr, "plus_ratio": run.settings.lora.plus_ratio}
    probe = nemo_run.Config(Probe, initial=sys.argv[2], gradients=sys.argv[3], **rates)
    recipe.trainer.callbacks.insert(0, probe)
    fiddle.build(recipe)()


if __name__ == "__main__":
    main()
