"""Which base model an adapter or a checkpoint belongs to, by content hash (conversion/checkpoint/tensor_digests.py).

    python conversion/identity.py MODEL

prints the hash of a Hugging Face folder or a NeMo checkpoint. The import records it in the NeMo checkpoint
(`base.json`), training passes it on to every adapter and checkpoint, and a merge compares it with the base that it is
given. Tensors are read in pieces, on all cores, so a 63 GB model costs one pass over its files and no memory.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
    from nano3.outputs import fresh_file
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from conversion.certificates.certificate import base_revision
from conversion.checkpoint.model_folder import HFFolder, SafetensorsFolder, named_model, open_model, side_files
from conversion.checkpoint.output_folder import SIDE
from conversion.checkpoint.tensor_digests import Facts, content_hash, facts_of
from nano3.arch import is_nemo_checkpoint
from nano3.checkpoints.base_identity import FILE, recorded_sha256
from nano3.file_digests import file_sha256, recall, remember, stamp
from nano3.file_system import is_transient
from nano3.hf_config import is_plain
from nano3.sealed_folder import PROSE, check_seal

_CONTENT = "content"
"""What is remembered of a folder's weight files: their content hash."""


def weight_files(hf: SafetensorsFolder) -> list[Path]:
    """The safetensors files of a folder, sorted."""
    return [hf.path / name for name in sorted({entry.file for entry in hf.layout.entries.values()})]


def source_stamps(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Name -> (bytes, mtime in ns) of files that a long work reads: another one, and the work begins anew.

    These outlast a reboot, as the work must. They say less than a `Stamp`: nothing is remembered by them.
    """
    stats = {path.name: path.stat() for path in paths}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


class Watch:
    """The weight files of a folder while they are read once, from when this is made until `done`."""

    def __init__(self, hf: SafetensorsFolder) -> None:
        self._files, self._begun = weight_files(hf), time.time_ns()
        self._stamps = [stamp(path) for path in self._files]

    def done(self, sha256: str, all_read: bool = True) -> None:
        """Remembers their content hash for `remembered_hash`, unless a part of it is from an earlier reading. Raises
        `UserError` when one of them changed meanwhile."""
        for path, before in zip(self._files, self._stamps, strict=True):
            if stamp(path) != before:
                raise UserError(f"{path} changed while it was read; begin again when nobody writes there")
        if all_read:
            remember(_CONTENT, self._files, self._stamps, self._begun, sha256)


def remembered_hash(source: Path, quantized: bool = False) -> str:
    """The content hash of a Hugging Face folder, with `quantized` of one that may be FP8 too; its tensors are read
    unless they were before and did not change."""
    with SafetensorsFolder(source) if is_plain(source) else HFFolder(source, quantized=quantized) as hf:
        known, watch = recall(_CONTENT, weight_files(hf)), Watch(hf)
        if isinstance(known, str):
            return known
        sha256 = content_hash(facts_of(hf))
        watch.done(sha256)
        return sha256


def record(checkpoint: Path, facts: Facts, base: dict[str, str]) -> None:
    """Writes `base.json` into a NeMo checkpoint whose tensors have `facts`; `base` says what it descends from
    (certificates/certificate.py)."""
    (checkpoint / FILE).write_text(json.dumps({"sha256": content_hash(facts), "base": base}, indent=1) + "\n")


def is_record(folder: Path) -> bool:
    """Whether a folder only says which weights a base has, as `record_only` left it, or was about to."""
    return folder.is_dir() and all(path.name == FILE or is_transient(path.name) for path in folder.iterdir())


def drop_record(folder: Path) -> None:
    """Removes such a folder, where there is one."""
    if is_record(folder):
        shutil.rmtree(folder)


def record_only(folder: Path, source: Path) -> None:
    """Writes `base.json` of the Hugging Face folder `source` into a folder that holds no weights.

    Raises `UserError` where the folder holds something else.
    """
    if folder.exists() and not is_record(folder):
        raise UserError(f"{folder} holds other weights than {source}; remove it, or choose another --out")
    folder.mkdir(exist_ok=True)
    sha256 = remembered_hash(source)
    with fresh_file(folder / FILE) as temporary:
        temporary.write_text(json.dumps({"sha256": sha256, "base": base_revision(source, sha256)}, indent=1) + "\n")


def holds(checkpoint: Path, source: Path) -> bool:
    """Whether a NeMo checkpoint is what was imported from the Hugging Face folder `source` as that is now: its tensors
    and its other files. Nothing is read that did not change since it was read before."""
    try:
        check_seal(checkpoint, required=True)
        recorded = recorded_sha256(checkpoint)
    except UserError as error:
        print(f"{error}: importing it again", file=sys.stderr)
        return False
    return recorded == remembered_hash(source) and _side(checkpoint / SIDE) == _side(source)


def _side(folder: Path) -> dict[str, str]:
    return {str(path): file_sha256(folder / path) for path in side_files(folder) if path.name not in PROSE}


def model_sha256(folder: Path) -> str:
    """Content hash of a Hugging Face folder, an FP8 one too, or of a NeMo checkpoint, which is read each time."""
    if not is_nemo_checkpoint(folder):
        return remembered_hash(folder, quantized=True)
    with open_model(folder) as model:
        return content_hash(facts_of(model))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder, NeMo checkpoint, or a preset such as pico")
    print(model_sha256(named_model(parser.parse_args().model)))
    return 0


if __name__ == "__main__":
    run(main)
