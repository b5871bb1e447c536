"""`--config FILE.yaml`: a run's paths, resources and settings in a file, read here; and OUT/config.yaml, written here.

    model: nano
    data: /data/store
    train:
      lr: 3e-4
      epochs: 2

A file names settings in groups or by their whole key (`train.lr: 3e-4`). Nothing in it is executed or looked up
elsewhere: OmegaConf's ${interpolations} are refused. Imports neither torch nor NeMo.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from finetune.setting_sentences import group_sentence, groups_of, sentences
from finetune.settings import Run
from nano3.cli import UserError
from nano3.documents import read_yaml
from nano3.overrides import flatten

PLACES: dict[str, tuple[type, str]] = {
    "model": (str, "The model: pico, nano, or a folder."),
    "base": (str, "NeMo checkpoint of the model."),
    "data": (str, "Token store to train on."),
    "validation": (str, "Token store to validate on."),
    "out": (str, "Folder to write."),
    "nodes": (int, "Machines."),
    "gpus_per_node": (int, "GPUs of each machine."),
    "local": (bool, "Whether the run is on CPU ranks of this machine."),
    "ranks": (int, "CPU ranks."),
}
"""What a file may say of paths and resources, with its type: the flags of the same names."""


def read_config(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(paths and resources by flag, settings by whole key) of a file.

    Raises:
        UserError: a file that cannot be read, or that holds what is no setting; it names the line or the key.
    """
    loaded = read_yaml(file, dict, "write key: value lines as in OUT/config.yaml")
    places, settings = {}, {}
    for key, value in _flat(loaded, file).items():
        if key not in PLACES:
            settings[key] = value
            continue
        kind, _ = PLACES[key]
        if value is None:
            continue
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            words = {str: "text", int: "a whole number", bool: "true or false"}[kind]
            raise UserError(f"{file}: {key}: {value!r} is not {words}")
        places[key] = value
    return places, settings


def _flat(loaded: Mapping[Any, Any], file: Path, before: str = "") -> dict[str, Any]:
    """{"group.key": value} of nested dictionaries."""
    flat: dict[str, Any] = {}
    for key, value in loaded.items():
        name = f"{before}{key}"
        inner = _flat(value, file, f"{name}.") if isinstance(value, dict) else {name: value}
        for found, item in inner.items():
            if found in flat:
                raise UserError(f"{file}: {found} is given twice; keep one of them")
            if isinstance(item, str) and "${" in item:
                raise UserError(f"{file}: {found}: {item!r} is looked up elsewhere; write the value itself")
            flat[found] = item
    return flat


def config_text(run: Run) -> str:
    """OUT/config.yaml: every value of the run with its sentence as a comment; `read_config` reads it back."""
    recipe = f"# recipe: {run.recipe.name}\n" if run.recipe else ""
    places = _places_of(run)
    blocks = [f"# Every value of this run. The same run elsewhere: RECIPE --config config.yaml --out FOLDER\n{recipe}"]
    blocks += [_lines({name: value}, PLACES[name][1]) for name, value in places.items()]
    values, explained = flatten(run.settings), sentences(run.settings)
    for group, keys in groups_of(run.settings).items():
        if keys == [group]:
            blocks.append(_lines({group: values[group]}, explained[group]))
            continue
        inside = [_lines({key.partition(".")[2]: values[key]}, explained[key]) for key in keys]
        title = f"\n# {group_sentence(run.settings, group)}\n{group}:\n"
        blocks.append(title + textwrap.indent("".join(inside), "  "))
    return "".join(blocks)


def _places_of(run: Run) -> dict[str, Any]:
    """Paths and resources of a run, by the names of the flags."""
    where = {"local": True, "ranks": run.ranks} if run.cpu and run.nodes == 1 else {}
    where = where or {"nodes": run.nodes, "gpus_per_node": run.ranks_per_node}
    paths = {"model": run.model, "base": None if run.own_base else run.base, "data": run.data or None}
    return {**paths, "validation": run.validation, "out": run.out, **where}


def _lines(value: Mapping[str, Any], sentence: str) -> str:
    """One value as YAML, its sentence above it."""
    comment = textwrap.wrap(sentence, 100, initial_indent="# ", subsequent_indent="# ")
    return "\n".join(comment) + "\n" + OmegaConf.to_yaml(OmegaConf.create(dict(value)))
