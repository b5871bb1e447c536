"""The folder of a run of recipes/qwen3_qlora.py: what makes it the same run, its checkpoint, its best adapter.

    OUT/run.json        the run; the hashes of base and stores, and all numbers, make another attempt the same run
    OUT/metrics.jsonl   one row a step
    OUT/checkpoint/     adapter, optimizer, random numbers, how far it is
    OUT/adapter/        PEFT's form, of the best validation

A killed run leaves the checkpoint of its last validation. The same command resumes from it, bit for bit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typing_extensions import TypedDict

from conversion.adapters.trained_json import TRAINED
from conversion.identity import model_sha256
from nano3.cli import UserError
from nano3.documents import Count, Name, NotNegative, as_json, read_json
from nano3.file_digests import file_sha256
from nano3.outputs import alone, claim, fresh_file, fresh_output, put_back
from nano3.sealed_folder import check_seal
from nano3.token_store import MANIFEST
from nano3.training.journal import Journal, Row

KIND, RUN, CHECKPOINT, ADAPTER = "qlora-run", "run.json", "checkpoint", "adapter"
_STATE, _PROGRESS = "state.safetensors", "progress.json"
_REMEDY = "remove the run's folder and begin again"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter."""


class RunFile(TypedDict):
    """What a resumed run needs of run.json."""

    identity: dict[Name, Any]


class ProgressFile(TypedDict):
    """progress.json."""

    step: Count
    best: NotNegative | None
    best_step: Count
    since: Count


@dataclass
class Progress:
    """Steps taken, the lowest validation loss (None: no validation yet) and its step, validations since then."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    since: int = 0


class PlainRun:
    """A run in its folder; `open_run` makes one.

    Args:
        out: the folder.
        trained_on: what the adapter is to say of itself (`conversion.adapters.trained_json.Trained`).
    """

    def __init__(self, out: Path, trained_on: dict[str, Any]) -> None:
        self.out, self.trained_on = out, trained_on
        self.progress = Progress()
        self.journal = Journal(out, ())

    def resume(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Brings model, optimizer, random numbers and metrics to where the checkpoint is; to the start without one.

        Raises `UserError` for a damaged checkpoint.
        """
        folder = self.out / CHECKPOINT
        for place in (folder, self.out / ADAPTER):
            put_back(place)
        if folder.exists():
            check_seal(folder, required=True)
            self.progress = Progress(**read_json(folder / _PROGRESS, ProgressFile, _REMEDY))
            try:
                _restore(load_file(folder / _STATE), model, optimizer)
            except (SafetensorError, KeyError, RuntimeError) as error:
                raise UserError(f"{folder / _STATE} is no checkpoint of this run ({error}); {_REMEDY}") from error
            print(f"resuming after step {self.progress.step}", flush=True)
        self.journal.open(self.progress.step)

    def report(self, row: Row) -> None:
        """One step's numbers, to metrics.jsonl and to the terminal."""
        self.journal.write(row)
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)

    def keep(self, model: Any, optimizer: torch.optim.Optimizer, step: int, loss: float | None) -> None:
        """After `step` steps: the adapter, if `loss` is the lowest validation loss so far (or there is none), then
        everything that resuming needs. A kill between the two repeats the steps that lead to that adapter."""
        best = self.progress.best
        if loss is None or best is None or loss < best:
            self.progress = Progress(step, loss, step, 0)
            with fresh_output(self.out / ADAPTER, "peft-adapter") as folder:
                model.save_pretrained(folder)
                (folder / TRAINED).write_text(json.dumps({**self.trained_on, "steps": step}, indent=1) + "\n")
        else:
            self.progress = Progress(step, best, self.progress.best_step, self.progress.since + 1)
        with fresh_output(self.out / CHECKPOINT, "qlora-checkpoint") as folder:
            save_file(_state(model, optimizer), folder / _STATE)
            (folder / _PROGRESS).write_text(json.dumps(asdict(self.progress)) + "\n")


def described(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """What run.json says of the command line of the recipe, and what its adapter says of itself.

    Raises `UserError` for a number that means nothing, a model without weights, and a store that is none.
    """
    for name in ("seq_length", "batch", "epochs", "rank", "validate_every", "patience"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0")
    paths = {name: value for name, value in vars(args).items() if isinstance(value, Path)}
    numbers = {name: value for name, value in vars(args).items() if name not in (*paths, "validation")}
    stores = {name: paths[name] / MANIFEST for name in ("data", "validation") if name in paths}
    for store in stores.values():
        if not store.is_file():
            raise UserError(f"{store.parent} is no token store; make one with data_prep/prepare.py")
    base = model_sha256(args.model)
    contents: dict[str, Any] = {name: file_sha256(store) for name, store in stores.items()}
    identity = {**numbers, "model": base, **contents}
    run = {**{name: str(path) for name, path in paths.items()}, "settings": _settings(args), "identity": identity}
    return run, {"base_sha256": base, "base_quantization": None if args.lora else "nf4"}


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The numbers by the names that the other recipes have for them: certificates and cards tell them."""
    lengths = {"seq_length": args.seq_length, "global_batch": args.batch, "epochs": args.epochs}
    train = {**lengths, "lr": args.lr, "schedule": "cosine", "seed": args.seed}
    lora = {"rank": args.rank, "alpha": 2 * args.rank, "dropout": args.dropout}
    return {"train": train, "lora": lora | {"base": "original" if args.lora else "nf4"}}


@contextmanager
def open_run(out: Path, run: dict[str, Any], trained_on: dict[str, Any]) -> Iterator[PlainRun]:
    """The run in the folder `out`, which nobody else writes meanwhile. `run` is what run.json says; its `identity` is
    what must be equal for a run to be resumed.

    Raises `UserError` where `out` holds something else, or another run.
    """
    claim(out, KIND)
    with alone(out, f"another run is writing to {out}; wait for it, or choose another --out"):
        file, run = out / RUN, as_json(run)
        if file.exists():
            recorded = read_json(file, RunFile, _REMEDY)["identity"]
            names = sorted(name for name in recorded.keys() | run["identity"].keys())
            other = [name for name in names if recorded.get(name) != run["identity"].get(name)]
            if other:
                what = "; ".join(f"{n} was {recorded.get(n)!r} and is {run['identity'].get(n)!r}" for n in other)
                raise UserError(f"{out} holds another run: {what}. Run with what it was, or choose another --out")
        with fresh_file(file) as temporary:
            temporary.write_text(json.dumps(run, indent=1) + "\n")
        yield PlainRun(out, trained_on)


def _state(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Trained parameters, what the optimizer keeps of each, and the states of the random numbers."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in _trained(model).items():
        tensors[f"value.{name}"] = parameter.detach()
        tensors |= {f"{kind}.{name}": optimizer.state[parameter][kind] for kind in _MOMENTS}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _restore(tensors: dict[str, torch.Tensor], model: Any, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for name, parameter in _trained(model).items():
            parameter.copy_(tensors[f"value.{name}"])
            moments = {kind: tensors[f"{kind}.{name}"] for kind in _MOMENTS}
            # AdamW counts steps on the CPU and keeps the moments where the parameter is.
            moments |= {kind: moments[kind].to(parameter.device) for kind in _MOMENTS[1:]}
            optimizer.state[parameter] = moments
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def _trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
