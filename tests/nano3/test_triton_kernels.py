"""The CPU stand-ins against the code that the cluster runs: mamba-ssm's Triton kernels, in Triton's interpreter.

The sources come from `make build/reference` (mamba-ssm and causal-conv1d without their CUDA parts, not in .venv).
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nano3.cpu import mamba_standin
from nano3.cpu.norm import rmsnorm_fn
from nano3.cpu.ssd_combined import mamba_chunk_scan_combined
from nano3.cpu.ssd_split import mamba_split_conv1d_scan_combined
from tests.helpers.fetched import not_here

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "build" / "reference"
CASES: dict[str, Any] = {
    "scan, one document": mamba_chunk_scan_combined,
    "scan, documents": mamba_chunk_scan_combined,
    "split, documents": mamba_split_conv1d_scan_combined,
    "norm, gate first": rmsnorm_fn,
    "norm, gate last": rmsnorm_fn,
}


@pytest.fixture(scope="module")
def sources() -> Path:
    """The folder with the originals; missing is a skip on a laptop and a failure in CI."""
    if not (REFERENCE / "mamba_ssm").is_dir():
        not_here(f"no original sources in {REFERENCE}: run `make build/reference`")
    return REFERENCE


@pytest.fixture(scope="module")
def originals(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("triton") / "cases.pt"
    command = [sys.executable, "-m", "tests.helpers.triton_reference", str(sources), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert process.returncode == 0, process.stderr[-3000:]
    return torch.load(out)


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    return ((actual - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_triton_kernels(name: str, originals: dict[str, Any]) -> None:
    case = originals[name]
    leaves = {key: value.clone().requires_grad_() for key, value in case["inputs"].items()}
    outputs = CASES[name](**leaves, **case["options"])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [(o.shape, o.dtype) for o in outputs] == [(o.shape, o.dtype) for o in case["outputs"]]
    for actual, reference in zip(outputs, case["outputs"], strict=True):
        assert relative_error(actual, reference) < 2e-6
    torch.autograd.backward(outputs, case["cotangents"])
    errors = {key: relative_error(leaf.grad, case["gradients"][key]) for key, leaf in leaves.items()}  # type: ignore[arg-type]
    assert max(errors.values()) < 5e-6, errors


def test_boundaries_matter_to_the_triton_kernels(originals: dict[str, Any]) -> None:
    """The comparison above would notice a stand-in that forgot the documents."""
    case = originals["split, documents"]
    options = {**case["options"], "seq_idx": None}
    output = mamba_split_conv1d_scan_combined(**case["inputs"], **options)
    assert relative_error(output, case["outputs"][0]) > 1e-2


def parameters_in_source(path: Path, function: str) -> list[tuple[str, str]]:
    """Names and defaults of a function's parameters as written, from the text: the file imports CUDA extensions."""
    import ast

    tree = ast.parse(path.read_text())
    owner, _, method = function.rpartition(".")
    body = tree.body
    if owner:
        body = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == owner).body
    node = next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == method)
    defaults = ["" for _ in node.args.args]
    for i, default in enumerate(reversed(node.args.defaults)):
        defaults[-1 - i] = repr(eval(compile(ast.Expression(default), "default", "eval")))
    return list(zip([a.arg for a in node.args.args], defaults, strict=True))


@pytest.mark.parametrize(
    ("path", "function"),
    [
        ("mamba_ssm/ops/triton/ssd_combined.py", "mamba_chunk_scan_combined"),
        ("mamba_ssm/ops/triton/ssd_combined.py", "mamba_split_conv1d_scan_combined"),
        ("mamba_ssm/ops/triton/layernorm_gated.py", "rmsnorm_fn"),
        ("mamba_ssm/ops/triton/layernorm_gated.py", "RMSNorm.__init__"),
        ("mamba_ssm/ops/triton/layernorm_gated.py", "RMSNorm.forward"),
        ("causal_conv1d/causal_conv1d_interface.py", "causal_conv1d_fn"),
        ("causal_conv1d/causal_conv1d_varlen.py", "causal_conv1d_varlen_states"),
    ],
)
def test_signatures_are_the_originals(path: str, function: str, sources: Path) -> None:
    module = "causal_conv1d" if path.endswith("interface.py") else path.removesuffix(".py").replace("/", ".")
    ours = mamba_standin.MODULES[module]
    standin = ours[function.split(".")[0]]
    for attribute in function.split(".")[1:]:
        standin = getattr(standin, attribute)
    mine = [
        (p.name, "" if p.default is p.empty else repr(p.default))
        for p in inspect.signature(standin).parameters.values()
    ]
    assert mine == parameters_in_source(sources / path, function)


def test_versions_are_those_of_the_sources(sources: Path) -> None:
    found = {
        d.metadata["Name"].replace("_", "-"): d.version for d in importlib.metadata.distributions(path=[str(sources)])
    }
    assert found["mamba-ssm"] == mamba_standin.MAMBA_VERSION
    assert found["causal-conv1d"] == mamba_standin.CONV_VERSION
    makefile = (ROOT / "Makefile").read_text()
    for name, version in (("mamba-ssm", mamba_standin.MAMBA_VERSION), ("causal-conv1d", mamba_standin.CONV_VERSION)):
        assert re.search(rf"{name}==(\S+)", makefile).group(1) == version  # type: ignore[union-attr]
