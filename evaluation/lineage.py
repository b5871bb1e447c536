"""Where a model comes from, verified by hash: source revision -> store -> adapter -> merged -> FP8 -> results.

    python evaluation/lineage.py OUT

OUT is a run's folder, or one that holds a run, `merged`, `fp8` and results (launch/pipeline.py and recipes/demo.py make
such). Every link is computed again from the files: no account and no network. Exit code 1 when a link does not hold.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.certificates.certificate import folder_sha256
from conversion.certificates.certificate_json import CERTIFICATE, read_certificate
from conversion.identity import model_sha256
from nano3.documents import read_json

RUN_FILE = "run.json"
RESULT_KIND = "evaluation-result"


@dataclass(frozen=True)
class Link:
    """A part of the chain: its name and place, the hash that identifies it, what was compared, and what is wrong."""

    name: str
    path: Path
    sha256: str
    says: str
    problem: str = ""

    def __str__(self) -> str:
        verdict = f"FAILED, {self.problem}" if self.problem else "ok"
        return f"{self.name:<8} {self.sha256[:16]:<16} {self.path}: {self.says}: {verdict}"


@dataclass(frozen=True)
class Parts:
    """What a folder holds of the chain; None for what it has not."""

    run: Path | None
    merged: Path | None
    fp8: Path | None
    results: tuple[Path, ...]


def parts_of(out: Path) -> Parts:
    """Raises `UserError` for a folder with none of them."""
    runs = [folder for folder in (out, out / "lora") if (folder / "metrics.jsonl").exists()]
    merged, fp8 = (folder if (folder / "config.json").exists() else None for folder in (out / "merged", out / "fp8"))
    results = tuple(path for path in sorted(out.glob("*.json")) if _is_result(path))
    if not (runs or merged or fp8 or results):
        raise UserError(
            f"{out} holds no run (metrics.jsonl), merged model or result; give a run's or pipeline's folder"
        )
    return Parts(runs[0] if runs else None, merged, fp8, results)


def _is_result(path: Path) -> bool:
    try:
        return read_json(path, dict).get("kind") == RESULT_KIND
    except UserError:
        return False


def lineage(out: Path) -> list[Link]:
    """The chain's links, in order. Reads every weight file once."""
    parts = parts_of(out)
    links: list[Link] = []
    if parts.run is not None:
        links += _training(parts.run)
    adapter = next((link.sha256 for link in links if link.name == "adapter"), "")
    known = {link.sha256: link.name for link in links}
    for name, folder in (("merged", parts.merged), ("fp8", parts.fp8)):
        if folder is not None:
            link = _certified(name, folder, known, adapter)
            links.append(link)
            known[link.sha256] = name
    return links + [_result(path, known) for path in parts.results]


def _training(folder: Path) -> Iterator[Link]:
    """Base, store and adapter of a run."""
    recorded = read_json(folder / RUN_FILE, dict) if (folder / RUN_FILE).exists() else {}
    lora_file = folder / "adapter" / "lora.json"
    lora = read_json(lora_file, dict) if lora_file.exists() else {}
    base = Path(str(recorded.get("base", "")))
    if not (base / "base.json").exists():
        yield Link(
            "source", base, str(lora.get("base_sha256") or ""), "base of the adapter", "it is not there any more"
        )
    else:
        found, expected = model_sha256(base), lora.get("base_sha256")
        problem = "" if expected in (None, found) else f"the adapter was trained on {str(expected)[:16]}"
        yield Link("source", base, found, f"base of the adapter, {_revision(base)}", problem)
    store = Path(str(recorded.get("data", "")))
    if not (store / "manifest.json").exists():
        yield Link("store", store, "", "training data", "it is not there any more")
    else:
        yield _store(store)
    if lora:
        adapter = folder / "adapter"
        steps = f"{lora['steps']} steps" if lora.get("steps") else "trained"
        yield Link("adapter", adapter, folder_sha256(adapter), f"rank {lora.get('rank')}, {steps}")


def _revision(base: Path) -> str:
    """Name and revision that the import recorded."""
    said = read_json(base / "base.json", dict).get("base") or {}
    return f"{said.get('name', 'unknown')} at revision {said.get('revision', 'unknown')}"


def _store(folder: Path) -> Link:
    manifest: dict[str, Any] = read_json(folder / "manifest.json", dict)
    wrong = []
    for name, facts in manifest.get("files", {}).items():
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if isinstance(facts, dict) and facts.get("sha256") not in (None, found):
            wrong.append(name)
    sha256 = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    says = f"{manifest.get('documents', 0):,} documents, {manifest.get('tokens', 0):,} tokens"
    return Link("store", folder, sha256, says, f"{', '.join(wrong)} changed since preparation" if wrong else "")


def _certified(name: str, folder: Path, known: dict[str, str], adapter: str) -> Link:
    """A merged or FP8 folder against its certificate, and the certificate against what came before."""
    found = model_sha256(folder)
    if not (folder / CERTIFICATE).exists():
        return Link(name, folder, found, "no certificate", "nothing says what it was made from")
    certificate = read_certificate(folder)
    came = certificate["input"]["sha256"]
    problems = []
    if certificate["output"]["sha256"] != found:
        problems.append("its tensors are not those of its certificate")
    if known and came not in known:
        problems.append(f"it was made from {came[:16]}, which is not in {folder.parent}")
    used = (certificate.get("adapter") or {}).get("sha256")
    if name == "merged" and adapter and used not in (None, adapter):
        problems.append(f"it was merged with the adapter {used[:16]}")
    return Link(name, folder, found, f"made from {known.get(came, came[:16])}", "; ".join(problems))


def _result(path: Path, known: dict[str, str]) -> Link:
    result = read_json(path, dict)
    sha256 = str(result.get("model_sha256") or "")
    score = f"{result.get('correct')} of {result.get('n')} right"
    if not sha256:
        return Link("result", path, "", f"{score}, of {result.get('model')}, whose hash was not recorded")
    problem = "" if sha256 in known else "of a model that is not in this chain"
    return Link("result", path, sha256, f"{score}, of {known.get(sha256, result.get('model'))}", problem)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of a run, of a pipeline, or of the demo")
    links = lineage(parser.parse_args().out)
    for link in links:
        print(link)
    broken = [link for link in links if link.problem]
    print(f"{len(links)} links, {len(broken)} broken" if broken else f"{len(links)} links, all hold")
    return 1 if broken else 0


if __name__ == "__main__":
    run(main)
