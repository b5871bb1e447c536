"""conversion/adapter.py export: names by hand, PEFT's logits, vLLM's rules, and what cannot be represented."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conversion.adapter import export, import_peft
from conversion.adapters.adapter_folder import Adapter
from conversion.adapters.peft_names import CONSUMERS
from conversion.checkpoint.torch_dist import TorchDistReader
from conversion.merge_lora import merge
from evaluation.hf_model import load_reference
from nano3.arch import Arch, resolve_model
from nano3.cli import UserError
from nano3.targets import PRESETS
from tests.conversion.test_merge import FORMAT_2, write_adapter
from tests.helpers.legacy_model import LegacyModel
from tests.helpers.tiny import TINY_CONFIG, tiny_hf_folder

peft = pytest.importorskip("peft")

FP32 = TINY_CONFIG | {"torch_dtype": "float32"}
VOCABULARY = ("word_embeddings", "output_layer")
NO_OUT_PROJ = ("linear_qkv", "linear_proj", "in_proj", "linear_fc1", "linear_fc2")
PATTERNS = {"rank_pattern": ["*.experts.*:2", "linear_qkv:8"], "alpha_pattern": ["in_proj:3", "*.layers.4.*:5"]}
KINDS: dict[str, dict[str, Any]] = {
    "shared": {"targets": (*NO_OUT_PROJ, *VOCABULARY)},
    "each": {"targets": NO_OUT_PROJ, "experts": "each"},
    "fc2 alone": {"targets": ("linear_fc2",), "experts": "each"},
    "patterns": {"targets": NO_OUT_PROJ, "experts": "each", **FORMAT_2, **PATTERNS},
    "rslora": {"targets": NO_OUT_PROJ, **FORMAT_2, "rslora": True},
    "preset": {"targets": PRESETS["peft"]},
    "dora": {"targets": (*PRESETS["peft"], "output_layer"), **FORMAT_2, "dora": True},
    "all": {"targets": PRESETS["all"]},
    "all dora": {"targets": PRESETS["all"], "experts": "each", **FORMAT_2, "dora": True},
}
"""`write_adapter`'s arguments."""
LOADS = {
    "peft": ("shared", "each", "fc2 alone", "patterns", "rslora", "preset", "dora"),
    "peft-legacy": ("shared", "each", "fc2 alone", "patterns", "rslora", "preset", "dora", "all", "all dora"),
    "vllm": ("shared", "each", "rslora", "preset", "all"),
}
"""Consumer -> the kinds that it can represent."""
FAST = {"peft": LOADS["peft"], "peft-legacy": ("each", "all dora"), "vllm": ("rslora",)}
CASES = [
    pytest.param(consumer, kind, marks=() if kind in FAST[consumer] else pytest.mark.full)
    for consumer, kinds in LOADS.items()
    for kind in kinds
]


def random_values(tensors: dict[str, torch.Tensor]) -> None:
    """A, B and lengths that matter, other ones for every tensor."""
    generator = torch.Generator().manual_seed(1)
    for key, tensor in tensors.items():
        value = torch.randn(tensor.shape, generator=generator)
        tensors[key] = (0.4 + 0.05 * value).abs() if ".magnitude" in key else 0.1 * value


def our_adapter(folder: Path, kind: str, config: dict[str, Any] = FP32) -> Path:
    return write_adapter(folder, random_values, config=config, **KINDS[kind])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_folder(tmp_path_factory.mktemp("base") / "hf", torch_dtype="float32")


