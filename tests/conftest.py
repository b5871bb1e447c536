"""What every folder of tests may ask for."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest

from tests.helpers import rank_server


@pytest.fixture(scope="session")
def ranks() -> rank_server.RankServer:
    """Ranks that have imported NeMo: one process for the whole session, started by the first test that asks."""
    return rank_server.server()


LONGEST = (
    "nano3/test_parity_suite.py",
    "project/test_readme.py",
    "project/test_bench_step.py",
    "launch/test_memory_plan.py",
    "launch/test_real_slurm.py",
    "finetune/test_resume.py",
    "nano3/test_gpu_check.py",
    "nano3/test_relayout.py",
    "launch/test_pipeline.py",
    "launch/test_cluster_doc.py",
    "nano3/test_gate.py",
    "finetune/test_sweep_killed.py",
    "launch/test_medical_doc.py",
)
"""Files that take minutes: begun last, one of them would keep one worker busy and no other. The three with a Slurm of
their own are apart: one waits for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of `LONGEST` first, the others in their order."""
    root = Path(__file__).parent
    places = {root / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))
    gc.freeze()  # what is imported by now stays: the collector need not look at it again and again


@pytest.fixture
def roomy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every disk has room, whatever the machine has: preflight of Nano asks for 61 GiB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1 << 50, 0, 1 << 50))  # type: ignore[attr-defined]
