"""Layouts and settings: every rule refuses with its numbers and a way out, and nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from launch.plan.layout import Layout, stages
from launch.plan.layout_rules import nearest, validate
from nano3.arch import PRESETS, Arch
from nano3.cli import UserError
from nano3.overrides import apply_overrides, flatten
from nano3.pipeline_parallel import layer_costs, output_cost, pipeline_kwargs, stage_sizes

NANO = Arch.load(PRESETS["nano"])
# 10 layers, 8 Mamba heads in 4 groups, 4 attention heads on 2 KV heads, 8 experts
SMALL = Arch(
    pattern="MEM*EMEM*E", vocab_size=64, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=4, conv_kernel=4, chunk_size=16,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=64,
    intermediate_size=32, max_position_embeddings=512, routed_scaling_factor=2.5, layer_norm_epsilon=1e-5,
    initializer_range=0.02,
)  # fmt: skip


def test_answers_without_torch_or_nemo_in_a_second():
    code = (
        "import sys, launch.plan.layout, nano3.overrides; "
        "assert not {'torch', 'nemo', 'megatron', 'numpy', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=5)


@pytest.mark.parametrize(
    ("arch", "layout", "world"),
    [
        (NANO, Layout(), 1),
        (NANO, Layout(ep=8), 16),
        (NANO, Layout(tp=2, ep=8), 8),
        (NANO, Layout(tp=4), 4),  # more ranks than the 2 KV heads: megatron-core 0.16.1 shares them
        (NANO, Layout(tp=8), 8),
        (NANO, Layout(pp=4, ep=8), 32),
        (NANO, Layout(pp=3), 3),  # 52 layers, unequal stages
        (NANO, Layout(cp=16), 16),  # 8 groups, repeated on two ranks each
        (NANO, Layout(tp=2, cp=2, ep=8, etp=2, pp=2), 32),
        (SMALL, Layout(ep=2), 2),
        (SMALL, Layout(tp=4, pp=5), 20),
    ],
)
def test_layouts_that_megatron_core_can_train(arch, layout, world):
    validate(arch, layout, world, seq_length=4096, global_batch=world)


@pytest.mark.parametrize(
    ("layout", "world", "message"),
    [
        # every message: the rule, its numbers, the nearest valid values of that size and layouts on these ranks
        (Layout(tp=3), 3, r"must divide Mamba heads \(mamba_num_heads\): 64 / 3; nearest valid .*: 1, 2, 4, 8; "),
        (Layout(tp=16), 16, r"Mamba groups \(n_groups\): 8 / 16; nearest valid layout.tp: 1, 2, 4, 8; "),
        (Layout(tp=2, sp=False), 2, r"layout.sp=false with layout.tp=2"),
        (Layout(sp=True), 1, r"layout.sp=true needs tensor parallelism"),
        (Layout(pp=60), 60, r"52 layers, 60 stages; nearest valid layout.pp: 49, 50, 51, 52; "),
        (Layout(cp=3), 3, r"64 / 1 = 64\) .* \(8 / 1 = 8\); nearest valid layout.cp: 1, 2, 4, 8; "),
        (Layout(tp=8, cp=16), 128, r"64 / 8 = 8\) .* \(8 / 8 = 1\); nearest valid layout.cp: 1, 2, 4, 8; "),
        (Layout(ep=3), 3, r"n_routed_experts\): 128 / 3; nearest valid layout.ep: 1, 2, 4, 8; "),
        (Layout(etp=3), 3, r"moe_intermediate_size\): 1856 / 3; nearest valid layout.etp: 1, 2, 4, 8; "),
        (Layout(tp=2, pp=2), 6, r"tp \* pp \* cp = 2 \* 2 \* 1 = 4, but it is 6; use 4 or 8 ranks"),
        (Layout(ep=8), 12, r"ep \* etp \* pp = 8 \* 1 \* 1 = 8, but it is 12; use 8 or 16 ranks"),
        (Layout(ep=8), 4, r"but it is 4; use 8 ranks"),
        (Layout(tp=0), 1, r"layout.tp is 0; it must be at least 1"),
        (Layout(), 0, r"number of ranks is 0"),
    ],
)  # fmt: skip
def test_layouts_that_are_refused(layout, world, message):
    with pytest.raises(UserError, match=message):
        validate(NANO, layout, world)


def test_sequence_and_batch_shares():
    layout = Layout(tp=2, cp=2)
    assert (layout.document_multiple, layout.sequence_multiple) == (4, 4)  # documents in 2*cp pieces; cp*tp shares
    assert Layout(tp=8).sequence_multiple == 8
    assert Layout(cp=4, tp=8).sequence_multiple == 32
    assert Layout().sequence_multiple == 1
    validate(NANO, layout, 8, seq_length=4096, global_batch=2)
    with pytest.raises(UserError, match=r"seq_length must be .* multiple of 4 .* 4097; nearest: 4096, 4100; "):
        validate(NANO, layout, 8, seq_length=4097)
    with pytest.raises(
        UserError, match=r"global_batch must be .* multiple of 2 .* it is 3; nearest: 2, 4; nearest valid on 8 ranks: "
    ):
        validate(NANO, layout, 8, global_batch=3)
    with pytest.raises(UserError, match=r"it is 0; nearest: 4$"):
        validate(NANO, layout, 8, seq_length=0)


def test_derived_sizes():
    layout = Layout(tp=2, pp=2, ep=4)
    assert (layout.dp(16), layout.expert_dp(16), layout.smallest_world) == (4, 2, 8)
    assert layout.sequence_parallel
    assert not Layout().sequence_parallel
    assert "".join(stages(SMALL, 3)) == SMALL.pattern
    assert "".join(stages(NANO, 4)) == NANO.pattern
    table = layout.describe(SMALL, 16)
    assert " | ".join(stages(SMALL, 2)) in table
    assert "2 of 8 experts per rank" in table


def test_stages_hold_every_layer_and_weigh_alike():
    # Multiplications per token in millions (facts of the published model): M 38.7, * 23.4, E 80.4, output layer 352.3
    costs = {letter: round(layer_costs(NANO)[NANO.pattern.index(letter)] / 1e6, 1) for letter in "M*E"}
    assert costs == {"M": 38.7, "*": 23.4, "E": 80.2}
    assert round(output_cost(NANO) / 1e6, 1) == 352.3
    for pp in range(1, 53):
        sizes = stage_sizes(NANO, pp)
        assert len(sizes) == pp
        assert sum(sizes) == 52
        assert min(sizes) >= 1
        assert len(set(sizes[1:-1])) <= 1  # what megatron-core can be told
        assert "".join(stages(NANO, pp)) == NANO.pattern
    assert stage_sizes(NANO, 2) == (30, 22)  # the output layer alone weighs more than four MoE layers
    assert pipeline_kwargs(NANO, 3) == {
        "num_layers_in_first_pipeline_stage": 20,
        "num_layers_in_last_pipeline_stage": 13,
    }
    assert pipeline_kwargs(NANO, 1) == {}
    with pytest.raises(ValueError, match="53 pipeline stages for 52 layers"):
        stage_sizes(NANO, 53)


def test_a_refusal_offers_the_nearest_layouts_and_all_of_them_are_valid():
    with pytest.raises(UserError, match=r"on 16 ranks: layout.tp=8 layout.ep=2 \| layout.tp=4 layout.ep=2 \| "):
        validate(NANO, Layout(tp=16, ep=2), 16)
    with pytest.raises(UserError, match=r"on 12 ranks: layout.ep=4 \| layout.ep=2 \| layout.ep=1$"):
        validate(NANO, Layout(ep=8), 12)
    for layout, world in ((Layout(tp=16, ep=2), 16), (Layout(tp=3, cp=5, ep=7, pp=11), 96), (Layout(ep=3), 720)):
        start = time.perf_counter()
        found = nearest(NANO, layout, world, seq_length=4096, global_batch=world)
        assert time.perf_counter() - start < 1
        assert len(found) == 3
        for other in found:
            validate(NANO, other, world, seq_length=4096, global_batch=world)


def test_tensor_parallel_groups_stay_on_a_node():
    validate(NANO, Layout(tp=4, ep=8), 16, ranks_per_node=8)
    with pytest.raises(UserError, match=r"ranks of a node.* spans nodes: 4 / 8; nearest valid layout.tp: 1, 2, 4; "):
        validate(NANO, Layout(tp=8, ep=8), 16, ranks_per_node=4)


def test_without_moe_there_is_nothing_for_expert_parallel():
    dense = Arch(**{**SMALL.__dict__, "pattern": "M-M*-"})
    validate(dense, Layout(tp=2, sp=False), 2)  # sequence parallelism is a choice here
    with pytest.raises(UserError, match="has no MoE layers"):
        validate(dense, Layout(ep=2), 2)


@dataclass
class Train:
    steps: int = 10
    lr: float = 1e-3
    warmup: int | None = None


@dataclass
class Lora:
    targets: list[str] = field(default_factory=lambda: ["linear_qkv"])
    ranks: tuple[int, ...] = (8,)
    experts: Literal["shared", "each"] = "shared"
    name: str | None = None


@dataclass
class Config:
    layout: Layout = field(default_factory=Layout)
    lora: Lora = field(default_factory=Lora)
    train: Train = field(default_factory=Train)
    router: str = "frozen"
    out: Path = Path("runs")


def test_overrides_are_typed_and_leave_the_rest_alone():
    config = Config()
    items = [
        "layout.tp=2", "layout.sp=True", "train.lr=3", "train.warmup=50", "lora.targets=in_proj, out_proj",
        "lora.ranks=4,8", "lora.experts=each", "lora.name=a=b", "router=train", "out=/tmp/x",
    ]  # fmt: skip
    apply_overrides(config, items)
    assert config == Config(
        layout=Layout(tp=2, sp=True),
        lora=Lora(["in_proj", "out_proj"], (4, 8), "each", "a=b"),
        train=Train(lr=3.0, warmup=50),
        router="train",
        out=Path("/tmp/x"),
    )
    assert isinstance(config.train.lr, float)
    apply_overrides(config, ["train.warmup=none", "layout.sp=null", "lora.targets="])
    assert (config.train.warmup, config.layout.sp, config.lora.targets) == (None, None, [])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            "layout.tpp=2",
            r"unknown key layout.tpp; did you mean layout.tp\? \(group layout has layout.tp, .*layout.sp\)",
        ),
        ("layuot.tp=2", r"unknown key layuot.tp; did you mean layout.tp\? \(there are layout.\*, .* router, out\)"),
        ("lr=1", r"unknown key lr; did you mean train.lr\?"),
        ("lora.lr=1", r"unknown key lora.lr; did you mean train.lr\? \(group lora has lora.targets, "),
        ("router.x=1", r"unknown key router.x"),
        ("zzzzzz=1", r"unknown key zzzzzz \(there are"),
        ("layout=2", r"layout is a group, not a setting; set layout.KEY=VALUE with KEY one of tp, pp"),
        ("train.steps=1.5", r"train.steps=1.5: '1.5' is not a whole number"),
        ("train.steps=", r"train.steps=: '' is not a whole number"),
        ("train.lr=fast", r"train.lr=fast: 'fast' is not a finite number"),
        ("train.lr=nan", r"not a finite number"),
        ("train.warmup=x", r"'x' is not a whole number or none"),
        ("layout.sp=1", r"'1' is not true or false or none"),
        ("lora.ranks=4,x", r"lora.ranks=4,x: '4,x' is not a list a,b,c, each item a whole number"),
        ("lora.experts=some", r"is not one of shared, each"),
        ("train.steps", r"cannot read 'train.steps': settings are written key=value, for example layout.tp=1"),
        ("=3", r"cannot read '=3'"),
    ],
)
def test_bad_overrides_name_key_value_and_remedy_and_change_nothing(item, message):
    config = Config()
    with pytest.raises(UserError, match=message):
        apply_overrides(config, ["train.steps=5" if "train.steps" not in item else "train.lr=5", item])
    assert config == Config()


def test_the_same_key_twice_is_refused():
    with pytest.raises(UserError, match=r"train\.steps is given twice"):
        apply_overrides(Config(), ["train.steps=5", "train.steps=6"])


def test_flatten_names_every_setting_once():
    flat = flatten(Config())
    assert flat["layout.tp"] == 1
    assert flat["train.lr"] == 1e-3
    assert flat["router"] == "frozen"
    assert len(flat) == 6 + 4 + 3 + 2
    copy = Config()
    apply_overrides(copy, [f"{key}={value}" for key, value in flat.items() if not isinstance(value, list | tuple)])
    assert copy == Config()
