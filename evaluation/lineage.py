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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from conversion.adapters.trained_json import Trained as PlainTrained
from conversion.adapters.trained_json import read_trained
from conversion.certificates.certificate import folder_sha256
from conversion.certificates.certificate_json import CERTIFICATE, read_certificate
from conversion.identity import model_sha256
from evaluation.comparison import accuracy
from evaluation.result_file import Result, results_in
from nano3.arch import is_nemo_checkpoint
from nano3.checkpoints.base_identity import FILE as BASE_FILE
from nano3.checkpoints.base_identity import read_base
from nano3.documents import AnyPath, Count, Sha256, read_json
from nano3.file_digests import file_sha256
from nano3.store_contents import check_store
from nano3.token_store import MANIFEST, TokenStore

RUN_FILE = "run.json"


class RunPaths(TypedDict):
    """What the chain needs of run.json; finetune/settings.py has all of it."""

    model: NotRequired[AnyPath]
    base: NotRequired[AnyPath]
    data: NotRequired[AnyPath]


class Trained(TypedDict):
    """What the chain needs of lora.json; conversion/adapters/lora_json.py has all of it."""

    rank: NotRequired[Count]
    steps: NotRequired[Count]
    base_sha256: NotRequired[Sha256 | None]


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
    results: Mapping[Path, Result]


def parts_of(out: Path) -> Parts:
    """Raises `UserError` for a folder with none of them."""
    runs = [folder for folder in (out, out / "lora") if (folder / "metrics.jsonl").exists()]
    merged, fp8 = (folder if (folder / "config.json").exists() else None for folder in (out / "merged", out / "fp8"))
    results = results_in(out)
    if not (runs or merged or fp8 or results):
        raise UserError(
            f"{out} holds no run (metrics.jsonl), merged model or result; give a run's or pipeline's folder"
        )
    return Parts(runs[0] if runs else None, merged, fp8, results)


def read_run(folder: Path) -> RunPaths:
    """What a run recorded of its inputs; nothing where it recorded none."""
    path = folder / RUN_FILE
    return read_json(path, RunPaths, "restore the file, or remove it") if path.exists() else {}


def lineage(parts: Parts) -> list[Link]:
    """The chain's links, in order. Reads every file once; those that did not change since they were read before are
    known (`nano3.file_digests`)."""
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
    return links + [_result(path, result, known) for path, result in parts.results.items()]


def _training(folder: Path) -> Iterator[Link]:
    """Base, store and adapter of a run."""
    if (trained := read_trained(folder / "adapter")) is not None:
        yield from _trained_plain(folder, trained)
        return
    recorded, lora_file = read_run(folder), folder / "adapter" / "lora.json"
    lora: Trained = read_json(lora_file, Trained, "copy the adapter again") if lora_file.exists() else {}
    base, expected = Path(recorded.get("base", "")), lora.get("base_sha256")
    if (base / BASE_FILE).exists():
        # Of a run with lora.base=nf4 there is no copy: base.json says which weights MODEL had.
        weights = base if is_nemo_checkpoint(base) else Path(recorded.get("model", ""))
        yield _source(base, weights, expected, f", {_revision(base)}")
    else:
        yield _source(base, None, expected)
    yield _store(Path(recorded.get("data", "")))
    if lora_file.exists():
        steps = f"{lora['steps']} steps" if lora.get("steps") else "trained"
        sha256 = folder_sha256(lora_file.parent)
        yield Link("adapter", lora_file.parent, sha256, f"rank {lora.get('rank')}, {steps}")


def _trained_plain(folder: Path, trained: PlainTrained) -> Iterator[Link]:
    """The same of recipes/qwen3_qlora.py, whose base is the Hugging Face folder itself."""
    recorded = read_run(folder)
    base = Path(recorded.get("model", ""))
    yield _source(base, base if (base / "config.json").exists() else None, trained["base_sha256"])
    yield _store(Path(recorded.get("data", "")))
    adapter = folder / "adapter"
    yield Link("adapter", adapter, folder_sha256(adapter), f"{trained.get('steps')} steps")


def _source(base: Path, weights: Path | None, expected: str | None, more: str = "") -> Link:
    """The base of an adapter, which lies in `weights`, or nowhere any more. `expected`: the hash that was recorded."""
    if weights is None:
        return Link("source", base, expected or "", "base of the adapter", "it is not there any more")
    found = model_sha256(weights)
    problem = "" if expected in (None, found) else f"the adapter was trained on {str(expected)[:16]}"
    return Link("source", base, found, f"base of the adapter{more}", problem)


def _revision(base: Path) -> str:
    """Name and revision that the import recorded."""
    said = read_base(base).get("base")
    return f"{said['name']} at revision {said['revision']}" if said else "of unknown revision"


def _store(folder: Path) -> Link:
    """The training data: every byte is what its manifest says."""
    if not (folder / MANIFEST).exists():
        return Link("store", folder, "", "training data", "it is not there any more")
    sha256, says, problem = file_sha256(folder / MANIFEST), "training data", ""
    try:
        store = TokenStore(folder)
        says = f"{store.manifest['documents']:,} documents, {store.manifest['tokens']:,} tokens"
        check_store(store)
    except UserError as error:
        problem = str(error)
    return Link("store", folder, sha256, says, problem)


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


def _result(path: Path, result: Result, known: Mapping[str, str]) -> Link:
    """A result against the models of the chain: by the model's hash, and the adapter's where one lay beside it."""
    score = f"{accuracy(result):.1%} of {result['n']} questions right"
    sha256, adapter = result.get("model_sha256", ""), result.get("adapter_sha256")
    if not sha256:
        return Link("result", path, "", f"{score}, of {result.get('model')}, whose hash was not recorded")
    problems = ["of a model that is not in this chain"] if sha256 not in known else []
    if adapter and adapter not in known:
        problems.append(f"with the adapter {adapter[:16]}, which is not in this chain")
    name = known.get(sha256, result.get("model"))
    with_adapter = " with the adapter" if adapter else ""
    return Link("result", path, sha256, f"{score}, of {name}{with_adapter}", "; ".join(problems))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of a run, of a pipeline, or of the demo")
    links = lineage(parts_of(parser.parse_args().out))
    for link in links:
        print(link)
    broken = [link for link in links if link.problem]
    print(f"{len(links)} links, {len(broken)} broken" if broken else f"{len(links)} links, all hold")
    return 1 if broken else 0


if __name__ == "__main__":
    run(main)
