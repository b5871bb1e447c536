"""What would fail later though the layout is right: store, checkpoint, disk, paths, library versions.

Imports neither torch nor NeMo. Every check returns findings instead of raising, so that one look shows all of them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from launch.plan.hardware import GIB
from launch.plan.layout import Layout
from launch.plan.mounts import Mount
from launch.plan.plan_settings import Plan
from launch.plan.run_length import length_of
from launch.plan.weights import adapter_weights
from nano3.arch import Arch, is_nemo_checkpoint
from nano3.cli import UserError
from nano3.documents import read_bytes
from nano3.file_system import free_disk
from nano3.mixture import data_size, is_mixture, read_mixture
from nano3.pack_index import read_index
from nano3.safetensors_header import AGAIN, INDEX, parse_header, parse_index, read_header
from nano3.sealed_folder import is_ours
from nano3.token_store import TokenStore

WANTED = {"nemo-toolkit": "2.7.3", "megatron-core": "0.16.1"}
"""Distributions that the recipe is written for (requirements.txt, requirements-gpu.txt)."""
NETWORK = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "wekafs", "ceph", "cifs", "fuse.glusterfs", "orangefs", "panfs"}
"""File systems that other machines can see; the kernel's names."""


MOST_COMPARED = 200_000_000
"""Training tokens that are compared with the validation store: about a minute."""


@dataclass(frozen=True)
class Finding:
    """`wrong`: the run would fail or could not be right. Otherwise something to know."""

    wrong: bool
    text: str

    def __str__(self) -> str:
        return f"  {'WRONG' if self.wrong else 'note'}: {self.text}"


@dataclass(frozen=True)
class Paths:
    """Where things are. `mounts`: (outside, inside) of the container; None where there is no container."""

    model: Path
    data: Path | None = None
    validation: Path | None = None
    out: Path | None = None
    mounts: tuple[Mount, ...] | None = None
    imported: bool = False
    """Whether the base weights lie, or will lie, elsewhere than in `out`."""
    also: Mapping[str, Path] = field(default_factory=dict)
    """What else the run reads, by the setting that names it; only looked for among the mounts."""
    runs: int = 1
    """How many write below `out`, each with an imported base of its own."""


def check_store(plan: Plan, arch: Arch, paths: Paths, trains: bool = True) -> tuple[list[Finding], int | None]:
    """The token store: whole, of the model's tokenizer, with packs of this length and padding, and, where it `trains`,
    of rows that one may train on; and how many packs."""
    if paths.data is None:
        return [Finding(False, "no --data: the token store was not looked at")], None
    rows, packs = [], []
    try:
        mixture = read_mixture(paths.data)
        for folder in mixture.stores:
            store = TokenStore(folder)
            if (paths.model / "tokenizer.json").is_file():
                store.check_tokenizer(paths.model)
            if trains:
                store.check_trainable()
            store.check_vocabulary(arch.vocab_size)
            facts = read_index(store, plan.train.seq_length, plan.document_multiple, mixture.curriculum)[1]
            rows.append(facts["documents"])
            packs.append(facts["packs"])
        length = length_of(plan.train, data_size(mixture, rows, packs), str(paths.data))
    except UserError as error:
        return [Finding(True, str(error))], None
    text = f"{length.rows} rows in {length.packs} packs: {length.steps} steps are {length.passes:.1f} passes over them"
    return [Finding(False, text)], length.packs


def check_validation(plan: Plan, arch: Arch, paths: Paths) -> list[Finding]:
    """The same of the validation store, where there is one."""
    if paths.validation is None:
        return []
    found, packs = check_store(plan, arch, replace(paths, data=paths.validation), trains=False)
    if packs is None:
        return [Finding(True, f"--validation: {finding.text}") for finding in found]
    return [Finding(False, f"{packs} packs to validate on, all of them every time")]


def check_overlap(paths: Paths) -> list[Finding]:
    """Documents of the validation store whose prompt, token for token, is one that the run trains on."""
    if paths.data is None or paths.validation is None:
        return []
    try:
        stores = [TokenStore(folder) for folder in read_mixture(paths.data).stores]
        held = TokenStore(paths.validation)
        tokens = sum(store.manifest["tokens"] for store in stores)
        if tokens > MOST_COMPARED:
            text = f"{tokens:,} training tokens were not compared with --validation: data_prep/check_overlap.py does"
            return [Finding(False, text)]
        trained = {digest for store in stores for digest in _prompts(store)}
        same = [number for number, digest in enumerate(_prompts(held)) if digest in trained]
    except UserError:
        return []  # check_store and check_validation say why
    if not same:
        return []
    text = (
        f"{len(same)} of {len(held)} validation documents have a prompt that is trained on (the first is "
        f"{held.origin(same[0])}): their loss shows memory; leave them out with data_prep/clean.py --exclude"
    )
    return [Finding(True, text)]


def _prompts(store: TokenStore) -> Iterator[bytes]:
    """A hash of each document's tokens before the first that the loss counts."""
    for tokens, weights in map(store.document, range(len(store))):
        supervised = weights.nonzero()[0]
        stop = int(supervised[0]) if len(supervised) else len(tokens)
        yield hashlib.blake2b(tokens[:stop].tobytes(), digest_size=16).digest()


