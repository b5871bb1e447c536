"""The stages from questions to a scored model and its FP8 checkpoint, each as command lines that a user would type.

`launch/pipeline.py` runs them. Nothing of the other packages is imported: a stage is python's arguments.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launch.chain.shards import Shards
from launch.plan.plan_settings import Plan
from nano3.arch import Arch, is_nemo_checkpoint, resolve_model
from nano3.cli import UserError
from nano3.overrides import apply_overrides

NAMES = ("prepare", "import", "train", "merge", "quantize", "evaluate")
EXTENDABLE = ("prepare", "merge", "quantize", "evaluate")
"""Stages whose script takes more flags than paths; those of training are key=value."""
TRAIN = "train"
DEQUANTIZED = "--base dequantized"
"""The merge's flag for an adapter of a base in 4 bits."""
RECIPE = "recipes/nemotron_lora.py"
"""The recipe that trains unless another is given."""
_PLANNED = ("layout.", "train.seq_length=", "train.pad_multiple=", "lora.base=")
"""The recipe's settings on which the other stages depend: the packs of its data, and whether a base is imported."""


@dataclass(frozen=True)
class Stage:
    """One step of the chain."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    """Python's arguments, run one after the other; the first failure ends the stage."""
    output: Path
    """There once the stage is finished."""
    inputs: tuple[Path, ...] = ()
    """The user's own files that it reads; the rest are outputs of stages before."""
    gpu: bool = False
    """Whether it goes to a node with GPUs."""
    shards: Shards | None = None
    """An array that must have ended before, each element of which writes a share of what the commands join."""


