"""Which linear layers a LoRA target names. Imports neither torch nor NeMo, so a wrong target is refused at once.

Paths are Megatron-Core's with global layer numbers: `decoder.layers.5.self_attention.linear_qkv`. A target is a
module's last name (`linear_qkv`, `in_proj`) or a pattern with `*` over the path (`*.layers.5.*`, `*.shared_experts.*`).
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from nano3.arch import Arch
from nano3.cli import UserError

PRESETS = {
    "all": ("linear_qkv", "linear_proj", "in_proj", "out_proj", "linear_fc1", "linear_fc2"),
    "attention": ("linear_qkv", "linear_proj"),
}
"""Target lists by name; `all` is the list of NVIDIA's published recipe for this model (Megatron-Bridge)."""

_MODULES = {
    "M": ("mixer.in_proj", "mixer.out_proj"),
    "*": ("self_attention.linear_qkv", "self_attention.linear_proj"),
    "E": (
        "mlp.experts.linear_fc1",
        "mlp.experts.linear_fc2",
        "mlp.shared_experts.linear_fc1",
        "mlp.shared_experts.linear_fc2",
    ),
    "-": ("mlp.linear_fc1", "mlp.linear_fc2"),
}


def adaptable_modules(arch: Arch) -> list[str]:
    """Every linear layer that can carry an adapter, by path, in layer order. The router is not among them."""
    return [f"decoder.layers.{n}.{name}" for n, letter in enumerate(arch.layers) for name in _MODULES[letter]]


def matches(target: str, path: str) -> bool:
    """Whether `target` names the module at `path`."""
    return fnmatchcase(path, target) if "*" in target else path.rsplit(".", 1)[-1] == target


def select(arch: Arch, targets: list[str] | tuple[str, ...], experts: str) -> list[str]:
    """Paths of the modules that get an adapter.

    Args:
        arch: the model.
        targets: names or patterns, see the module's docstring.
        experts: "shared" (one adapter per layer for all its routed experts) or "none" (routed experts stay untouched).

    Raises:
        UserError: a target names nothing, or nothing is left.
    """
    modules = adaptable_modules(arch)
    for target in targets:
        if not any(matches(target, path) for path in modules):
            names = sorted({path.rsplit(".", 1)[-1] for path in modules})
            raise UserError(
                f"LoRA target {target!r} matches no linear layer of this model (pattern {arch.pattern}); "
                f"there are {', '.join(names)}, or patterns such as '*.layers.0.*' over paths such as {modules[0]}"
            )
    if experts not in ("shared", "none"):
        raise UserError(f"lora.experts={experts!r} is not known; choose shared or none")
    chosen = [path for path in modules if any(matches(target, path) for target in targets)]
    if experts == "none":
        chosen = [path for path in chosen if ".mlp.experts." not in path]
    if not chosen:
        raise UserError("the LoRA targets leave no layer to adapt; give lora.targets or lora.preset=all")
    return chosen
