"""SHA-256 of files, computed once for each state of a file: the check of a 63 GB model that did not change costs stats.

What is remembered lies outside of every folder that is checked, in NANO3_CACHE (default ~/.cache/nano3-lora), which
only you may write to. A file is known again by file system, inode, size, and both its times in nanoseconds: of its
bytes (mtime) and of its inode (ctime). Size and mtime alone say nothing: `touch` and every copying tool set an mtime. A
ctime is set by the kernel or the file server, by its clock, at every change. A file system is known again by its server
where it has one, else by its device on this machine since it was started.

Three things are hashed each time: files that changed in the last seconds or in the future, which could change again
within the same tick; files on file systems without a true ctime; and everything where no folder can be kept to
yourself. docs/security.md says what is left.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from nano3.file_system import mount_of

RECENT_NS = 3 * 10**9
"""A file that changed less than this before it was looked at may change again and keep its times: the clock of a kernel
or a file server ticks in steps of up to 2 s, and the clocks of two hosts differ."""
PROGRESS_BYTES = 4 << 30
"""From here on hashing takes seconds, and shows how far it is."""
SMALL_BYTES = 1 << 20
"""Files below are read each time: that is as fast as to look up what is known of them."""
_PIECE = 8 << 20
_SHA256 = "sha256"
_SERVED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "panfs", "wekafs")
"""File systems whose inodes and times are the server's, the same on every host."""
_NO_CTIME = ("vfat", "msdos", "exfat", "ntfs", "ntfs3", "cifs", "smb3", "9p")
"""File systems whose ctime is not the kernel's word on the last change; so are those that a program serves (FUSE)."""
_MOST_ENTRIES = 20_000

Stamp = tuple[str, int, int, int, int]
"""File system, inode, size, mtime and ctime in ns of a file: equal stamps, equal bytes, unless they are recent."""


def stamp(path: Path) -> Stamp:
    """The stamp of a file as it is now. It is opened for that: NFS then asks its server, and not its cache."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        stat = os.fstat(file)
    finally:
        os.close(file)
    mount = mount_of(path)
    served = mount.kind in _SERVED
    system = f"{mount.kind} {mount.source}" if served else f"{_boot()} {stat.st_dev}"
    return system, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def file_sha256(path: Path | str) -> str:
    """SHA-256 of a file, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(paths: Iterable[Path], anew: bool = False) -> dict[Path, str]:
    """SHA-256 of files; those that did not change since they were last hashed are not read. On all cores, with a
    progress bar where it takes seconds.

    `anew` reads them all: what a refusal must rest on.
    """
    sizes = {path: path.stat().st_size for path in paths}
    found: dict[Path, str] = {}
    if not anew:
        known = {path: recall(_SHA256, [path]) for path, size in sizes.items() if size >= SMALL_BYTES}
        found = {path: digest for path, digest in known.items() if isinstance(digest, str)}
    left = [path for path in sizes if path not in found]
    if not left:
        return found
    with _progress(sum(sizes[path] for path in left)) as bar, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        largest_first = sorted(left, key=lambda path: -sizes[path])
        return found | dict(zip(largest_first, pool.map(lambda path: _hash(path, bar), largest_first), strict=True))


def _hash(path: Path, bar: Any) -> str:
    begun, before = time.time_ns(), stamp(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            bar.update(len(piece))
    if before[2] >= SMALL_BYTES and before == stamp(path):
        remember(_SHA256, [path], [before], begun, digest.hexdigest())
    return digest.hexdigest()


def _progress(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc="check",
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        mininterval=0.5,
        disable=None if total >= PROGRESS_BYTES else True,
    )


def recall(what: str, paths: Iterable[Path]) -> Any:
    """What `remember` kept of files that are still in the same state; None where it kept nothing."""
    folder = _folder()
    if folder is None:
        return None
    try:
        return json.loads((folder / _key(what, [stamp(path) for path in paths])).read_text())
    except (OSError, ValueError):
        return None


def remember(what: str, paths: list[Path], stamps: list[Stamp], begun: int, value: Any) -> None:
    """Keeps a fact (JSON) that holds of files while they have these stamps, unless one of them is recent.

    `begun` is the time in ns before the stamps were taken and the files read.
    """
    folder = _folder()
    if folder is None or any(max(mtime, ctime) > begun - RECENT_NS for *_, mtime, ctime in stamps):
        return
    if not all(_true_ctime(path) for path in paths):
        return
    target = folder / _key(what, stamps)
    new = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        new.write_text(json.dumps(value))
        os.replace(new, target)
        _prune(folder)
    except OSError:  # a full disk costs the next check its time, and nothing else
        new.unlink(missing_ok=True)


def _key(what: str, stamps: list[Stamp]) -> str:
    return hashlib.sha256(json.dumps([what, stamps]).encode()).hexdigest()


def _true_ctime(path: Path) -> bool:
    kind = mount_of(path).kind
    return kind not in _NO_CTIME and not kind.startswith("fuse")


@cache
def _boot() -> str:
    """This machine since it was started: device numbers mean nothing elsewhere or later."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _folder() -> Path | None:
    """Where facts are kept; None where that cannot be ours alone."""
    root = os.environ.get("NANO3_CACHE")
    folder = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nano3-lora"
    folder /= "digests"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = folder.lstat()
    except (OSError, RuntimeError):
        return None
    ours = stat.st_uid == os.geteuid() and not stat.st_mode & 0o022 and not folder.is_symlink()
    return folder if ours and _boot() != "unknown" else None


def _prune(folder: Path) -> None:
    """Lets the oldest facts go when there are very many."""
    names = os.listdir(folder)
    if len(names) <= _MOST_ENTRIES:
        return
    oldest = sorted((folder / name for name in names), key=lambda path: path.stat().st_mtime_ns)
    for path in oldest[: len(names) // 2]:
        path.unlink(missing_ok=True)
