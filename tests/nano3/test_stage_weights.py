"""Stages of a turn have weights in the loss: given, or by what is wrong; alike on all ranks and after a kill."""

import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conversion.hf_to_nemo import convert
from data_prep.packing import build_packs
from data_prep.store import StoreWriter
from finetune.settings import CheckpointSettings, LogSettings, LoraSettings, Settings, StageSettings, TrainSettings
from launch.plan.layout import Layout
from nano3.cli import UserError
from nano3.outputs import fresh_output
from nano3.stage_weights import FLOOR, LEAST, NAMES, UNTIL, StageWeights
from nano3.token_store import KIND, TokenStore, tokenizer_sha256
from tests.helpers.rank_server import RankServer
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_run import metrics, write_run

FIXED = [1.0, 1.0, 0.5, 2.0, 3.0]
STEPS = 24


def counts(**stages: int) -> torch.Tensor:
    return torch.tensor([stages.get(name, 0) for name in NAMES])


def test_dynamic_weights_by_hand():
    """Of 90 tokens of EXECUTE 9 are wrong and of 10 of VERIFY 4, in every step: 0.1 and 0.4, with the floor 0.11 and
    0.41; their mean by share is 0.9 * 0.11 + 0.1 * 0.41 = 0.14."""
    weights = StageWeights([1.0] * 5, exponent=0.5)
    for step in range(UNTIL):
        assert weights.weights.tolist() == [1.0] * len(NAMES), step
        weights.update(counts(none=7, execute=90, verify=10, other=5), counts(execute=81, verify=6))
    execute, verify = (0.11 / 0.14) ** 0.5, (0.41 / 0.14) ** 0.5
    mean = 0.9 * execute + 0.1 * verify
    expected = [1, 1, 1, execute / mean, verify / mean, 1, 1]
    assert weights.weights.tolist() == pytest.approx(expected, rel=1e-12)
    assert 0.9 * weights.weights[3] + 0.1 * weights.weights[4] == pytest.approx(1, rel=1e-12)
    again = StageWeights([1.0] * 5, exponent=0.5)
    again.restore(weights.state())
    for one in (weights, again):
        one.update(counts(execute=90, verify=10), counts(execute=90, verify=0))
    assert weights.state() == again.state()
    assert float(weights.errors[4]) == pytest.approx(0.9 * 0.4 + 0.1, rel=1e-12)


def test_a_stage_without_errors_keeps_a_quarter_and_given_weights_multiply():
    weights = StageWeights(FIXED, exponent=1.0)
    for _ in range(UNTIL):
        weights.update(counts(execute=50, answer=50), counts(execute=50))
    relative = FLOOR / ((1 + 2 * FLOOR) / 2)  # 0.0196: clipped
    assert relative < LEAST
    answer = (1 + FLOOR) / ((1 + 2 * FLOOR) / 2)
    mean = (LEAST + answer) / 2
    assert weights.weights[[3, 5]].tolist() == pytest.approx([0.5 * LEAST / mean, 3 * answer / mean], rel=1e-12)


def test_fixed_weights_never_move():
    weights = StageWeights(FIXED, exponent=0)
    for _ in range(UNTIL + 3):
        weights.update(counts(execute=50, answer=50), counts(execute=50))
    assert weights.weights.tolist() == [1.0, *FIXED, 1.0]


@pytest.mark.full
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": [1.0] * 6}, "weights"),
        ({"errors": [float("nan")] * 7}, "errors"),
        ({"step": True}, "step"),
        ({"seen": 1}, "seen"),
    ],
)
def test_a_checkpoint_with_other_weights_is_refused(change, says):
    weights = StageWeights([1.0] * 5, 0.5)
    state = weights.state()
    with pytest.raises(UserError, match=f"weights of stages: {says}"):
        weights.restore(state | change)
    assert weights.state() == state


