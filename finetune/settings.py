"""Everything that a LoRA run can be told: the groups of `key=value`, their defaults and what they mean.

Imports neither torch nor NeMo, so that a wrong key or layout is refused at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from typing_extensions import TypedDict

from finetune.recipe_file import Recipe
from launch.plan.layout import Layout
from launch.plan.plan_settings import CheckpointPlan, TrainPlan
from nano3.arch import is_nemo_checkpoint
from nano3.cli import UserError
from nano3.documents import Count, Name, Positive, Sha256, Text, closed, parse_json
from nano3.overrides import apply_values, flatten, nested_keys
from nano3.ranges import MOST_STEPS, SEED_BITS, Range
from nano3.targets import LoraSettings


@dataclass
class TrainSettings(TrainPlan):
    """How long and how fast."""

    lr: Annotated[float, Range(0, 1, above=True)] = 1e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine to `min_lr`; or `lr`, and over the last `decay` steps 1 - sqrt to `min_lr`; or `lr`."""
    min_lr: Annotated[float, Range(0, 1)] = 0.0
    """Where cosine and wsd end: the rate that a step after the last would have."""
    warmup: Annotated[float, Range(0, MOST_STEPS)] = 0.1
    """Linear warm-up: a share of the steps below 1, or a number of steps from 1 on."""
    decay: Annotated[int, Range(0, MOST_STEPS)] = 0
    """Steps of wsd's decay; other schedules have none."""
    weight_decay: Annotated[float, Range(0, 1)] = 0.1
    """Of AdamW."""
    beta2: Annotated[float, Range(0, 1, below=True)] = 0.95
    """Of AdamW; beta1 is 0.9."""
    clip: Annotated[float, Range(0, 1e9, above=True)] = 1.0
    """Largest norm of the gradient."""
    divergence: Annotated[float, Range(1, 1e6, above=True, zero=True)] = 3.0
    """Stop when the loss is above its first level and this multiple of its lowest for 20 steps in a row; 0: never."""
    validate_every: Annotated[int, Range(0, MOST_STEPS)] = 0
    """Steps between validations; 0: only at the end."""
    patience: Annotated[int, Range(0, MOST_STEPS)] = 0
    """Validations in a row without an improvement after which the run stops; 0: it never stops early."""
    min_improvement: Annotated[float, Range(0, 1e3)] = 0.0
    """By how much the validation loss must fall for an improvement, below that of the last one."""
    seed: Annotated[int, Range(0, 1 << SEED_BITS, below=True)] = 1234
    """Of the adapters' first A, the order of packs and dropout."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of weights and activations; auto: bf16 on GPUs, fp32 on CPU ranks. bf16 brings the distributed optimizer."""

    @property
    def total_steps(self) -> int:
        """`steps`, which must be known."""
        assert self.steps is not None, "the number of steps is derived before it is used"
        return self.steps

    @property
    def warmup_steps(self) -> int:
        """`warmup` in steps; the number of steps must be known."""
        return round(self.warmup * self.total_steps) if self.warmup < 1 else int(self.warmup)


@dataclass
class CheckpointSettings(CheckpointPlan):
    """How much work an interruption may cost. All of it may change when a run resumes."""

    every: Annotated[int, Range(0, MOST_STEPS)] = 200
    """Steps between checkpoints; 0: by `minutes` only."""
    minutes: Annotated[float, Range(0, 1e5)] = 15.0
    """Minutes between checkpoints, by rank 0's clock; 0: by `every` only. Both 0: no checkpoints."""


@dataclass
class LogSettings:
    """What is shown and kept."""

    every: Annotated[int, Range(1, MOST_STEPS)] = 10
    """Steps between progress lines, and between adapter norms and expert loads; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard events to OUT/tensorboard."""
    wandb: Literal["offline", "online", "off"] = "offline"
    """Weights & Biases; offline: files in OUT/wandb, without account or network, for `wandb sync` later."""
    project: str = "nano3-lora"
    """Project in Weights & Biases."""
    name: str = ""
    """The run's name there; empty: the name of the folder OUT."""


@dataclass
class StageSettings:
    """Weight of each stage of a turn in the training loss; the data say the stages, by `spans`."""

    weights: Literal["uniform", "fixed", "dynamic"] = "uniform"
    """All 1; or as the next five say; or these times what follows from each stage's share of wrong tokens."""
    understand: Annotated[float, Range(0, 100)] = 1.0
    """Weight of stage 1."""
    plan: Annotated[float, Range(0, 100)] = 1.0
    """Weight of stage 2."""
    execute: Annotated[float, Range(0, 100)] = 1.0
    """Weight of stage 3."""
    verify: Annotated[float, Range(0, 100)] = 1.0
    """Weight of stage 4."""
    answer: Annotated[float, Range(0, 100)] = 1.0
    """Weight of stage 5."""
    exponent: Annotated[float, Range(0, 1, above=True)] = 0.5
    """How far dynamic weights follow the share of wrong tokens."""

    @property
    def fixed(self) -> list[float]:
        """The given weights of stages 1 to 5."""
        return [self.understand, self.plan, self.execute, self.verify, self.answer]


