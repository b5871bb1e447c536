"""One rank of tests/nano3/test_variants.py: every kind of adapter on one rank, then on two in several layouts.

python -m tests.helpers.variants_worker FOLDER NAME,NAME,...   (two ranks; FOLDER/nemo has the base)

FOLDER/NAME/initial is the adapter that one rank starts from, handed on from layout to layout; FOLDER/NAME/fresh-LAYOUT
one as training starts it, FOLDER/NAME/LAYOUT its gradients, written as an adapter; FOLDER/results.json has the numbers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers.mcore_model import build  # first: it switches the CPU backend on

# isort: split

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, optimizer, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from safetensors.torch import save_file

from nano3 import compat
from nano3.arch import Arch
from nano3.checkpoints.adapter_checkpoint import adapter_state, save_adapter
from nano3.lora import adapters, expert_adapters
from nano3.lora.lora import Nano3LoRA
from nano3.lora.parameter_groups import is_b, is_magnitude
from nano3.targets import select
from tests.helpers.variants import FAULTS, LAYOUTS, VARIANTS, facts

LENGTHS = (7, 1, 12, 20)
PACKS = 2
LR, WEIGHT_DECAY = 1e-3, 0.5


class Bench:
    """One layout: its parallel groups, and the base weights to build models with."""

    def __init__(self, folder: Path, layout: str) -> None:
        self.folder, self.layout = folder, layout
        self.tp, self.ep = LAYOUTS.get(layout, (1, 1))
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.tp, expert_model_parallel_size=self.ep, expert_tensor_parallel_size=1
        )
        model_parallel_cuda_manual_seed(0)
        self.arch = Arch.load(folder / "hf")
        model = self._empty()
        state = dist_checkpointing.load(model.sharded_state_dict(prefix="module."), str(folder / "nemo" / "weights"))
        self.base = {key.removeprefix("module."): value for key, value in state.items()}

    def _empty(self) -> Any:
        model = build(self.arch, 128, torch.float32, tp=self.tp, ep=self.ep)
        model.config.calculate_per_token_loss = True
        return model

    def adapted(self, name: str, **changes: Any) -> Any:
        """The model with the adapters of a variant, as training starts them."""
        settings = VARIANTS[name]
        model = self._empty()
        model.load_state_dict(self.base)
        modules = select(self.arch, settings.chosen_targets(), settings.experts)
        chosen = {key: getattr(settings, key) for key in ("rank_pattern", "alpha_pattern", "rslora", "dora", "experts")}
        lora = Nano3LoRA(modules=modules, rank=settings.rank, alpha=settings.alpha, **chosen, **changes)
        return lora(model).train()

    def start(self, model: Any, initial: Path) -> None:
        """Fills the adapters from a folder, whatever layout wrote it."""
        state = dist_checkpointing.load(adapter_state(model), str(initial / "weights"))
        missing = model.load_state_dict({key.removeprefix("module."): v for key, v in state.items()}, strict=False)
        assert not missing.unexpected_keys, missing.unexpected_keys

    def close(self) -> None:
        parallel_state.destroy_model_parallel()


def packs() -> Iterator[dict[str, torch.Tensor]]:
    """The packs of this data-parallel rank."""
    generator = torch.Generator().manual_seed(1)
    for number in range(PACKS):
        tokens = torch.randint(0, 100, (1, sum(LENGTHS) + 1), generator=generator)
        mask = (torch.rand(1, sum(LENGTHS), generator=generator) < 0.7 - 0.4 * number).float()  # unequal packs
        if number % parallel_state.get_data_parallel_world_size() == parallel_state.get_data_parallel_rank():
            yield {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "mask": mask}


def run(model: Any, pack: dict[str, torch.Tensor], labels: bool) -> torch.Tensor:
    """Losses (1, s), or logits (1, s, vocabulary)."""
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    params = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS))
    return model(pack["tokens"], positions, None, labels=pack["labels"] if labels else None, packed_seq_params=params)


def randomize(model: Any) -> None:
    """A, B and lengths that matter, rows of padding too."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_magnitude(name, parameter):
                parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
            elif ".adapter." in name:
                parameter.normal_(0, 0.1, generator=generator)


