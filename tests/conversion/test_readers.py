"""Who reads which modules as FP8: our restatement of the rules against vLLM's and SGLang's own code."""

import ast
import random
import re
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import pytest

from conversion.fp8.readers import (
    loaded_modules,
    sglang_cache_scale,
    sglang_excludes,
    tensorrt_excludes,
    vllm_cache_scale,
    vllm_excludes,
)
from conversion.fp8.selection import Selection, matrices
from nano3.arch import PRESETS, Arch
from tests.helpers.foreign import source
from tests.helpers.serving_rules import sglang_decisions, sglang_scale, vllm_decisions, vllm_scale
from tests.helpers.tiny import TINY_CONFIG

ARCH = Arch.from_config({**TINY_CONFIG, "hybrid_override_pattern": "MEM*EME-MEM*EMEMEM*EMEM*E"})
"""Twenty-five layers: layer 2 is the beginning of the names of 20 to 24."""
MODULES = list(loaded_modules(ARCH))
ATTENTION = [name for name in matrices(ARCH) if name.endswith(("q_proj", "k_proj", "v_proj"))]
Decisions = Callable[[dict[str, Any], list[str]], dict[str, bool | None]]
READ: tuple[tuple[str, Decisions, Callable[[str, list[str]], bool | None]], ...] = (
    ("vLLM", vllm_decisions, vllm_excludes),
    ("SGLang", sglang_decisions, sglang_excludes),
)
pytestmark = pytest.mark.full


def quantization(excluded: list[str]) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": excluded}


def some_names(rng: random.Random) -> list[str]:
    """One line of a list of excluded modules, as tools and people write them; a module's shards mostly together."""
    others = ["lm_head", "backbone.embeddings", "backbone.layers.1.mixer.gate"]
    name = rng.choice([*matrices(ARCH), *others * 3, *ATTENTION * 3])
    parent, _, last = name.rpartition(".")
    layer = f"backbone.layers.{rng.randrange(25)}"
    if last in ("q_proj", "k_proj", "v_proj") and rng.random() < 0.8:
        return [f"{parent}.{shard}_proj" for shard in rng.choice(["qkv", "kqv", "qk"])]
    forms = [
        name,
        f"{name}*",
        f"{parent}*",
        f"{parent}.*",
        f"{layer}*",
        f"{layer}.*",
        f"{layer}.mixer",
        f"{layer}.mixer.experts",
        f"{layer}.mixer.experts.*",
        f"{layer}.mixer.qkv_proj",
        f"*.{last}",
        f"*{last}*",
        last,
        f"*.mixer.{last}",
        f"backbone.layers.?.mixer.{last}",
        f"backbone.layers.[0-9].mixer.{last}",
        "*.shared_experts.*",
        "*experts*",
        "mixer",
        "backbone*",
        name.replace("backbone", "model"),
        f"model.{name}",
        f"re:.*{last}",
        f"{name}.",
        f"{last}(",
        "",
        "*",
    ]
    weights = [8] + [1] * (len(forms) - 3) + [0.2, 0.2]
    return rng.choices(forms, weights)


def differing(decide: Decisions, ours: Callable[[str, list[str]], bool | None]) -> tuple[int, list[Any]]:
    """Decisions compared over random lists, and those that differ."""
    rng, compared, wrong = random.Random(0), 0, []
    while compared < 28_400:
        excluded = [name for _ in range(rng.randint(1, 5)) for name in some_names(rng)]
        for module, theirs in decide(quantization(excluded), MODULES).items():
            compared += 1
            if (mine := ours(module, excluded)) is not theirs:
                wrong.append((module, excluded, theirs, mine))
    return compared, wrong


def test_one_expert_by_name_and_q_without_k_and_v():
    one = ["backbone.layers.1.mixer.experts.3.up_proj"]
    assert [decide(quantization(one), ["model.layers.1.mixer.experts"]) for _, decide, _ in READ] == [
        {"model.layers.1.mixer.experts": True},  # all of the layer
        {"model.layers.1.mixer.experts": False},  # none of it
    ]
    query = ["backbone.layers.3.mixer.q_proj"]
    for _, decide, ours in READ:
        assert decide(quantization(query), ["model.layers.3.mixer.qkv_proj"]) == {"model.layers.3.mixer.qkv_proj": None}
        assert ours("model.layers.3.mixer.qkv_proj", query) is None


@pytest.mark.parametrize(("name", "decide", "ours"), READ, ids=[name for name, *_ in READ])
def test_random_lists_are_decided_as_the_reader_does(name, decide, ours):
    compared, wrong = differing(decide, ours)
    assert wrong == [], f"{len(wrong)} of {compared} differ from {name}"


