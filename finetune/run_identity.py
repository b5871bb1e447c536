"""What makes two attempts the same run, so that the second may go on from the first's checkpoints.

Every setting that has a say in the numbers, the recipe's function and file, and the *contents* of base, stores and the
adapter that it starts from, by hash. Paths are not part of it: a run may move. Neither are the groups `log`,
`checkpoint` and `supervision`, when a run counts as diverged, what is recomputed and the chunks of the loss: an attempt
that stopped for one of these must be able to go on. Nor are the ranks and their layout, on which only the order of sums
depends, and random numbers: what a checkpoint says of them decides whether equal bits can be promised.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from conversion.certificates.certificate import folder_sha256
from data_prep.packing import PackedDataset
from finetune.settings import Run
from launch.plan.layout import AXES
from nano3.checkpoints.base_identity import recorded_sha256
from nano3.documents import as_json
from nano3.mixture import is_mixture, read_mixture
from nano3.overrides import flatten
from nano3.pack_index import Curriculum
from nano3.sealed_folder import SEAL
from nano3.token_store import MANIFEST

MAY_CHANGE = (
    "log.",
    "checkpoint.",
    "supervision.",
    "layout.",
    "train.divergence",
    "train.recompute",
    "train.loss_chunk",
)


def run_identity(text: str) -> dict[str, Any]:
    """The identity of the run with this JSON (`Run.to_json`), whose base and stores must exist; JSON values."""
    run = Run.from_json(text)
    settings = {key: value for key, value in flatten(run.settings).items() if not key.startswith(MAY_CHANGE)}
    initial = settings.pop("lora.init_from")
    identity = {
        "train.pad_multiple": run.settings.document_multiple,
        "base": recorded_sha256(Path(run.base))[:16],
        "data": _data_sha256(run),
        "validation": _store_sha256(Path(run.validation), run, None) if run.validation else None,
        "initial adapter": folder_sha256(Path(initial))[:16] if initial else None,
        "bf16": run.bf16,
        **_recipe(run),
        **{key: value for key, value in settings.items() if key != "train.pad_multiple"},
    }
    return as_json(identity)


def _recipe(run: Run) -> dict[str, str]:
    """The recipe's name, and the hashes of its file and of the recipes that it imports."""
    if run.recipe is None:
        return {}
    files = {f"the recipe's file {name}": digest[:16] for name, digest in run.recipe.sha256.items()}
    return {"recipe": run.recipe.name, **files}


def run_layout(run: Run) -> dict[str, int]:
    """The number of ranks and the sizes of their groups: what may be different when a run goes on."""
    layout = run.settings.layout
    sizes = {name: getattr(layout, name) for name in AXES}
    return {"ranks": run.ranks, **sizes, "sp": int(layout.sequence_parallel)}


def _data_sha256(run: Run) -> str:
    """The hash of the store to train on, or of what a mixture says and of all its stores."""
    mixture = read_mixture(run.data)
    hashes = [_store_sha256(store, run, mixture.curriculum) for store in mixture.stores]
    if not is_mixture(run.data):
        return hashes[0]
    says = [hashes, list(map(str, mixture.amounts)), mixture.by_epochs, mixture.curriculum]
    return hashlib.sha256(json.dumps(says).encode()).hexdigest()[:16]


def _store_sha256(store: Path, run: Run, curriculum: Curriculum | None) -> str:
    """The hash of a store's manifest and of the seal of the packs that this run uses: both have their files' hashes."""
    packs = PackedDataset(store, run.settings.train.seq_length, run.settings.document_multiple, curriculum)
    digest = hashlib.sha256((store / MANIFEST).read_bytes())
    digest.update((packs.index / SEAL).read_bytes())
    return digest.hexdigest()[:16]
