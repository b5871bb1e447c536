"""Regular expressions from files, matched in linear time and bounded memory.

Python's `re` may take years for a short pattern. RE2 does not (https://github.com/google/re2); what it does not know,
such as backreferences, no configuration of a model needs, and it is refused.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from nano3.errors import UserError

MAX_PATTERN = 1000
"""Longest pattern. Those of PEFT's and ModelOpt's configurations name a module or two."""


class Pattern:
    """A regular expression of a file; `where` is how errors call the file.

    Raises:
        UserError: it is none, is too long, or has what cannot be matched in linear time.
    """

    def __init__(self, text: str, where: str) -> None:
        if len(text) > MAX_PATTERN:
            raise UserError(f"{where}: a pattern of {len(text):,} characters; at most {MAX_PATTERN:,} are read")
        import re2

        try:
            re.compile(text)  # what Python would refuse, others refuse too
            self._compiled = re2.compile(text, _options())
        except (re.error, re2.error, OverflowError, RecursionError) as error:
            reason = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
            raise UserError(f"{where}: the pattern {text[:80]!r} is no regular expression ({reason[:80]})") from None

    def begins(self, name: str) -> bool:
        """Whether the beginning of `name` matches."""
        return self._compiled.match(name) is not None

    def matches(self, name: str) -> bool:
        """Whether all of `name` matches."""
        return self._compiled.fullmatch(name) is not None


@cache
def _options() -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False
    options.max_mem = 8 << 20
    return options
