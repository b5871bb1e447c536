"""`lora.init_from`: the kind of the adapter that a run starts from becomes the run's. Torch-free."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from conversion.adapters.lora_json import read_lora_json
from finetune.settings import LoraSettings
from nano3.cli import UserError
from nano3.targets import KIND


def adopt(lora: LoraSettings) -> None:
    """Sets the settings that say what kind of adapter it is to those of `lora.init_from`, whose path becomes absolute.

    Raises `UserError` for a folder that is no adapter, and for a setting that is not at its default and says otherwise.
    """
    folder = Path(lora.init_from).resolve()
    info, defaults = read_lora_json(folder), {field.name: field.default for field in fields(LoraSettings)}
    lora.init_from = str(folder)
    there = info.kind() | {"targets": info.targets}
    here = lora.kind() | {"targets": lora.chosen_targets()}
    given = {name for name in KIND if here[name] not in (defaults[name], [])}
    given |= {"targets"} if lora.targets or lora.preset != defaults["preset"] else set()
    for name in sorted(given):
        if here[name] != there[name]:
            raise UserError(
                f"lora.{name}={here[name]} with lora.init_from={folder}, whose adapter has {there[name]}; leave "
                f"lora.{name} out, or start fresh"
            )
    for name, value in there.items():
        setattr(lora, name, value)
