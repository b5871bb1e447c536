"""Mixtures of token stores: a YAML file that names them, with their shares, and the order in which a run meets them.

    stores:
      - {path: runs/data/medical, weight: 0.7}     # paths count from this file's folder
      - {path: runs/data/chat, weight: 0.3}
    curriculum: {order: level, blocks: 4}          # optional

`weight` is a store's share of the packs, `epochs` how often the run meets each of its packs; all stores have the one or
all the other. With a curriculum, every pass over a store goes through the blocks of its documents in ascending order.
Nothing is copied: another weight is another line here. data_prep/mixture.py draws from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, NamedTuple, NotRequired

from annotated_types import Ge, MinLen
from typing_extensions import TypedDict

from nano3.cli import UserError
from nano3.documents import AboveZero, Name, Positive, closed, read_yaml
from nano3.pack_index import Curriculum

SMALLEST_SHARE = Fraction(1, 500_000)
"""Of the packs; a store that a run would meet less often is a mistake."""

WRITE = "a mixture has stores, each with path and weight or epochs, and may have a curriculum with order and blocks"
"""What a file that says something else must be."""


@closed
class StoreEntry(TypedDict):
    """One line of `stores`."""

    path: Annotated[str, MinLen(1)]
    weight: NotRequired[AboveZero]
    epochs: NotRequired[AboveZero]


@closed
class CurriculumEntry(TypedDict):
    """Documents in ascending order of `order`, a row key that the stores keep or `length`, in `blocks` blocks."""

    order: Name
    blocks: Annotated[Positive, Ge(2)]


@closed
class MixtureEntry(TypedDict):
    """The file."""

    stores: Annotated[list[StoreEntry], MinLen(1)]
    curriculum: NotRequired[CurriculumEntry]


@dataclass(frozen=True)
class MixtureFile:
    """A mixture: `amounts` are weights, or epochs with `by_epochs`, one for each of `stores`."""

    stores: tuple[Path, ...]
    amounts: tuple[Fraction, ...]
    by_epochs: bool = False
    curriculum: Curriculum | None = None


class DataSize(NamedTuple):
    """What a pass over the data is: documents and packs; with `by_epochs` as often as the mixture says."""

    rows: int
    packs: int
    by_epochs: bool


def rounds_of(mixture: MixtureFile, packs: Sequence[int]) -> list[int]:
    """Samples of each store in a pass over a mixture whose stores have so many packs: all, or what its epochs make."""
    if not mixture.by_epochs:
        return list(packs)
    return [max(1, round(amount * number)) for amount, number in zip(mixture.amounts, packs, strict=True)]


def data_size(mixture: MixtureFile, rows: Sequence[int], packs: Sequence[int]) -> DataSize:
    """The size of a mixture whose stores have so many documents in so many packs."""
    rounds = rounds_of(mixture, packs)
    met = sum(documents * count / number for documents, count, number in zip(rows, rounds, packs, strict=True))
    return DataSize(round(met), sum(rounds), mixture.by_epochs)


def is_mixture(data: Path | str) -> bool:
    """Whether a run's `data` is a mixture's file and not a token store's folder."""
    return Path(data).suffix in (".yaml", ".yml")


def read_mixture(data: Path | str) -> MixtureFile:
    """The mixture in a YAML file; a token store's folder is a mixture of one.

    Raises:
        UserError: a field that is not what it must be, a key that means nothing, a store given twice.
    """
    path = Path(data)
    if not is_mixture(path):
        return MixtureFile((path,), (Fraction(1),))
    entry = read_yaml(path, MixtureEntry, WRITE)
    keys = {key for store in entry["stores"] for key in ("weight", "epochs") if key in store}
    if len(keys) != 1 or any(len(store) != 2 for store in entry["stores"]):
        raise UserError(f"{path}: every store needs a weight, or every store epochs; they cannot be mixed")
    (key,) = keys
    stores = tuple((path.parent / store["path"]).resolve() for store in entry["stores"])
    twice = next((store for store in stores if stores.count(store) > 1), None)
    if twice:
        raise UserError(f"{path}: the store {twice} is given twice; add its {key} up")
    given = entry.get("curriculum")
    curriculum = Curriculum(given["order"], given["blocks"]) if given else None
    amounts = tuple(Fraction(str(store[key])) for store in entry["stores"])  # type: ignore[literal-required]
    if key == "weight" and min(amounts) < SMALLEST_SHARE * sum(amounts):
        raise UserError(
            f"{path}: the smallest weight is less than {float(SMALLEST_SHARE):g} of all; leave that store out"
        )
    return MixtureFile(stores, amounts, key == "epochs", curriculum)
