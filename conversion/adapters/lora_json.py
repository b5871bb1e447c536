"""`lora.json`, what an adapter folder says of itself, checked field by field; and what is known of its training run.

Every field that decides a merge is required: rank_pattern, alpha_pattern, rslora and dora too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MaxLen, MinLen
from typing_extensions import TypedDict

from conversion.certificates.certificate_json import CombinedFacts
from conversion.checkpoint.output_folder import require_adapter
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.documents import AboveZero, Count, Name, Positive, Sha256, Text, check, read_json, shown
from nano3.sealed_folder import check_seal
from nano3.targets import EXPERTS, AdapterKind, Size, adaptable_modules, is_routed, select, sizes


@dataclass(kw_only=True)
class LoraInfo(AdapterKind):
    """What `lora.json` holds. What is None was not recorded: the base's hashes, and of foreign adapters its config.

    `combined` says of which adapters it was made; None of one that was trained.
    """

    targets: list[str]
    base_config: dict[str, Any] | None
    router: str
    router_sha256: str | None
    base_sha256: str | None
    combined: dict[str, Any] | None
    base_quantization: Literal["nf4"] | None = None
    """What the frozen linear layers were in while it was trained; None: in the base's own precision."""
    mark: list[int] = field(default_factory=list)
    """Tokens from whose last one on it acts (`nano3.gate`); none: everywhere."""

    def sizes(self, arch: Arch) -> dict[str, Size]:
        """Rank and scale of every adapted module by path. Raises `UserError` when `arch` has no such layers."""
        return self.sizes_of(select(arch, self.targets, self.experts))

    def alphas(self, arch: Arch) -> dict[str, float]:
        """Alpha of every adapted module by path: the scale of a rank of 1."""
        paths = select(arch, self.targets, self.experts)
        return {path: size.scale for path, size in sizes(paths, 1, self.alpha, (), self.alpha_pattern).items()}

    def refuse_gate(self, adapter: Path, tool: str) -> None:
        """Raises `UserError` where `tool` would make an adapter that waits for a mark act everywhere."""
        if self.mark:
            raise UserError(
                f"{adapter} acts from its mark (tokens {self.mark}) to the end of the turn only, and {tool} would make "
                "it act everywhere; export it with conversion/adapter.py export --for peft"
            )

    def refuse_other_base(self, where: Path, found: str, adapter: Path) -> None:
        """Raises `UserError` when the base in `where`, of content hash `found`, is not the one that is recorded."""
        refuse_other_base(self.base_sha256, where, found, adapter)


def refuse_other_base(recorded: str | None, where: Path, found: str, adapter: Path) -> None:
    """Raises `UserError` when the base in `where`, of content hash `found`, is not the one that `adapter` recorded."""
    if recorded is not None and found != recorded:
        raise UserError(
            f"adapter {adapter} was trained on another base than {where}: that one's content hash begins with "
            f"{recorded[:16]}, this one's with {found[:16]}; give the base that was tuned"
        )


_OPTIONAL: dict[str, Any] = {"router": "frozen", "router_sha256": None, "base_sha256": None, "combined": None}
_OPTIONAL |= {"base_quantization": None, "mark": []}
_REMEDY = "copy the adapter again"
_Targets = Annotated[list[Name], MaxLen(100_000)]


class LoraFile(TypedDict):
    """lora.json of format 2."""

    rank: Annotated[int, Ge(1), Le(1 << 16)]
    alpha: AboveZero
    targets: Annotated[_Targets, MinLen(1)]
    experts: Name
    base_config: dict[str, Any]
    rank_pattern: _Targets
    alpha_pattern: _Targets
    rslora: bool
    dora: bool
    router: Literal["frozen", "balance"]
    router_sha256: Sha256 | None
    base_sha256: Sha256 | None
    base_quantization: Literal["nf4"] | None
    combined: CombinedFacts | None
    mark: Annotated[list[Count], MaxLen(1000)]


def read_lora_json(folder: Path, as_is: bool = False) -> LoraInfo:
    """Reads `lora.json` of an adapter folder, all of which is what was written. Raises `UserError` naming the file that
    is not (unless `as_is`), or the field that is missing or wrong."""
    require_adapter(folder)
    if not as_is:
        check_seal(folder, required=True)
    info = read_json(folder / "lora.json", dict[str, Any], _REMEDY)
    return parse_lora_json(info, f"{folder}/lora.json")


