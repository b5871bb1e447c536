"""Verifies a checkpoint that somebody hands over: recomputes its certificate, line by line.

    python conversion/certify.py verify DIR [--against BASE]
    python conversion/certify.py card DIR

Every tensor of DIR is hashed and compared with certificate.json: nothing altered since, nothing missing, every expert
there, the routers as the certificate says. --against also hashes BASE, the model that DIR says it was made from, so
that "identical" and "changed" are known and not believed. `card` prints a model card. Exit code 1 for a difference.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from conversion.certificate import count_lines, happened, read_certificate
from conversion.identity import Facts, content_hash, hf_facts
from conversion.layout import some
from conversion.safetensors_io import HFFolder
from nano3.arch import resolve_model
from nano3.cli import UserError, run

ROUTER = (".gate.weight", ".gate.e_score_correction_bias")


def verify(folder: Path, base: Path | None = None) -> list[str]:
    """Every difference between DIR, its certificate and BASE. Raises `UserError` when there is no certificate."""
    certificate = read_certificate(folder)
    tensors: dict[str, Any] = certificate["tensors"]
    problems = _contradictions(certificate)
    try:
        with HFFolder(folder, quantized=True) as hf:
            facts = hf_facts(hf)
            problems += _compare(facts, tensors, "output", f"{folder}")
            if content_hash(facts) != certificate["output"]["sha256"]:
                problems.append(f"{folder} has not the content hash that the certificate names as its output")
    except UserError as error:
        return [*problems, str(error)]
    if base is not None:
        with HFFolder(base) as hf:
            facts = hf_facts(hf)
            problems += _compare(facts, tensors, "input", f"{base}")
            if content_hash(facts) != certificate["input"]["sha256"]:
                problems.append(f"{base} is not the model that the certificate names as its input")
    return problems


def _contradictions(certificate: dict[str, Any]) -> list[str]:
    """Where a certificate's words are not what its own hashes say."""
    tensors: dict[str, Any] = certificate["tensors"]
    problems = [
        f"the certificate calls {name} {line['what']}, and its hashes say {happened(line)}"
        for name, line in tensors.items()
        if line["what"] != happened(line)
    ]
    counted = count_lines(tensors)
    if certificate["totals"] != counted:
        problems.append(f"the certificate's totals are {certificate['totals']}, its lines make {counted}")
    still = ROUTER[:1] if certificate.get("router") == "balance" else ROUTER
    moved = [name for name, line in tensors.items() if name.endswith(still) and happened(line) != "identical"]
    if moved:
        problems.append(f"the router is not that of the input: {some(moved)}")
    return problems


def _compare(found: Facts, tensors: dict[str, Any], side: str, where: str) -> list[str]:
    """How the tensors of a folder differ from one side of the certificate's lines."""
    told = {name: line[side] for name, line in tensors.items() if side in line}
    problems = []
    for what, names in (("lacks", told.keys() - found.keys()), ("holds", found.keys() - told.keys())):
        if names:
            rest = "which its certificate names" if what == "lacks" else "which its certificate does not name"
            problems.append(f"{where} {what} {some(sorted(names))}, {rest}")
    for name in sorted(told.keys() & found.keys()):
        if told[name] != found[name].to_json():
            problems.append(f"{where}: {name} is not what the certificate says")
    return problems


def model_card(certificate: dict[str, Any]) -> str:
    """Markdown for the people who receive the model: what it was made from, and what exactly changed."""
    totals = ", ".join(f"{count} {what}" for what, count in certificate["totals"].items() if count)
    lines = [
        f"# {certificate['kind'].capitalize()} of {certificate['input']['sha256'][:16]}",
        "",
        *(f"- {side}: SHA-256 of the content `{certificate[side]['sha256']}`" for side in ("input", "output")),
        f"- tensors: {totals}",
    ]
    if "adapter" in certificate:
        facts = certificate["adapter"]
        lines.append(f"- adapter: {', '.join(f'{name} {value}' for name, value in facts.items())}")
    lines.append(f"- router: {certificate.get('router', 'frozen')}")
    changes = _numbers(certificate, "relative_change")
    if changes:
        lines.append(f"- size of the changes, norm over norm: {min(changes):.2e} to {max(changes):.2e}")
    errors = _numbers(certificate, "relative_error")
    if errors:
        lines.append(f"- error of FP8, norm over norm: {min(errors):.2e} to {max(errors):.2e}")
    tools = ", ".join(f"{name} {found}" for name, found in certificate["tools"].items())
    return "\n".join([*lines, f"- tools: {tools}", "", "Check it: `python conversion/certify.py verify DIR`", ""])


def _numbers(certificate: dict[str, Any], name: str) -> list[float]:
    return [line[name] for line in certificate["tensors"].values() if isinstance(line.get(name), float)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("command", choices=("verify", "card"), help="what to do")
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with certificate.json")
    parser.add_argument("--against", metavar="BASE", help="model folder that it was made from")
    args = parser.parse_args()
    if args.command == "card":
        print(model_card(read_certificate(args.folder)), end="")
        return 0
    problems = verify(args.folder, resolve_model(args.against) if args.against else None)
    for problem in problems:
        print(problem)
    totals = read_certificate(args.folder)["totals"]
    if not problems:
        checked = "tensors and input" if args.against else "tensors (the input was not given: --against BASE)"
        print(f"{args.folder}: {checked} are what the certificate says: {totals}")
    return 1 if problems else 0


if __name__ == "__main__":
    run(main)