def check_model(paths: Paths) -> list[Finding]:
    """The checkpoint: every file that it names is there and as long as its header says."""
    if is_nemo_checkpoint(paths.model):
        metadata = [paths.model / "weights" / name for name in ("metadata.json", ".metadata")]
        missing = [str(path) for path in metadata if not path.is_file()]
        return [Finding(True, f"NeMo checkpoint without {', '.join(missing)}; convert it again")] if missing else []
    index = paths.model / INDEX
    try:
        names = set(parse_index(read_bytes(index, AGAIN), index).values()) if index.is_file() else set()
    except UserError as error:
        return [Finding(True, str(error))]
    files = [paths.model / name for name in sorted(names)] or sorted(paths.model.glob("*.safetensors"))
    if not files:
        return [Finding(False, f"{paths.model} has no weights: only its config.json was looked at")]
    return [Finding(True, problem) for path in files if (problem := _safetensors_problem(path))]


def _safetensors_problem(path: Path) -> str | None:
    """What is wrong with a safetensors file, by its header and length; None if nothing is."""
    if not path.is_file():
        return f"{path} is missing; download the model again"
    try:
        header = read_header(path)
        items = parse_header(header, str(path))
    except UserError as error:
        return str(error)
    expected = 8 + len(header) + max((item["data_offsets"][1] for item in items.values()), default=0)
    size = path.stat().st_size
    return f"{path} has {size} bytes and should have {expected}; download it again" if size != expected else None


def disk_bytes(plan: Plan, arch: Arch, imports: bool) -> int:
    """What a run writes: checkpoints (adapter in BF16, FP32 copy and two moments), one more while one is written, the
    adapter itself, and the imported base where it is not a NeMo checkpoint yet and not read in 4 bits."""
    adapters = plan.adapters(arch)
    values = (
        0
        if adapters is None
        else sum(held.count * held.tensors for held in adapter_weights(arch, Layout(), 0, 2, adapters))
    )
    base = 2 * arch.parameters if imports and not plan.nf4 else 0
    return values * (2 + 12) * (plan.checkpoint.keep + 2) + base


def check_output(plan: Plan, arch: Arch, paths: Paths, nodes: int) -> list[Finding]:
    """The output folder: ours or new, with room on its disk, and on a file system that other nodes can see."""
    if paths.out is None:
        return [Finding(False, "no --out: disk space and visibility of the output were not looked at")]
    out = paths.out.resolve()
    if out.is_dir() and not is_ours(out):
        return [Finding(True, f"{out} holds files that are no run of this project; choose another --out")]
    there, free = free_disk(out)
    found = []
    if not os.access(there, os.W_OK):
        found.append(Finding(True, f"{there} cannot be written; choose another --out"))
    need = paths.runs * disk_bytes(plan, arch, not (paths.imported or is_nemo_checkpoint(paths.model)))
    whose = f" for {paths.runs} runs" if paths.runs > 1 else ""
    room = f"{out} needs about {need / GIB:.1f} GiB{whose} and its disk has {free / GIB:.1f} GiB free"
    found.append(Finding(need > free, room + ("; free some or choose another --out" if need > free else "")))
    kind = file_system(there)
    if nodes > 1 and kind not in NETWORK:
        found.append(Finding(False, f"{there} is on {kind or 'an unknown file system'}: see that every node has it"))
    return found


def file_system(path: Path) -> str | None:
    """The kernel's name of the file system that `path` is on, None where the kernel does not say."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return None
    best: tuple[int, str | None] = (-1, None)
    for line in lines:
        _, where, kind, *_ = line.split()
        if path == Path(where) or Path(where) in path.parents:
            best = max(best, (len(where), kind))
    return best[1]


def check_mounts(paths: Paths) -> list[Finding]:
    """Everything that a run reads or writes is mounted into the container, at its own path: run.json holds those."""
    if paths.mounts is None:
        return []
    named = {"--model": paths.model, "--data": paths.data, "--validation": paths.validation, "--out": paths.out}
    seen = {what: path for what, path in named.items() if path is not None}
    if paths.data is not None and is_mixture(paths.data):
        stores = read_mixture(paths.data).stores
        seen |= {f"--data {paths.data.name}: store {number}": store for number, store in enumerate(stores, 1)}
    return unmounted(seen | dict(paths.also), paths.mounts)


def unmounted(named: Mapping[str, Path], mounts: tuple[Mount, ...]) -> list[Finding]:
    """Which of the paths a container with these mounts does not see at their own place."""
    found = ((what, _unseen(path.resolve(), mounts)) for what, path in named.items())
    return [Finding(True, f"{what} {problem}") for what, problem in found if problem]


def _unseen(path: Path, mounts: tuple[Mount, ...]) -> str | None:
    """Why the container does not see `path` where the run looks for it; None if it does."""
    over = [(outside.resolve(), inside) for outside, inside in mounts]
    over = [(outside, inside) for outside, inside in over if outside in (path, *path.parents)]
    if any(outside == inside for outside, inside in over):
        return None
    if not over:
        return f"{path} is not mounted into the container (mounts: {_listed([mount for mount, _ in mounts])}); add it"
    outside, inside = over[-1]
    return (
        f"{path} is mounted at {inside / path.relative_to(outside)}, but the run looks for it at its path outside; "
        f"mount {outside}:{outside}"
    )


def _listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths)) or "none"


def check_versions(container: bool) -> list[Finding]:
    """Library versions of this environment, which is the run's where there is no container."""
    if container:
        return [Finding(False, "library versions are those of the container: not looked at from here")]
    return list(_versions())


def _versions() -> Iterator[Finding]:
    for name, wanted in WANTED.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(True, f"{name} {wanted} is not installed here; install it, or name a container")
            continue
        if found != wanted:
            yield Finding(True, f"{name} is {found}; this recipe is written for {wanted}")
