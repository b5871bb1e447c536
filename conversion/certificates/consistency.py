"""What a certificate says against itself: its words, totals and targets held against its own hashes, link by link.

Reads no weights. A merge may change what its adapter's modules hold, a quantization what its selection names, a
conversion nothing; routers stay (with `router=balance` their correction biases may move), and every link of the chain
begins with the tensors that the one before ended with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from conversion.certificates.certificate_json import (
    BALANCE,
    DEQUANTIZED,
    MAY,
    PROOF,
    SIDES,
    chain,
    count_lines,
    happened,
    said,
    sealed,
)
from conversion.checkpoint.safetensors_layout import some
from conversion.checkpoint.tensor_digests import content_hash
from conversion.fp8.selection import KV_SCALES, SCALES
from nano3.arch import MTP, Arch
from nano3.targets import VOCABULARY
from nano3.tensor_names import adaptable

ROUTER = (".gate.weight", ".gate.e_score_correction_bias")


def contradictions(certificate: dict[str, Any], arch: Arch | None) -> list[str]:
    """Every contradiction in a certificate and in those before it; `arch` is that of the model, None of one whose
    modules are called as its tensors are (`nano3.hf_config.PLAIN`)."""
    problems = []
    links = list(chain(certificate))
    for number, link in enumerate(links):
        where = f" (in the certificate of the {link['kind']})" if number else ""
        problems += [problem + where for check in _CHECKS for problem in check(link, arch)]
    for link, before in pairwise(links):
        problems += _joint(link, before)
    if links[-1]["input"]["sha256"] != certificate["base"]["sha256"]:
        problems.append(f"the base is not the input of the first step, the {links[-1]['kind']}")
    return problems


def _hash(link: dict[str, Any], _: Arch | None) -> Iterator[str]:
    if link != sealed(link):
        yield "the certificate's own hash is not that of its content: a field was changed"
    if link["proof"] != PROOF:
        yield "the certificate calls other parts recomputable than are"


def _words(link: dict[str, Any], _: Arch | None) -> Iterator[str]:
    for name, line in link["tensors"].items():
        what = happened(line)
        if line["what"] != what:
            yield f"the certificate calls {name} {line['what']}, and its hashes say {what}"
        if what not in MAY[link["kind"]]:
            yield f"{name} was {what}, which no {link['kind']} does"


def _totals(link: dict[str, Any], _: Arch | None) -> Iterator[str]:
    counted = count_lines(link["tensors"])
    if link["totals"] != counted:
        yield f"the certificate's totals are {link['totals']}, its lines make {counted}"
    for side in SIDES:
        facts = said(link, side)
        if link[side] != {"sha256": content_hash(facts), "tensors": len(facts)}:
            yield f"the certificate's {side} is {link[side]['sha256'][:16]}, its lines make {content_hash(facts)[:16]}"


def _routers(link: dict[str, Any], _: Arch | None) -> Iterator[str]:
    still = ROUTER[:1] if link.get("router") == "balance" else ROUTER
    moved = [name for name, line in link["tensors"].items() if name.endswith(still) and happened(line) != "identical"]
    if moved:
        yield f"the router is not that of the input: {some(moved)}"


def _not_tuned(link: dict[str, Any], _: Arch | None) -> Iterator[str]:
    """The heads of multi-token prediction are named, all of them, and are the input's."""
    carried = sorted(name for name in link["tensors"] if name.startswith(MTP))
    if carried != link.get("not_tuned", []):
        yield f"the tensors {MTP}* are not those that the certificate names as not tuned"
    moved = [name for name in carried if happened(link["tensors"][name]) != "identical"]
    if moved:
        yield f"what is not tuned is not that of the input: {some(moved)}"


def _targets(link: dict[str, Any], arch: Arch | None) -> Iterator[str]:
    """Every changed tensor belongs to the modules that the line names, and these to the adapter."""
    changed = {name: line for name, line in link["tensors"].items() if happened(line) == "changed"}
    if not changed:
        return
    adapter = link.get("adapter")
    modules = adapter.get("modules") if isinstance(adapter, dict) else None
    tensors = _tensors_of_modules(link, arch)
    if not isinstance(modules, list) or not set(map(str, modules)) <= tensors.keys():
        yield "the certificate names no modules of an adapter that this model could have"
        return
    holders: dict[str, set[str]] = {}
    for path in modules:
        for name in tensors[path]:
            holders.setdefault(name, set()).add(path)
    if link.get("merged_onto") == "dequantized":
        for name in {name for path, names in tensors.items() if path not in VOCABULARY for name in names}:
            holders.setdefault(name, set()).add(DEQUANTIZED)
    for name, line in changed.items():
        by = line.get("by")
        if link.get("router") == "balance" and name.endswith(ROUTER[1]):
            if by != [BALANCE]:
                yield f"{name} changed by {by}, not by {BALANCE}"
        elif name not in holders:
            yield f"{name} changed, and no module of the adapter holds it"
        elif by != sorted(holders[name]):
            yield f"{name} changed by {by}, and the adapter's modules that hold it are {sorted(holders[name])}"


def _tensors_of_modules(link: dict[str, Any], arch: Arch | None) -> dict[str, list[str]]:
    """Path of every module that an adapter could have -> the tensors that it holds."""
    if arch is not None:
        return {path: [block.name for block in linear.blocks] for path, linear in adaptable(arch).items()}
    matrices = [name for name, line in link["tensors"].items() if len(line.get("input", {}).get("shape", ())) == 2]
    return {name.removesuffix(".weight"): [name] for name in matrices}


def _scales(link: dict[str, Any], arch: Arch | None) -> Iterator[str]:
    """Exactly what was quantized has scales; the cache's belong to attention layers."""
    if link["kind"] != "quantization":
        return
    if arch is None:
        yield "the certificate tells of a quantization, and this model has none here"
        return
    lines = link["tensors"]
    quantized = [name for name, line in lines.items() if happened(line) == "quantized"]
    added = {name for name, line in lines.items() if happened(line) == "added"}
    wanted = {f"{name.removesuffix('.weight')}.{scale}" for name in quantized for scale in SCALES}
    cache = {f"backbone.layers.{number}.mixer.{name}" for number in arch.attention_layers for name in KV_SCALES}
    if wanted - added:
        yield f"{some(sorted(wanted - added))} are missing beside quantized tensors"
    if added - wanted - cache:
        yield f"{some(sorted(added - wanted - cache))} were added, and nothing is scaled by them"
    chosen = link.get("calibration", {}).get("selection", [])
    if sorted(name.removesuffix(".weight") for name in quantized) != sorted(chosen):
        yield "the quantized tensors are not those of the selection that the certificate names"


def _joint(link: dict[str, Any], before: dict[str, Any]) -> Iterator[str]:
    """Where one step does not begin with what the one before it ended with."""
    ended, begun = said(before, "output"), said(link, "input")
    other = [name for name in sorted(ended.keys() | begun.keys()) if ended.get(name) != begun.get(name)]
    if other:
        yield f"the {link['kind']} did not begin with what the {before['kind']} ended with: {some(other)}"
    if link["base"] != before["base"]:
        yield f"the {link['kind']} names another base than the {before['kind']} before it"


_CHECKS: tuple[Callable[[dict[str, Any], Arch | None], Iterator[str]], ...] = (
    _hash,
    _words,
    _totals,
    _routers,
    _not_tuned,
    _targets,
    _scales,
)
