"""Shows what is in a token store: which tokens train, in which documents, in which packs.

    python data_prep/xray.py runs/data/train
    python data_prep/xray.py runs/data/train --pack 7 --html pack7.html

Text that the loss counts is coloured by its weight, and stands in [[ ]] where there are no colours; a weight other than
1 and a stage are written in front of it. Everything else is context.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
    from nano3.outputs import fresh_file
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.packing import PackedDataset
from data_prep.store_view import DocumentView, Overview, Viewer, label_of, overview, runs
from data_prep.xray_page import page
from nano3.pack_index import PREFIX, parse_index_name
from nano3.token_store import TokenStore

SHOWN_ROWS = 3
"""Documents that a preparation shows in the end."""
SHOWN_CHARACTERS = 1200
"""Of a document in the terminal; what is left out is taken from its middle."""
BARS = "▏▎▍▌▋▊▉█"


def print_documents(viewer: Viewer, numbers: Sequence[int]) -> None:
    """Prints documents to the terminal."""
    for number in dict.fromkeys(numbers):
        view = viewer.document(number)
        print(f"\n{view.origin} ({view.source}): {len(view.pieces):,} tokens, {view.trained:,} trained")
        print(terminal_text(view, colours=_colours()))


def some_rows(documents: int) -> list[int]:
    """The first, middle and last document."""
    return sorted({0, documents // 2, documents - 1})


def _colours() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def terminal_text(view: DocumentView, colours: bool) -> str:
    """A document for the terminal, shortened in its middle; control characters of the text are made visible."""
    parts, left = [], SHOWN_CHARACTERS
    total = sum(len(piece.text) for piece in view.pieces)
    skip = (left // 2, total - left // 2) if total > left else (total, total)
    place = 0
    for weight, stage, pieces in runs(view):
        text = "".join(piece.text for piece in pieces)
        start, place = place, place + len(text)
        head, tail = text[: max(0, skip[0] - start)], text[max(0, skip[1] - start) :] if place > skip[1] else ""
        gap = f" ... {skip[1] - skip[0]:,} characters ... " if start <= skip[0] < place else ""
        shown = _visible(head) + gap + _visible(tail)
        if shown:
            parts.append(_marked(shown, weight, label_of(weight, stage), colours))
    return "".join(parts)


def _visible(text: str) -> str:
    """Text whose control characters cannot act on a terminal."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _marked(text: str, weight: float, label: str, colours: bool) -> str:
    note = f"({label}) " if label else ""
    if not colours:
        return f"[[{note}{text}]]" if weight else f"{{{{{note}{text}}}}}" if label else text
    colour = "2" if not weight else "32" if weight == 1 else "33" if weight < 1 else "35"
    return f"\x1b[{colour}m{note}{text}\x1b[0m"


def print_overview(found: Overview) -> None:
    """Prints lengths, sources, stages and packs."""
    width = min(40, shutil.get_terminal_size().columns - 40)
    manifest = found.store.manifest
    print(f"{found.store.folder}: {len(found.store):,} documents, {manifest['tokens']:,} tokens", end=", ")
    print(f"{manifest['supervised_tokens']:,} trained")
    for name, counts in manifest["sources"].items():
        print(f"  {name}: {counts['documents']:,} documents, {counts['supervised_tokens']:,} tokens trained")
    for stage, count in found.stages.items():
        print(f"  stage {stage}: {count:,} tokens")
    most = max(count for _, _, count in found.bins)
    for shortest, longest, count in found.bins:
        print(f"  {shortest:>7,} to {longest:>7,} tokens {count:>9,} {_bar(count / most, width)}")
    length = found.packs.facts["seq_length"]
    print(f"  packs of {length:,}: {len(found.packs):,}; {found.packs.facts['efficiency']:.2%} full")
    for name, named in (("fullest", found.fullest), ("emptiest", found.emptiest)):
        print(f"  {name}: " + ", ".join(f"{number} ({filled / length:.1%})" for number, filled in named))


def _bar(share: float, width: int) -> str:
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + (BARS[eighths % 8 - 1] if eighths % 8 else "")


def _open(args: argparse.Namespace) -> PackedDataset:
    """The pack index that the arguments name, or the only one that the store has."""
    store = TokenStore(args.store)
    names = sorted(folder.name for folder in store.folder.glob(f"{PREFIX}*"))
    wanted = args.packs or (names[0] if names else None)
    if wanted is None or wanted not in names:
        has = ", ".join(names) or "none: make them with data_prep/repack.py"
        raise UserError(f"{store.folder} has no packs{f' {wanted}' if wanted else ''} (it has {has})")
    packs = PackedDataset(store.folder, *parse_index_name(wanted))
    packs.check_contents()
    return packs


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Show what is in a token store: what trains, documents, packs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("store", type=Path, help="token store that data_prep/prepare.py made")
    parser.add_argument("--pack", type=int, metavar="N", help="show this pack, counted from 0")
    parser.add_argument("--packs", metavar="NAME", help="pack index, such as packs-4096 (the first that the store has)")
    parser.add_argument("--cp", type=int, default=1, help="context-parallel ranks: shows which slice each has")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write one page for a browser instead")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of the store, where it has moved since")
    return parser.parse_args()


def main() -> int:
    """Shows the store, one of its packs, or writes the page."""
    args = _arguments()
    packs = _open(args)
    if args.pack is not None and not 0 <= args.pack < len(packs):
        raise UserError(f"--pack {args.pack}: the packs count from 0 to {len(packs) - 1}")
    if args.cp < 1 or (packs.facts["pad_multiple"] % (2 * args.cp) and args.cp > 1):
        raise UserError(f"--cp {args.cp} needs packs whose --pad-multiple is a multiple of {2 * max(1, args.cp)}")
    viewer = Viewer(packs.store, args.tokenizer)
    if not viewer.has_text:
        print("note: the store's tokenizer is not at hand: tokens are numbers; give --tokenizer", file=sys.stderr)
    number = args.pack or 0
    views = viewer.pack(packs, number, args.cp)
    if args.html is not None:
        with fresh_file(args.html) as temporary:
            temporary.write_text(page(overview(packs), number, views), encoding="utf-8")
        print(f"{args.html}: pack {number} of {packs.store.folder}")
        return 0
    if args.pack is None:
        print_overview(overview(packs))
        print_documents(viewer, some_rows(len(packs.store)))
    else:
        _print_pack(packs, number, views)
    return 0


def _print_pack(packs: PackedDataset, number: int, views: list[DocumentView]) -> None:
    facts: dict[str, Any] = packs.facts
    filled = sum(len(view.pieces) - 1 for view in views)
    print(f"pack {number} of {len(packs):,}: {len(views)} documents, {filled:,} of {facts['seq_length']:,} positions")
    for view in views:
        note = f", {view.padding} positions of padding" if view.padding else ""
        print(f"\n--- {view.origin} ({view.source}): {len(view.pieces):,} tokens, {view.trained:,} trained{note}")
        if view.slices:
            sizes = {rank: view.slices.count(rank) for rank in sorted(set(view.slices))}
            print("    context parallel: " + ", ".join(f"rank {rank} {size} positions" for rank, size in sizes.items()))
        print(terminal_text(view, colours=_colours()))


if __name__ == "__main__":
    run(main)
