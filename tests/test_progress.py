"""The progress line, the learning rate that it shows, and a run that diverges."""

import json
from types import SimpleNamespace

import pytest

from nano3.cli import UserError
from nano3.progress import Progress, line


def trainer(step, rate, **metrics):
    scheduler = SimpleNamespace(scheduler=SimpleNamespace(get_last_lr=lambda: [rate]))
    return SimpleNamespace(
        global_step=step,
        is_global_zero=True,
        callback_metrics=metrics,
        lr_scheduler_configs=[scheduler],
        datamodule=SimpleNamespace(tokens_in_step=lambda number: 100 + number),
    )


def one_step(progress, step, used, then, **metrics):
    """A step taken with learning rate `used`; when it ends, the scheduler has moved on to `then`."""
    progress.on_train_batch_start(trainer(step - 1, used))
    progress.on_train_batch_end(trainer(step, then, **metrics), None, None, None, 0)


def test_a_step_is_written_with_the_rate_that_it_used(tmp_path, capsys):
    progress = Progress(str(tmp_path), every=10, steps=20)
    progress.on_train_start(trainer(0, 0.0), None)
    one_step(progress, 1, used=0.5, then=0.25, reduced_train_loss=2.0, grad_norm=3.0)
    one_step(progress, 2, used=0.25, then=0.125, reduced_train_loss=1.0, grad_norm=3.0)
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["lr"], row["loss"], row["tokens"]) for row in rows] == [
        (1, 0.5, 2.0, 100),
        (2, 0.25, 1.0, 101),
    ]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1  # the first step, then every tenth
    assert printed[0].startswith("step  1/20  loss 2.0000  lr 5.00e-01  grad norm 3.000")


@pytest.mark.parametrize("metrics", [{"reduced_train_loss": float("nan"), "grad_norm": 1.0},
                                     {"reduced_train_loss": 1.0, "grad_norm": float("inf")}])  # fmt: skip
def test_a_run_that_diverges_stops_and_says_what_to_change(tmp_path, metrics):
    progress = Progress(str(tmp_path), every=1, steps=20)
    progress.on_train_start(trainer(0, 0.0), None)
    with pytest.raises(UserError, match=r"step 7: .*diverged.*train\.lr"):
        one_step(progress, 7, used=0.5, then=0.25, **metrics)


def test_the_line_in_numbers():
    assert line(5, 300, 0.5, 1e-3, 2.0, 1234.4, 61.0) == (
        "step   5/300  loss 0.5000  lr 1.00e-03  grad norm 2.000  1234 tokens/s  1m01s left"
    )
