"""What Hugging Face PEFT and vLLM call the parts of an adapter of this model. Torch-free; the one owner of these maps.

PEFT wraps modules of the Hugging Face model, so its names are that model's, and there are three of them (`CONSUMERS`):

* `peft`: PEFT 0.18 or later on transformers 5. Routed experts are two stacked parameters of one module, reached by
  `target_parameters`; PEFT nests a wrapper for each: `experts.base_layer.lora_*` is up_proj and `experts.lora_*`
  down_proj when both are adapted, `experts.lora_*` the one that is when only one is (peft/tuners/lora/layer.py,
  `ParamWrapper`). A is (experts * rank, in), B is (out, rank * experts) with the expert as its last axis.
* `peft-legacy`: the model's own code for transformers 4: names begin with `backbone.`, every expert is a module.
* `vllm`: vLLM's own module names (vllm/model_executor/models/nemotron_h.py: `hf_to_vllm_mapper`, `get_expert_mapping`),
  every expert a module: it does not take PEFT's stacked form for this model.

`linear_qkv` is three modules there, which share our A.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from conversion.adapters.lora_json import LoraInfo
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.targets import EMBEDDING, Size, is_routed
from nano3.tensor_names import Linear

CONSUMERS = ("peft", "peft-legacy", "vllm")
PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FACTS = "nano3_lora"
"""In the header of the weights: the `lora.json` that they were exported from. Whoever writes other weights drops it."""

KINDS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
"""What follows a module's name in a key; the first two have `.weight` behind them."""

FUSED = re.compile(r"(?P<experts>(?:backbone|model)\.layers\.\d+\.mixer\.experts)(?P<nested>(?:\.base_layer)*)")
PARAMETERS = {"linear_fc1": "up_proj", "linear_fc2": "down_proj"}
"""Of the stacked experts, in the order in which PEFT wraps them: the first is the innermost."""


@dataclass(frozen=True)
class Part:
    """One matrix of the Hugging Face model that is a part of one of our modules.

    `spans` are (first row, number of rows) in our module, in the matrix's own order; `expert` counts routed experts.
    """

    tensor: str
    spans: tuple[tuple[int, int], ...]
    expert: int | None = None

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return sum(count for _, count in self.spans)


def parts(linear: Linear) -> list[Part]:
    """The matrices that a module covers: q, k and v of `linear_qkv`, every expert of grouped experts, else one."""
    spans: dict[str, list[tuple[int, int, int]]] = {}
    begin = 0
    for block in linear.blocks:
        spans.setdefault(block.name, []).append((block.start, begin % linear.rows, block.count))
        begin += block.count
    return [
        Part(name, tuple((first, count) for _, first, count in sorted(found)), number if linear.experts else None)
        for number, (name, found) in enumerate(spans.items())
    ]


def module_name(tensor: str, consumer: str) -> str:
    """What a consumer calls the module of a Hugging Face weight."""
    name = tensor.removesuffix(".weight")
    if consumer == "peft-legacy":
        return name
    name = re.sub(r"^backbone\.", "model.", name)
    return name.replace("model.embeddings", "model.embed_tokens") if consumer == "vllm" else name


def tensor_name(module: str) -> str:
    """The Hugging Face weight of a module, whatever consumer named it."""
    name = re.sub(r"^model\.", "backbone.", module)
    return name.replace("backbone.embed_tokens", "backbone.embeddings") + ".weight"


def fused_name(path: str, chosen: Iterable[str]) -> str:
    """What `peft` calls the wrapper of a layer's routed experts, when our modules `chosen` are adapted."""
    layer, _, last = path.rpartition(".")
    both = last == "linear_fc1" and f"{layer}.linear_fc2" in chosen
    return f"model.layers.{path.split('.')[2]}.mixer.experts" + ".base_layer" * both


def key(module: str, kind: str) -> str:
    """The name of a tensor in the file."""
    return f"{PREFIX}{module}.{kind}" + (".weight" if kind in KINDS[:2] else "")


def check_consumer(consumer: str, arch: Arch, info: LoraInfo, sizes: dict[str, Size]) -> None:
    """Raises `UserError` for an adapter that the consumer would refuse or, worse, read as another one."""
    routed = [path for path in sizes if is_routed(path)]
    out_proj = next((path for path in sizes if path.endswith(".mixer.out_proj")), None)
    balanced = info.router == "balance" and bool(arch.moe_layers)
    if info.mark and (consumer != "peft" or len(info.mark) > 1):
        raise UserError(
            f"{consumer} cannot represent an adapter that acts from its mark on (tokens {info.mark}): PEFT alone can, "
            "as Activated LoRA, and only from a mark of one token, since it begins with a mark's first one; train it "
            "with a lora.mark of one token, and export it for peft"
        )
    wrong = {
        "router=balance: the routers' correction biases have moved, and an adapter has no place for them": balanced,
        f"DoRA of {EMBEDDING}: PEFT's lengths are those of columns, ours of the tokens' rows": (
            info.dora and EMBEDDING in sizes
        ),
    }
    if consumer == "peft":
        wrong[f"{out_proj}: PEFT refuses out_proj of Mamba layers, whose fused kernel would pass its adapter by"] = (
            out_proj is not None
        )
        wrong["DoRA of routed experts: PEFT's adapters of stacked parameters have none"] = info.dora and bool(routed)
    if consumer == "vllm":
        wrong["DoRA: vLLM loads none"] = info.dora
        wrong["layers with ranks or alphas of their own: vLLM takes one of each and reads no patterns"] = (
            len(set(sizes.values())) > 1
        )
        layers = {path.rpartition(".")[0] for path in routed}
        wrong["linear_fc1 or linear_fc2 of routed experts alone: vLLM requires both"] = len(routed) != 2 * len(layers)
    for what, holds in wrong.items():
        if holds:
            raise UserError(
                f"{consumer} cannot represent {what}. Merge the adapter instead (conversion/merge_lora.py), or train "
                "one that every consumer loads: lora.preset=peft, without lora.dora and patterns, router=frozen"
            )
