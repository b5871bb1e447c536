"""Puts this project and its pure-Python packages into a folder on a shared disk, beside an image that has torch.

    python launch/slurm/bundle.py /shared/nano3-bundle          # then in cluster.yaml: bundle: /shared/nano3-bundle

Run it with the environment of requirements.txt (`make install`): what is installed and pinned there is copied, nothing
is fetched. Only what runs on any Python 3.11 or later is taken: pure Python, and extensions with Python's stable ABI.
What is compiled for one Python or one torch stays the image's, torch above all; launch/slurm/versions.py says which
versions of it will do. The same command again replaces the bundle; wait for jobs that use it.

Tried with an interpreter that lacks the packages (tests/launch/test_bundle.py). **Not verified with an image.**
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
    from nano3.outputs import fresh_output
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import importlib.metadata
import json
import re
import shutil
import sys
from hashlib import sha256
from pathlib import Path

from packaging.requirements import Requirement
from tqdm import tqdm
from typing_extensions import TypedDict

from launch.slurm.cluster import PACKAGES, PROJECT
from launch.slurm.versions import NO_RUN_NEEDS, REQUIREMENTS, ROOT, pins
from nano3.documents import Name, Text, read_json

KIND = "bundle"
FACTS = "bundle.json"
"""In the bundle: the packages with their versions, and a hash for every file of the project."""
OURS = ("nano3", "recipes", "finetune", "pico", "data_prep", "conversion", "evaluation", "launch", "tests")
FILES = ("requirements.txt", "requirements-gpu.txt", "constraints.txt", "pyproject.toml")
COMPILED_PART_UNUSED = ("megatron-core",)
"""Packages that are pure but for an extension that no run of ours imports (GPT data sets' index): it is left out."""


def project_files(root: Path) -> list[Path]:
    """This project's files that a job may need, relative."""
    found = [path for folder in OURS for path in sorted((root / folder).rglob("*")) if path.is_file()]
    kept = [path for path in found if "__pycache__" not in path.parts]
    return [path.relative_to(root) for path in [*kept, *(root / name for name in FILES)]]


def hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every file of the project, by its path."""
    return {str(path): sha256((root / path).read_bytes()).hexdigest() for path in project_files(root)}


def files_of(package: importlib.metadata.Distribution) -> list[importlib.metadata.PackagePath]:
    """What of a package is copied: no scripts, no byte code, and no extension that nothing of ours imports."""
    files = [file for file in package.files or [] if ".." not in file.parts and "__pycache__" not in file.parts]
    return [file for file in files if not is_compiled(file)] if package.name in COMPILED_PART_UNUSED else files


def is_compiled(file: importlib.metadata.PackagePath) -> bool:
    """Whether it is an extension or a shared library."""
    return re.search(r"\.(so|pyd)(\.\d+)*$", file.name) is not None


def portable(package: importlib.metadata.Distribution) -> bool:
    """Whether a package runs on any Python of ours: pure, or with extensions of the stable ABI, and not bound to one
    version of a package that is neither, as pydantic is to pydantic-core."""
    if package.name in COMPILED_PART_UNUSED:
        return True
    wheel = package.read_text("WHEEL") or ""
    anywhere = "Root-Is-Purelib: true" in wheel or "-abi3-" in wheel
    if not anywhere or any(is_compiled(file) and not file.name.endswith(".abi3.so") for file in files_of(package)):
        return False
    bound = [need.name for need in needs(package) if any(clause.operator == "==" for clause in need.specifier)]
    return all(portable(other) for other in map(find, bound) if other is not None)


def needs(package: importlib.metadata.Distribution) -> list[Requirement]:
    """What a package requires here, extras aside."""
    found = map(Requirement, package.requires or [])
    return [need for need in found if need.marker is None or need.marker.evaluate({"extra": ""})]


def find(name: str) -> importlib.metadata.Distribution | None:
    """The installed package of that name."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def chosen(tested: dict[str, str]) -> dict[str, importlib.metadata.Distribution]:
    """The portable ones of the tested packages and of what they require, by name.

    What a package of the image's requires is the image's too. `UserError` where a tested one is of another version.
    """
    waiting, found = list(tested), dict[str, importlib.metadata.Distribution]()
    while waiting:
        package = find(waiting.pop())
        if package is None or package.name in {*found, *NO_RUN_NEEDS} or not portable(package):
            continue
        if package.version != tested.get(package.name, package.version):
            raise UserError(
                f"{package.name} is {package.version} here, and {tested[package.name]} in requirements.txt: "
                "make install, then again"
            )
        found[package.name] = package
        waiting += [need.name for need in needs(package)]
    return found


class BundleFacts(TypedDict):
    """What a bundle says of itself."""

    project: dict[Text, Name]


def refuse_stale(bundle: Path, root: Path = ROOT) -> None:
    """Raises `UserError` where a bundle is not of this state of the project, or is none; a job would run the other."""
    if not bundle.is_dir():
        return  # only the nodes see it
    try:
        there = read_json(bundle / FACTS, BundleFacts)["project"]
    except UserError:
        raise UserError(f"bundle: {bundle} is no bundle; make it: python launch/slurm/bundle.py {bundle}") from None
    here = hashes(root)
    other = sorted(path for path in {*here, *there} if here.get(path) != there.get(path))
    if other:
        raise UserError(
            f"bundle: {bundle} holds another state of this project ({len(other)} files, such as {other[0]}); make it "
            f"again: python launch/slurm/bundle.py {bundle}"
        )


def make(folder: Path) -> None:
    """Writes the bundle. `UserError` for an environment without the pinned packages, or a folder of somebody else."""
    packages = chosen(pins(REQUIREMENTS.read_text()))
    lacking = [name for name in ("nemo-toolkit", "megatron-core", "transformers") if name not in packages]
    if lacking:
        raise UserError(
            f"{', '.join(lacking)} not installed here: use the environment of requirements.txt (make install)"
        )
    with fresh_output(folder, KIND) as new:
        for package in tqdm(packages.values(), desc="copying packages", unit="package", disable=None):
            for file in files_of(package):
                target = new / PACKAGES / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(file.locate()), target)
        for path in project_files(ROOT):
            (new / PROJECT / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, new / PROJECT / path)
        versions = {name: package.version for name, package in sorted(packages.items())}
        facts = {"python": sys.version.split()[0], "packages": versions, "project": hashes(ROOT)}
        (new / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{len(packages)} packages and this project in {folder}; in cluster.yaml: bundle: {folder.resolve()}")


def main() -> None:
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("folder", metavar="FOLDER", type=Path, help="on a disk that the nodes see")
    make(parse.parse_args().folder)


if __name__ == "__main__":
    run(main)
