"""What every folder of tests may ask for."""

from __future__ import annotations

import pytest

from tests.helpers import rank_server


@pytest.fixture(scope="session")
def ranks() -> rank_server.RankServer:
    """Ranks that have imported NeMo: one process for the whole session, started by the first test that asks."""
    return rank_server.server()