def test_the_gradient_is_that_of_the_stages_losses_summed_by_hand():
    """FP64: one micro batch of 40 tokens of all stages, two sources and weights of the data besides."""
    from nano3.loss import LOSS, TOKENS, WEIGHT, TokenLoss

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 11, dtype=torch.float64, generator=generator, requires_grad=True)
    labels, stage = torch.randint(0, 11, (40,), generator=generator), torch.arange(40) % 8
    mask = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0])[torch.arange(40) % 5].double()
    source = torch.arange(40) // 20
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    loss = TokenLoss(sources=2, validation=False, stages=StageWeights(FIXED, exponent=0))
    total, *_ = loss.forward({"loss_mask": mask, "source": source, "stage": stage.byte()}, losses)
    table = loss.sums[:2].sum(0)
    (gradient,) = torch.autograd.grad(total / table[WEIGHT], logits, retain_graph=True)

    by_number = [1.0, *FIXED, 1.0, 1.0]  # stages 6 and 7 weigh as none does
    sums = [(mask * losses)[stage == number].sum() for number in range(8)]
    weights = [mask[stage == number].sum() for number in range(8)]
    by_hand = sum(w * one for w, one in zip(by_number, sums, strict=True)) / sum(
        w * one for w, one in zip(by_number, weights, strict=True)
    )
    (expected,) = torch.autograd.grad(by_hand, logits)
    assert float((gradient - expected).abs().max()) < 1e-10
    assert float(table[LOSS] / table[WEIGHT]) == pytest.approx(float(by_hand), abs=1e-12)
    rows = loss.sums[2:]
    assert rows[3, LOSS].item() == pytest.approx(sums[3].item())
    assert rows[6, TOKENS] == (mask[stage >= 6] > 0).sum()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a store whose tokens have stages 0 to 5; the answers' tokens are the easiest: all the same."""
    folder = tmp_path_factory.mktemp("stages")
    source = tiny_hf_folder(folder / "hf", dtypes={"": "F32"}, hybrid_override_pattern="MEM*E")
    convert(source, folder / "nemo", context=False)
    rng = np.random.default_rng(0)
    with fresh_output(folder / "store", KIND) as inside:
        writer = StoreWriter(inside)
        for _ in range(40):
            tokens, stages = rng.integers(3, 128, 24), np.repeat([0, 1, 2, 3, 4, 5], 4).astype(np.uint8)
            tokens[20:] = 5
            mask = (rng.random(24) < 0.8).astype(np.uint8)
            mask[0], mask[-1] = 0, 1
            writer.add(tokens, mask, "traces", stages=stages)
        facts = SimpleNamespace(sha256=tokenizer_sha256(source), vocab_size=128)
        writer.finish(facts)  # type: ignore[arg-type]
    build_packs(TokenStore(folder / "store"), 64)
    return folder


def settings(layout: Layout, weights: str = "dynamic", steps: int = STEPS) -> Settings:
    return Settings(
        layout=layout,
        lora=LoraSettings(rank=4),
        train=TrainSettings(steps=steps, warmup=1, lr=1e-2, global_batch=4, seq_length=64),
        stages=StageSettings(weights=weights),
        checkpoint=CheckpointSettings(every=2, minutes=0),
        log=LogSettings(tensorboard=False, wandb="off"),
    )


def weights_of(out: Path) -> np.ndarray:
    return np.array([[row[f"stage_weight/{name}"] for name in NAMES] for row in metrics(out)])


@pytest.mark.full
def test_weights_are_equal_on_one_two_and_four_ranks_and_after_a_kill(folder: Path, ranks: RankServer):
    found = {}
    for world, layout in ((1, Layout(ep=1)), (2, Layout(ep=2)), (4, Layout(tp=2, ep=2))):
        path = write_run(folder, f"ranks{world}", world, settings(layout))
        assert ranks.run(path) == [0] * world, (folder / f"ranks{world}/logs/rank0.log").read_text()[-3000:]
        found[world] = weights_of(folder / f"ranks{world}")
    assert found[1] == pytest.approx(found[2], rel=1e-9)
    assert found[1] == pytest.approx(found[4], rel=1e-9)
    assert found[1][UNTIL - 2].tolist() == [1.0] * len(NAMES)
    answer, others = found[1][-1][5], found[1][-1][1:5]
    assert answer < min(others), "what is learned first weighs least"
    path = write_run(folder, "killed", 2, settings(Layout(ep=2)))
    assert -signal.SIGKILL in ranks.run(path, FAULT=f"kill:{UNTIL + 1}")
    assert ranks.run(path) == [0, 0]
    assert "resumed at step" in (folder / "killed/logs/rank0.log").read_text()
    assert weights_of(folder / "killed").tolist() == found[2].tolist()
    assert [row["loss"] for row in metrics(folder / "killed")] == [row["loss"] for row in metrics(folder / "ranks2")]


@pytest.mark.full
def test_data_without_stages_is_refused(folder: Path, ranks: RankServer, tmp_path: Path):
    """The same store, its stages taken away."""
    with fresh_output(tmp_path / "store", KIND) as inside:
        writer, store = StoreWriter(inside), TokenStore(folder / "store")
        for number in range(20):
            tokens, mask = store.document(number)
            writer.add(tokens, (mask > 0).astype(np.uint8), "plain")
        writer.finish(SimpleNamespace(sha256=store.manifest["tokenizer"]["sha256"], vocab_size=128))  # type: ignore[arg-type]
    build_packs(TokenStore(tmp_path / "store"), 64)
    for part in ("hf", "nemo"):
        (tmp_path / part).symlink_to(folder / part)
    path = write_run(tmp_path, "plain", 1, settings(Layout(ep=1), "fixed", steps=2))
    assert ranks.run(path) == [1]
    assert "no token of the first 2 steps has a stage" in (tmp_path / "plain/logs/rank0.log").read_text()
