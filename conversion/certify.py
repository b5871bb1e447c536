"""Verifies a model that somebody hands over: recomputes its certificate, line by line, back to the base.

    python conversion/certify.py verify DIR [--against BASE] [--adapter ADAPTER]
    python conversion/certify.py card DIR

DIR is a Hugging Face folder or a NeMo checkpoint. Every tensor of it is hashed and compared with certificate.json:
nothing altered since, nothing swapped or missing, every expert there, config.json and tokenizer as they were; every
step of the chain (a merge, then a quantization) begins with what the one before ended with, changed what it may, and
left the routers alone. --against also hashes BASE, the model before the last step or before any earlier one, so that
"identical" is known and not believed; from the last step's input the norms of the changes and errors are recomputed.
--adapter hashes the adapter that a merge names. What no model can show, such as how long the adapter trained, is listed
as claimed. `card` prints the model card. Exit code 1 for a difference.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
from pathlib import Path
from typing import Any

from conversion.certificates.certificate import side_digests
from conversion.certificates.certificate_json import (
    PROOF,
    chain,
    changed_since,
    parse_certificate,
    read_certificate,
    said,
    sealed,
)
from conversion.certificates.consistency import contradictions
from conversion.certificates.model_card import model_card, read_readme
from conversion.certificates.recompute import wrong_numbers, wrong_scales
from conversion.checkpoint.model_folder import FOREIGN_WEIGHTS, NemoFolder, named_model, open_tensors
from conversion.checkpoint.output_folder import CERTIFICATE, side_folder
from conversion.checkpoint.tensor_digests import Facts, facts_of
from nano3.arch import Arch, is_nemo_checkpoint
from nano3.hf_config import is_plain, read_config
from nano3.sealed_folder import check_seal


def verify(folder: Path, base: Path | None = None, adapter: Path | None = None) -> list[str]:
    """Every difference between DIR, its certificate, BASE and ADAPTER. Raises `UserError` when there is no
    certificate."""
    certificate = parse_certificate(folder)
    side = side_folder(folder)
    problems = _other_files(folder, certificate)
    if changed_since(folder, certificate) and certificate == sealed(certificate):
        problems.append(f"{folder}: {CERTIFICATE} is not in the form in which it was written")
    try:
        arch = _arch_of(side)
        problems += contradictions(certificate, arch)
        problems += _other_adapter(certificate, adapter, arch) if adapter is not None else []
        with open_tensors(folder, quantized=True, as_is=True) as model:
            found = facts_of(model)
            problems += differences(found, said(certificate, "output"), f"{folder}")
            if isinstance(model, NemoFolder):
                problems += model.padding_problems()
            else:
                problems += wrong_scales(model, certificate)
    except (UserError, OSError, ValueError) as error:
        return [*problems, str(error)]
    if not problems:
        problems = _broken_seal(folder)
    return problems if base is None else [*problems, *_against(certificate, folder, base, bool(problems))]


def _arch_of(side: Path) -> Arch | None:
    """The architecture of a model folder; None of one that is tuned in plain transformers."""
    if is_plain(side):
        return None
    config = read_config(side)
    config.pop("quantization_config", None)
    return Arch.from_config(config, str(side))


def _broken_seal(folder: Path) -> list[str]:
    """What the seal finds where the certificate found nothing: `context/` of a NeMo checkpoint, the seal itself."""
    try:
        check_seal(folder)
    except UserError as error:
        return [str(error)]
    return []


def _other_adapter(certificate: dict[str, Any], folder: Path, arch: Arch | None) -> list[str]:
    """How the adapter in `folder` differs from the one that the last merge names."""
    from conversion.adapters.adapter_folder import Adapter
    from conversion.adapters.plain_merge import PlainAdapter

    merges = [link for link in chain(certificate) if link["kind"] == "merge"]
    if not merges:
        return [f"the certificate names no merge, so {folder} has no part in it"]
    shapes = {name: fact.shape for name, fact in said(merges[0], "input").items()}
    adapter = PlainAdapter(folder, shapes) if arch is None else Adapter(folder, arch)
    told, found = merges[0].get("adapter"), adapter.certified()
    if not isinstance(told, dict):
        return ["the certificate names no adapter"]
    return [
        f"{folder}: {name} is {value}, and the certificate says {told.get(name)}"
        for name, value in found.items()
        if told.get(name) != value
    ]


def _against(certificate: dict[str, Any], folder: Path, base: Path, altered: bool) -> list[str]:
    """How BASE differs from the input of the step that it is closest to; and whether that step's numbers are true."""
    with open_tensors(base, quantized=True, as_is=True) as model:
        found = facts_of(model)
        links = list(chain(certificate))
        best = min(links, key=lambda link: len(_unequal(found, said(link, "input"))))
        problems = differences(found, said(best, "input"), f"{base}")
        if problems:
            return [f"{base} is not the model that the certificate names as input of the {best['kind']}", *problems]
        problems = _other_settings(folder, base)
        if best is certificate and not altered:
            with open_tensors(folder, quantized=True, as_is=True) as made:
                problems += wrong_numbers(made, model, certificate)
    return problems


