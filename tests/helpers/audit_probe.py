"""Run by tests/project/test_no_foreign_code.py: this project's commands over folders whose pickles would run code.

    python -m tests.helpers.audit_probe FOLDER [--old]

Python tells an audit hook of every class that a pickle names, of every text that is compiled, of every command that is
run. What a hostile pickle would do is known: the names and the word in it. With `--old` the readers are those that this
project had, and that its libraries have. Prints a line of JSON: what was seen, by command.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nano3 import cpu

cpu.enable()

# isort: split
import torch  # noqa: E402

import conversion.checkpoint.torch_dist as torch_dist  # noqa: E402
import nano3.checkpoint_metadata as checkpoint_metadata  # noqa: E402
from conversion.hf_to_nemo import convert  # noqa: E402
from nano3.cli import UserError  # noqa: E402
from nano3.pickles import load_state  # noqa: E402
from nano3.sealed_folder import seal  # noqa: E402
from tests.conversion.test_merge import write_adapter  # noqa: E402
from tests.helpers.tiny import tiny_hf_folder  # noqa: E402

WORD = "nano3_foreign_code"
"""Stands in everything that the hostile pickles would do."""
NAMES = {("builtins", "eval"), ("posix", "system"), ("os", "system")}
seen: list[str] = []
armed = False


def hook(event: str, arguments: Any) -> None:
    """Notes what a hostile pickle does."""
    if not armed:
        return
    if event == "pickle.find_class" and tuple(arguments[:2]) in NAMES:
        seen.append(f"{event} {arguments[0]}.{arguments[1]}")
    elif event in ("compile", "exec", "os.system", "subprocess.Popen") and WORD in repr(arguments):
        seen.append(event)


class Hostile:
    """Runs a command, then gives what the good pickle gave: its reader goes on as if nothing had been."""

    def __init__(self, good: bytes) -> None:
        self.good = good

    def __reduce__(self) -> Any:
        text = f"(__import__('os').system('true {WORD}'), __import__('pickle').loads({self.good!r}))[1]"
        return eval, (text,)


def plant(path: Path) -> None:
    """Puts code into a pickle, or into an archive of `torch.save`."""
    if path.suffix == ".pt":
        torch.save({"x": Hostile(pickle.dumps({}))}, path)
    else:
        path.write_bytes(pickle.dumps(Hostile(path.read_bytes())))


def script(path: str, *arguments: Any) -> Callable[[], Any]:
    """One of the project's commands, run here."""

    def run() -> None:
        before = sys.argv
        sys.argv = [path, *map(str, arguments)]
        try:
            runpy.run_path(path, run_name="__main__")
        finally:
            sys.argv = before

    return run


def folders(root: Path) -> tuple[Path, Path, Path]:
    """A Hugging Face folder, and a NeMo checkpoint and an adapter of it whose pickles would run code."""
    hf = tiny_hf_folder(root / "hf", torch_dtype="float32")
    convert(hf, root / "nemo", context=False)
    from tests.helpers.tiny import TINY_CONFIG

    adapter = write_adapter(root / "adapter", config=TINY_CONFIG | {"torch_dtype": "float32"})
    for folder in (root / "nemo", adapter):
        plant(folder / "weights" / ".metadata")
        torch.save({}, folder / "weights" / "common.pt")
        plant(folder / "weights" / "common.pt")
    for name in ("nano3.json", "files.json"):
        (root / "nemo" / name).unlink(missing_ok=True)  # as another tool's folder comes: without a seal
    (adapter / "files.json").unlink()
    seal(adapter)  # as somebody who may write there can
    return hf, root / "nemo", adapter


def commands(hf: Path, nemo: Path, adapter: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """Name -> command, or the step of a run that reads the same folder on its ranks."""
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import FileSystemReader

    weights = nemo / "weights"
    return {
        "merge": script("conversion/merge_lora.py", hf, adapter, out / "merged"),
        "merge into NeMo": script("conversion/merge_lora.py", nemo, adapter, out / "merged-nemo"),
        "adapter export": script("conversion/adapter.py", "export", adapter, out / "peft", "--for", "vllm"),
        "export": script("conversion/nemo_to_hf.py", nemo, out / "hf"),
        "identity": script("conversion/identity.py", nemo),
        "certify": script("conversion/certify.py", "verify", nemo),
        "base of a run": lambda: checkpoint_metadata.check_folder(weights),
        "NeMo's load of the base": lambda: FileSystemReader(weights).read_metadata(),
        "Megatron's common state": lambda: dist_checkpointing.load_common_state_dict(str(weights)),
        "adapter of a run": lambda: checkpoint_metadata.load_sharded({}, adapter / "weights"),
        "state of a run": lambda: load_state(weights / "common.pt", "common.pt"),
    }


def old_readers() -> None:
    """The readers of before: Python's own unpickler."""

    def read(folder: Path) -> Any:
        return pickle.loads((folder / ".metadata").read_bytes())

    torch_dist.check_folder = read
    checkpoint_metadata.check_folder = read
    checkpoint_metadata.guard = lambda: None


def main() -> int:
    global armed
    root = Path(sys.argv[1])
    hf, nemo, adapter = folders(root)
    os.environ["NANO3_CACHE"] = str(root / "cache")
    if "--old" in sys.argv:
        old_readers()
    else:
        checkpoint_metadata.guard()
    sys.addaudithook(hook)
    result: dict[str, Any] = {}
    for name, command in commands(hf, nemo, adapter, root / "out").items():
        seen.clear()
        quiet, ended = io.StringIO(), "read"
        armed = True
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                command()
        except UserError:
            ended = "refused"
        except SystemExit as end:
            ended = "refused" if end.code == 2 else f"exit {end.code}"
        except Exception as error:
            ended = f"{type(error).__name__}: {error}"[:200]
        finally:
            armed = False
        result[name] = {"ended": ended, "seen": sorted(set(seen)), "said": quiet.getvalue()[-300:]}
        shutil.rmtree(root / "out", ignore_errors=True)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
