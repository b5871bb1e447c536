"""What is known of the training run that wrote an adapter: its steps, its data, its settings. Torch-free.

An adapter lies in its run's folder (OUT/adapter, OUT/best, OUT/checkpoints/step-N), whose run.json has the settings.
Paths are left out: they say more of a machine than of a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from nano3.documents import Count, Name, Positive, Text, read_json


class Steps(TypedDict, total=False):
    """What lora.json says of the run."""

    steps: Count


class RunFile(TypedDict, total=False):
    """What run.json says that a certificate tells (finetune/settings.py has all of it)."""

    settings: dict[Name, Any]
    data: Text
    nodes: Positive
    ranks_per_node: Positive


class StoreCounts(TypedDict, total=False):
    """What a store's manifest says that a certificate tells."""

    documents: Count
    tokens: Count
    supervised_tokens: Count
    sources: dict[Name, Any]


_COUNTS = ("documents", "tokens", "supervised_tokens")


def training_facts(adapter: Path) -> dict[str, Any]:
    """Facts for a certificate; {} of an adapter that came without its run and says nothing itself."""
    facts: dict[str, Any] = {}
    lora = _read(adapter / "lora.json", Steps)
    if "steps" in lora:
        facts["steps"] = lora["steps"]
    folder = adapter.resolve()
    where = _run_of(folder)
    run = _read(where / "run.json", RunFile) if where is not None else {}
    if "settings" in run and "data" in run:
        facts["data"] = _data(Path(str(run["data"])))
        facts["settings"] = {group: _no_paths(values) for group, values in run["settings"].items()}
        facts["ranks"] = run.get("nodes", 1) * run.get("ranks_per_node", 1)
    return facts


def _run_of(adapter: Path) -> Path | None:
    """The folder of the run that wrote an adapter; None for one that lies elsewhere, though a run may be near it."""
    if adapter.name in ("adapter", "best"):
        return adapter.parent
    return adapter.parents[1] if adapter.parent.name == "checkpoints" else None


def _no_paths(values: Any) -> Any:
    """A group of settings without those that name a file or folder."""
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if not (isinstance(value, str) and "/" in value)}


def _data(store: Path) -> dict[str, Any]:
    """Name of the token store, and from its manifest, if it still is there, sizes and sources."""
    manifest = _read(store / "manifest.json", StoreCounts)
    facts: dict[str, Any] = {"name": store.name} | {key: manifest[key] for key in _COUNTS if key in manifest}
    if "sources" in manifest:
        facts["sources"] = sorted(manifest["sources"])
    return facts


def _read(path: Path, schema: Any) -> dict[str, Any]:
    return dict(read_json(path, schema, "restore it, or move the adapter away from its run")) if path.is_file() else {}