def logits(model: Any, vocabulary: int = 128) -> torch.Tensor:
    tokens = torch.randint(3, vocabulary, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = model.eval()(tokens)
    return found if isinstance(found, torch.Tensor) else found.logits


def test_names_and_shapes_for_every_consumer(tmp_path: Path):
    """Layer 0 Mamba, 1 MoE (8 experts, 24 wide), 3 attention (q 64 rows, k 32) of the tiny model, hidden 32, rank 4."""
    source = our_adapter(tmp_path / "adapter", "shared")
    found = {}
    for consumer in CONSUMERS:
        export(source, tmp_path / consumer, consumer)
        tensors = load_file(tmp_path / consumer / "adapter_model.safetensors")
        found[consumer] = {key.removeprefix("base_model.model."): tuple(t.shape) for key, t in tensors.items()}
    common = {
        "layers.0.mixer.in_proj.lora_A.weight": (4, 32),
        "layers.0.mixer.in_proj.lora_B.weight": (264, 4),
        "layers.3.mixer.q_proj.lora_B.weight": (64, 4),
        "layers.3.mixer.k_proj.lora_B.weight": (32, 4),
        "layers.3.mixer.o_proj.lora_A.weight": (4, 64),
        "layers.1.mixer.shared_experts.down_proj.lora_B.weight": (32, 4),
    }
    one_by_one = {
        "layers.1.mixer.experts.7.up_proj.lora_B.weight": (24, 4),
        "layers.1.mixer.experts.7.down_proj.lora_A.weight": (4, 24),
    }
    stacked = {
        "layers.1.mixer.experts.base_layer.lora_A.weight": (32, 32),  # 8 experts of rank 4, hidden 32
        "layers.1.mixer.experts.base_layer.lora_B.weight": (24, 32),
        "layers.1.mixer.experts.lora_A.weight": (32, 24),
        "layers.1.mixer.experts.lora_B.weight": (32, 32),
    }
    expected = {
        "peft": ("model", common | stacked, "embeddings"),
        "peft-legacy": ("backbone", common | one_by_one, "embeddings"),
        "vllm": ("model", common | one_by_one, "embed_tokens"),
    }
    for consumer, (prefix, shapes, table) in expected.items():
        shapes = {f"{prefix}.{name}": shape for name, shape in shapes.items()}
        shapes |= {f"{prefix}.{table}.lora_embedding_A": (4, 128), f"{prefix}.{table}.lora_embedding_B": (32, 4)}
        shapes |= {"lm_head.lora_A.weight": (4, 32), "lm_head.lora_B.weight": (128, 4)}
        assert shapes.items() <= found[consumer].items(), consumer
        assert all(key.startswith((f"{prefix}.", "lm_head.")) for key in found[consumer]), consumer
    # 2 tensors each: 2 in_proj, q k v o, 2 shared experts of 2 matrices, embedding, output; and the routed experts
    assert len(found["peft"]) == 2 * (2 + 4 + 4 + 2 + 4)
    assert len(found["vllm"]) == len(found["peft-legacy"]) == 2 * (2 + 4 + 4 + 2 + 2 * 2 * 8)


@pytest.mark.parametrize(("consumer", "kind"), [case for case in CASES if case.values[0] != "vllm"])
def test_peft_gives_the_logits_of_the_merged_model(consumer: str, kind: str, base: Path, tmp_path: Path):
    """That the merged model is the adapted one is shown by tests/nano3/test_variants.py."""
    export(our_adapter(tmp_path / "adapter", kind), tmp_path / "peft", consumer)
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    model: Any = load_reference(base, torch.float32)
    config = peft.LoraConfig.from_pretrained(tmp_path / "peft")
    if consumer == "peft-legacy":
        model, config.task_type = LegacyModel(model), None  # the task wants more methods than a forward
    before = logits(model)
    found = logits(peft.PeftModel.from_pretrained(model, tmp_path / "peft", config=config))
    expected = logits(load_reference(tmp_path / "merged", torch.float32))
    assert (found - expected).abs().max() < 1e-5
    assert (found - before).abs().max() > 0.1


MERGED = {"shared": 16, "each": 14, "fc2 alone": 4, "patterns": 14, "rslora": 14, "preset": 10, "dora": 11}
"""Kind -> how many tensors of transformers' model it changes: experts of a layer are two, up and down."""


@pytest.mark.parametrize("kind", LOADS["peft"])
def test_pefts_own_merge_gives_the_bits_of_ours(kind: str, base: Path, tmp_path: Path):
    """In FP32. A wrong scale, twice the alpha, is seen in every tensor."""
    source = our_adapter(tmp_path / "adapter", kind)
    export(source, tmp_path / "peft", "peft")
    merge(base, source, tmp_path / "merged")
    before, ours = (load_reference(path, torch.float32).state_dict() for path in (base, tmp_path / "merged"))
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert len(changed) == MERGED[kind]
    assert differing(ours, peft_merged(base, tmp_path / "peft")) == set()
    told = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    told |= {
        "lora_alpha": 2 * told["lora_alpha"],
        "alpha_pattern": {k: 2 * v for k, v in told["alpha_pattern"].items()},
    }
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(told))
    assert differing(ours, peft_merged(base, tmp_path / "peft")) == changed


