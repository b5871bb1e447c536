"""The parts that pages are made of: one HTML file, nothing fetched, no script; whatever comes from data is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any


def page(title: str, sections: Sequence[str]) -> str:
    """The whole document; empty sections are left out. Light and dark, and readable on 400 pixels (report.css)."""
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        "<meta name='color-scheme' content='light dark'>\n"
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in sections if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """A card; none for an empty body."""
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def facts_table(values: Mapping[str, Any]) -> str:
    """Name and value, a line each."""
    rows = "".join(f"<tr><th>{escape(str(name))}</th><td>{cell(value)}</td></tr>" for name, value in values.items())
    return f"<div class='wide'><table class='facts'><tbody>{rows}</tbody></table></div>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; it scrolls sideways where it is too wide."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{one}</td>" for one in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"


def cell(value: Any) -> str:
    """A value in words: mappings as `name value` pairs, lists with commas, booleans as yes and no."""
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(str(name))} {cell(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(cell(inner) for inner in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return escape(f"{value:.6g}" if isinstance(value, float) else str(value))


def points(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


def signed(share: float) -> str:
    """The same, green for a gain and red for a loss."""
    if not round(1000 * share):
        return points(0.0)
    return f"<span class='{'bad' if share < 0 else 'good'}'>{points(share)}</span>"
