"""A container's mounts, as Pyxis takes them: `OUTSIDE[:INSIDE[:FLAGS]]`. Imports neither torch nor NeMo."""

from __future__ import annotations

from pathlib import Path

from nano3.cli import UserError

Mount = tuple[Path, Path]
"""(outside, inside)."""


def parse_mount(text: str) -> Mount:
    """The two paths; without INSIDE it is the same path there. Flags, such as `ro`, are the container's business.

    Raises:
        UserError: it has more than three parts, an empty one, or a path that does not begin with /.
    """
    parts = text.split(":")
    outside, inside = parts[0], parts[1] if len(parts) > 1 else parts[0]
    if len(parts) > 3 or not all(parts) or not (outside.startswith("/") and inside.startswith("/")):
        raise UserError(f"mount {text!r} is not OUTSIDE[:INSIDE[:FLAGS]] with whole paths, such as /data:/data")
    return Path(outside), Path(inside)
