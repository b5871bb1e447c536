"""Learning rates against tables worked out by hand."""

import math

import pytest
import torch

from finetune.checks import check_run
from finetune.settings import Run, Settings, TrainSettings
from nano3.arch import PRESETS, Arch
from nano3.cli import UserError
from nano3.training.rates import factor, group_rates


def rates(kind, steps=10, warmup=3, decay=4, floor=0.1):
    return [factor(step, kind, steps, warmup, decay, floor) for step in range(steps + 1)]


WARMUP = [0.25, 0.5, 0.75]


def test_constant():
    assert rates("constant") == pytest.approx([*WARMUP, *[1.0] * 8])


def test_wsd():
    # Stable from step 3, decay over steps 6 to 10: p = 0, 1/4, 1/2, 3/4, 1 and 0.1 + 0.9 * (1 - sqrt(p)).
    decay = [1.0, 0.55, 0.1 + 0.9 * (1 - 0.70710678), 0.1 + 0.9 * (1 - 0.86602540), 0.1]
    assert rates("wsd") == pytest.approx([*WARMUP, 1.0, 1.0, 1.0, *decay])


def test_cosine():
    # Seven steps from 1 to 0.1: the middle of an even number of steps is the mean of both ends.
    assert rates("cosine")[:4] == pytest.approx([*WARMUP, 1.0])
    assert rates("cosine")[-1] == pytest.approx(0.1)
    assert rates("cosine", steps=11)[7] == pytest.approx(0.55)
    # A quarter of the way: (1 + cos 45°) / 2 = 0.853553.
    assert rates("cosine", steps=11)[5] == pytest.approx(0.1 + 0.9 * 0.85355339)


def test_without_warmup_and_floor():
    assert rates("wsd", steps=4, warmup=0, decay=4, floor=0.0) == pytest.approx(
        [1.0, 0.5, 1 - 0.70710678, 1 - 0.86602540, 0.0]
    )
    assert rates("cosine", steps=2, warmup=0, floor=0.0) == pytest.approx([1.0, 0.5, 0.0])


def test_after_the_last_step_the_rate_stays_where_it_ended():
    assert factor(25, "cosine", 10, 3, 0, 0.1) == pytest.approx(0.1)
    assert factor(25, "wsd", 10, 3, 4, 0.1) == pytest.approx(0.1)


def two_groups():
    """A group with the common peak and one with four times of it, as LoRA+ gives B."""
    optimizer = torch.optim.SGD(
        [
            {"params": [torch.nn.Parameter(torch.zeros(1))], "max_lr": 0.01},
            {"params": [torch.nn.Parameter(torch.zeros(1))], "max_lr": 0.04},
        ],
        lr=0.01,
    )
    return optimizer, group_rates(optimizer, lambda step: factor(step, "cosine", 8, 2, 0, 0.1))


def trace(optimizer, scheduler, steps):
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


def test_groups_keep_their_ratio_in_every_step():
    seen = trace(*two_groups(), steps=9)
    assert [slow for slow, _ in seen[:3]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert seen[-1] == pytest.approx([0.001, 0.004])
    assert all(math.isclose(fast, 4 * slow) for slow, fast in seen)


def test_a_restored_schedule_goes_on_exactly():
    whole = trace(*two_groups(), steps=8)
    optimizer, scheduler = two_groups()
    trace(optimizer, scheduler, steps=5)
    state = scheduler.state_dict()
    fresh_optimizer, fresh = two_groups()
    fresh.load_state_dict(state)
    assert trace(fresh_optimizer, fresh, steps=3) == whole[5:]


def test_a_rank_with_other_groups_takes_the_schedule_over():
    """As on another parallel layout, where a rank may have no B at all, or groups in another order."""
    whole = trace(*two_groups(), steps=8)
    optimizer, scheduler = two_groups()
    trace(optimizer, scheduler, steps=5)
    fewer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.04)
    fresh = group_rates(fewer, lambda step: factor(step, "cosine", 8, 2, 0, 0.1))
    fresh.load_state_dict(scheduler.state_dict())
    assert trace(fewer, fresh, steps=3) == [[fast] for _, fast in whole[5:]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "wsd"}, r"train\.decay=0 must be from 1 to 250 with wsd, such as 60"),
        ({"schedule": "wsd", "decay": 251}, r"train\.decay=251 must be from 1 to 250"),
        ({"decay": 10}, r"train\.decay=10 must be 0: train\.schedule=cosine has no decay"),
        ({"schedule": "constant", "min_lr": 1e-5}, r"train\.min_lr=1e-05 must be 0"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings, message):
    run = Run(
        "pico",
        "",
        "",
        None,
        "",
        1,
        1,
        True,
        Settings(train=TrainSettings(global_batch=4, steps=300, warmup=50, **settings)),
    )
    with pytest.raises(UserError, match=message):
        check_run(run, Arch.load(PRESETS["pico"]))
