"""What large libraries need not do when they are imported: look for modules, and collect garbage that there is not."""

from __future__ import annotations

import gc
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


@contextmanager
def uncollected() -> Iterator[None]:
    """Around what makes many objects and no cycles: imports of large libraries, rows of data. The garbage collector
    would look at all objects whenever there are a quarter more: for NeMo's million, which all stay, 4 of 11 s. Nor does
    it look at them later, or at the end."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
