"""Runs python's arguments inside a job, where the packages are those that were tested; standard library only.

    python launch/slurm/inside.py -m torch.distributed.run ... -m finetune.worker OUT/run.json

It is found by its path, so it needs nothing installed. It puts this project, and the packages of the bundle that it
lies in (launch/slurm/bundle.py), before what the image has: an image's own PYTHONPATH may win over the script's. It
compares versions, says what differs and ends with exit code 2, which no job tries again, or becomes the command.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def search_path(root: Path, before: str) -> str:
    """PYTHONPATH with this project and its bundle's packages in front, each once."""
    packages = root.parent / "packages"
    ours = [str(root), *([str(packages)] if (root.parent / "bundle.json").is_file() else [])]
    return os.pathsep.join([*ours, *(part for part in before.split(os.pathsep) if part and part not in ours)])


def main() -> int:
    arguments = sys.argv[1:]
    os.environ["PYTHONPATH"] = search_path(ROOT, os.environ.get("PYTHONPATH", ""))
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    from launch.slurm.versions import GPU, PYTHON, REQUIREMENTS, differences, installed, pins

    if sys.version_info[:2] < PYTHON:
        print(
            f"error: {sys.executable} is Python {sys.version.split()[0]}; this project needs 3.11 or later",
            file=sys.stderr,
        )
        return 2
    tested = pins(REQUIREMENTS.read_text())
    wrong = differences(tested, {name: installed(name) for name in [*tested, *GPU]})
    if wrong:
        print(
            f"error: {sys.executable} has other packages than were tested: {'; '.join(wrong)}. Put the tested ones "
            "beside the image: python launch/slurm/bundle.py FOLDER, then bundle: FOLDER in cluster.yaml. What is "
            "compiled and missing in the image goes there too, with the image's own pip: "
            "pip install --no-deps --target FOLDER/packages NAME==VERSION",
            file=sys.stderr,
        )
        return 2
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    sys.exit(main())