@dataclass(frozen=True)
class Chain:
    """What is to be made of what. Raises `UserError` for inputs that are not there."""

    model: Path
    """Hugging Face folder of the base."""
    inputs: tuple[Path, ...]
    """Chat JSONL to train on."""
    questions: Path
    """Chat JSONL to score."""
    out: Path
    settings: tuple[str, ...] = ()
    """The recipe's key=value."""
    resources: tuple[str, ...] = ()
    """The recipe's flags that say where it runs, such as --local --ranks 2."""
    script: str = RECIPE
    """The recipe's file, from this repository's folder or absolute."""
    asked: tuple[str, ...] = ()
    """What the recipe said of its settings, as key=value: its own defaults with everything that was given."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """More flags by stage, one string each."""
    shards: int = 0
    """Elements of an array that prepares the data; 0 for one process."""
    at_once: int = 0
    """Most of them at the same time; 0 leaves it to Slurm."""

    def __post_init__(self) -> None:
        for path in (*self.inputs, self.questions):
            if not path.is_file():
                raise UserError(f"{path} is not there; give chat JSONL, one conversation a line")
        if is_nemo_checkpoint(self.model):
            raise UserError(f"{self.model} is a NeMo checkpoint; the merge requires the Hugging Face folder: give that")
        wrong = [name for name in self.extra if name not in EXTENDABLE]
        if wrong:
            raise UserError(f"--with {wrong[0]}=...: only {', '.join(EXTENDABLE)} take more flags")
        if "quantize" in self.extra and not self.quantizes:
            raise UserError(
                f"--with quantize=...: {self.model} is dense, and no FP8 selection of it is known; remove it"
            )
        self._check_merge()

    def _check_merge(self) -> None:
        """Raises `UserError` for flags of the merge other than which weights it is onto."""
        flags = shlex.join(self._more("merge"))
        if flags not in ("", "--base original", DEQUANTIZED):
            raise UserError(f"--with merge={flags!r}: write {DEQUANTIZED!r} or leave it out")
        if flags == DEQUANTIZED and self.asked and not self.plan.nf4:
            raise UserError(f"--with merge={flags!r} is of a base in 4 bits: give lora.base=nf4, or leave it out")

    @property
    def quantizes(self) -> bool:
        """Whether the published FP8 recipe is one of this model: it is of those with experts."""
        return bool(Arch.load(self.model).moe_layers)

    @property
    def plan(self) -> Plan:
        """Layout, packs and base of the settings; the recipe itself checks the others."""
        plan = Plan()
        for settings in (self.asked, self.settings):
            apply_overrides(plan, [item for item in settings if item.startswith(_PLANNED)])
        return plan

    def recipe(self, stored: bool = True) -> tuple[str, ...]:
        """The training's command line; without `stored` it names no store, which need not be there then."""
        paths = ["--model", self.model, *self._base(), "--out", self.out / "lora"]
        paths += ["--data", self.out / "data"] if stored else []
        return (self.script, *map(str, paths), *self.resources, *self.settings)

    def _base(self) -> tuple[str | Path, ...]:
        """What the recipe is told of an imported base. With lora.base=nf4 its ranks read the Hugging Face folder."""
        return () if self.plan.nf4 else ("--base", self.out / "base")

    def stages(self) -> tuple[Stage, ...]:
        """All of them, in order: `import` unless the base is in NF4, `quantize` where FP8 has a published recipe."""
        out, model = self.out, str(self.model)
        own = () if self.script == RECIPE else (Path(self.script),)
        merged, scored = str(out / "merged"), out / "scores.json"
        fp8 = (self._score(str(out / "fp8"), out / "scores-fp8.json"),) if self.quantizes else ()
        return (
            self._prepare(),
            *(() if self.plan.nf4 else (self._import(),)),
            Stage(TRAIN, (self.recipe(),), out / "lora" / "adapter", own, gpu=True),
            self._merge(merged),
            *((self._quantize(merged),) if self.quantizes else ()),
            Stage(
                "evaluate",
                (self._score(model, out / "scores-base.json"), self._score(merged, scored), *fp8),
                scored,
                gpu=True,
            ),
        )

    def _prepare(self) -> Stage:
        """No training question is a held-out one, or near to it; then tokens and packs of the run's length."""
        plan = self.plan
        overlap = tuple(("data_prep/check_overlap.py", str(path), str(self.questions)) for path in self.inputs)
        given = [word for path in self.inputs for word in ("--input", str(path))]
        command = ["data_prep/prepare.py", *given, "--tokenizer", str(self.model), "--out", str(self.out / "data")]
        command += ["--seq-length", str(plan.train.seq_length)]
        multiple = plan.document_multiple
        command += ["--pad-multiple", str(multiple)] if multiple > 1 else []
        prepare = (*command, *self._more("prepare"))
        inputs, output = (*self.inputs, self.questions), self.out / "data"
        if not self.shards:
            return Stage("prepare", (*overlap, prepare), output, inputs)
        shards = Shards(prepare, output, self.shards, self.at_once).fitted()
        return Stage("prepare", (*overlap, (*prepare, "--join")), output, inputs, shards=shards)

    def _import(self) -> Stage:
        """The NeMo checkpoint of the base."""
        base = self.out / "base"
        command = ("conversion/hf_to_nemo.py", str(self.model), str(base), "--no-context")
        return Stage("import", (command,), base, (self.model / "config.json",))

    def _merge(self, merged: str) -> Stage:
        """The Hugging Face folder with the adapter in it, and its certificate verified."""
        model, adapter = str(self.model), str(self.out / "lora" / "adapter")
        command = ("conversion/merge_lora.py", model, adapter, merged, *self._more("merge"))
        verified = ("conversion/certify.py", "verify", merged, "--against", model)
        return Stage("merge", (command, verified), Path(merged))

    def _quantize(self, merged: str) -> Stage:
        """The FP8 checkpoint of the merged model, calibrated on the training's data, and how its readers see it."""
        fp8 = self.out / "fp8"
        command = ["conversion/quantize_fp8.py", merged, str(fp8), "--calibration", str(self.out / "data")]
        checked = ("conversion/lint_export.py", str(fp8))
        return Stage("quantize", ((*command, *self._more("quantize")), checked), fp8)

    def _score(self, model: str, result: Path) -> tuple[str, ...]:
        command = ("evaluation/evaluate.py", model, "--questions", str(self.questions), "--out", str(result))
        return (*command, *self._more("evaluate"))

    def _more(self, name: str) -> list[str]:
        return shlex.split(self.extra.get(name, ""))


def recipe_script(name: str, root: Path) -> str:
    """The file of a recipe that is given as FILE.py or as `module[:function]`, such as recipes.nemotron_lora.

    Returns a path from `root`, the repository, or an absolute one for a file elsewhere. Raises `UserError` for none.
    """
    module, _, _ = name.partition(":")
    file = (Path(module) if module.endswith(".py") else root.joinpath(*module.split(".")).with_suffix(".py")).resolve()
    if not file.is_file():
        raise UserError(f"--recipe {name}: there is no {file}; give a recipe's FILE.py, or module:function")
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def model_folder(name: str) -> Path:
    """The Hugging Face folder of a preset or path, whole."""
    return resolve_model(name).resolve()