def peft_merged(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The base with an adapter merged by PEFT, in transformers' names."""
    model = peft.PeftModel.from_pretrained(load_reference(base, torch.float32), folder)
    return model.merge_and_unload().state_dict()


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def test_on_pico(tmp_path: Path):
    """The complete small model of this repository, with everything that PEFT on transformers 5 can represent.

    In FP64: its logits reach 20, where FP32 resolves 2e-6 and the two ways of adding differ by 1.5e-5.
    """
    pico = tmp_path / "pico"
    shutil.copytree(resolve_model("pico"), pico)
    config = json.loads((pico / "config.json").read_text()) | {"torch_dtype": "float32"}
    (pico / "config.json").write_text(json.dumps(config))
    tensors = load_file(pico / "model.safetensors")  # BF16 would round the merge
    save_file({name: value.float() for name, value in tensors.items()}, pico / "model.safetensors")
    write_adapter(tmp_path / "adapter", random_values, config=config, **KINDS["shared"])
    export(tmp_path / "adapter", tmp_path / "peft", "peft")
    merge(pico, tmp_path / "adapter", tmp_path / "merged")
    model, merged = (load_reference(folder, torch.float64) for folder in (pico, tmp_path / "merged"))
    for each in (model, merged):
        each.set_experts_implementation("eager")  # the grouped kernels know no FP64
    found = logits(peft.PeftModel.from_pretrained(model, tmp_path / "peft"))
    assert (found - logits(merged)).abs().max() < 1e-5


@pytest.mark.parametrize(("consumer", "kind"), CASES)
def test_the_round_trip_is_bit_equal(consumer: str, kind: str, base: Path, tmp_path: Path):
    source = our_adapter(tmp_path / "adapter", kind)
    export(source, tmp_path / "peft", consumer)
    import_peft(tmp_path / "peft", base, tmp_path / "back")
    assert json.loads((tmp_path / "back/lora.json").read_text()) == json.loads((source / "lora.json").read_text())
    ours, back = (TorchDistReader(folder / "weights") for folder in (source, tmp_path / "back"))
    assert ours.shapes == back.shapes
    for key in ours.shapes:
        assert ours.dtype(key) == back.dtype(key)
        assert torch.equal(ours.whole(key), back.whole(key)), key


def test_dtypes_are_kept(base: Path, tmp_path: Path):
    """BF16 adapters stay BF16, bit for bit, and their FP32 lengths FP32."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        random_values(tensors)
        for key in [key for key in tensors if ".magnitude" not in key]:
            tensors[key] = tensors[key].to(torch.bfloat16)

    source = write_adapter(tmp_path / "adapter", change, config=FP32, **KINDS["dora"])
    export(source, tmp_path / "peft", "peft")
    kinds = {k.rsplit(".lora_")[-1]: t.dtype for k, t in load_file(tmp_path / "peft/adapter_model.safetensors").items()}
    assert kinds == {"A.weight": torch.bfloat16, "B.weight": torch.bfloat16, "magnitude_vector": torch.float32}
    import_peft(tmp_path / "peft", base, tmp_path / "back")
    ours, back = (TorchDistReader(folder / "weights") for folder in (source, tmp_path / "back"))
    assert all(torch.equal(ours.whole(key), back.whole(key)) for key in ours.shapes)


def vllm_deltas(folder: Path, experts: int) -> dict[str, torch.Tensor]:
    """What vLLM adds to each weight, by its names, after its rules.

    vllm/lora/lora_model.py (`parse_fine_tuned_lora_name`: the prefix is dropped, the rest is a module's name),
    model_manager.py (`experts` is packed from `experts.K.up_proj` and `experts.K.down_proj` of every expert, both
    needed; an unexpected module is an error), lora_weights.py (one rank and alpha for all; `pack_moe` scales by
    alpha / r whatever use_rslora says), peft_helper.py (no DoRA, no modules_to_save).
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    scale = config["lora_alpha"] / config["r"]
    general = config["lora_alpha"] / math.sqrt(config["r"]) if config["use_rslora"] else scale
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "up_proj", "down_proj"}
    known = linears | {"embed_tokens", "lm_head"}
    known |= {f"experts.{k}.{name}" for k in range(experts) for name in ("up_proj", "down_proj")}
    low, high = {}, {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        assert name != key
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        suffix = module[module.find(".experts") + 1 :] if ".experts" in module else module.rsplit(".", 1)[-1]
        assert suffix in known, key
        assert config["r"] in tensor.shape
        (low if kind.endswith("A") else high)[module] = tensor
    assert low.keys() == high.keys()
    packed = [module for module in low if ".mixer.experts." in module]
    layers = {module.split(".experts.")[0] for module in packed}
    assert len(packed) == 2 * experts * len(layers)
    deltas = {}
    for module in low:
        if module.endswith("embed_tokens"):
            deltas[module] = general * (low[module].T @ high[module].T)
        else:
            deltas[module] = (scale if module in packed else general) * (high[module] @ low[module])
    return deltas


@pytest.mark.parametrize("kind", LOADS["vllm"])
def test_vllm_adds_what_a_merge_adds(kind: str, base: Path, tmp_path: Path):
    source = our_adapter(tmp_path / "adapter", kind)
    export(source, tmp_path / "vllm", "vllm")
    merge(base, source, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    deltas = vllm_deltas(tmp_path / "vllm", experts=8)
    names = {
        module.replace("model.embed_tokens", "backbone.embeddings").replace("model.layers", "backbone.layers"): delta
        for module, delta in deltas.items()
    }
    for name, old in before.items():
        change = after[name] - old
        expected = names.pop(name.removesuffix(".weight"), torch.zeros_like(change))
        assert (change - expected).abs().max() < 1e-6, name
    assert not names


REFUSED = {
    ("peft", "all"): r"decoder\.layers\.0\.mixer\.out_proj",
    ("peft", "all dora"): "out_proj",
    ("vllm", "dora"): "DoRA",
    ("vllm", "patterns"): "ranks or alphas of their own",
    ("vllm", "fc2 alone"): "both",
}


@pytest.mark.parametrize(("consumer", "kind"), REFUSED)
def test_what_a_consumer_cannot_represent_is_an_error(consumer: str, kind: str, tmp_path: Path):
    source = our_adapter(tmp_path / "adapter", kind)
    with pytest.raises(UserError, match=REFUSED[consumer, kind]) as error:
        export(source, tmp_path / "out", consumer)
    assert "lora.preset=peft" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("what", ["router=balance", "DoRA of embedding", "DoRA of routed experts"])
def test_what_no_adapter_has_a_place_for(what: str, consumer: str, tmp_path: Path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if what == "router=balance":
            tensors |= {f"module.decoder.layers.{layer}.mlp.router.expert_bias": torch.zeros(8) for layer in (1, 4)}

    info: dict[str, Any] = {
        "router=balance": {"router": "balance", "targets": PRESETS["peft"]},
        "DoRA of embedding": {"targets": VOCABULARY, **FORMAT_2, "dora": True},
        "DoRA of routed experts": {"targets": ("linear_fc1", "linear_fc2"), **FORMAT_2, "dora": True},
    }[what]
    source = write_adapter(tmp_path / "adapter", change, config=FP32, **info)
    if (consumer, what) == ("peft-legacy", "DoRA of routed experts"):  # a module each: it can have a length each
        assert export(source, tmp_path / "out", consumer) > 0
        return
    with pytest.raises(UserError, match=r"router=balance|DoRA") as error:
        export(source, tmp_path / "out", consumer)
    assert "lora.preset=peft" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_preset_that_the_errors_name_exports_everywhere(tmp_path: Path):
    source = our_adapter(tmp_path / "adapter", "preset")
    for consumer in CONSUMERS:
        export(source, tmp_path / consumer, consumer)
        with safe_open(tmp_path / consumer / "adapter_model.safetensors", "pt") as file:
            assert json.loads(file.metadata()["nano3_lora"]) == json.loads((source / "lora.json").read_text())
        assert Adapter(tmp_path / consumer, Arch.from_config(FP32)).sizes.keys() == {
            *(f"decoder.layers.{n}.mixer.in_proj" for n in (0, 2)),
            *(f"decoder.layers.3.self_attention.{name}" for name in ("linear_qkv", "linear_proj")),
            *(f"decoder.layers.{n}.mlp.shared_experts.{name}" for n in (1, 4) for name in ("linear_fc1", "linear_fc2")),
        }
