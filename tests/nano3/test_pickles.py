"""Pickles are read as data: what a checkpoint's may say, and that nothing of any other is imported or run."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nano3 import pickles
from nano3.checkpoint_metadata import check_folder, read_metadata
from nano3.cli import UserError
from nano3.pickles import load_state, saved_tensor

BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def metadata(**changes: Any) -> Metadata:
    """One tensor of 4x6 FP32 in two chunks of 4x3, each of 48 bytes in a place of 100, and an object."""
    given = {"second": (0, 3), "sizes": (4, 3), "file": "__0_0.distcp", "begin": 100, "length": 100, "size": (4, 6)}
    given |= changes
    chunks = [
        ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((4, 3))),
        ChunkStorageMetadata(torch.Size(given["second"]), torch.Size(given["sizes"])),
    ]
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(given["size"]), chunks)
    places = {
        MetadataIndex("a", (0, 0)): _StorageInfo("__0_0.distcp", 0, 100),
        MetadataIndex("a", given["second"]): _StorageInfo(given["file"], given["begin"], given["length"]),
        MetadataIndex("b"): _StorageInfo("__0_0.distcp", 200, 10),
    }
    return Metadata({"a": entry, "b": BytesStorageMetadata()}, storage_data=places)


def write(folder: Path, content: Any) -> Path:
    """A `.metadata` with this content, bytes as they are."""
    path = folder / ".metadata"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return path


def test_metadata_comes_back_in_pytorchs_own_classes(tmp_path):
    wanted = metadata()
    found = read_metadata(write(tmp_path, wanted))
    assert found.state_dict_metadata == wanted.state_dict_metadata
    assert found.storage_data == wanted.storage_data
    assert type(found.state_dict_metadata["a"].size) is torch.Size
    for protocol in (2, 3, 4, 5):
        assert read_metadata(write(tmp_path, pickle.dumps(wanted, protocol))).storage_data == wanted.storage_data


WRONG = {
    "overlap": ({"second": (0, 2)}, "chunks of a do not cover it once each"),
    "gap": ({"size": (4, 7)}, "chunks of a do not cover it once each"),
    "outside": ({"second": (0, 4)}, "chunks of a do not cover it once each"),
    "huge": ({"size": (2**40, 2**40)}, "is no size of a tensor"),
    "place too small": ({"length": 47}, "a chunk of a has 48 bytes in a place of 47"),
    "shared place": ({"begin": 40}, "two chunks lie over one another in __0_0.distcp at byte 40"),
    "negative place": ({"begin": -1}, "a lies at -1 for 100 bytes"),
    "path out": ({"file": "../../etc/passwd"}, "a lies in ../../etc/passwd, no file of this folder"),
    "number as text": ({"length": "100"}, "a lies at 100 for 100 bytes"),
}
"""Case -> what is wrong, what the refusal says."""


@pytest.mark.parametrize("case", WRONG)
def test_metadata_that_contradicts_itself_is_refused(case, tmp_path):
    changes, says = WRONG[case]
    with pytest.raises(UserError, match=r"\.metadata is not the metadata of a checkpoint") as error:
        read_metadata(write(tmp_path, metadata(**changes)))
    assert says in str(error.value)


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


HOSTILE = {
    "os.system": (Call(os.system, "true"), "posix.system"),
    "eval": (Call(eval, "1"), "builtins.eval"),
    "open": (Call(open, "/tmp/x", "w"), "io.open"),
    "attribute": (Call(getattr, "text", "upper"), "builtins.getattr"),
    "inside": (Metadata({"a": Call(exec, "pass")}, storage_data={}), "builtins.exec"),
    "torch": (Call(torch.load, "x"), "torch.serialization.load"),
    "instance": (b"(ios\nsystem\nq\x00S'true'\no.", "KeyError"),
    "dotted": (b"\x80\x04\x8c\x05torch\x8c\x0cSize.__new__\x93.", "torch.Size.__new__"),
    "module of a known name": (b"cos\nMetadata\n.", "os.Metadata"),
    "changes a class": (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n}(X\x01\x00\x00\x00xK\x01ub.",
        "it changes something other than a new object",
    ),
    "calls a dtype": (b"\x80\x02ctorch\nfloat32\n)R.", "it calls something other"),
    "extension": (b"\x80\x02\x82\x01.", "KeyError"),
    "memory by a number": (b"\x80\x04Nr\xf0\xff\xff\xff.", "is no Metadata"),
    "length by a number": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"abc", "EOFError"),
    "frame by a number": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.", ""),
    "endless": (b"\x80\x02" + b"N0" * 300 + b"N.", "more than 200 operations"),
    "empty": (b"", "EOFError"),
    "another object": (pickle.dumps([1]), "is no Metadata"),
}
"""Case -> the pickle, what the refusal names."""


@pytest.mark.parametrize("case", HOSTILE)
def test_no_foreign_name_is_imported_or_called(case, tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_STEPS", 200)
    content, says = HOSTILE[case]
    seen: list[tuple[str, Any]] = []
    with watched(seen), pytest.raises(UserError) as error:
        read_metadata(write(tmp_path, content))
    assert says in str(error.value)
    assert "from a place that you trust" in str(error.value)
    assert seen == []


@pytest.mark.parametrize("case", ["os.system", "eval", "inside"])
def test_the_watch_sees_what_pickle_itself_would_do(case):
    """The negative control: Python's own reader of the same bytes."""
    seen: list[tuple[str, Any]] = []
    with watched(seen):
        pickle.loads(pickle.dumps(HOSTILE[case][0]))
    assert "pickle.find_class" in {event for event, _ in seen}


