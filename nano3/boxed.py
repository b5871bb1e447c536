r"""Answers in `\boxed{...}`: where mathematics puts them, in data sets and in what a model writes."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ \t]*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
"""A brace behind a backslash is a character, not a brace."""
_BARE = re.compile(r"[^\s{}$]+")


def boxes(text: str) -> list[str | None]:
    r"""What every `\boxed{...}` and `\fbox{...}` of a text holds, in order, braces balanced; None for one that never
    closes. A box around others is none itself.

    `\boxed 4`, as MATH has it, holds what follows up to a blank or a dollar sign, without a full stop or comma.
    """
    found: list[str | None] = []
    for match in _BOX.finditer(text):
        if text[match.end() : match.end() + 1] != "{":
            bare = _BARE.match(text, match.end())
            found += [bare[0].rstrip(".,;:")] if bare else []
            continue
        content = _braced(text, match.end())
        if content is None or not _BOX.search(content):
            found.append(content)
    return found


def _braced(text: str, start: int) -> str | None:
    """What stands between the brace at `start` and the one that closes it; None without such a one."""
    depth = 0
    for match in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start + 1 : match.start()].strip()
    return None
