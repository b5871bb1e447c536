"""A page of docs/ whose commands are run as they stand, on a real Slurm.

The page's boxes marked `bash` are its commands; the last column of its table of variables says what they were tried
with.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import yaml

from tests.helpers.slurm_site import Slurm

ROOT = Path(__file__).parents[2]


class Page:
    """`docs/NAME.md`."""

    def __init__(self, name: str) -> None:
        self.text = (ROOT / "docs" / f"{name}.md").read_text()

    @cached_property
    def blocks(self) -> list[str]:
        """The boxes, in the page's order."""
        return re.findall(r"```bash\n(.*?)```", self.text, re.DOTALL)

    def tried(self, variable: str) -> str:
        """The last column of the page's table of variables."""
        (row,) = [line for line in self.text.splitlines() if line.startswith(f"| `{variable}` |")]
        return row.rstrip("| ").split("|")[-1].strip().strip("`")


def site(work: Path, python: Path) -> str:
    """A site file as docs/cluster.md says that it was tried; `python` has the packages and not this project."""
    content = {
        "account": "tests", "partition": "batch", "hardware": "cpu", "gpus_per_node": 1, "time": "00:30:00",
        "cpu_partition": "cpu", "cpu_cores": 1, "cpu_time": "00:30:00", "exclusive": False,
        "workdir": str(ROOT), "logs": str(work / "logs"), "python": str(python),
        "environment": {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    }  # fmt: skip
    return yaml.safe_dump(content)


def run(block: str, slurm: Slurm, work: Path, variables: Mapping[str, str]) -> str:
    """What a box prints; an AssertionError with it, and with the jobs' logs in WORK/logs, where it fails."""
    environment = slurm.environment | {"WORK": str(work), "OMP_NUM_THREADS": "1"} | dict(variables)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    logs = "".join(f"{log.name}:\n{log.read_text()[-2000:]}\n" for log in (work / "logs").glob("*.log"))
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}\n{logs}"
    return done.stdout
