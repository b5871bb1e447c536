"""Starts vLLM in its own environment, build/vllm: a model in one process, or a server on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "build" / "vllm" / "bin" / "python"
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # These two round no inputs to FP8, or choose scales of their own; the one that is left computes as GPUs do.
    "VLLM_DISABLED_KERNELS": "CPUFp8PerTensorScaledMMLinearKernel,CPUFP8W8A8ScaledMMLinearKernel",
}
SECONDS = 900
"""How long vLLM may take to start, or to answer in one process: its imports alone take a quarter of a minute."""


def has_fp8_cache() -> bool:
    """Whether vLLM has an FP8 cache on this machine (`_get_attn_isa` of its cpu_attn.py)."""
    return bool(torch.cpu._is_avx512_supported())


def _environment(plugins: Path) -> dict[str, str]:
    """With our plug-in among the packages that are installed: its metadata lies in the folder `plugins`."""
    metadata = plugins / "nano3_experts-1.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: nano3-experts\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nexperts = tests.vllm_cpu.plugin:register\n")
    return os.environ | SETTINGS | {"PYTHONPATH": f"{ROOT}{os.pathsep}{plugins}"}


def probe(
    model: Path,
    engine: dict[str, Any],
    rows: list[list[int]],
    prompts: list[list[int]] | None = None,
    longest: int = 1,
    adapters: dict[str, str] | None = None,
) -> dict[str, Any]:
    """What tests/vllm_cpu/probe.py finds for a folder, whose log lies beside it. `RuntimeError` when vLLM fails."""
    engine = {"model": str(model), "dtype": "float32", "max_model_len": 512, **engine}
    job = {"engine": engine, "rows": rows, "prompts": prompts or [], "longest": longest, "adapters": adapters or {}}
    given, out, log = (model.with_suffix(f".{ending}") for ending in ("json", "out.json", "log"))
    given.write_text(json.dumps(job))
    out.unlink(missing_ok=True)
    with log.open("w") as told:
        command = [str(PYTHON), "-m", "tests.vllm_cpu.probe", str(given), str(out)]
        environment = _environment(model.parent / "plugins")
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=told, stderr=told, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"vLLM ended with {done.returncode}:\n{log.read_text()[-3000:]}")
    return dict(json.loads(out.read_text()))


@contextmanager
def serve(model: Path, log: Path) -> Iterator[str]:
    """vLLM's server for a folder, in FP32; gives its address, and ends it. Raises `RuntimeError` when it does not
    come up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "512"]
    with log.open("w") as told:
        environment = _environment(log.parent / "plugins")
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=told, stderr=told, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, log)
        yield url
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and the processes that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            with opener.open(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(2)
    raise RuntimeError(f"vLLM did not come up within {SECONDS} s:\n{log.read_text()[-3000:]}")