def differences(found: Facts, told: Facts, where: str) -> list[str]:
    """How tensors differ from what a certificate tells, by name; one that lies in another's place is said so."""
    problems = []
    for what, names in (("lacks", told.keys() - found.keys()), ("holds", found.keys() - told.keys())):
        rest = "which its certificate names" if what == "lacks" else "which its certificate does not name"
        problems += [f"{where} {what} {name}, {rest}" for name in sorted(names)]
    owners = {fact: name for name, fact in told.items()}
    for name in _unequal(found, told):
        if name in found and name in told:
            owner = owners.get(found[name])
            here = f"it is what {owner} was" if owner else f"it is {found[name].dtype} {list(found[name].shape)}"
            problems.append(f"{where}: {name} is not what the certificate says; {here}")
    return problems


def _unequal(found: Facts, told: Facts) -> list[str]:
    return [name for name in sorted(found.keys() | told.keys()) if found.get(name) != told.get(name)]


def _other_files(folder: Path, certificate: dict[str, Any]) -> list[str]:
    """Files beside the tensors that are not what they were, are gone, or came later: a chat template, an adapter beside
    a model and the like change what it does. Only README.md may come later."""
    found, told = side_digests(folder), certificate["files"]
    problems = [
        f"{folder}: {name} is {'not what the certificate says' if name in found else 'missing'}"
        for name, digest in told.items()
        if found.get(name) != digest
    ]
    problems += [f"{folder}: {name} is not in the certificate" for name in sorted(found.keys() - told.keys())]
    problems += [f"{folder}: {path.name} is not in the certificate" for path in foreign_weights(folder)]
    if is_nemo_checkpoint(folder) and ((folder / "config.json").exists() or any(folder.glob("*.safetensors"))):
        problems.append(f"{folder} holds a Hugging Face model beside a NeMo checkpoint; only the second is certified")
    return problems


def foreign_weights(folder: Path) -> list[Path]:
    """Weights that no certificate speaks of."""
    return sorted(path for path in folder.iterdir() if path.suffix in FOREIGN_WEIGHTS)


def _other_settings(folder: Path, base: Path) -> list[str]:
    """Files beside the tensors that are not BASE's, but for what a quantization adds."""
    mine, theirs = _settings(folder), _settings(base)
    names = sorted(mine.keys() | theirs.keys())
    return [f"{folder}: {name} is not that of {base}" for name in names if mine.get(name) != theirs.get(name)]


def _settings(folder: Path) -> dict[str, Any]:
    config = read_config(side_folder(folder))
    config.pop("quantization_config", None)
    digests = {name: digest for name, digest in side_digests(folder).items() if name != "hf_quant_config.json"}
    return digests | {"config.json": config}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("command", choices=("verify", "card"), help="what to do")
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with certificate.json")
    parser.add_argument("--against", metavar="BASE", help="model folder (or preset) that it was made from")
    parser.add_argument("--adapter", metavar="ADAPTER", type=Path, help="adapter folder that was merged")
    args = parser.parse_args()
    if args.command == "card":
        print(model_card(read_certificate(args.folder), read_readme(args.folder)), end="")
        return 0
    base = named_model(args.against) if args.against else None
    certificate = parse_certificate(args.folder)
    problems = verify(args.folder, base, args.adapter)
    for problem in problems:
        print(problem)
    if problems:
        print(f"{args.folder}: {len(problems)} differences from its certificate; do not use it for what it says it is")
        return 1
    steps = " -> ".join(link["kind"] for link in reversed(list(chain(certificate))))
    checked = f"tensors and {args.against}" if base else "tensors (nothing to compare with: --against BASE)"
    print(f"{args.folder}: {checked} are what the certificate says ({steps}): {certificate['totals']}")
    print(_what_is_known(certificate, base is not None, args.adapter is not None))
    return 0


def _what_is_known(certificate: dict[str, Any], base: bool, adapter: bool) -> str:
    """Which parts of the certificate were recomputed now, which can be, and which are its writer's word."""
    known = {"folder": True, "input": base, "adapter": adapter, "claimed": False}
    found = [part for source, parts in PROOF.items() if known[source] for part in parts]
    lines = [f"recomputed: {', '.join(part for part in found if _says(certificate, part))}"]
    for source, flag in (("input", "--against BASE"), ("adapter", "--adapter ADAPTER")):
        left = [part for part in PROOF[source] if _says(certificate, part) and not known[source]]
        lines += [f"not recomputed, give {flag}: {', '.join(left)}"] if left else []
    claimed = [part for part in PROOF["claimed"] if _says(certificate, part)]
    return "\n".join([*lines, f"claimed by its writer, and not to be recomputed: {', '.join(claimed)}"])


def _says(certificate: dict[str, Any], part: str) -> bool:
    """Whether a certificate has a part, such as `base.name`; or some tensor of it has, such as `tensors.input`."""
    name, _, inner = part.partition(".")
    if name == "tensors" and inner:
        return any(inner in line for line in certificate["tensors"].values())
    return bool(certificate.get(name)) and (not inner or inner in certificate[name])


if __name__ == "__main__":
    run(main)
