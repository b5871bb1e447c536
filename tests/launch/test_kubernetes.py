"""What NeMo-Run makes of a job for Kubernetes, compared whole with a checked-in file; and SkyPilot as docs name it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "kubeflow-h100-2x8.yaml"
SITE = ROOT / "launch" / "examples" / "h100-2x8.yaml"


def script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "kubernetes_nemo_run.py"), "--cluster", str(SITE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.full
def test_the_manifest_is_the_checked_in_one():
    done = script(
        "--nodes", "2", "--name", "lora", "--volume", "lustre:/lustre", "--", "-m", "finetune.worker", "r.json"
    )
    assert done.returncode == 0, done.stderr
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(done.stdout)
    assert done.stdout == GOLDEN.read_text()


@pytest.mark.full
def test_what_kubernetes_cannot_do_is_refused():
    from launch.kubernetes_nemo_run import manifest
    from launch.slurm.cluster import Cluster
    from launch.slurm.sbatch import Job
    from nano3.cli import UserError

    with pytest.raises(UserError, match="no afterok"):
        manifest(Cluster.load(SITE), Job("x", ["y"], after=3), {})
    with pytest.raises(UserError, match="name it in `container`"):
        manifest(Cluster("me", "gpu"), Job("x", ["y"]), {})


@pytest.mark.full
def test_skypilot_as_documented_has_the_fields_of_nemo_runs_executor():
    from nemo_run import SkypilotExecutor

    text = (ROOT / "docs" / "launch.md").read_text()
    (code,) = re.findall(r"```python\n(.*?SkypilotExecutor.*?)```", text, re.DOTALL)
    (call,) = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and "Skypilot" in ast.unparse(node.func)
    ]
    known = {field.name for field in fields(SkypilotExecutor)}
    assert {keyword.arg for keyword in call.keywords} <= known
    with pytest.raises(AssertionError, match="Skypilot is not installed"):  # why nothing here renders it
        SkypilotExecutor(gpus="H100")