def step(model: Any, ratio: float, gradients: Path) -> dict[str, float]:
    """One optimizer step as training makes it; writes the gradients, returns loss, norm and largest updates."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    config = OptimizerConfig(optimizer="adam", lr=LR, weight_decay=WEIGHT_DECAY, clip_grad=1e9)
    conditions = {"no_weight_decay_cond": is_magnitude, "scale_lr_cond": is_b, "lr_mult": ratio}
    updates = compat.with_conditions(optimizer.get_megatron_optimizer)(config, [ddp], **conditions)
    for group in updates.param_groups:
        group["lr"] = group["max_lr"]
        group["weight_decay"] *= group["wd_mult"]
    ddp.zero_grad_buffer()
    total, tokens = torch.zeros(()), torch.zeros((), dtype=torch.int)
    for pack in packs():
        loss = (run(ddp, pack, labels=True) * pack["mask"]).sum()
        loss.backward()
        total, tokens = total + loss.detach(), tokens + pack["mask"].sum().int()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    finalize_model_grads([ddp], tokens)  # sums the tokens of all ranks, too
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    _, norm, _ = updates.step()
    check_replicas(trained)
    moved = {name: float((parameter.detach() - before[name]).abs().max()) for name, parameter in trained.items()}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(parameter.main_grad)
    save_adapter(model, gradients, {})
    kinds = {"in": ".linear_in.", "out": ".linear_out.", "magnitude": ".adapter.magnitude"}
    largest = {kind: max([0.0, *(v for name, v in moved.items() if word in name)]) for kind, word in kinds.items()}
    return {"loss": float(total / tokens), "norm": float(norm), **{kind: value / LR for kind, value in largest.items()}}


def check_replicas(trained: dict[str, Any]) -> None:
    """After a step, ranks that hold the same values hold the same bits."""
    if "FAULT" in os.environ:
        return
    for name, parameter in trained.items():
        own = not getattr(parameter, "allreduce", True)
        groups = [parallel_state.get_expert_data_parallel_group() if own else parallel_state.get_data_parallel_group()]
        if not getattr(parameter, "tensor_model_parallel", False):
            groups.append(parallel_state.get_tensor_model_parallel_group())
        for group in groups:
            everyone = [torch.empty_like(parameter) for _ in range(group.size())]
            dist.all_gather(everyone, parameter.detach().contiguous(), group=group)
            assert all(torch.equal(other, parameter) for other in everyone), name


@contextmanager
def fault(name: str) -> Iterator[None]:
    """Breaks one thing."""
    os.environ["FAULT"] = name
    per_expert, over = dict(expert_adapters._PER_EXPERT), adapters.DenseAdapter.over_columns
    magnitude = globals()["is_magnitude"]
    if name == "mixed experts":
        expert_adapters._PER_EXPERT["allreduce"] = True
    elif name == "norm of one rank":
        expert_adapters._PER_EXPERT["tensor_model_parallel"] = False
    elif name == "length of a slice":
        adapters.DenseAdapter.over_columns = lambda _self, squares: squares  # type: ignore[method-assign]
    else:
        globals()["is_magnitude"] = nothing
    try:
        yield
    finally:
        del os.environ["FAULT"]
        expert_adapters._PER_EXPERT.update(per_expert)
        adapters.DenseAdapter.over_columns = over  # type: ignore[method-assign]
        globals()["is_magnitude"] = magnitude


def nothing(name: str, parameter: Any) -> bool:
    """A condition that holds for no parameter."""
    del name, parameter
    return False


def alone(folder: Path, names: list[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The reference: one rank, which also writes the adapters that the other layouts start from."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    bench, results, logits = Bench(folder, "one"), {}, {}
    pack = next(packs())
    logits["tokens"] = pack["tokens"][0]
    config = json.loads((folder / "hf" / "config.json").read_text())
    for name in names:
        model = bench.adapted(name)
        with torch.no_grad():
            plain = run(build_base(bench), pack, labels=False)
            fresh = run(model.eval(), pack, labels=False)
            save_adapter(model, folder / name / "fresh-one", {})
            randomize(model)
            save_adapter(model, folder / name / "initial", facts(VARIANTS[name], config))
            logits[name] = run(model, pack, labels=False)[0]
            dropped = bench.adapted(name, dropout=0.5)
            bench.start(dropped, folder / name / "initial")
            results[f"{name} dropout"] = [
                float((run(dropped.train(training), pack, labels=False)[0] - logits[name]).abs().max())
                for training in (False, True)
            ]
        results[f"{name} fresh"] = float((fresh - plain).abs().max())
        results[f"{name} one"] = step(model.train(), VARIANTS[name].plus_ratio, folder / name / "one")
    bench.close()
    dist.destroy_process_group()
    return results, logits


def build_base(bench: Bench) -> Any:
    model = bench._empty()
    model.load_state_dict(bench.base)
    return model.requires_grad_(False).eval()


def together(folder: Path, names: list[str]) -> dict[str, Any]:
    """The same on two ranks, layout after layout, and with the faults that belong to them.

    Each layout starts from the adapter as the one before it wrote it.
    """
    dist.init_process_group("gloo")
    results, last = {}, "initial"
    for layout in LAYOUTS:
        bench = Bench(folder, layout)
        for name in names:
            model = bench.adapted(name)
            save_adapter(model, folder / name / f"fresh-{layout}", {})
            bench.start(model, folder / name / last)
            save_adapter(model, folder / name / f"initial-{layout}", {})
            results[f"{name} {layout}"] = step(model, VARIANTS[name].plus_ratio, folder / name / layout)
        for broken, (name, where) in FAULTS.items():
            if where == layout and name in names:
                with fault(broken):
                    model = bench.adapted(name)
                    bench.start(model, folder / name / "initial")
                    results[broken] = step(model, VARIANTS[name].plus_ratio, folder / name / broken)
        bench.close()
        last = f"initial-{layout}"
    return results


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
    results: dict[str, Any] = {}
    if os.environ["RANK"] == "0":
        results, logits = alone(folder, names)
        save_file({name: value.contiguous() for name, value in logits.items()}, folder / "logits.safetensors")
    results |= together(folder, names)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results, indent=1))
    dist.barrier()


if __name__ == "__main__":
    main()
