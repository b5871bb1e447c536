"""The progress line, the learning rate that it shows, a run that diverges or runs out of memory."""

import json
from types import SimpleNamespace

import pytest
import torch

from nano3.cli import UserError
from nano3.training.divergence import Divergence
from nano3.training.memory_advice import MemoryAdvice
from nano3.training.progress import Progress, expected, line


def trainer(step, rate, **metrics):
    scheduler = SimpleNamespace(scheduler=SimpleNamespace(get_last_lr=lambda: [rate]))
    return SimpleNamespace(
        global_step=step,
        global_rank=3,
        is_global_zero=True,
        world_size=2,
        callback_metrics=metrics,
        lr_scheduler_configs=[scheduler],
        datamodule=SimpleNamespace(
            documents_in_step=lambda number: [60, 40 + number], global_batch_size=4, seq_length=50
        ),
    )


@pytest.fixture
def make(tmp_path):
    """Builds a `Progress` for 20 steps; a step has 3e6 FLOPs a token."""
    details = SimpleNamespace(start=lambda _: None, stop=lambda _: {"adapter_norm": 7.0})

    def build(divergence=0.0, every=10):
        built = Progress(str(tmp_path), every, 20, lambda documents: 3e6 * sum(documents), divergence, details)
        built.on_train_start(trainer(0, 0.0), None)
        return built

    return build


def one_step(progress, step, used, then, **metrics):
    """A step taken with learning rate `used`; when it ends, the scheduler has moved on to `then`."""
    progress.on_train_batch_start(trainer(step - 1, used), None)
    progress.on_train_batch_end(trainer(step, then, **metrics), None, None, None, 0)


def rows(folder):
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_written_with_the_rate_that_it_used(make, tmp_path, capsys):
    progress = make()
    one_step(progress, 1, used=0.5, then=0.25, reduced_train_loss=2.0, grad_norm=3.0)
    one_step(progress, 2, used=0.25, then=0.125, reduced_train_loss=1.0, grad_norm=3.0)
    assert [(row["step"], row["lr"], row["loss"], row["tokens"]) for row in rows(tmp_path)] == [
        (1, 0.5, 2.0, 100),
        (2, 0.25, 1.0, 101),
    ]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1  # the first step, then every tenth
    assert printed[0].startswith("step  1/20  loss 2.0000  lr 5.00e-01  grad norm 3.000")


def test_what_a_row_says_of_speed_padding_and_others(make, tmp_path):
    progress = make()
    values = {"loss/math": 4.0, "loss/code": float("nan"), "router_bias_norm": 0.5, "validation_loss": 9.0}
    one_step(progress, 1, 0.5, 0.5, reduced_train_loss=2.0, grad_norm=3.0, **values)
    (row,) = rows(tmp_path)
    assert row["padding_share"] == pytest.approx(1 - 100 / 200)
    assert row["tokens_per_second"] == pytest.approx(100 / row["seconds"])
    assert row["tokens_per_second_per_gpu"] == pytest.approx(50 / row["seconds"])
    assert row["tflops_per_gpu"] == pytest.approx(3e6 * 100 / row["seconds"] / 2 / 1e12)
    assert row["adapter_norm"] == 7.0
    assert row["loss/math"] == 4.0
    assert row["router_bias_norm"] == 0.5
    # A source without tokens has no loss; a validation's result belongs to the row of its validation.
    assert "loss/code" not in row
    assert "validation_loss" not in row


def test_details_come_with_the_first_step_every_tenth_and_the_last(make, tmp_path):
    progress = make()
    for step in range(1, 21):
        one_step(progress, step, 0.5, 0.5, reduced_train_loss=1.0, grad_norm=1.0)
    assert [row["step"] for row in rows(tmp_path) if "adapter_norm" in row] == [1, 10, 20]


@pytest.mark.parametrize("metrics", [{"reduced_train_loss": float("nan"), "grad_norm": 1.0},
                                     {"reduced_train_loss": 1.0, "grad_norm": float("inf")}])  # fmt: skip