def test_a_wrong_rule_is_seen():
    """The rule of before: expert names one by one as any other names, shards as if they were qkv_proj."""

    def by_names(module: str, excluded: list[str]) -> bool:
        return any(module == name.replace("backbone", "model").replace("q_proj", "qkv_proj") for name in excluded)

    assert all(len(differing(decide, by_names)[1]) > 300 for _, decide, _ in READ)


KEEP = [["*.experts.*"], ["*.layers.3.*"], ["*.in_proj", "*.shared_experts.*"]]
SELECTIONS = [
    Selection.published(ARCH),
    *(
        Selection(ARCH, frozenset(n for n in matrices(ARCH) if not any(fnmatch(n, pattern) for pattern in kept)))
        for kept in KEEP
    ),
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=["published", "experts", "attention", "shared"])
def test_what_we_write_is_read_as_what_is_on_disk(selection):
    """A planted wrong exclude, one name less or one more, is seen by both."""
    told = selection.quantization_config("0.47.0")
    on_disk = {module: not set(parts) <= selection.chosen for module, parts in loaded_modules(ARCH).items()}
    for _, decide, _ in READ:
        assert decide(told, MODULES) == on_disk
        less = told | {"ignore": [name for name in told["ignore"] if name != "lm_head"]}
        assert decide(less, MODULES) == on_disk | {"lm_head": False}
        more = told | {"ignore": [*told["ignore"], "backbone.layers.10.mixer.out_proj"]}
        assert decide(more, MODULES) == on_disk | {"model.layers.10.mixer.out_proj": True}
    assert all(tensorrt_excludes(module, told["ignore"]) == kept for module, kept in on_disk.items())


def test_nano_as_published_is_read_as_what_is_on_disk():
    arch = Arch.load(PRESETS["nano"])
    selection, modules = Selection.published(arch), loaded_modules(arch)
    for _, decide, _ in READ:
        found = decide(selection.quantization_config("0.47.0"), list(modules))
        assert found == {module: not set(parts) <= selection.chosen for module, parts in modules.items()}


def test_kv_scales_go_where_the_reader_puts_them():
    names = [f"{prefix}_scale" for prefix in ("k", "v", "kv", "attn.k", "attn.v", "qkv_proj.k")]
    names += [f"{part}_proj.{which}_scale" for part in "kvo" for which in "kv"]
    places = dict.fromkeys(f"model.layers.3.mixer.attn.{which}_scale" for which in "kv")
    found = {}
    for name in names:
        full = f"backbone.layers.3.mixer.{name}"
        vllm, sglang = vllm_scale(full), sglang_scale(full, places)
        assert vllm_cache_scale(full) == (vllm if vllm in places else None), name
        assert sglang_cache_scale(full) == (sglang if sglang in places else None), name
        found[name] = (vllm in places, sglang in places)
    assert found["k_proj.k_scale"] == found["k_scale"] == found["kv_scale"] == found["attn.v_scale"] == (True, True)
    assert found["k_proj.v_scale"] == (True, False)
    assert found["qkv_proj.k_scale"] == found["o_proj.k_scale"] == (False, False)


def given_the_configuration(path: str) -> set[str]:
    """Last names of the modules to which a source of a model gives its quantization configuration."""
    names = set()
    for node in ast.walk(ast.parse(source(path))):
        words = {word.arg: ast.unparse(word.value) for word in node.keywords} if isinstance(node, ast.Call) else {}
        if "prefix" in words and words.get("quant_config", "None") != "None":
            names |= set(re.findall(r"\w+(?='$|', prefix|'\))", words["prefix"]))
    return names


@pytest.mark.parametrize(
    "files",
    [
        ("vllm/model_executor/models/nemotron_h.py", "vllm/model_executor/layers/mamba/mamba_mixer2.py"),
        ("sglang/srt/models/nemotron_h.py", "sglang/srt/layers/attention/mamba/mamba.py"),
    ],
    ids=["vLLM", "SGLang"],
)
def test_the_modules_that_take_a_method_are_theirs(files):
    found = set().union(*(given_the_configuration(path) for path in files))
    ours = {module.rpartition(".")[2] for module in MODULES}
    inner = {"attn", "mixer", "model", "shared_experts", "embed_tokens"}  # no linear layers themselves
    latent = {"fc1_latent_proj", "fc2_latent_proj"}  # of larger models of the family
    assert ours <= found
    assert found - ours <= inner | latent
    assert not found & {"gate", "conv1d"}
