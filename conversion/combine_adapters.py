"""Makes one LoRA adapter of bounded rank from several of the same base. No GPU, no model in memory.

    python conversion/combine_adapters.py BASE OUT ADAPTER ADAPTER ... [--rank 32] [--weights 1,0.5]
    python conversion/combine_adapters.py BASE OUT ADAPTER ADAPTER --method ties --density 0.2

The result is the adapter of rank R that is nearest to the weighted sum of what the adapters add to the model, layer by
layer: exact when the ranks of a layer sum up to R at most. Each layer's error is printed. `ties` keeps the share
`--density` of each adapter's elements, the largest, and averages those that agree in sign; `dare` keeps random ones and
scales them up; `dare-ties` does both. ADAPTER is a folder that training wrote, or one of Hugging Face PEFT. OUT is an
adapter as any other: it merges, exports, and training goes on from it with lora.init_from=OUT. Its lora.json names all
parents with their hashes, and so does the certificate of its merge.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
    from nano3.outputs import check_output
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from conversion.adapters.adapter_folder import Adapter
from conversion.adapters.adapter_writer import KIND, write_adapter
from conversion.adapters.combination import METHODS, Combined, Rule, combine, relative_error, seed_for
from conversion.adapters.lora_json import describe
from conversion.adapters.peft_names import parts
from conversion.certificates.certificate import folder_sha256
from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.output_folder import progress, refuse_overlap
from conversion.checkpoint.pieces import in_parallel
from conversion.identity import remembered_hash
from nano3.arch import resolve_model
from nano3.targets import is_routed
from nano3.tensor_names import Linear, adaptable, adapter_key, adapter_shapes


@dataclass(frozen=True)
class Report:
    """What a combination did: its rank, and by module the sum of the parents' ranks and the relative error."""

    rank: int
    modules: dict[str, tuple[int, float]]

    @property
    def largest_error(self) -> float:
        """Of all modules, Frobenius norm over Frobenius norm."""
        return max(error for _, error in self.modules.values())

    def __str__(self) -> str:
        width = max(map(len, self.modules))
        lines = [f"{'module':{width}}  ranks in  error of rank {self.rank}"]
        lines += [f"{path:{width}}  {ranks:8}  {error:.2e}" for path, (ranks, error) in self.modules.items()]
        return "\n".join(lines)


class _Result:
    """The combined adapter of `adapters`, module by module."""

    def __init__(self, adapters: Sequence[Adapter], weights: Sequence[float], rank: int, rule: Rule) -> None:
        self.adapters, self.weights, self.rule = adapters, weights, rule
        self.arch = adapters[0].arch
        self.linears = adaptable(self.arch)
        self.modules = {
            path: [number for number, adapter in enumerate(adapters) if path in adapter.sizes]
            for path in self.linears
            if any(path in adapter.sizes for adapter in adapters)
        }
        """Path -> numbers of the adapters that have it. The others add nothing there."""
        self.ranks = {
            path: sum(adapters[number].sizes[path].rank for number in numbers) for path, numbers in self.modules.items()
        }
        # A sum has no more than the sum of the ranks: columns beyond it would be zero in every module.
        self.rank = min(rank, max(self.ranks.values())) if rule.method == "sum" else rank
        kinds = {adapter.info.experts for adapter in adapters if any(map(is_routed, adapter.sizes))}
        self.experts: Literal["shared", "each", "none"] = "each" if "each" in kinds else "shared" if kinds else "none"

    def module(self, path: str) -> tuple[dict[str, torch.Tensor], float]:
        """The tensors of a module by their keys, and its relative error."""
        linear = self.linears[path]
        each = self.experts == "each" and linear.experts > 0
        made = [self._matrix(path, linear, expert) for expert in range(linear.experts if each else 1)]
        low, high = torch.stack([one.low for one in made]), torch.stack([one.high for one in made])
        first, *sections = adapter_shapes(linear, self.rank, each, dora=False).items()
        rows = high.split([shape[-2] for _, shape in sections], dim=1)
        values = {first[0]: low} | {name: part for (name, _), part in zip(sections, rows, strict=True)}
        tensors = {
            adapter_key(path, linear, name): (value if each else value[0]).contiguous()
            for name, value in values.items()
        }
        return tensors, relative_error(made)

    def _matrix(self, path: str, linear: Linear, expert: int) -> Combined:
        """One adapter for a module, or for one of its routed experts."""
        pairs, weights = [], []
        for number in self.modules[path]:
            adapter = self.adapters[number]
            low, high, _ = adapter.factors(path, expert)
            pairs.append((low, adapter.sizes[path].scale * high))
            weights.append(self.weights[number])
        rule = replace(self.rule, seed=seed_for(self.rule.seed, f"{path} {expert}"))
        matrices = [((0, linear.rows),)] if linear.experts else [part.spans for part in parts(linear)]
        return combine(pairs, weights, self.rank, rule, matrices)


