"""What tests need beside the repository: without it they are skipped on a laptop, and fail in CI."""

from __future__ import annotations

import os

import pytest


def not_here(message: str) -> None:
    """Skips the running test, or fails it in CI; `message` says what is missing, and the command that brings it."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
