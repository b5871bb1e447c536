"""Validation: exact over the whole set on every layout; the best adapter kept; a run that improves no more stopped."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conversion.hf_to_nemo import convert
from conversion.merge_lora import merge
from data_prep.epochs import LOGGED_SOURCES, OTHER_SOURCES, Once, logged_sources, validation_plan
from data_prep.packing import PackedDataset, build_packs
from finetune.eval_only import evaluate, evaluation_run
from finetune.recipe_file import keep
from finetune.settings import LogSettings, LoraSettings, Run, Settings, TrainSettings
from launch.plan.layout import Layout
from nano3.cli import UserError
from nano3.token_store import TokenStore
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_run import metrics, run, write_run
from tests.helpers.token_reference import figures, weighted_store

SEQ_LENGTH = 64
LAYOUTS = {"tp2": Layout(tp=2), "ep2": Layout(ep=2), "pp2": Layout(pp=2), "tp2-chunked": Layout(tp=2)}
MEASURED = {"step", "loss", "tokens", "validation_loss", "validation_accuracy"}
CHUNK = 20
"""Positions whose logits exist at a time, where the loss is in chunks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a store of 11 packs, and a run on one rank that stopped early; its validation store is its data."""
    path = tmp_path_factory.mktemp("validation")
    convert(tiny_hf_folder(path / "hf", dtypes={"": "F32"}), path / "nemo", context=False)
    store = weighted_store(path / "store", documents=40, shortest=1, longest=30)
    assert build_packs(store, SEQ_LENGTH)["packs"] == 11  # no multiple of the 4 packs of a step
    settings = Settings(
        lora=LoraSettings(rank=4, alpha=8.0),
        train=TrainSettings(
            steps=9, warmup=0, lr=0.02, global_batch=4, seq_length=SEQ_LENGTH, validate_every=1, patience=2,
            min_improvement=100.0,
        ),
        log=LogSettings(tensorboard=False, wandb="off"),
    )  # fmt: skip
    run(write_run(path, "run", 1, settings, validate=True))
    return path


def validations(folder: Path) -> list[dict]:
    return [row for row in metrics(folder / "run") if "validation_loss" in row]


def adapter(folder: Path, name: str) -> dict:
    return json.loads((folder / "run" / name / "lora.json").read_text())


def same(ours: dict, expected: dict) -> None:
    """Losses to FP32's precision; the accuracy is a share of the same tokens."""
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=1e-6 if "accuracy" in name else 2e-6), name


def test_patience_stops_the_run_and_the_best_adapter_is_kept(folder):
    # The first validation is an improvement on nothing; the next two do not improve by 100.
    assert [row["step"] for row in validations(folder)] == [1, 2, 3]
    assert max(row["step"] for row in metrics(folder / "run")) == adapter(folder, "adapter")["steps"] == 3
    best = min(validations(folder), key=lambda row: row["validation_loss"])
    assert adapter(folder, "best")["steps"] == best["step"]
    assert adapter(folder, "best")["validation_loss"] == best["validation_loss"]
    log = (folder / "run" / "logs" / "rank0.log").read_text()
    assert "stopped after step 3" in log
    assert "in 2 validations (train.patience)" in log


def test_validation_is_what_transformers_says_of_the_documents(folder, tmp_path):
    merge(folder / "hf", folder / "run" / "adapter", tmp_path / "merged")
    expected = figures(tmp_path / "merged", TokenStore(folder / "store"))
    same(validations(folder)[-1], expected)
    assert expected["validation_accuracy"] > 0
    assert set(expected) == {"validation_loss", "validation_accuracy", "validation_loss/tales", "validation_loss/sums"}


@pytest.mark.full
def test_an_evaluation_gives_the_same_figures_on_every_layout(folder, ranks):
    run = Run.from_json((folder / "run.json").read_text())
    expected = {name: value for name, value in validations(folder)[-1].items() if name.startswith("validation_")}
    for name, layout in LAYOUTS.items():
        train = replace(run.settings.train, loss_chunk=CHUNK if "chunked" in name else 0)
        settings = replace(run.settings, layout=layout, train=train)
        there = replace(run, out=str(folder / name), ranks_per_node=2, settings=settings)
        keep(there.recipe, Path(there.out))
        path = folder / f"{name}.json"
        path.write_text(evaluation_run(there, str(folder / "run" / "adapter")).to_json())
        assert ranks.run(path) == [0, 0], name
        results = json.loads((folder / name / "results.json").read_text())
        same(results, expected)
        assert (results["packs"], results["adapter"]) == (11, str((folder / "run" / "adapter").resolve()))


@pytest.mark.full
def test_a_loss_in_chunks_trains_and_validates_as_a_whole_one(folder):
    """The gradients' norm to 1e-4: at a rate of 0.02 Adam, which divides by small gradients, shows rounding."""
    settings = Run.from_json((folder / "run.json").read_text()).settings
    chunked = replace(settings, train=replace(settings.train, loss_chunk=CHUNK))
    rows = metrics(run(write_run(folder, "chunked", 1, chunked, validate=True)))
    whole = metrics(folder / "run")
    assert len(rows) == len(whole) > 3
    for ours, expected in zip(rows, whole, strict=True):
        same(ours, {key: expected[key] for key in MEASURED & set(expected)})
        if "grad_norm" in expected:
            assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.full
