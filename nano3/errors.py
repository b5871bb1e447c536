"""The one exception for what the user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend. The message names the thing and the remedy; scripts then exit with 2."""
