"""The X-ray of a token store as one static page: no scripts, nothing fetched, light or dark by the reader's setting."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from data_prep.store_view import DocumentView, Overview, Piece, label_of, runs

STYLE = Path(__file__).with_name("xray.css")
MOST_TOKENS = 20_000
"""Tokens that a page shows of a pack; a browser is slow with more."""


def page(found: Overview, number: int, views: Sequence[DocumentView]) -> str:
    """The page of a store and of one of its packs."""
    name = html.escape(found.store.folder.resolve().name)
    body = [
        f"<h1>{name}</h1>",
        _summary(found),
        "<h2>Sources</h2>",
        _sources(found),
        "<h2>Lengths</h2>",
        _histogram(found),
        "<h2>Packs</h2>",
        _packs(found),
        f"<h2>Pack {number}</h2>",
        _legend(found, views),
        *_documents(found, views),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" '
        f'content="light dark">\n<title>{name}: what trains</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n'
        "<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def _summary(found: Overview) -> str:
    manifest, facts = found.store.manifest, found.packs.facts
    total, trained = manifest["tokens"], manifest["supervised_tokens"]
    cards = [
        (f"{len(found.store):,}", "documents"),
        (f"{total:,}", "tokens"),
        (f"{trained / total:.1%}", f"trained: {trained:,} tokens"),
        (f"{len(found.packs):,}", f"packs of {facts['seq_length']:,}"),
        (f"{facts['efficiency']:.2%}", "of their positions filled"),
    ]
    items = "".join(f"<div><dt>{html.escape(what)}</dt><dd>{value}</dd></div>" for value, what in cards)
    return f'<dl class="cards">{items}</dl>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and the others numbers."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _sources(found: Overview) -> str:
    rows = [
        (name, f"{counts['documents']:,}", f"{counts['tokens']:,}", f"{counts['supervised_tokens']:,}")
        for name, counts in found.store.manifest["sources"].items()
    ]
    return _table(("source", "documents", "tokens", "trained"), rows)


def _histogram(found: Overview) -> str:
    """Documents by length; a bar is as wide as its share of the largest count."""
    most = max(count for _, _, count in found.bins)
    lines = "".join(
        f"<tr><th>{shortest:,}&ndash;{longest:,}</th><td>{count:,}</td>"
        f'<td class="bar"><span style="width:{count / most:.1%}"></span></td></tr>'
        for shortest, longest, count in found.bins
    )
    return (
        '<table class="bars"><thead><tr><th>tokens</th><th>documents</th><th></th></tr></thead>'
        f"<tbody>{lines}</tbody></table>"
    )


def _packs(found: Overview) -> str:
    length = found.packs.facts["seq_length"]
    rows = [
        (f"{kind}: pack {number}", f"{filled:,}", f"{filled / length:.1%}", f"{len(found.packs.documents(number))}")
        for kind, named in (("fullest", found.fullest), ("emptiest", found.emptiest))
        for number, filled in named
    ]
    return _table(("pack", "positions", "filled", "documents"), rows)


def _class(weight: float, stage: int) -> str:
    kind = "none" if not weight else "one" if weight == 1 else "less" if weight < 1 else "more"
    return f"run {kind}" + (" stage" if stage else "")


def _legend(found: Overview, views: Sequence[DocumentView]) -> str:
    words = [
        (0.0, 0, "context: shown, not trained"),
        (1.0, 0, "trained, weight 1"),
        (0.5, 0, "trained with less weight"),
        (2.0, 0, "trained with more weight"),
        (1.0, 1, "underlined: has a stage"),
    ]
    items = "".join(f'<li><span class="{_class(weight, stage)}">{text}</span></li>' for weight, stage, text in words)
    items += '<li><span class="control">&lt;|im_end|&gt;</span> control token</li>'
    if any(view.slices for view in views):
        items += '<li><span class="slice">rank 0</span> a context-parallel slice begins</li>'
    stages = ", ".join(f"stage {stage}: {count:,} tokens" for stage, count in found.stages.items())
    return f'<ul class="legend">{items}</ul>' + (f"<p>In the store: {stages}.</p>" if stages else "")


def _documents(found: Overview, views: Sequence[DocumentView]) -> list[str]:
    shown, left = [], MOST_TOKENS
    for view in views:
        shown.append(_document(view, left))
        left -= len(view.pieces)
        if left <= 0:
            shown.append(f"<p>The page ends here, after {MOST_TOKENS:,} tokens of the pack.</p>")
            break
    filled = sum(len(view.pieces) - 1 for view in views)
    rest = found.packs.facts["seq_length"] - filled - sum(view.padding for view in views)
    return [*shown, f'<p class="rest">{rest:,} positions are left empty at the end of this pack.</p>']


def _document(view: DocumentView, most: int) -> str:
    facts = [html.escape(view.source), f"{len(view.pieces):,} tokens", f"{view.trained:,} trained"]
    if view.padding:
        facts.append(f"{view.padding} padding")
    text, place = [], 0
    for weight, stage, pieces in runs(view):
        kept = pieces[: max(0, most - place)]
        label = label_of(weight, stage)
        note = f'<b class="note">{label}</b>' if label else ""
        marked = "".join(_token(piece, _slice_at(view, place + offset)) for offset, piece in enumerate(kept))
        text.append(f'<span class="{_class(weight, stage)}">{note}{marked}</span>')
        place += len(pieces)
    return (
        f"<article><header><h3>{html.escape(view.origin)}</h3><p>{' &middot; '.join(facts)}</p></header>"
        f"<pre>{''.join(text)}</pre></article>"
    )


def _slice_at(view: DocumentView, place: int) -> int | None:
    """The context-parallel rank whose slice begins at this token, None where none does."""
    if place >= len(view.slices) or (place and view.slices[place] == view.slices[place - 1]):
        return None
    return view.slices[place]


def _token(piece: Piece, rank: int | None) -> str:
    mark = f'<b class="slice">rank {rank}</b>' if rank is not None else ""
    text = html.escape(_visible(piece.text))
    return f'{mark}<i class="control">{text}</i>' if piece.control else f"{mark}<i>{text}</i>"


def _visible(text: str) -> str:
    """Text with a sign where a line ends, and with escapes for what a page would not show."""
    shown = "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.replace("\n", "⏎\n")