def test_an_evaluation_of_the_base_and_of_another_adapter(folder, capfd):
    run = Run.from_json((folder / "run.json").read_text())
    assert evaluate(evaluation_run(replace(run, out=str(folder / "base-only")), "none")) == 0
    results = json.loads((folder / "base-only" / "evaluation" / "results.json").read_text())
    same(results, figures(folder / "hf", TokenStore(folder / "store")))
    assert results["adapter"] is None
    run.settings.lora.alpha = 9.0
    assert evaluate(evaluation_run(replace(run, out=str(folder / "other")), str(folder / "run" / "adapter"))) == 2
    assert "alpha is 8.0 there and 9.0 here" in capfd.readouterr().err


def test_an_evaluation_needs_a_store_and_an_adapter(folder, tmp_path):
    run = Run.from_json((folder / "run.json").read_text())
    with pytest.raises(UserError, match="--eval-only needs --validation"):
        evaluation_run(replace(run, validation=None), None)
    with pytest.raises(UserError, match=r"nothing has no lora\.json"):
        evaluation_run(run, str(tmp_path / "nothing"))
    assert evaluation_run(run, None).adapter == str(folder / "run" / "adapter")
    assert evaluation_run(run, "none").adapter is None


@pytest.mark.parametrize(
    ("packs", "ranks", "most", "plan"),
    [
        (8, 1, 8, (1, 8)),
        (11, 1, 4, (3, 4)),
        (9, 1, 4, (3, 3)),
        (10, 2, 64, (1, 5)),
        (1, 4, 32, (1, 1)),
        (17, 2, 2, (5, 2)),
    ],
)
def test_validation_takes_every_pack_with_little_filling(packs, ranks, most, plan):
    assert validation_plan(packs, ranks, most) == plan
    steps, micro_batches = plan
    assert packs <= steps * micro_batches * ranks < packs + ranks * steps
    assert micro_batches <= most


def test_every_pack_once_then_padding(folder):
    packs = PackedDataset(folder / "store", SEQ_LENGTH)
    held = Once(packs, 12)
    assert len(held) == 12
    assert all(np.array_equal(held[number]["tokens"], packs[number]["tokens"]) for number in range(11))
    assert held[11]["loss_mask"].sum() == 0
    assert not {-1} ^ set(held[11]["source"].tolist())


def test_many_sources_share_the_last_name():
    counts = {f"s{number}": {"supervised_tokens": number} for number in range(40)}
    packs = SimpleNamespace(store=SimpleNamespace(source_names=list(counts), manifest={"sources": counts}))
    names, places = logged_sources([packs])
    assert len(names) == LOGGED_SOURCES
    assert names[:2] == ["s39", "s38"]
    assert [names[places[number]] for number in (39, 9, 8, 0)] == ["s39", "s9", OTHER_SOURCES, OTHER_SOURCES]
    assert places[-1] == -1  # of padding


def trainer(step: int, loss: float) -> SimpleNamespace:
    from lightning.pytorch.trainer.states import TrainerFn

    numbers = {"validation_loss": torch.tensor(loss), "validation_accuracy": torch.tensor(0.5)}
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    return SimpleNamespace(
        state=state, sanity_checking=False, callback_metrics=numbers, global_step=step, is_global_zero=True,
        should_stop=False, callbacks=[],
    )  # fmt: skip


@pytest.fixture
def kept(monkeypatch) -> list[tuple[str, int]]:
    """What is saved instead of adapters: folder and step."""
    from nano3.training import validation

    saved: list[tuple[str, int]] = []
    monkeypatch.setattr(validation, "_of_rank_0", float)
    monkeypatch.setattr(validation, "adapter_facts", lambda trainer: {"steps": trainer.global_step})
    monkeypatch.setattr(validation, "save_trained", lambda *args: saved.append((str(args[2]), args[3]["steps"])))
    return saved


@pytest.mark.parametrize(
    ("losses", "least", "stops", "best"),
    [
        ([3.0, 2.0, 2.5, 2.4, 1.0], 0.0, 4, 2),
        ([3.0, 2.0, 2.5, 1.9, 2.1, 2.2], 0.0, 6, 4),
        ([3.0, 2.95, 2.9, 2.0], 0.5, 3, 3),  # better, and kept, but not by enough to go on for
        ([3.0, float("nan"), float("nan")], 0.0, 3, 1),
        ([3.0, 2.0, 1.0, 0.5], 0.0, None, 4),
    ],
)
def test_patience_by_hand(kept, losses, least, stops, best):
    from nano3.training.validation import Validation

    callback = Validation("best", patience=2, min_improvement=least)
    for step, loss in enumerate(losses, 1):
        state = callback.state_dict()
        callback = Validation("best", patience=2, min_improvement=least)  # as a run that goes on would have it
        callback.load_state_dict(state)
        now = trainer(step, loss)
        callback.on_validation_end(now, None)
        assert now.should_stop == (step == stops)
        if now.should_stop:
            break
    assert kept[-1] == ("best", best)
    assert (stops is None) == (step == len(losses) and not now.should_stop)


def test_a_checkpoint_sets_nothing_else_of_the_validation():
    from nano3.training.validation import Validation

    callback = Validation("best", patience=2, min_improvement=0.0)
    callback.load_state_dict(callback.state_dict() | {"patience": 0})
    assert callback.patience == 2
    with pytest.raises(UserError, match="waited is -1"):
        callback.load_state_dict(callback.state_dict() | {"waited": -1})