class watched:
    """Collects the audit events of unpickling and of running code while it is open (a hook can never be removed)."""

    _hooks: list[list[tuple[str, Any]]] = []  # noqa: RUF012
    _installed = False

    def __init__(self, seen: list[tuple[str, Any]]) -> None:
        self.seen = seen

    def __enter__(self) -> None:
        if not watched._installed:
            sys.addaudithook(_note)
            watched._installed = True
        watched._hooks.append(self.seen)

    def __exit__(self, *_: object) -> None:
        watched._hooks.remove(self.seen)


def _note(event: str, args: Any) -> None:
    if watched._hooks and event in ("pickle.find_class", "exec", "compile", "os.system", "subprocess.Popen"):
        for seen in watched._hooks:
            seen.append((event, args[:2]))


def test_a_folder_is_checked_before_megatron_core_opens_it(tmp_path):
    with pytest.raises(UserError, match="is not a Megatron torch_dist checkpoint"):
        check_folder(tmp_path)
    write(tmp_path, metadata())
    (tmp_path / "metadata.json").write_text(json.dumps(BACKEND))
    with pytest.raises(UserError, match=r"__0_0\.distcp is missing or truncated"):
        check_folder(tmp_path)
    (tmp_path / "__0_0.distcp").write_bytes(bytes(210))
    check_folder(tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps({**BACKEND, "sharded_backend": "zarr"}))
    with pytest.raises(UserError, match="sharded_backend is 'zarr'; it must be 'torch_dist'"):
        check_folder(tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps(BACKEND))
    (tmp_path / "modelopt_state").mkdir()
    with pytest.raises(UserError, match="a model that ModelOpt changed"):
        check_folder(tmp_path)


def test_states_are_tensors_and_numbers_only(tmp_path):
    torch.save({"step": 4, "t": torch.ones(2)}, tmp_path / "run.pt")
    assert load_state(tmp_path / "run.pt", "run.pt")["step"] == 4
    torch.save({"x": Call(os.system, "true")}, tmp_path / "run.pt")
    with pytest.raises(UserError, match=r"run\.pt is damaged, or holds more than tensors and numbers"):
        load_state(tmp_path / "run.pt", "run.pt")
    (tmp_path / "run.pt").write_bytes(b"PK\x03\x04" + bytes(50))
    with pytest.raises(UserError, match=r"run\.pt is damaged"):
        load_state(tmp_path / "run.pt", "run.pt")
    with pytest.raises(UserError, match=r"none\.pt is missing"):
        load_state(tmp_path / "none.pt", "none.pt")


def test_a_saved_tensor_is_described_without_opening_it(tmp_path):
    import zipfile

    torch.save(torch.arange(6.0, dtype=torch.bfloat16).view(2, 3), tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "t.pt") as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert saved_tensor(data) == ("BFloat16Storage", "0", 0, (2, 3), (3, 1))
    for content in (pickle.dumps(Call(os.system, "true")), pickle.dumps(3), b"", data[:-20]):
        with pytest.raises(pickle.UnpicklingError):
            saved_tensor(content)
