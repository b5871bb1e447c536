"""A Slurm site, as cluster.yaml describes it: read and checked. Imports neither torch nor NeMo."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from launch.plan.hardware import find_gpu
from launch.plan.mounts import parse_mount
from launch.slurm.shell import refuse_unwritable
from nano3.cli import UserError
from nano3.documents import read_yaml

FILL_IN = "FILL IN"
CPU = "cpu"
"""The `hardware` of nodes without GPUs."""
REQUIRED = ("account", "partition")
PROJECT, PACKAGES = "project", "packages"
"""Folders in a bundle (launch/slurm/bundle.py)."""
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = Path(__file__).parents[1] / "cluster.example.yaml"


@dataclass
class Cluster:
    """A site, as cluster.yaml describes it; `launch/cluster.example.yaml` says what each key means."""

    account: str
    partition: str
    time: str = "04:00:00"
    hardware: str = "h100"
    gpus_per_node: int = 8
    gres: bool = True
    cpus_per_task: int = 0
    cpu_partition: str = ""
    cpu_cores: int = 0
    cpu_time: str = ""
    cpu_options: list[str] = field(default_factory=list)
    exclusive: bool = True
    signal_seconds: int = 300
    logs: str = "runs/slurm"
    workdir: str = "."
    container: str | None = None
    mounts: list[str] = field(default_factory=list)
    python: str = "python"
    setup: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)
    bundle: str = ""
    model: str = ""
    data: str = ""
    settings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, text in self._texts():
            refuse_unwritable(f"cluster.yaml: {name}", text)
        if self.hardware != CPU:
            find_gpu(self.hardware)
        if self.mounts and self.container is None:
            raise UserError("cluster.yaml: mounts are of a container; name it in `container`, or remove them")
        if self.gpus_per_node < 0 or self.signal_seconds < 0:
            raise UserError("cluster.yaml: gpus_per_node and signal_seconds must be at least 0")
        if self.seconds is not None and self.signal_seconds >= self.seconds:
            raise UserError(f"cluster.yaml: signal_seconds: {self.signal_seconds} must be less than time: {self.time}")
        for text in self.mounts:
            parse_mount(text)
        for option in [*self.options, *self.cpu_options]:
            if not re.fullmatch(r"[a-z][a-z-]*(=.+)?", option):
                raise UserError(
                    f"cluster.yaml: options has {option!r}; write sbatch's long names without dashes, such as qos=high"
                )
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise UserError(f"cluster.yaml: environment has {name!r}, which is no name of a variable; rename it")

    def _texts(self) -> Iterator[tuple[str, str]]:
        """Every text in the file, with its key."""
        for item in fields(self):
            value = getattr(self, item.name)
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            for text in parts if isinstance(parts, list) else [parts]:
                if isinstance(text, str):
                    yield item.name, text

    def blanks(self) -> list[str]:
        """What is still to be filled in."""
        return [name for name in REQUIRED if getattr(self, name) in ("", FILL_IN)]

    @property
    def project(self) -> str:
        """This repository, as the nodes see it: the bundle's copy where there is a bundle."""
        return f"{self.bundle}/{PROJECT}" if self.bundle and self.workdir == "." else self.workdir

    @property
    def packages(self) -> str:
        """The bundle's packages; empty without one."""
        return f"{self.bundle}/{PACKAGES}" if self.bundle else ""

    @property
    def seconds(self) -> int | None:
        """The time limit of a job in seconds, None for no limit. Raises `UserError` for what Slurm cannot read."""
        if self.time.lower() in ("infinite", "unlimited"):
            return None
        found = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", self.time, re.ASCII)
        if found is None:
            raise UserError(
                f'cluster.yaml: time: "{self.time}" is not [DAYS-]HOURS:MINUTES:SECONDS, such as "04:00:00"'
            )
        days, first, second, third = (None if part is None else int(part) for part in found.groups())
        if days is None and third is None:  # then the first is minutes (sbatch(1), --time)
            return 60 * (first or 0) + (second or 0)
        return 86400 * (days or 0) + 3600 * (first or 0) + 60 * (second or 0) + (third or 0)

    @property
    def gpus(self) -> int:
        """GPUs of a node."""
        return 0 if self.hardware == CPU else self.gpus_per_node

    @property
    def ranks_per_node(self) -> int:
        """Ranks of a node: one for each GPU; on nodes without, what `gpus_per_node` says, at least one."""
        return max(1, self.gpus_per_node)

    def for_one_process(self, gpu: bool) -> Cluster:
        """The site for a job of one process, which saves nothing when time is up: on a GPU, or on nodes without."""
        one = replace(self, exclusive=False, signal_seconds=0)
        if gpu:
            return replace(one, gpus_per_node=min(1, self.gpus))
        return replace(
            one,
            partition=self.cpu_partition or self.partition,
            time=self.cpu_time or self.time,
            hardware=CPU,
            gpus_per_node=0,
            cpus_per_task=self.cpu_cores,
            options=self.cpu_options,
        )

    @classmethod
    def load(cls, path: Path) -> Cluster:
        """Reads cluster.yaml. `UserError` when there is none, or a key is unknown, missing or of another type."""
        if not path.is_file():
            raise UserError(
                f"no {path}: a cluster is described there. Copy {EXAMPLE} and fill in account and partition, or leave "
                "submitting out with --dry-run"
            )
        site = cls._read(path)
        if blanks := site.blanks():
            raise UserError(f"{path}: {' and '.join(blanks)} not filled in; {EXAMPLE} says how to find it")
        return site

    @classmethod
    def example(cls) -> Cluster:
        """The shipped example, its blanks in it: what a script looks like before a site is described."""
        return cls._read(EXAMPLE)

    @classmethod
    def _read(cls, path: Path) -> Cluster:
        raw = read_yaml(path, dict[str, Any], f"see {EXAMPLE}")
        typed = {key: _typed(path, key, value) for key, value in raw.items()}
        lacking = [name for name in REQUIRED if name not in raw]
        if lacking:
            raise UserError(f"{path} has no {' and no '.join(lacking)}; see {EXAMPLE}")
        site = cls(**typed)
        return site if site.bundle or site.workdir != "." else replace(site, workdir=str(ROOT))


def _typed(path: Path, key: str, value: Any) -> Any:
    """The value if `key` exists and the value is of its kind."""
    kinds: dict[str, tuple[type, ...]] = {
        "str": (str,), "int": (int,), "bool": (bool,), "str | None": (str, type(None)),
        "list[str]": (list,), "dict[str, str]": (dict,),
    }  # fmt: skip
    known = {item.name: str(item.type) for item in fields(Cluster)}
    if key not in known:
        near = get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
        raise UserError(f"{path}: unknown key {key}; did you mean {near}?")
    kind = known[key]
    if not isinstance(value, kinds[kind]) or (kind == "int" and isinstance(value, bool)):
        raise UserError(f"{path}: {key} must be {kind}, but it is {value!r}{_quotes(key, kind, value)}")
    for item in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []:
        if not isinstance(item, str):
            raise UserError(f'{path}: {key} holds {item!r}, which YAML does not read as text; write "{item}" there')
    return value


def _quotes(key: str, kind: str, value: Any) -> str:
    """The remedy where YAML read as a number what was meant as text; it takes 12:00:00 for 43200."""
    if not kind.startswith("str") or isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if key == "time" and isinstance(value, int) and value >= 3600:
        return f'; write it in quotes: time: "{value // 3600:02}:{value // 60 % 60:02}:{value % 60:02}"'
    return f'; write it in quotes: {key}: "{value}"'
