"""Which packages a run was tested with, and whether this interpreter has them. Standard library only.

requirements.txt is the list. Most of it is pure Python, and must be there in exactly the tested version: the numerics
of a run are those of NeMo and Megatron-Core. What is compiled against the machine's Python, CUDA and torch is the
image's own: there a lowest version is asked for, or that it is there at all. Where torch is the tested one itself, the
environment is the one of requirements.txt, and everything in it must be.

What NVIDIA's images hold nobody here has seen: **not verified**.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements.txt"
PYTHON = (3, 11)
"""The lowest that this project's own code runs on."""
NO_RUN_NEEDS = ("pytest", "ruff", "mypy", "setuptools", "ninja", "hypothesis")
"""Of requirements.txt: development."""
SOME_COMMANDS = ("reasoning_gym", "rensa", "lm-eval", "math-verify")
"""Of requirements.txt: what single commands of data and evaluation import. They may be missing; those say so."""
IMAGE = {
    "torch": "2.7",
    "numpy": "1.26",
    "triton": "",
    "pandas": "",
    "pydantic": "2.7",
    "google-re2": "1.1",
    "PyYAML": "6.0",
    "tiktoken": "",
    "sentencepiece": "",
    "tensorstore": "",
    "multi-storage-client": "",
    "nvidia-resiliency-ext": "",
    "wandb": "",
}
"""Of requirements.txt: compiled for one Python, CUDA or torch, hence the image's; the lowest version, or any."""
CPU_ONLY = ("numba", "jiter")
"""Of requirements.txt: what only the CPU backend needs, and what only makes faster: packing runs without numba too
(data_prep/best_fit.py), and JSON is read without jiter (nano3/documents.py)."""
GPU = {"transformer-engine": ("2.9", "2.12"), "mamba-ssm": ("2.0", ""), "causal-conv1d": ("1.4", "")}
"""What a GPU run needs besides: from, and below (requirements-gpu.txt says why)."""


def pins(text: str) -> dict[str, str]:
    """Package -> version of the lines `name==version`."""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", text, re.MULTILINE))


def number(version: str) -> tuple[int, ...]:
    """`2.9.0a0+50eac81` -> (2, 9, 0), to compare; what stands behind + is a build's own."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def installed(name: str) -> str | None:
    """The version that an import would find, None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def differences(tested: dict[str, str], found: dict[str, str | None]) -> list[str]:
    """What is not as it was tested, each by its name, its version and what it should be."""
    torch = found.get("torch")
    ours = torch is not None and number(torch) == number(tested["torch"])
    wrong = []
    for name, version in tested.items():
        if name in NO_RUN_NEEDS or (name in CPU_ONLY and not ours) or (name in SOME_COMMANDS and not found.get(name)):
            continue
        lowest, below = (version, None) if ours or name not in IMAGE else (IMAGE[name], "")
        wrong += _compare(name, found.get(name), lowest, below)
    for name, (lowest, below) in ({} if ours else GPU).items():
        wrong += _compare(name, found.get(name), lowest, below)
    return wrong


def _compare(name: str, found: str | None, lowest: str, below: str | None) -> list[str]:
    """At most one difference. `below` None: it must be `lowest` exactly; empty: nothing is too new."""
    if below is None:
        right, wanted = found is not None and found.partition("+")[0] == lowest, lowest
    else:
        high_enough = found is not None and (not lowest or number(found) >= number(lowest))
        right = high_enough and (not below or number(found or "") < number(below))
        wanted = " ".join(
            filter(None, (f"{lowest} or later" if lowest else "any version", f"below {below}" if below else ""))
        )
    return [] if right else [f"{name} is {found or 'missing'} (tested: {wanted})"]
