"""The code of `make gpu-check` where there is no GPU: the same comparisons, by stand-ins or Triton's interpreter."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import layouts
from tests.gpu.distance import compare, distance
from tests.gpu.record import Row, Tier, markdown, rows_from, say
from tests.gpu_check import REFERENCE, main, stack_rows

ROOT = Path(__file__).parents[2]


def interpreted(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.gpu.kernels", str(REFERENCE), "--interpret", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.skipif(
    not (REFERENCE / "mamba_ssm").is_dir() and not os.environ.get("CI"), reason="run `make build/reference`"
)
def test_tier_a_holds_in_the_interpreter_and_notices_a_stand_in_that_forgets_documents():
    done = interpreted()
    rows = rows_from(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    bounded = [row for row in rows if row.bound is not None]
    assert len(bounded) == 6  # three kernels, each against the stand-in and the CPU's compiled loops
    assert all(row.holds for row in bounded)
    assert all(row.value < 1e-5 for row in rows)
    done = interpreted("--fault")
    failed = [row.name for row in rows_from(done.stdout) if not row.holds]
    assert done.returncode == 1
    assert [name.split(",")[0] for name in failed] == ["scan", "scan", "split", "split"]


def test_without_cuda_nothing_is_checked_and_the_exit_code_is_2(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main([]) == 2
    assert "nothing was checked" in capsys.readouterr().out


def test_a_tier_passes_only_with_rows_that_all_hold(capsys):
    say(Row("x", 0.5, 1.0))
    say(Row("speed", 7.0, None, "tokens/s"))
    rows = rows_from("noise\n" + capsys.readouterr().out)
    tier = Tier("a: kernels", "torch", rows=rows)
    tier.judge()
    assert tier.state == "passed"
    assert "| speed | 7 tokens/s |  |" in markdown([tier], "1 x GPU")
    tier.rows.append(Row("broken", math.nan, 1.0))
    tier.judge()
    assert (tier.state, tier.reason) == ("failed", "beyond the bound: broken")
    nothing = Tier("b", "NeMo")
    nothing.judge()
    assert nothing.state == "failed"


def outcome(logits: list[float], gradient: list[float]) -> dict:
    return {"logits": torch.tensor([logits]), "gradients": {"a": torch.tensor(gradient), "b": torch.ones(2)}}


def test_distances_by_hand(tmp_path):
    """(3, 4) against (3, 4.5): 0.5 of 5. The bound is twice the stand-ins' error and 0.02 more."""
    exact, rounded, far = outcome([3, 4], [1, 0]), outcome([3, 4.5], [1, 0.1]), outcome([3, 5.2], [1, 0.1])
    assert distance(rounded, exact) == (pytest.approx(0.1), pytest.approx(0.1))
    for name, value in (("exact", exact), ("rounded", rounded), ("far", far)):
        torch.save(value, tmp_path / name)
    rows = compare(tmp_path / "exact", tmp_path / "rounded", tmp_path / "far")
    assert [row.bound for row in rows] == [None, pytest.approx(0.22), None, pytest.approx(0.22)]
    assert [row.holds for row in rows] == [True, False, True, True]
    with pytest.raises(ValueError, match="one side only"):
        distance({"logits": exact["logits"], "gradients": {}}, exact)
    with pytest.raises(ValueError, match="zero everywhere"):
        distance(exact, outcome([3, 4], [0, 0]))
    unread = {name: torch.tensor(values) for name, values in (("a", [1.0, 0.0]), ("b", [math.nan, 0.0]))}
    fine = {name: torch.tensor([1.0, 0.0]) for name in unread}
    both = [{"logits": exact["logits"], "gradients": gradients} for gradients in (unread, fine)]
    assert math.isnan(distance(*both)[1])  # whichever comes first: it must not pass


@pytest.mark.full
def test_tier_b_runs_with_the_stand_ins_in_place_of_the_gpu(tmp_path):
    standin, gpu, standin_gradient, gpu_gradient, positions, *nf4 = stack_rows(tmp_path, gpu="1")
    assert gpu.value == standin.value  # the same code twice
    assert gpu_gradient.value == standin_gradient.value
    assert 1e-4 < standin.value < 0.05  # BF16 was on
    assert (positions.value, positions.bound) == (0, 0)
    assert positions.name == "context-parallel positions, of 16478"
    assert [(row.name.partition(":")[0], row.value) for row in nf4] == [("NF4", 0)] * 3


@pytest.mark.full
def test_tier_c_compares_layouts_on_cpu_ranks(tmp_path):
    rows = layouts.compare(tmp_path, 2, local=True, layouts=("ep=2",), bounds=(1e-5, 1e-5))
    assert [row.name for row in rows] == ["ep=2 on 2: loss, 3 steps", "ep=2 on 2: grad_norm, 3 steps"]
    assert all(row.holds for row in rows), rows


@pytest.mark.full
def test_the_line_of_the_qwen3_recipe_runs_with_the_cpu_in_place_of_the_gpu(tmp_path):
    (row,) = layouts.qwen3_qlora(tmp_path / "qwen3", gpu=False)
    assert row.name.startswith("QLoRA of a tiny Qwen3 on one GPU: loss, ")
    assert row.value == 0  # the same code twice
