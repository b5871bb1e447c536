"""Folders that the tools write: their parts, disk space, and outputs that grow for minutes.

Of these last: killed, their finished files are used again; never do they look finished.

The work lies in `.NAME.unfinished` beside the output NAME. While it grows, what a reader would open first has `.part`
behind its name (`UnfinishedOutput.hide`): model.safetensors and the index, or `.metadata` of a torch_dist. Only when
all is written and hashed do those get their names, in that order, and then the folder its own. So a kill at any moment
leaves the old result or the new one, and beside it at most a hidden folder that nothing loads, which the same command
resumes; or, between the last two renamings, one that is the whole result.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nano3.arch import is_nemo_checkpoint
from nano3.cli import UserError
from nano3.documents import as_json, read_json
from nano3.file_system import free_disk
from nano3.outputs import check_output, claim, discard, only_writer, replace_folder
from nano3.sealed_folder import MARKER, is_ours, mark, seal

NEMO_KIND = "nemo-checkpoint"
HF_KIND = "hf-model"
"""Kinds of folders that we write (see `nano3.outputs.fresh_output`)."""

WEIGHTS = "weights"
CONTEXT = "context"
SIDE = "hf"
LAYOUT = "safetensors.json"
"""Parts of a NeMo folder: Megatron's weights, NeMo's context, the Hugging Face folder's side files, and how its
safetensors files were laid out."""

CERTIFICATE = "certificate.json"
"""What the writer of a folder certifies about its tensors (conversion/certificates/certificate.py)."""

CARD = "model_card.md"
"""The same for people (conversion/certificates/model_card.py)."""

PART = ".part"
CONFIG = "config.json"
_RECORDS = ".work"
_JOB = "job.json"


class UnfinishedOutput:
    """A work folder. Files are named relative to it. `resumed`: it may hold files that a killed run finished."""

    def __init__(self, folder: Path, resumed: bool = False) -> None:
        self.folder, self.resumed = folder, resumed
        self.hidden: list[str] = []

    def hide(self, file: str) -> Path:
        """Where `file` is written until the end; files get their names in the order of these calls."""
        if file not in self.hidden:
            self.hidden.append(file)
        return self.folder / (file + PART)

    def recorded(self, file: str) -> dict[str, Any] | None:
        """What `record` kept of a file that is finished, in this run or in a killed one."""
        try:
            return read_json(self._record(file), dict[str, Any])
        except UserError:
            return None

    def record(self, file: str, content: dict[str, Any]) -> None:
        """Keeps `content` as what is known of `file`, which is complete and on the disk; so is this when it returns."""
        path = self._record(file)
        new = path.with_suffix(".new")
        with open(new, "w") as record:
            record.write(json.dumps(content))
            record.flush()
            os.fsync(record.fileno())
        os.replace(new, path)

    def scratch(self, name: str) -> Path:
        """A folder for what is needed on the way; the next run of the same job finds it, the output has none."""
        path = self.folder / _RECORDS / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def seal(self) -> None:
        """Hashes what was written, while a kill still finds the finished files where they were."""
        seal(self.folder, {file + PART: file for file in self.hidden}, leave_out=_RECORDS)

    def reveal(self) -> None:
        """Gives the hidden files their names. Meanwhile there is no config.json: some readers take all
        *.safetensors that they find beside one."""
        shutil.rmtree(self.folder / _RECORDS)
        config = self.folder / CONFIG
        aside = config.rename(config.with_name(CONFIG + PART)) if config.is_file() else None
        for file in self.hidden:
            os.replace(self.folder / (file + PART), self.folder / file)
        if aside is not None:
            aside.rename(config)

    def _record(self, file: str) -> Path:
        return self.folder / _RECORDS / (file.replace("/", "_") + ".json")


def check_room(out: Path, needed: int) -> None:
    """Refuses to begin when the disk is too small for `out`; what its work folder holds already is deducted."""
    held = sum(path.stat().st_blocks * 512 for path in _folder(out.resolve()).rglob("*") if path.is_file())
    require_space(out, needed - held)


@contextmanager
def unfinished_output(
    out: Path, kind: str, job: dict[str, Any], needed: int, stays: tuple[type[BaseException], ...] = ()
) -> Iterator[UnfinishedOutput]:
    """Gives the work folder of `out`, which becomes `out` in the end, of `kind` as `nano3.outputs.fresh_output` has it.

    `job` is what decides the bytes of the output (JSON): the work of a killed run is gone on with when its job was the
    same, else thrown away. After Ctrl-C the work stays, and after `stays`; after any other error nothing does.

    Args:
        needed: bytes of disk that the finished output takes, as for `check_room`.

    Raises:
        UserError: `out` is a stranger's, the disk is too small, or another process writes the same output.
    """
    out = check_output(out, kind)
    check_room(out, needed)
    with only_writer(out):
        check_output(out, kind)  # what a kill had left is back
        folder = _folder(out)
        work = UnfinishedOutput(folder, resumed=_begin(out, kind, as_json(job)))
        try:
            yield work
            # All is written. In this order a kill leaves the old result or the new one, nothing between.
            mark(folder, kind)
            work.seal()
            work.reveal()
            replace_folder(folder, out)
        except BaseException as error:
            if not folder.exists():
                pass  # it is the output, and what came in between came later
            elif isinstance(error, (KeyboardInterrupt, *stays)):
                print(f"unfinished work stays in {folder}: the same command resumes from it", file=sys.stderr)
            else:
                with suppress(OSError):  # the disk may be full; the next run goes on from here then
                    mark(folder, kind)
                    discard(folder, out)
            raise


def _begin(out: Path, kind: str, job: dict[str, Any]) -> bool:
    """Leaves in the work folder only the finished files of the same job; returns whether it was the same."""
    folder = _folder(out)
    try:
        same = read_json(folder / _RECORDS / _JOB, dict[str, Any]) == job
    except UserError:
        same = False
    if same:
        print(f"resuming the unfinished work in {folder}", file=sys.stderr)
        _only_weights(folder)
        return True
    if folder.exists():
        if not (folder / _RECORDS).is_dir() and not is_ours(folder, kind):
            raise UserError(f"{folder} holds another tool's work or somebody's; move it, or choose another output")
        mark(folder, kind)
        discard(folder, out)
    claim(folder, kind)
    (folder / _RECORDS).mkdir()
    (folder / _RECORDS / _JOB).write_text(json.dumps(job))
    return False


def _only_weights(folder: Path) -> None:
    """Removes what is written anew whatever was there: `job` says nothing of a source's side files."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        kept = path.suffix in (PART, ".distcp") or path == folder / MARKER
        if _RECORDS not in path.relative_to(folder).parts and not kept:
            path.unlink()


