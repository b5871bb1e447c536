"""Which file system a path lies on: what it can promise about times and locks depends on that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Mount:
    """Where it is mounted, its kind (ext4, nfs4, lustre, ...), the disk or `server:/export` behind it, its options."""

    point: str
    kind: str
    source: str
    options: tuple[str, ...]


def mount_of(path: Path) -> Mount:
    """The mount that a path lies in; of an unknown kind where the system does not say."""
    real = str(path.resolve())
    inside = [mount for mount in _mounts() if real == mount.point or real.startswith(mount.point.rstrip("/") + "/")]
    return max(inside, key=lambda mount: len(mount.point), default=Mount("/", "unknown", "", ()))


@cache
def _mounts() -> tuple[Mount, ...]:
    """The kernel's list; a later line hides an earlier one of the same place."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ()
    found: dict[str, Mount] = {}
    for line in lines:
        first, _, last = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), first.split()[4])
        kind, source, options = last.split(" ", 2)
        found[point] = Mount(point, kind, source, tuple(f"{first.split()[5]},{options}".split(",")))
    return tuple(found.values())
