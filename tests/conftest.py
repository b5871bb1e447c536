"""What every folder of tests may ask for, and which tests one worker runs together."""

from __future__ import annotations

import pytest

from tests.helpers import rank_server

SLURM = {"test_real_slurm.py", "test_cluster_doc.py"}
"""Both start a Slurm of their own, whose ports go by job number: never side by side."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file share what they set up, so one worker of pytest-xdist runs them all."""
    for item in items:
        group = "slurm" if item.path.name in SLURM else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def ranks() -> rank_server.RankServer:
    """Ranks that have imported NeMo: one process for the whole session, started by the first test that asks."""
    return rank_server.server()
