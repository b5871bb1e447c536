"""conversion/combine_adapters.py: deltas computed by hand, PEFT's own combinations, descent, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.adapter import export
from conversion.adapters.adapter_folder import Adapter
from conversion.adapters.combination import Rule, combine, keep_largest, keep_random, merge_deltas
from conversion.certificates.certificate import folder_sha256
from conversion.certificates.certificate_json import read_certificate
from conversion.certify import verify
from conversion.checkpoint.torch_dist import TorchDistReader
from conversion.combine_adapters import Report, combine_adapters, main
from conversion.hf_to_nemo import convert
from conversion.merge_lora import merge
from data_prep.packing import build_packs
from evaluation.hf_model import load_reference
from finetune.initial import adopt
from finetune.settings import LoraSettings
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.targets import PRESETS
from nano3.token_store import TokenStore
from tests.conversion.test_merge import FORMAT_2, write_adapter
from tests.conversion.test_peft_export import FP32, logits
from tests.conversion.test_peft_train import SEQ_LENGTH, launch
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_run import metrics
from tests.helpers.tiny_store import tiny_store

SUM = Rule()
IN_PROJ = "decoder.layers.0.mixer.in_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_folder(tmp_path_factory.mktemp("base") / "hf", torch_dtype="float32")


def random_adapter(folder: Path, seed: int, **kind: Any) -> Path:
    """Rank 4, scale 2 (alpha 8) unless `kind` says otherwise."""

    def fill(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for value in tensors.values():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))

    return write_adapter(folder, fill, config=FP32, **kind)


def two(tmp_path: Path, **kind: Any) -> list[Path]:
    return [random_adapter(tmp_path / f"parent{seed}", seed, **kind) for seed in (1, 2)]


def delta(adapter: Adapter, path: str, expert: int = 0) -> torch.Tensor:
    """Of one module, FP64; zero where the adapter has none."""
    if path not in adapter.sizes:
        return torch.zeros((), dtype=torch.float64)
    low, high, _ = adapter.factors(path, expert)
    return adapter.sizes[path].scale * high.double() @ low.double()


def combined(base: Path, out: Path, parents: Sequence[Path], rank: int, weights: Sequence[float] = (1, 1)) -> Report:
    return combine_adapters(base, out, parents, weights, rank, SUM)


@pytest.mark.parametrize("experts", ["shared", "each"])
def test_two_of_rank_4_are_one_of_rank_8_exactly(experts: str, base: Path, tmp_path: Path):
    """Every module of the model, weights 1 and -0.5."""
    parents = two(tmp_path, experts=experts)
    report = combined(base, tmp_path / "out", parents, 8, weights=(1.0, -0.5))
    arch = Arch.load(base)
    first, second, out = (Adapter(folder, arch) for folder in (*parents, tmp_path / "out"))
    assert (out.info.rank, out.info.experts, report.rank) == (8, experts, 8)
    assert out.modules.keys() == first.modules.keys() == report.modules.keys()
    for path, linear in out.modules.items():
        for expert in range(max(1, linear.experts)):
            expected = delta(first, path, expert) - 0.5 * delta(second, path, expert)
            assert (delta(out, path, expert) - expected).abs().max() < 1e-6, path
    assert report.largest_error < 1e-7


def test_merged_it_has_the_logits_of_both_merged_one_after_the_other(base: Path, tmp_path: Path):
    """Weights 1 and 0.5; half of an adapter is the adapter with half its alpha."""
    parents = two(tmp_path)
    combined(base, tmp_path / "out", parents, 8, weights=(1, 0.5))
    merge(base, tmp_path / "out", tmp_path / "merged")
    merge(base, parents[0], tmp_path / "first")
    merge(tmp_path / "first", random_adapter(tmp_path / "half", 2, alpha=4.0), tmp_path / "both")
    folders = (base, tmp_path / "merged", tmp_path / "both")
    before, found, expected = (logits(load_reference(folder, torch.float32)) for folder in folders)
    assert (found - expected).abs().max() < 1e-5
    assert (found - before).abs().max() > 0.1


def test_what_rank_4_has_no_place_for_is_the_error_that_is_reported(base: Path, tmp_path: Path):
    parents = two(tmp_path)
    report = combined(base, tmp_path / "out", parents, 4)
    arch = Arch.load(base)
    first, second, out = (Adapter(folder, arch) for folder in (*parents, tmp_path / "out"))
    for path, (ranks, error) in report.modules.items():
        whole = delta(first, path) + delta(second, path)
        assert ranks == 8
        assert math.isclose((whole - delta(out, path)).norm() / whole.norm(), error, rel_tol=1e-5)
        nearest = torch.linalg.svdvals(whole)[4:].square().sum().sqrt() / whole.norm()  # no matrix of rank 4 is nearer
        assert math.isclose(error, nearest, rel_tol=1e-9)
        assert error > 0.1


def test_a_truncation_by_hand():
    """Deltas 3 at (0, 0) and 4 at (1, 1), 12 at (2, 2): rank 2 keeps 12 and 4, and drops 3 of 13."""
    unit = torch.eye(3)
    pairs = [(unit[:2], torch.tensor([[3.0, 0], [0, 4], [0, 0]])), (unit[2:], 6 * unit[:, 2:])]
    one = combine(pairs, [1.0, 2.0], 2, SUM, [((0, 3),)])
    assert torch.allclose(one.high @ one.low, torch.diag(torch.tensor([0.0, 4, 12])), atol=1e-6)
    assert (round(one.dropped, 9), round(one.whole, 9)) == (9, 169)
    four = combine(pairs, [1.0, 2.0], 4, SUM, [((0, 3),)])
    assert four.dropped == 0
    assert not four.high[:, 3].any()
    assert not four.low[3].any()


def test_ties_and_dare_by_hand():
    """TIES: (0, 0) agrees, mean 2; (0, 1) elects +, 5 alone; (1, 0) has one; (1, 1) elects -, -3 alone."""
    deltas = torch.tensor([[[1.0, 5.0], [0.0, 2.0]], [[3.0, -4.0], [6.0, -3.0]]])
    weights = torch.ones(2)
    assert merge_deltas(deltas, weights, elect=True).tolist() == [[2, 5], [6, -3]]
    assert merge_deltas(deltas, torch.tensor([1.0, 2.0]), elect=True).tolist() == [[3.5, 5], [12, -6]]
    assert merge_deltas(deltas, torch.tensor([1.0, 2.0]), elect=False).tolist() == [[7, -3], [12, -4]]
    assert keep_largest(deltas[1], 0.5).tolist() == [[0, -4], [6, 0]]
    kept = keep_random(torch.ones(100, 100), 0.25, seed=3)
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert abs(kept.mean() - 1) < 0.06  # five standard deviations: sqrt(0.25 * 0.75 / 10000) / 0.25 is 0.017
    assert torch.equal(kept, keep_random(torch.ones(100, 100), 0.25, seed=3))
    assert not torch.equal(kept, keep_random(torch.ones(100, 100), 0.25, seed=4))


def test_ties_takes_the_largest_of_each_matrix_by_itself():
    """Rows 0 and 1 are one matrix, row 2 another whose elements are all smaller: half of each stays."""
    low, high = torch.eye(2), torch.tensor([[8.0, 1], [2, 9], [0.5, 0.1]])
    one = combine([(low, high)], [1.0], 2, Rule("ties", 0.5), [((0, 2),), ((2, 1),)])
    assert torch.allclose(one.high @ one.low, torch.tensor([[8.0, 0], [0, 9], [0.5, 0]]), atol=1e-6)


def test_unequal_targets_add_where_they_are(base: Path, tmp_path: Path):
    """One adapter of the attention, one of all with an own adapter for each expert, one shared by all experts."""
    parents = [
        random_adapter(tmp_path / "attention", 1, targets=PRESETS["attention"], experts="none"),
        random_adapter(tmp_path / "each", 2, experts="each", **FORMAT_2),
        random_adapter(tmp_path / "shared", 3, targets=("linear_fc1",), rank_pattern=["linear_fc1:2"]),
    ]
    report = combined(base, tmp_path / "out", parents, 32, weights=(1, 1, 1))
    arch = Arch.load(base)
    one, two, three, out = (Adapter(folder, arch) for folder in (*parents, tmp_path / "out"))
    assert (report.rank, out.info.experts) == (8, "each")
    assert {path: ranks for path, (ranks, _) in report.modules.items() if "layers.1" in path or "layers.3" in path} == {
        "decoder.layers.1.mlp.shared_experts.linear_fc1": 6,
        "decoder.layers.1.mlp.shared_experts.linear_fc2": 4,
        "decoder.layers.1.mlp.experts.linear_fc1": 6,
        "decoder.layers.1.mlp.experts.linear_fc2": 4,
        "decoder.layers.3.self_attention.linear_qkv": 8,
        "decoder.layers.3.self_attention.linear_proj": 8,
    }
    for path in out.modules:
        for expert in (0, 7) if ".mlp.experts." in path else (0,):
            expected = sum(delta(adapter, path, expert) for adapter in (one, two, three))
            assert (delta(out, path, expert) - expected).abs().max() < 1e-6, path


@pytest.mark.full
def test_training_goes_on_from_it(tmp_path: Path):
    """`lora.init_from`: it begins with the loss of a model into which both were merged, and every matrix learns."""
    base = tiny_hf_folder(tmp_path / "hf", torch_dtype="float32")
    combined(base, tmp_path / "both", two(tmp_path), 8)
    merge(base, tmp_path / "both", tmp_path / "of-merged" / "hf")
    for folder in (tmp_path, tmp_path / "of-merged"):
        convert(folder / "hf", folder / "nemo", context=False)
        build_packs(TokenStore(tiny_store(folder / "store", 20, 30, vocab_size=128)), SEQ_LENGTH)
    adopt(lora := LoraSettings(init_from=str(tmp_path / "both")))
    out = launch(tmp_path, "run", 2, lora, steps=2)
    fresh = launch(tmp_path / "of-merged", "run", 2, LoraSettings(rank=4), steps=1)
    without = launch(tmp_path, "of-base", 2, LoraSettings(rank=4), steps=1)
    first, expected, bases = (metrics(of)[0]["loss"] for of in (out, fresh, without))
    assert first == pytest.approx(expected, rel=1e-5)
    assert abs(first - bases) > 1e-3
    ours, began = (TorchDistReader(folder / "weights") for folder in (out / "adapter", tmp_path / "both"))
    assert ours.shapes == began.shapes
    for key in began.shapes:
        assert 0 < (ours.whole(key) - began.whole(key)).abs().max() < 0.01, key  # two steps of Adam at 1e-3


def test_it_is_an_adapter_as_any_other_and_names_its_parents(base: Path, tmp_path: Path):
    """Exported for vLLM, trained on, merged; certificate and card name the parents, and verify knows them."""
    parents = two(tmp_path)
    combined(base, tmp_path / "out", parents, 8, weights=(1, 0.25))
    export(tmp_path / "out", tmp_path / "vllm", "vllm")
    config = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})
    adopt(lora := LoraSettings(init_from=str(tmp_path / "out")))
    assert (lora.rank, lora.alpha, lora.rank_pattern) == (8, 8.0, [])
    merge(base, tmp_path / "out", tmp_path / "merged")
    told = read_certificate(tmp_path / "merged")["adapter"]["combined"]
    assert told["parents"] == [
        {"name": parent.name, "sha256": folder_sha256(parent), "weight": weight, "combined": None}
        for parent, weight in zip(parents, (1, 0.25), strict=True)
    ]
    assert verify(tmp_path / "merged", base, tmp_path / "out") == []
    assert f"combined by sum from parent1 (weight 1, `{folder_sha256(parents[0])}`), parent2 (weight 0.25" in (
        (tmp_path / "merged" / "model_card.md").read_text()
    )
    combined(base, tmp_path / "again", [tmp_path / "out", parents[0]], 8)
    grandparents = json.loads((tmp_path / "again" / "lora.json").read_text())["combined"]["parents"]
    assert grandparents[0]["combined"] == told


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({**FORMAT_2, "dora": True}, "adapter .*other is DoRA, whose lengths"),
    "moved biases": ({"router": "balance"}, "adapter .*other is router=balance"),
    "another base": ({"base_sha256": "0" * 64}, "adapter .*other was trained on another base"),
    "other routers": ({"router_sha256": "0" * 64}, "adapter .*other was trained on another checkpoint"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_add_up_is_refused_by_name(case: str, base: Path, tmp_path: Path):
    info, message = REFUSED[case]
    good = random_adapter(tmp_path / "good", 1)

    def biases(tensors: dict[str, torch.Tensor]) -> None:
        if info.get("router") == "balance":
            keys = (f"module.decoder.layers.{number}.mlp.router.expert_bias" for number in (1, 4))
            tensors.update({key: torch.zeros(8) for key in keys})

    other = write_adapter(tmp_path / "other", biases, config=FP32, **info)
    with pytest.raises(UserError, match=message):
        combined(base, tmp_path / "out", [good, other], 8)
    assert not (tmp_path / "out").exists()


WRONG: dict[str, tuple[list[str], str]] = {
    "one weight for two": (["--weights", "1"], "give 2 numbers other than 0"),
    "a weight of 0": (["--weights", "1,0"], "give 2 numbers other than 0"),
    "a weight that is none": (["--weights", "1,nan"], "give 2 numbers other than 0"),
    "no rank": (["--rank", "0"], "--rank 0"),
    "ties without density": (["--method", "ties"], "requires --density"),
    "too dense": (["--method", "dare", "--density", "1.5"], "requires --density above 0 and at most 1"),
    "a sum with density": (["--density", "0.5"], "leave it out"),
    "a seed without chance": (["--seed", "1"], "--method dare and dare-ties"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_refused(case: str, monkeypatch: pytest.MonkeyPatch):
    options, message = WRONG[case]
    monkeypatch.setattr("sys.argv", ["combine_adapters.py", "pico", "out", "one", "two", *options])
    with pytest.raises(UserError, match=message):
        main()


def test_the_command_shows_each_layers_error(base: Path, tmp_path: Path, monkeypatch: Any, capsys: Any):
    parents = two(tmp_path, targets=("in_proj",))
    names = [str(path) for path in (base, tmp_path / "out", *parents)]
    monkeypatch.setattr("sys.argv", ["combine_adapters.py", *names, "--rank", "4", "--weights", "1,-1"])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["module", "ranks", "in", "error", "of", "rank", "4"]
    assert lines[1].split()[:2] == [IN_PROJ, "8"]
    assert len(lines) == 4
    assert "adapter of rank 4 for 2 modules, from 2 adapters; largest error" in lines[3]


peft = pytest.importorskip("peft")

APART = ["o_proj", "in_proj", "up_proj", "down_proj", "lm_head"]
"""Modules that PEFT and Megatron cut alike; PEFT adapts q, k and v apart, and so it truncates them apart."""


def in_peft(base: Path, folder: Path, names: Sequence[str], targets: list[str]) -> Any:
    """A PEFT model with two adapters of rank 4 and scale 1.5, saved to `folder`."""
    model: Any = load_reference(base, torch.float32)
    made = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    model = peft.get_peft_model(model, made, adapter_name=names[0])
    model.add_adapter(names[1], made)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


CASES = {
    "svd": (APART, 5, Rule(), {}),
    "svd exactly": ([*APART, "q_proj", "k_proj", "v_proj"], 24, Rule(), {}),  # q, k and v: three A of rank 4 each
    "ties_svd": (APART, 6, Rule("ties", 0.4), {"density": 0.4}),
    "dare_linear_svd": (APART, 6, Rule("dare", 0.4), {"density": 0.4}),
    "dare_ties_svd": (APART, 6, Rule("dare-ties", 0.4), {"density": 0.4}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_peft_combines(case: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The logits of `add_weighted_adapter`. PEFT's random elements are ours here: a mask for all calls."""
    targets, rank, rule, options = CASES[case]

    def mask(delta: torch.Tensor, density: float, *_: Any, **__: Any) -> torch.Tensor:
        return keep_random(delta, density, seed=delta.shape[0])

    monkeypatch.setattr("peft.utils.merge_utils.random_pruning", mask)
    monkeypatch.setattr("conversion.adapters.combination.keep_random", mask)
    model = in_peft(base, tmp_path, ("first", "second"), targets)
    kind = case.split()[0]
    model.add_weighted_adapter(["first", "second"], [0.8, 0.6], "both", kind, svd_rank=rank, **options)
    model.set_adapter("both")
    combine_adapters(base, tmp_path / "out", [tmp_path / "first", tmp_path / "second"], [0.8, 0.6], rank, rule)
    merge(base, tmp_path / "out", tmp_path / "merged")
    expected, found = logits(model), logits(load_reference(tmp_path / "merged", torch.float32))
    assert (found - expected).abs().max() < 1e-5
    assert (expected - logits(load_reference(base, torch.float32))).abs().max() > 0.05
