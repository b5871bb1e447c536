"""Calibration and golden answers go layer by layer: what that takes, and that it is what the whole model gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conversion import quantize_fp8
from conversion.checkpoint import output_folder
from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.output_folder import UnfinishedOutput
from conversion.fp8 import layerwise
from conversion.fp8.calibrate import Activations, calibrate
from conversion.fp8.layerwise import hidden_bytes
from conversion.fp8.selection import Selection
from conversion.quantize_fp8 import quantize
from nano3.arch import PRESETS, Arch
from nano3.cli import UserError
from tests.conversion.test_conversion_killed import content
from tests.conversion.test_fp8 import samples
from tests.helpers.tiny import tiny_hf_folder

LAYER = 2 * 64 * 2 * 512 * 1024
"""Bytes in BF16 of the experts of a layer below: up and down of 64 experts of 512 x 1024."""


def test_disk_is_known_before_it_starts():
    import torch

    with HFFolder(PRESETS["pico"]) as hf:
        assert hidden_bytes(hf, samples(), torch.bfloat16) == 2 * (
            2 * 113 * 128 + 3 * 128
        )  # 113 tokens, 128 wide, 3 headers, in one block


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, [[32], [17], [64]]), (33, [[32, 17], [64]]), (49, [[32, 17], [64]]), (50, [[32, 17, 64]])],
)
def test_blocks_have_enough_tokens_but_for_the_last(monkeypatch, tokens, expected):
    monkeypatch.setattr(layerwise, "BLOCK_TOKENS", tokens)
    assert [[len(sample) for sample in block] for block in layerwise._blocks(samples())] == expected


@pytest.mark.full
def test_memory_is_that_of_one_layer(tmp_path):
    """Five layers of 134 MB: never are two in memory, and no layer is there twice."""
    folder = tiny_hf_folder(
        tmp_path / "hf",
        hybrid_override_pattern="ME*EEEE",
        hidden_size=512,
        n_routed_experts=64,
        moe_intermediate_size=1024,
    )
    command = [sys.executable, "-m", "tests.helpers.memory_of_layers", str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calibration, golden = (int(line) for line in done.stdout.split()[-2:])
    print(f"one layer {LAYER / 1e6:.0f} MB; calibration took {calibration / 1e6:.0f} MB, golden {golden / 1e6:.0f} MB")
    assert LAYER < calibration < 1.5 * LAYER
    assert 2 * LAYER < golden < 2 * 1.5 * LAYER  # FP32


class Killed(BaseException):
    """In the place of SIGKILL: nobody catches it."""


@pytest.fixture
def _one_each(monkeypatch):
    """A block for each sample."""
    monkeypatch.setattr(layerwise, "BLOCK_TOKENS", 1)


def calibrated(model: Path, folder: Path) -> tuple[Activations, list[int]]:
    """A calibration on 3 samples, and the tokens that its steps named."""
    steps: list[int] = []
    with HFFolder(model) as hf:
        return calibrate(hf, Selection.published(hf.arch), samples(), UnfinishedOutput(folder), steps.append), steps


def killed_at(moment: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = Killed) -> None:
    """From now on the renaming of that number, from 0, finds the process gone, or fails with another error."""
    calls = iter(range(moment))

    def replace(old: Path, new: Path) -> None:
        if next(calls, None) is None:
            raise error
        os.rename(old, new)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.usefixtures("_one_each")
def test_a_killed_calibration_goes_on_at_its_sample(tmp_path, monkeypatch):
    """State changes only by renaming: 1 at the start, 3 layers of 2 for each of 3 samples and 1 behind them."""
    model = tiny_hf_folder(tmp_path / "hf", hybrid_override_pattern="ME*")
    with monkeypatch.context() as patched:
        patched.setattr(layerwise, "BLOCK_TOKENS", 40)
        assert calibrated(model, tmp_path / "two blocks")[1] == [0, *(49, 64) * 3]
    expected, steps = calibrated(model, tmp_path / "undisturbed")
    assert calibrated(model, tmp_path / "two blocks")[0] == expected
    lengths = [len(sample) for sample in samples()]
    assert steps == [0, *lengths * 3]
    left = [path.name for path in (tmp_path / "undisturbed").rglob("*") if path.is_file()]
    assert left == ["calibration.json"]
    for moment in range(22):
        folder = tmp_path / str(moment)
        with monkeypatch.context() as patched:
            killed_at(moment, patched)
            with pytest.raises(Killed):
                calibrated(model, folder)
        found, again = calibrated(model, folder)
        assert found == expected, moment
        assert sum(again) == sum(steps), moment
        layer, within = divmod(max(moment - 1, 0), 7)
        assert again[1:] == steps[1:][layer * 3 + (within + 1) // 2 :], moment


class Steps(list):
    """In the place of the progress bar."""

    update = list.append

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.usefixtures("_one_each")
@pytest.mark.parametrize(("work", "moment", "left"), [("calibration", 11, 5), ("writing", 23, 0)])
def test_a_killed_quantization_calibrates_no_sample_twice(tmp_path, monkeypatch, capsys, work, moment, left):
    """At its renaming 11, from 0, of which the first is the marker's, the first sample has passed the second layer."""
    model, out = tiny_hf_folder(tmp_path / "hf", hybrid_override_pattern="ME*"), tmp_path / work
    selection, steps = Selection.published(Arch.load(model)), Steps()
    monkeypatch.setattr(quantize_fp8, "_progress", lambda _tokens: steps)
    quantize(model, tmp_path / "undisturbed", selection, samples())
    assert len(steps) == 1 + 9
    with monkeypatch.context() as patched:
        killed_at(moment, patched)
        patched.setattr(output_folder, "discard", lambda *_: None)  # who is killed does not tidy up
        with pytest.raises(Killed):
            quantize(model, out, selection, samples())
    assert not out.exists()
    capsys.readouterr()
    steps.clear()
    quantize(model, out, selection, samples())
    assert "resuming the unfinished work" in capsys.readouterr().err
    assert len(steps) == 1 + left
    assert content(out) == content(tmp_path / "undisturbed")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "undisturbed", work}


@pytest.mark.usefixtures("_one_each")
@pytest.mark.parametrize(("error", "left"), [(OSError, 5), (UserError, 9)])
def test_days_of_work_outlive_a_full_disk_but_not_a_user_error(tmp_path, monkeypatch, error, left):
    model, out = tiny_hf_folder(tmp_path / "hf", hybrid_override_pattern="ME*"), tmp_path / "out"
    selection, steps = Selection.published(Arch.load(model)), Steps()
    monkeypatch.setattr(quantize_fp8, "_progress", lambda _tokens: steps)
    with monkeypatch.context() as patched:
        killed_at(11, patched, error)
        with pytest.raises(error):
            quantize(model, out, selection, samples())
    steps.clear()
    quantize(model, out, selection, samples())
    assert len(steps) == 1 + left


@pytest.mark.usefixtures("_one_each")
def test_other_samples_are_another_calibration(tmp_path, monkeypatch):
    model, out, steps = tiny_hf_folder(tmp_path / "hf", hybrid_override_pattern="E"), tmp_path / "out", Steps()
    monkeypatch.setattr(quantize_fp8, "_progress", lambda _tokens: steps)
    with monkeypatch.context() as patched:
        killed_at(3, patched)
        patched.setattr(output_folder, "discard", lambda *_: None)
        with pytest.raises(Killed):
            quantize(model, out, Selection.published(Arch.load(model)), samples())
    steps.clear()
    quantize(model, out, Selection.published(Arch.load(model)), samples()[1:])
    assert steps == [0, 17, 64]