def combine_adapters(
    base: Path, out: Path, parents: Sequence[Path], weights: Sequence[float], rank: int, rule: Rule
) -> Report:
    """Writes the adapter that is nearest to the combination of `parents`, adapters of the model `base`.

    Args:
        base: Hugging Face folder.
        out: adapter folder to write.
        parents: adapter folders, ours or PEFT's.
        weights: one for each parent.
        rank: the largest rank of the result. All its layers have the same.
        rule: how the deltas become one.

    Raises:
        UserError: before anything is written.
    """
    refuse_overlap(out, base, *parents)
    check_output(out, KIND)
    # Every parent fits the base and is of a kind that adds up.
    with HFFolder(base) as hf:
        sha256 = remembered_hash(base)
        adapters = [_parent(folder, hf, sha256) for folder in parents]
        routers = adapters[0].routers_sha256(hf.rows)
        config = hf.config
    result = _Result(adapters, weights, rank, rule)
    tensors, report = _tensors(result)
    # lora.json says what it is, of which base, and who its parents are.
    sizes = {path: (result.rank, float(result.rank)) for path in result.modules}
    info = replace(
        describe(result.arch, sizes, rslora=False, dora=False),
        experts=result.experts,
        base_config=config,
        base_sha256=sha256,
        router_sha256=routers,
        combined=_descent(result, report),
    )
    write_adapter(out, tensors, {"format": 2, **asdict(info)})
    return report


def _parent(folder: Path, hf: HFFolder, sha256: str) -> Adapter:
    """Opens a parent. Raises `UserError` for one of another base, and for one that is more than added products."""
    adapter = Adapter(folder, hf.arch)
    adapter.info.refuse_gate(folder, "a combination")
    adapter.check_base(hf.rows)
    adapter.info.refuse_other_base(hf.path, sha256, folder)
    wrong = {
        "DoRA, whose lengths do not add up": adapter.info.dora,
        "router=balance: its correction biases moved with it, and biases of two trainings do not add up": (
            adapter.info.router == "balance"
        ),
    }
    for what, holds in wrong.items():
        if holds:
            raise UserError(
                f"adapter {folder} is {what}; merge it into the base (conversion/merge_lora.py) and tune from that"
            )
    return adapter


def _tensors(result: _Result) -> tuple[dict[str, torch.Tensor], Report]:
    """All tensors of the result by their keys, and the errors in the order of the model."""
    tensors: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}

    def do(path: str) -> None:
        made, errors[path] = result.module(path)
        tensors.update(made)
        bar.update(sum(tensor.nbytes for tensor in made.values()))

    total = sum(
        4 * math.prod(shape)
        for path in result.modules
        for shape in adapter_shapes(result.linears[path], result.rank, result.experts == "each", dora=False).values()
    )
    with progress(total, "combine") as bar:
        in_parallel(result.modules, do)
    return tensors, Report(result.rank, {path: (result.ranks[path], errors[path]) for path in result.modules})


def _descent(result: _Result, report: Report) -> dict[str, Any]:
    """What lora.json and the certificate of a merge say of the parents."""
    parents = [
        {
            "name": adapter.folder.resolve().name,
            "sha256": folder_sha256(adapter.folder),
            "weight": weight,
            "combined": adapter.info.combined,
        }
        for adapter, weight in zip(result.adapters, result.weights, strict=True)
    ]
    return {**asdict(result.rule), "largest_error": report.largest_error, "parents": parents}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("base", metavar="BASE", help="the model that all were tuned from: folder, or a preset as pico")
    parse.add_argument("out", metavar="OUT", type=Path, help="adapter folder to write")
    parse.add_argument("adapters", metavar="ADAPTER", type=Path, nargs="+", help="adapter folder, ours or PEFT's")
    parse.add_argument("--rank", type=int, default=32, help="largest rank of the result (default: 32)")
    parse.add_argument("--weights", metavar="W,W", help="one for each adapter (default: 1 each, the sum)")
    parse.add_argument("--method", choices=METHODS, default="sum", help="how they become one (default: sum)")
    parse.add_argument("--density", type=float, help="share of elements that ties and dare keep, such as 0.2")
    parse.add_argument("--seed", type=int, help="for the random elements of dare (default: 0)")
    return parse


def _weights(text: str | None, count: int) -> list[float]:
    """The weights of `--weights`. Raises `UserError` for other than `count` numbers that are not 0."""
    try:
        weights = [float(word) for word in text.split(",")] if text else [1.0] * count
    except ValueError:
        weights = []
    if len(weights) != count or not all(math.isfinite(weight) and weight for weight in weights):
        raise UserError(f"--weights {text}: give {count} numbers other than 0, one for each adapter, such as 1,0.5")
    return weights


def _rule(method: Any, density: float | None, seed: int | None) -> Rule:
    """The rule of the command line. Raises `UserError` for an option that its method has not, or that it requires."""
    if method == "sum" and density is not None:
        raise UserError("--density is for --method ties and dare; leave it out, or choose one of them")
    if method != "sum" and (density is None or not 0 < density <= 1):
        raise UserError(f"--method {method} requires --density above 0 and at most 1, such as 0.2")
    if seed is not None and (not method.startswith("dare") or seed < 0):
        raise UserError("--seed is a whole number from 0 on, for --method dare and dare-ties")
    return Rule(method, 1.0 if density is None else density, seed or 0)


def main() -> int:
    args = parser().parse_args()
    if not 1 <= args.rank <= 1 << 16:
        raise UserError(f"--rank {args.rank}: give a whole number from 1 to 65536")
    weights, rule = _weights(args.weights, len(args.adapters)), _rule(args.method, args.density, args.seed)
    report = combine_adapters(resolve_model(args.base), args.out, args.adapters, weights, args.rank, rule)
    print(report)
    print(
        f"{args.out}: adapter of rank {report.rank} for {len(report.modules)} modules, from {len(args.adapters)} "
        f"adapters; largest error {report.largest_error:.2e} of a module's change"
    )
    return 0


if __name__ == "__main__":
    run(main)
