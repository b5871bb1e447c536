"""Damage to files, as a bad disk, a bad copy or a clock that was set back leaves it."""

from __future__ import annotations

import os
import random
from pathlib import Path


def flip(path: Path, place: int) -> None:
    """Changes one byte of a file: every bit that a number made of it may turn on."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ (1 << place % 8)]))


def change_keeping_size_and_time(path: Path) -> None:
    """Flips a byte in the last quarter of a file, where tensors are, and puts the time of last change back."""
    stat = path.stat()
    flip(path, stat.st_size * 4 // 5)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def random_places(folder: Path, count: int, seed: int, but: tuple[str, ...] = ()) -> list[tuple[Path, int]]:
    """(file, byte) places in a folder, any byte as likely as any other in every second, any file in the others."""
    rng = random.Random(seed)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    files = [path for path in files if str(path.relative_to(folder)) not in but]
    sizes = [path.stat().st_size for path in files]
    by_size = rng.choices(files, sizes, k=count // 2)
    return [
        (path, rng.randrange(path.stat().st_size)) for path in [*by_size, *rng.choices(files, k=count - count // 2)]
    ]
