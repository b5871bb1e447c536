"""Conversion, merge and FP8 killed with SIGKILL all through their work: nothing that loads is left, and they go on."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from conversion import hf_to_nemo, nemo_to_hf
from conversion.certify import verify
from conversion.checkpoint import safetensors_writer, torch_dist_writer
from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.output_folder import CERTIFICATE, HF_KIND, WEIGHTS, unfinished_output
from conversion.checkpoint.safetensors_layout import FileLayout
from conversion.checkpoint.tensor_digests import scan
from conversion.checkpoint.torch_dist import TorchDistReader
from conversion.fp8.calibrate import Activations
from conversion.fp8.selection import Selection
from conversion.identity import drop_record, holds, record_only
from conversion.merge_lora import merge
from conversion.quantize_fp8 import weight_scales, write
from nano3 import file_digests
from nano3.cli import UserError
from nano3.sealed_folder import owner_of
from tests.conversion.test_merge import write_adapter
from tests.helpers.damage import change_keeping_size_and_time
from tests.helpers.killed import at_every_change
from tests.helpers.tiny import TINY_CONFIG, tiny_hf_folder

MOMENTS = 10


def quantize(source: Path, out: Path) -> None:
    """Check and writing of an FP8 checkpoint; tests/conversion/test_fp8_calibration.py kills the calibration."""
    with HFFolder(source) as hf:
        selection = Selection.published(hf.arch)
        before, largest = scan(hf)
        cache = {(number, part): 1.0 for number in selection.kv_layers for part in "kv"}
        found = Activations(dict.fromkeys(selection.chosen, 1.0), cache)
        with unfinished_output(out, HF_KIND, {"source": str(source)}, 0) as work:
            write(hf, before, weight_scales(largest, selection), selection, found, work)


Tool = Callable[[Path, Path], Any]
"""(folder with the inputs, output) -> runs one tool."""

TOOLS: dict[str, Tool] = {
    "import": lambda inputs, out: hf_to_nemo.convert(inputs / "hf", out, context=False),
    "export": lambda inputs, out: nemo_to_hf.convert(inputs / "nemo", out),
    "merge": lambda inputs, out: merge(inputs / "hf", inputs / "adapter", out),
    "quantize": lambda inputs, out: quantize(inputs / "hf", out),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_hf_folder(folder / "hf", shards=3)
    hf_to_nemo.convert(folder / "hf", folder / "nemo", context=False)
    write_adapter(folder / "adapter", lambda tensors: [t.add_(0.25) for t in tensors.values()], config=TINY_CONFIG)
    return folder


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch):
    """Several files from a tiny model, so that some are finished when the others are not."""
    monkeypatch.setattr(torch_dist_writer, "FILE_BYTES", 20_000)
    make = FileLayout.make.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(FileLayout, "make", classmethod(lambda cls, table: make(cls, table, shard_bytes=40_000)))


def in_child(work: Callable[[], Any], moment: int | None) -> int:
    """Runs `work` in a forked process that kills itself at its call number `moment` of a C function, of all threads.

    Returns the number of such calls, 0 when it was killed.
    """
    read, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        count = 0

        def look(_frame: FrameType, event: str, _argument: Any) -> None:
            nonlocal count
            if event == "c_call":
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        threading.setprofile(look)
        sys.setprofile(look)
        try:
            work()
            os.write(write_end, count.to_bytes(8, "little"))
        finally:
            os._exit(0)
    os.close(write_end)
    told = os.read(read, 8)
    os.close(read)
    os.waitpid(pid, 0)
    return int.from_bytes(told, "little")


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but what names times and paths."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (CERTIFICATE, "base.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def loads(folder: Path) -> bool:
    """Whether any reader would take a folder for a model: ours, one that takes all *.safetensors, or Megatron."""
    if list(folder.glob("*.safetensors")) and (folder / "config.json").is_file():
        return True
    try:
        TorchDistReader(folder / WEIGHTS)
    except UserError:
        return False
    return True


def files_without_pickled_order(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if not name.endswith(".metadata")}


@pytest.mark.parametrize("tool", TOOLS)
def test_killed_at_ten_moments_nothing_that_loads_is_left(tool: str, inputs: Path, tmp_path: Path):
    """The moments are spread evenly over the tool's calls, the last ones among them."""
    expected, out = tmp_path / "expected" / "out", tmp_path / "work" / "out"
    expected.parent.mkdir()
    out.parent.mkdir()
    calls = in_child(lambda: TOOLS[tool](inputs, expected), None)
    assert calls > 500
    killed = 0
    for number in range(MOMENTS):
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        killed += not in_child(lambda: TOOLS[tool](inputs, out), 1 + number * (calls - 2) // (MOMENTS - 1))
        for folder in out.parent.iterdir():
            # All that loads is whole: it was killed between the last file's name and its own.
            assert not loads(folder) or same(folder, expected), (number, folder)
    assert killed >= MOMENTS - 1  # threads take turns, so the last moments may never come
    TOOLS[tool](inputs, out)  # goes on from what the last one left
    assert os.listdir(out.parent) == ["out"]
    assert same(out, expected)


@pytest.mark.parametrize("tool", ["import", "merge"])
def test_killed_at_every_change_of_the_disk_it_goes_on_and_leaves_nothing(
    tool: str, inputs: Path, tmp_path: Path, monkeypatch
):
    """In the place of an older output, which is there until the new one is."""
    monkeypatch.setattr(torch_dist_writer, "FILE_BYTES", 100_000)  # few files: all are written alike
    expected, older, out = tmp_path / "expected", tmp_path / "older", tmp_path / "work" / "out"
    TOOLS[tool](inputs, expected)
    with unfinished_output(older, owner_of(expected) or "", {}, 0) as work:
        work.hide("old").write_text("old")
    shutil.copytree(older, out)
    moments = []
    for event in at_every_change(lambda: TOOLS[tool](inputs, out), out.parent):
        if out.is_dir():
            assert content(out).get("old") == b"old" or same(out, expected), event
        TOOLS[tool](inputs, out)
        assert os.listdir(out.parent) == ["out"], event
        assert same(out, expected), event
        moments.append(event)
        shutil.rmtree(out)
        shutil.copytree(older, out)
    assert len(moments) > 50, len(moments)


def same(folder: Path, expected: Path) -> bool:
    """Whether two outputs hold the same files, and the certificate is true of the first."""
    assert content(folder).keys() - {"nano3.json"} == content(expected).keys() - {"nano3.json"}
    for name, data in files_without_pickled_order(content(expected)).items():
        assert content(folder)[name] == data, name
    return verify(folder) == []


@pytest.mark.parametrize("tool", TOOLS)
def test_finished_files_of_a_killed_run_are_used_again(tool: str, inputs: Path, tmp_path: Path, capsys):
    """Those that still hold what was recorded keep their inode; one that was damaged meanwhile is written anew."""
    expected, out = tmp_path / "expected", tmp_path / "work" / "out"
    out.parent.mkdir()
    calls = in_child(lambda: TOOLS[tool](inputs, expected), None)
    hidden = out.parent / ".out.unfinished"
    for tenth in range(9, 4, -1):  # the latest moment of those with several finished files, and not yet the result
        shutil.rmtree(hidden, ignore_errors=True)
        assert not in_child(lambda: TOOLS[tool](inputs, out), calls * tenth // 10)
        records = [path for path in (hidden / ".work").glob("*.json") if path.name != "job.json"]
        if len(records) >= 2:
            break
    finished = {path.name.removesuffix(".json") for path in records}
    weights = {
        path.name.removesuffix(".part"): path
        for path in hidden.rglob("*")
        if path.name.removesuffix(".part").endswith((".safetensors", ".distcp"))
    }
    found = {name: path for name, path in weights.items() if any(record.endswith(name) for record in finished)}
    assert len(found) >= 2
    inodes = {name: path.stat().st_mtime_ns for name, path in found.items()}
    spoilt = sorted(found)[0]
    with found[spoilt].open("r+b") as file:
        file.seek(-300, os.SEEK_END)
        old = file.read(1)
        file.seek(-300, os.SEEK_END)
        file.write(bytes([old[0] ^ 1]))
    TOOLS[tool](inputs, out)
    assert "resuming the unfinished work" in capsys.readouterr().err
    after = {path.name: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    kept = {name for name in found if after[name] == inodes[name]}
    assert kept == found.keys() - {spoilt}
    assert same(out, expected)


def test_the_work_of_another_job_is_thrown_away(inputs: Path, tmp_path: Path, capsys):
    other = tiny_hf_folder(tmp_path / "other", seed=5)
    out = tmp_path / "out"
    calls = in_child(lambda: hf_to_nemo.convert(inputs / "hf", tmp_path / "whole", context=False), None)
    in_child(lambda: hf_to_nemo.convert(inputs / "hf", out, context=False), calls // 2)
    assert (tmp_path / ".out.unfinished").is_dir()
    hf_to_nemo.convert(other, out, context=False)
    assert "resuming" not in capsys.readouterr().err
    assert verify(out, other) == []


@pytest.mark.parametrize("tool", ["import", "export"])
def test_a_job_goes_on_after_a_reboot(tool: str, inputs: Path, tmp_path: Path, monkeypatch, capsys):
    """And after what sets the ctime of a source's files and nothing else, as a backup or `chmod` does."""
    expected, out = tmp_path / "expected", tmp_path / "work" / "out"
    out.parent.mkdir()
    calls = in_child(lambda: TOOLS[tool](inputs, expected), None)
    in_child(lambda: TOOLS[tool](inputs, out), calls * 3 // 4)
    for path in [path for path in inputs.rglob("*") if path.is_file()]:
        before = path.stat()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_ctime_ns > before.st_ctime_ns
    monkeypatch.setattr(file_digests, "_boot", lambda: "the next start of this machine")
    TOOLS[tool](inputs, out)
    assert "resuming the unfinished work" in capsys.readouterr().err
    assert same(out, expected)


def test_a_source_that_changes_unseen_while_its_import_is_dead_is_found_by_content(tmp_path: Path, monkeypatch, capsys):
    """The resumed import holds what was read before and after. It does not count as made from either."""
    monkeypatch.setenv("NANO3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "RECENT_NS", -(10**9))  # what was just written is remembered too
    source, out = tiny_hf_folder(tmp_path / "hf", shards=3), tmp_path / "out"
    calls = in_child(lambda: hf_to_nemo.convert(source, tmp_path / "whole", context=False), None)
    in_child(lambda: hf_to_nemo.convert(source, out, context=False), calls * 3 // 4)
    for path in source.glob("*.safetensors"):
        change_keeping_size_and_time(path)
    hf_to_nemo.convert(source, out, context=False)
    assert "resuming the unfinished work" in capsys.readouterr().err
    assert not holds(out, source)
    hf_to_nemo.convert(source, out, context=False)
    assert holds(out, source)


def test_what_says_only_which_weights_a_base_has_is_written_again(inputs: Path, tmp_path: Path):
    folder, base, moments = tmp_path / "run", tmp_path / "run" / "base", []
    folder.mkdir()
    for event in at_every_change(lambda: record_only(base, inputs / "hf"), folder):
        record_only(base, inputs / "hf")
        assert os.listdir(base) == ["base.json"], event
        drop_record(base)
        assert os.listdir(folder) == [], event
        moments.append(event)
    assert len(moments) > 5


def test_work_that_fails_and_is_killed_while_it_goes_is_not_resumed_from(tmp_path: Path):
    """Half of it would be gone."""
    out, kept = tmp_path / "work" / "out", []

    def fails() -> None:
        with unfinished_output(out, "x", {}, 0) as work:
            for name in "abc":
                work.scratch("states").joinpath(name).write_text(name)
            raise UserError

    def failed() -> None:
        with pytest.raises(UserError):
            fails()

    out.parent.mkdir()
    for _ in at_every_change(failed, out.parent):
        with unfinished_output(out, "x", {}, 0) as work:
            found = sorted(os.listdir(work.scratch("states")))
            assert not work.resumed or found in ([], ["a"], ["a", "b"], ["a", "b", "c"]), found
            kept.append(len(found))
        shutil.rmtree(out)
    assert max(kept) == 3
    assert kept[-1] == 0


def test_two_processes_do_not_write_one_output(tmp_path: Path):
    with unfinished_output(tmp_path / "out", "x", {}, 0) as work:
        with (
            pytest.raises(UserError, match="another process is writing"),
            unfinished_output(tmp_path / "out", "x", {}, 0),
        ):
            pass
        work.hide("last").write_text("a")
    assert sorted(os.listdir(tmp_path / "out")) == ["files.json", "last", "nano3.json"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_of_somebody_else_under_the_hidden_name_is_refused(tmp_path: Path):
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished/thesis").write_text("years of work")
    with (
        pytest.raises(UserError, match="holds another tool's work"),
        unfinished_output(tmp_path / "out", "x", {}, 0),
    ):
        pass
    assert (tmp_path / ".out.unfinished/thesis").read_text() == "years of work"


def test_what_is_interrupted_stays_and_what_fails_does_not(tmp_path: Path, capsys):
    def stopped_by(error: BaseException) -> None:
        with unfinished_output(tmp_path / "out", "x", {}, 0) as work:
            work.hide("file").write_text("half")
            raise error

    for error, left in ((KeyboardInterrupt(), [".out.unfinished"]), (UserError(), [])):
        with pytest.raises(type(error)):
            stopped_by(error)
        assert os.listdir(tmp_path) == left
    assert "the same command resumes" in capsys.readouterr().err


def test_a_full_disk_of_a_file_that_is_closed_in_the_background_is_an_error(inputs: Path, tmp_path: Path, monkeypatch):
    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_writer.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        nemo_to_hf.convert(inputs / "nemo", tmp_path / "out")
    assert os.listdir(tmp_path) == []
