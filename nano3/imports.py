"""Keeps modules out of sight of a library that would import them if it could."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Within, importing any of these modules fails as if they were not installed; those imported before come back."""
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # None is Python's mark for "cannot be imported"
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)