def _folder(out: Path) -> Path:
    return out.parent / f".{out.name}.unfinished"


def refuse_overlap(out: Path, *sources: Path) -> None:
    """Refuses an output that is one of the sources, holds one, or lies in one: replacing it would eat the source."""
    out = out.resolve()
    for source in sources:
        real = source.resolve()
        if out == real or out in real.parents or real in out.parents:
            raise UserError(f"output {out} and source {source} overlap; choose another output folder")


def require_adapter(folder: Path) -> None:
    """Refuses a folder without `lora.json`, and names the adapter of a training run's folder."""
    if not (folder / "lora.json").is_file():
        inner = [name for name in ("adapter", "adapter.previous") if (folder / name / "lora.json").is_file()]
        hint = f"did you mean {folder / inner[0]}?" if inner else "give the folder OUT/adapter of a training run"
        raise UserError(f"{folder} is no adapter folder (no lora.json); {hint}")


def side_folder(model: Path) -> Path:
    """Where config.json and the tokenizer of a model lie: in it, or in the `hf/` of a NeMo checkpoint."""
    return model / SIDE if is_nemo_checkpoint(model) else model


def require_space(out: Path, needed: int) -> None:
    """Refuses to begin when the disk of `out` has less than `needed` bytes free (an old output stays until the end)."""
    parent, free = free_disk(out)
    if free < needed:
        raise UserError(f"{out} needs {needed / 1e9:.2f} GB but {parent} has {free / 1e9:.2f} GB free; free some space")


def copy_files(source: Path, files: Iterable[Path], target: Path) -> None:
    """Copies files, given relative to `source`, byte for byte."""
    for relative in files:
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)


def progress(total: int, what: str) -> Any:
    """A progress bar over bytes, on stderr, silent where nobody watches."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1000, mininterval=0.5, disable=None)


def rate(size: int, seconds: float) -> str:
    """What was done, in words: bytes of weights, time and speed."""
    return f"{size / 1e9:.3f} GB of weights in {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s"


def add_push(parser: argparse.ArgumentParser) -> None:
    """The option `--push` of the tools that write Hugging Face folders."""
    parser.add_argument(
        "--push",
        metavar="NAME",
        help="then upload to this private repository, ORGANIZATION/NAME, of the Hugging Face Hub (conversion/push.py)",
    )
