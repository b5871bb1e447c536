"""benchmarks/bench_step.py: light help, its arithmetic by hand, and once through."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FOLDER / "bench_step.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("bench_step", FOLDER / "bench_step.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_help_and_refusals_load_no_torch():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import bench_step; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(FOLDER)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    done = bench("--repeats", "0")
    assert done.returncode == 2
    assert "--repeats and --starts must be at least 1" in done.stderr


def test_summary_by_hand(module):
    """PEFT takes 3, 6, 9 s, the recipe 2 s, Megatron-Core's loop 1.5 s: 3 times as fast, a quarter is NeMo's."""

    def steps(*seconds: float) -> list[dict]:
        return [{"wall": value, "cpu": 2 * value, "loss": 1.0} for value in seconds]

    row = {"length": 100, "steps": {"peft": steps(3, 6, 9), "megatron": steps(1.5, 1.5, 1.5), "recipe": steps(2, 2, 2)}}
    found = module.summary(row)
    assert found["tokens_per_second"] == {
        "peft": pytest.approx(100 / 6),
        "megatron": pytest.approx(200 / 3),
        "recipe": 50,
    }
    assert (found["ratio"], found["ratio_cpu_time"], found["ratio_without_nemo"]) == (3.0, 3.0, 4.0)
    assert found["share_of_nemo_and_lightning"] == pytest.approx(0.25)


@pytest.mark.full
def test_the_loops_take_turns_and_compute_the_same_loss(tmp_path):
    done = bench("--lengths", "64", "--repeats", "1", "--starts", "2", "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {name: len(steps) for name, steps in row["steps"].items()} == {"peft": 2, "megatron": 2, "recipe": 2}
    assert "| 64 | " in done.stdout