def parse_lora_json(info: Any, where: str) -> LoraInfo:
    """Checks the content of a `lora.json`, which messages call `where`. Raises `UserError` naming the field."""
    version = info.get("format") if isinstance(info, dict) else None
    if version != 2:
        raise UserError(
            f"{where} is of format {shown(version)}; this version reads format 2: use the one that wrote it"
        )
    checked = check(_OPTIONAL | info, LoraFile, where, _REMEDY)
    if checked["experts"] not in EXPERTS:
        raise UserError(f"{where}: experts is {checked['experts']!r}; it must be one of {', '.join(EXPERTS)}")
    return LoraInfo(**{name: checked[name] for name in LoraFile.__annotations__})  # type: ignore[literal-required]


def describe(arch: Arch, sizes: Mapping[str, tuple[int, float]], rslora: bool, dora: bool) -> LoraInfo:
    """What `lora.json` says of an adapter whose modules have these (rank, alpha), by path; nothing of its base.

    The most frequent pair is the common one. Layers that are all alike are named by one pattern, others one by one.
    """
    (rank, alpha), _ = Counter(sizes.values()).most_common(1)[0]
    groups: dict[str, list[str]] = {}
    for path in adaptable_modules(arch):
        groups.setdefault(re.sub(r"^decoder\.layers\.\d+", "", path), []).append(path)
    words: dict[str, str] = {}  # path -> the target that names it
    for suffix, paths in groups.items():
        alike = len({sizes.get(path) for path in paths}) == 1
        for path in paths:
            name = f"*{suffix}" if alike else f"*{path.removeprefix('decoder')}"
            words[path] = name if suffix.startswith(".") else path.rsplit(".", 1)[-1]
    ranks = {words[path]: own for path, (own, _) in sizes.items() if own != rank}
    alphas = {words[path]: own for path, (_, own) in sizes.items() if own != alpha}
    return LoraInfo(
        rank=rank,
        alpha=alpha,
        targets=list(dict.fromkeys(words[path] for path in sizes)),
        experts="each" if any(map(is_routed, sizes)) else "none",
        base_config=None,
        rank_pattern=[f"{word}:{own}" for word, own in ranks.items()],
        alpha_pattern=[f"{word}:{own!r}" for word, own in alphas.items()],
        rslora=rslora,
        dora=dora,
        router="frozen",
        router_sha256=None,
        base_sha256=None,
        combined=None,
    )


class Steps(TypedDict, total=False):
    """What lora.json says of the run."""

    steps: Count


class RunFile(TypedDict, total=False):
    """What run.json says that a certificate tells (finetune/settings.py has all of it)."""

    settings: dict[Name, Any]
    data: Text
    nodes: Positive
    ranks_per_node: Positive


class StoreCounts(TypedDict, total=False):
    """What a store's manifest says that a certificate tells."""

    documents: Count
    tokens: Count
    supervised_tokens: Count
    sources: dict[Name, Any]


_COUNTS = ("documents", "tokens", "supervised_tokens")


def training_facts(adapter: Path) -> dict[str, Any]:
    """Facts for a certificate; {} of an adapter that came without its run and says nothing itself."""
    facts: dict[str, Any] = {}
    lora = _read(adapter / "lora.json", Steps)
    if "steps" in lora:
        facts["steps"] = lora["steps"]
    folder = adapter.resolve()
    where = _run_of(folder)
    run = _read(where / "run.json", RunFile) if where is not None else {}
    if "settings" in run and "data" in run:
        facts["data"] = _data(Path(str(run["data"])))
        facts["settings"] = {group: _no_paths(values) for group, values in run["settings"].items()}
        facts["ranks"] = run.get("nodes", 1) * run.get("ranks_per_node", 1)
    return facts


def _run_of(adapter: Path) -> Path | None:
    """The folder of the run that wrote an adapter; None for one that lies elsewhere, though a run may be near it."""
    if adapter.name in ("adapter", "best"):
        return adapter.parent
    return adapter.parents[1] if adapter.parent.name == "checkpoints" else None


def _no_paths(values: Any) -> Any:
    """A group of settings without those that name a file or folder."""
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if not (isinstance(value, str) and "/" in value)}


def _data(store: Path) -> dict[str, Any]:
    """Name of the token store, and from its manifest, if it still is there, sizes and sources."""
    manifest = _read(store / "manifest.json", StoreCounts)
    facts: dict[str, Any] = {"name": store.name} | {key: manifest[key] for key in _COUNTS if key in manifest}
    if "sources" in manifest:
        facts["sources"] = sorted(manifest["sources"])
    return facts


def _read(path: Path, schema: Any) -> dict[str, Any]:
    return dict(read_json(path, schema, "restore it, or move the adapter away from its run")) if path.is_file() else {}
