"""The pack index of a token store, a folder in it: what its files must be. data_prep/packing.py writes and uses it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from typing_extensions import TypedDict

from nano3.cli import UserError
from nano3.documents import Count, Positive, Sha256, check, read_json
from nano3.file_digests import file_sha256
from nano3.token_store import MANIFEST, TokenStore

KIND = "pack-index"
VERSION = 1
PREFIX = "packs-"
"""What the name of every pack index begins with."""
DOCUMENTS, OFFSETS, FACTS = "documents.bin", "packs.idx", "packs.json"


class Curriculum(NamedTuple):
    """Documents in ascending order of a row key (or of `length`), cut into so many blocks, each packed by itself."""

    order: str
    blocks: int


class PackFacts(TypedDict):
    """packs.json. Facts that only people read are not named here."""

    store_sha256: Sha256
    seq_length: Positive
    pad_multiple: Positive
    packs: Positive
    documents: Positive
    positions: Count
    supervised_positions: Count


def index_name(seq_length: int, pad_multiple: int, curriculum: Curriculum | None = None) -> str:
    """Name of the pack index's folder in its store."""
    padding = "" if pad_multiple == 1 else f"-pad{pad_multiple}"
    return f"packs-{seq_length}{padding}" + (f"-by-{curriculum.order}-{curriculum.blocks}" if curriculum else "")


def parse_index_name(name: str) -> tuple[int, int, Curriculum | None]:
    """The arguments that `index_name` made a name of. Raises `UserError` for another one."""
    match = re.fullmatch(r"packs-(\d+)(?:-pad(\d+))?(?:-by-(\w+)-(\d+))?", name)
    if not match:
        raise UserError(f"{name!r} names no packs; it looks like packs-4096 or packs-4096-pad4")
    seq_length, padding, order, blocks = match.groups()
    return int(seq_length), int(padding or 1), Curriculum(order, int(blocks)) if order else None


def read_index(
    store: TokenStore, seq_length: int, pad_multiple: int = 1, curriculum: Curriculum | None = None
) -> tuple[Path, dict[str, Any]]:
    """The index's folder and the facts in its packs.json; reads the manifest and no pack.

    Raises:
        UserError: it is missing, truncated, made by other code or for another store; with the command that makes it.
    """
    index = store.folder / index_name(seq_length, pad_multiple, curriculum)
    padding = "" if pad_multiple == 1 else f" --pad-multiple {pad_multiple}"
    ordered = f" --order-by {curriculum.order} --blocks {curriculum.blocks}" if curriculum else ""
    remedy = f"run: python data_prep/repack.py {store.folder} --seq-length {seq_length}{padding}{ordered}"
    path = index / FACTS
    if not path.is_file():
        others = ", ".join(sorted(folder.name for folder in store.folder.glob("packs-*"))) or "none"
        raise UserError(f"the token store has no {index.name} (it has {others}); {remedy}")
    facts = read_json(path, dict[str, Any], remedy)
    if facts.get("format") != KIND or facts.get("version") != VERSION:
        raise UserError(f"{path} is not a {KIND} of version {VERSION}; {remedy}")
    check(facts, PackFacts, str(path), remedy)
    for name, wanted in (("seq_length", seq_length), ("pad_multiple", pad_multiple)):
        if facts[name] != wanted:
            raise UserError(f"{path}: {name} is {facts[name]} in the folder for {wanted}; {remedy}")
    if facts["store_sha256"] != file_sha256(store.folder / MANIFEST):
        raise UserError(f"{path} was made for other data than this store holds; {remedy}")
    for name, count in ((DOCUMENTS, facts["documents"]), (OFFSETS, facts["packs"] + 1)):
        file = index / name
        if not file.is_file() or file.stat().st_size != 8 * count:
            raise UserError(f"{file} is missing or truncated; {remedy}")
    return index, facts
