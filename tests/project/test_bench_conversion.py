"""benchmarks/bench_conversion.py: refusals, its arithmetic by hand, and once through on tiny shapes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from conversion.checkpoint.model_folder import HFFolder
from tests.helpers.tiny import TINY_CONFIG, tiny_hf_folder

FOLDER = Path(__file__).parents[2] / "benchmarks"


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FOLDER / "bench_conversion.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, found)
    spec.loader.exec_module(found)
    return found


def test_lines_by_hand(monkeypatch: pytest.MonkeyPatch):
    """8 GB in 10 s where cp takes 4: 0.8 GB/s, cp 2 GB/s, ratio 0.4."""
    module = load("bench_conversion", monkeypatch)
    row = module.Taken(8_000_000_000, 10.0, 3_100_000_000, 2.0, 4.0)
    assert module.line(7, "HF -> NeMo", row) == (
        "| 7 | 8.00 | HF -> NeMo | 0.80 | 2.00 | 0.40 (missed) (too much memory) | 0.5 | 3.10 | 2 |"
    )
    assert "missed" not in module.line(7, "merge, all targets", row)


def test_the_random_model_is_complete_finite_and_never_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = load("conversion_inputs", monkeypatch)
    module.write_model(tmp_path / "model", module.shortened(TINY_CONFIG, 4))
    with HFFolder(tmp_path / "model") as hf:
        assert "".join(hf.arch.layers) == "MEM*"
        for name, entry in hf.layout.entries.items():
            values = hf.rows(name, 0, entry.rows).float().abs()
            assert 2**-9 <= values.min() <= values.max() < 2**-5, name
        experts = [hf.rows(f"backbone.layers.1.mixer.experts.{k}.up_proj.weight", 0, 24) for k in (0, 1)]
        assert not (experts[0] == experts[1]).all()


def test_layers_without_attention_are_refused():
    done = bench("--layers", "3")
    assert done.returncode == 2
    assert "--layers must be 6 (the first with attention) to 52" in done.stderr


@pytest.mark.full
def test_once_through_on_tiny_shapes(tmp_path: Path):
    tiny_hf_folder(tmp_path / "tiny")
    done = bench("--model", str(tmp_path / "tiny"), "--layers", "4", "--connector", "2",
                 "--folder", str(tmp_path / "work"), "--out", str(tmp_path / "out.json"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    steps = ["HF -> NeMo", "NeMo -> HF", "merge, attention only", "merge, all targets", "FP8"]
    assert [row["step"] for row in rows] == [*steps, "whole model in memory", "streaming"]
    assert all(row["size"] > 0 and row["seconds"] > 0 and row["rss"] > 1e8 for row in rows)
    assert os.listdir(tmp_path / "work") == []