@dataclass
class SupervisionSettings:
    """When a run that hangs is ended, and who is called slow. All of it may change when a run resumes."""

    silent_seconds: Annotated[float, Range(1, 86400)] = 60.0
    """Seconds without an answer after which a rank counts as stopped: it is named and the run ends."""
    stuck_minutes: Annotated[float, Range(0.1, 10080)] = 30.0
    """Minutes in which a rank must get on: a step, a pack of a validation, a checkpoint, the start."""
    slow: Annotated[float, Range(1, 1e3, above=True, zero=True)] = 1.5
    """A rank that works so many times as long as the others is named; 0: none. CPU ranks only."""


@dataclass
class Settings:
    """All groups. Defaults: NVIDIA's published LoRA recipe for this model, in the layout that its evidence favours."""

    layout: Layout = field(default_factory=Layout)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    router: Literal["frozen", "balance"] = "frozen"
    """Weight and correction bias stay, verified by hash; or `balance`: the bias keeps moving towards equal load."""
    stages: StageSettings = field(default_factory=StageSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)
    supervision: SupervisionSettings = field(default_factory=SupervisionSettings)

    @property
    def document_multiple(self) -> int:
        """What every packed document's length is padded to: `train.pad_multiple`, with 0 resolved."""
        return self.train.pad_multiple or self.layout.document_multiple


@closed
class RecipeFile(TypedDict):
    """A run's recipe in run.json."""

    name: Name
    file: Text
    sha256: dict[Name, Sha256]


@closed
class RunFile(TypedDict):
    """run.json: what `Run.to_json` writes. Its settings are held to their own types and ranges."""

    model: Text
    base: Text
    data: Text
    validation: Text | None
    out: Text
    nodes: Positive
    ranks_per_node: Positive
    cpu: bool
    settings: dict[str, Any]
    eval_only: bool
    adapter: Text | None
    recipe: RecipeFile | None
    trial: NotRequired[Count | None]


_WRITE_AGAIN = "start the run again with the recipe's own command"


@dataclass
class Run:
    """One run: the settings, and the paths and resources that the flags give."""

    model: str
    """Folder with the model's config.json."""
    base: str
    """NeMo checkpoint with the base weights."""
    data: str
    validation: str | None
    out: str
    nodes: int
    ranks_per_node: int
    cpu: bool
    settings: Settings = field(default_factory=Settings)
    eval_only: bool = False
    """Validate, and train nothing."""
    adapter: str | None = None
    """With `eval_only`: the adapter folder to evaluate; None: the base alone."""
    recipe: Recipe | None = None
    """What makes the configuration of this run, on every rank. None: the run is only looked at, and no rank starts."""
    trial: int | None = None
    """Number of the trial that this run is, of the sweep whose folder OUT lies in (`finetune/sweep`)."""

    @property
    def ranks(self) -> int:
        """Ranks of the whole run."""
        return self.nodes * self.ranks_per_node

    @property
    def own_base(self) -> bool:
        """Whether the run imports its base itself, into OUT/base; with `nf4` nothing but its hash."""
        return Path(self.base) == Path(self.out) / "base"

    @property
    def nf4(self) -> bool:
        """Whether the frozen linear layers are in 4 bits."""
        return self.settings.lora.base == "nf4"

    @property
    def weights(self) -> str:
        """Where the base's tensors are read with `nf4`: in a checkpoint that was given or imported, else in MODEL."""
        return self.base if is_nemo_checkpoint(Path(self.base)) else self.model

    @property
    def bf16(self) -> bool:
        """Whether the run is in BF16, with FP32 gradients and optimizer state."""
        precision = self.settings.train.precision
        return precision == "bf16" or (precision == "auto" and not self.cpu)

    def to_json(self) -> str:
        """The run as JSON, for the ranks' processes."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "run.json") -> Run:
        """The inverse of `to_json`. Raises `UserError`, which calls the text `where`, for a field that is missing, of
        another type, or unknown."""
        raw: dict[str, Any] = dict(parse_json(text, RunFile, where, _WRITE_AGAIN))
        given, settings = nested_keys(raw.pop("settings")), Settings()
        missing = set(flatten(settings)) - set(given)
        if missing:
            raise UserError(f"{where}: settings lack {', '.join(sorted(missing))}; {_WRITE_AGAIN}")
        apply_values(settings, given, where)
        recipe = raw.pop("recipe")
        return cls(**raw, settings=settings, recipe=recipe and Recipe(**recipe))
