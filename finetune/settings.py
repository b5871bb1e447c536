"""Everything that a LoRA run can be told: the groups of `key=value`, their defaults and what they mean.

Imports neither torch nor NeMo, so that a wrong key or layout is refused at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from launch.plan.layout import Layout
from nano3.targets import PRESETS

Recompute = Literal["full", "moe", "moe_act", "shared_experts", "layernorm", "mamba"]


@dataclass
class LoraSettings:
    """Which layers get an adapter, and how large."""

    preset: Literal["all", "attention", "peft"] = "all"
    """The targets by a name: all linear layers but router, embedding and lm_head; the attention layers' only; or what
    Hugging Face PEFT can load for this model."""
    targets: list[str] = field(default_factory=list)
    """Names (`in_proj`) or patterns (`*.layers.5.*`) instead of the preset's; empty: the preset's. Only here can
    `word_embeddings` and `output_layer` be named."""
    rank: int = 32
    """Rows of A and columns of B; a multiple of layout.tp."""
    alpha: float = 32.0
    """The delta is multiplied by alpha / rank."""
    rank_pattern: list[str] = field(default_factory=list)
    """`target:rank` for some layers (`in_proj:64,*.layers.5.*:8`); of several that name a layer the last one holds."""
    alpha_pattern: list[str] = field(default_factory=list)
    """`target:alpha` for some layers, likewise; a rank of its own leaves a layer's alpha as it is."""
    rslora: bool = False
    """Rank-stabilized: the delta is multiplied by alpha / sqrt(rank) instead."""
    dora: bool = False
    """Weight-decomposed: every output row of an adapted layer has a trained length; routed experts have theirs each."""
    plus_ratio: float = 1.0
    """LoRA+: the learning rate of B is this many times train.lr, which A has."""
    dropout: float = 0.0
    """Probability on the adapters' input, while training; the embedding's adapter has no such input."""
    experts: Literal["shared", "each", "none"] = "shared"
    """Routed experts: one adapter per layer for all of them, one for each, or none."""
    init_from: str = ""
    """Adapter folder to start from: an earlier run's, or what `conversion/adapter.py import` wrote. The settings above,
    but for dropout and LoRA+, become its; the optimizer starts fresh. Empty: fresh adapters."""

    def chosen_targets(self) -> list[str]:
        """The targets, with the preset resolved."""
        return list(self.targets or PRESETS[self.preset])


@dataclass
class TrainSettings:
    """How long and how fast."""

    steps: int = 300
    """Optimizer steps."""
    lr: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine to `min_lr`; or `lr`, and over the last `decay` steps 1 - sqrt to `min_lr`; or `lr`."""
    min_lr: float = 0.0
    """Where cosine and wsd end: the rate that a step after the last would have."""
    warmup: int = 50
    """Steps of linear warm-up."""
    decay: int = 0
    """Steps of wsd's decay; other schedules have none."""
    micro_batch: int = 1
    """Packs per forward pass of a rank: 1, since a pack has document boundaries of its own."""
    global_batch: int = 128
    """Packs per step over all ranks."""
    seq_length: int = 4096
    """Positions in a pack; the token store must have a pack index of this length."""
    pad_multiple: int = 0
    """Every document in a pack takes a multiple of this many positions; 0: what the layout needs, 2 * layout.cp where
    that is above 1. A run can go on under any layout.cp that its multiple fits."""
    weight_decay: float = 0.1
    """Of AdamW."""
    beta2: float = 0.95
    """Of AdamW; beta1 is 0.9."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    divergence: float = 3.0
    """Stop when the loss is above its first level and this multiple of its lowest for 20 steps in a row; 0: never."""
    recompute: list[Recompute] = field(default_factory=list)
    """What the backward pass computes again instead of keeping: `full`, or some of moe, moe_act, shared_experts,
    layernorm, mamba."""
    validate_every: int = 0
    """Steps between validations; 0: only at the end."""
    patience: int = 0
    """Validations in a row without an improvement after which the run stops; 0: it never stops early."""
    min_improvement: float = 0.0
    """By how much the validation loss must fall for an improvement, below that of the last one."""
    seed: int = 1234
    """Of the adapters' first A, the order of packs and dropout."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of weights and activations; auto: bf16 on GPUs, fp32 on CPU ranks. bf16 brings the distributed optimizer."""


@dataclass
class CheckpointSettings:
    """How much work an interruption may cost. All of it may change when a run goes on."""

    every: int = 200
    """Steps between checkpoints; 0: by `minutes` only."""
    minutes: float = 15.0
    """Minutes between checkpoints, by rank 0's clock; 0: by `every` only. Both 0: no checkpoints."""
    keep: int = 2
    """Checkpoints that stay, the newest; at least 1."""


@dataclass
class LogSettings:
    """What is shown and kept."""

    every: int = 10
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
class Settings:
    """All groups. Defaults: NVIDIA's published LoRA recipe for this model, in the layout that its evidence favours."""

    layout: Layout = field(default_factory=Layout)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    router: Literal["frozen", "balance"] = "frozen"
    """Weight and correction bias stay, verified by hash; or `balance`: the bias goes on moving towards equal load."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)

    @property
    def document_multiple(self) -> int:
        """What every packed document's length is padded to: `train.pad_multiple`, with 0 resolved."""
        return self.train.pad_multiple or self.layout.document_multiple


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
    recipe: str = "recipes.nemotron_lora:nemotron_3_nano_lora"
    """`module:function` that makes the configuration of this run, on every rank."""

    @property
    def ranks(self) -> int:
        """Ranks of the whole run."""
        return self.nodes * self.ranks_per_node

    @property
    def bf16(self) -> bool:
        """Whether the run is in BF16, with FP32 gradients and optimizer state."""
        precision = self.settings.train.precision
        return precision == "bf16" or (precision == "auto" and not self.cpu)

    def to_json(self) -> str:
        """The run as JSON, for the ranks' processes."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Run:
        """The inverse of `to_json`."""
        raw: dict[str, Any] = json.loads(text)
        groups = raw.pop("settings")
        settings = Settings(
            layout=Layout(**groups["layout"]),
            lora=LoraSettings(**groups["lora"]),
            train=TrainSettings(**groups["train"]),
            router=groups["router"],
            checkpoint=CheckpointSettings(**groups["checkpoint"]),
            log=LogSettings(**groups["log"]),
        )
        return cls(**raw, settings=settings)