def test_a_loss_that_is_no_number_stops_the_run_and_says_what_to_change(make, metrics):
    with pytest.raises(UserError, match=r"step 7: .*diverged.*train\.lr"):
        one_step(make(every=1), 7, used=0.5, then=0.25, **metrics)


def feed(rule, losses, start=1):
    for step, loss in enumerate(losses, start):
        rule.check(step, loss, 1.0, 1e-3)


def test_a_loss_that_stays_high_stops_the_run():
    rule = Divergence(3.0)
    feed(rule, [2.0] * 5 + [1.0] * 10)  # first level 2, lowest 1: the limit is 3
    feed(rule, [3.1] * 19, start=16)
    with pytest.raises(UserError, match=r"step 35: the loss is 3\.1000, for 20 steps above 3\.0000.*train\.lr"):
        rule.check(35, 3.1, 1.0, 1e-3)


def test_what_is_no_divergence():
    spikes = [2.0] * 5 + ([9.0] * 19 + [1.0]) * 3  # comes back before 20 steps are over
    by_heart = [2.0] * 5 + [0.01] * 10 + [0.5] * 100  # fifty times the lowest, but below where it began
    for losses in (spikes, by_heart):
        feed(Divergence(3.0), losses)
    feed(Divergence(0.0), [1.0] * 10 + [50.0] * 100)  # switched off


def test_a_resumed_run_judges_as_the_uninterrupted_one(make):
    first = make(divergence=3.0)
    feed(first.divergence, [1.0] * 5 + [4.0] * 10)
    second = make(divergence=3.0)
    second.load_state_dict(first.state_dict())
    feed(second.divergence, [4.0] * 9, start=16)
    with pytest.raises(UserError, match="step 25"):
        second.divergence.check(25, 4.0, 1.0, 1e-3)


@pytest.mark.parametrize("change", [{"recent": [1.0] * 6}, {"first": "high"}, {"bad": -1}])
def test_other_levels_than_a_run_writes_are_refused(change):
    levels = Divergence(2.0)
    with pytest.raises(UserError, match="levels of the loss"):
        levels.load_state_dict(levels.state_dict() | change)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("Tried to allocate 2.00 GiB.\nmore"),
                                   MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
def test_out_of_memory_says_what_to_change(error):
    advice = MemoryAdvice("lower train.seq_length (4096)")
    with pytest.raises(UserError, match=r"on rank 3 in step 5: lower train\.seq_length \(4096\)") as raised:
        advice.on_exception(trainer(4, 0.0), None, error)
    assert raised.value.__cause__ is error
    advice.on_exception(trainer(4, 0.0), None, RuntimeError("something else"))  # is not ours to explain


def test_the_line_in_numbers():
    assert line(5, 300, 0.5, 1e-3, 2.0, 1234.4, 61.0) == (
        "step   5/300  loss 0.5000  lr 1.00e-03  grad norm 2.000  1234 tokens/s  1m01s left"
    )
    # After the first step, which also compiles, nobody knows.
    assert line(1, 300, 0.5, 1e-3, 2.0, 1234.4, None).endswith("1234 tokens/s")


def test_a_validation_loss_that_is_no_number_ends_the_run_on_every_rank(make, tmp_path, capsys):
    progress = make()
    progress.on_validation_end(trainer(2, 0.1, validation_loss=1.5, validation_accuracy=0.5), None)
    assert rows(tmp_path)[-1]["validation_accuracy"] == 0.5
    assert "validation loss 1.5000" in capsys.readouterr().out
    for first in (True, False):
        now = trainer(3, 0.1, validation_loss=float("nan"), validation_accuracy=0.0)
        now.is_global_zero = first
        with pytest.raises(UserError, match="step 3: the validation loss is not a number"):
            progress.on_validation_end(now, None)


def test_the_time_of_a_run_is_told_from_its_first_steps():
    assert expected([1.0, 3.0], 90) == "time        about 3 min for 90 steps, from 2.00 s a step in the first ones"
    assert expected([0.5], 10).startswith("time        about 5 s for 10 steps")
    assert expected([36.0], 250).startswith("time        about 2.5 h for 250 steps")
