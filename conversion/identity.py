"""Which base model an adapter or a checkpoint belongs to, by content hash (conversion/checkpoint/tensor_digests.py).

    python conversion/identity.py MODEL

prints the hash of a Hugging Face folder or a NeMo checkpoint. The import records it in the NeMo checkpoint
(`base.json`), training passes it on to every adapter and checkpoint, and a merge compares it with the base that it is
given. Tensors are read in pieces, on all cores, so a 63 GB model costs one pass over its files and no memory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from conversion.checkpoint.hf_folder import HFFolder
from conversion.checkpoint.nemo_folder import named_model, open_model
from conversion.checkpoint.tensor_digests import Facts, content_hash, facts_of
from nano3.checkpoints.base_identity import FILE
from nano3.cli import UserError, run


def source_files(hf: HFFolder) -> dict[str, list[int]]:
    """Name -> (bytes, time of last change in ns) of the weight files: a cheap answer to "are they still the same?"."""
    stats = {name: (hf.path / name).stat() for name in sorted({entry.file for entry in hf.layout.entries.values()})}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def record(checkpoint: Path, facts: Facts, base: dict[str, str], source: HFFolder | None = None) -> None:
    """Writes `base.json` into a NeMo checkpoint whose tensors have `facts`.

    `base` says what it descends from (certificates/revision.py), `source` is the folder that has the same tensors.
    """
    content: dict[str, Any] = {"sha256": content_hash(facts), "base": base}
    if source is not None:
        content |= {"source": str(source.path.resolve()), "files": source_files(source)}
    (checkpoint / FILE).write_text(json.dumps(content, indent=1) + "\n")


def holds(checkpoint: Path, source: Path) -> bool:
    """Whether a NeMo checkpoint was made from the Hugging Face folder `source`, whose files have not changed since."""
    try:
        recorded = json.loads((checkpoint / FILE).read_text())
    except (OSError, ValueError):
        return False
    with HFFolder(source) as hf:
        return recorded.get("source") == str(source.resolve()) and recorded.get("files") == source_files(hf)


def refuse_other_base(where: Path, facts: Facts, recorded: str | None, adapter: Path) -> None:
    """Raises `UserError` when the base in `where` has not the content hash that the adapter records."""
    found = content_hash(facts)
    if recorded is not None and found != recorded:
        raise UserError(
            f"adapter {adapter} was trained on another base than {where}: that one's content hash begins with "
            f"{recorded[:16]}, this one's with {found[:16]}; give the base that was tuned"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder, NeMo checkpoint, or a preset such as pico")
    with open_model(named_model(parser.parse_args().model), quantized=True) as model:
        print(content_hash(facts_of(model)))
    return 0


if __name__ == "__main__":
    run(main)
