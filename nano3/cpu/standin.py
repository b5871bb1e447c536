"""How a stand-in gets to where `import` finds it."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def put_module(name: str, **names: Any) -> None:
    """Puts a module with these names into `sys.modules`, over whatever is there, and into its parent, if it has one.

    Its spec has no loader: that is how others tell a stand-in from the real package (`evaluation.hf_model`).
    """
    module = ModuleType(name, f"Stand-in for {name} on the CPU (nano3.cpu).")
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    module.__dict__.update(names)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
