"""Single definitions out of the sources of those who read what we export, to run them apart from their packages.

    python -m tests.helpers.foreign FOLDER     # keeps a few sources of the wheels in FOLDER, and removes the wheels

Nothing of theirs is copied here or imported: a function or class is found in the source by its name, and only it runs.
"""

from __future__ import annotations
import __future__

import ast
import sys
import zipfile
from pathlib import Path
from typing import Any

from tests.helpers.fetched import not_here

FOLDER = Path(__file__).parents[2] / "build" / "reference" / "readers"
SOURCES = (
    "vllm/model_executor/layers/quantization/base_config.py",
    "vllm/model_executor/layers/quantization/modelopt.py",
    "vllm/model_executor/layers/quantization/utils/quant_utils.py",
    "vllm/model_executor/layers/mamba/mamba_mixer2.py",
    "vllm/model_executor/models/nemotron_h.py",
    "vllm/model_executor/models/utils.py",
    "sglang/srt/layers/attention/mamba/mamba.py",
    "sglang/srt/layers/quantization/base_config.py",
    "sglang/srt/layers/quantization/modelopt_quant.py",
    "sglang/srt/layers/quantization/utils.py",
    "sglang/srt/model_loader/weight_utils.py",
    "sglang/srt/models/nemotron_h.py",
    "sglang/srt/models/utils.py",
    "megatron/bridge/data/packing/algorithms.py",
    "megatron/bridge/data/packing/gpt_sft.py",
    "megatron/bridge/data/packing/parquet.py",
    "megatron/bridge/data/packing/paths.py",
    "megatron/bridge/models/conversion/param_mapping.py",
    "megatron/bridge/models/nemotronh/nemotron_h_bridge.py",
)


def keep(folder: Path) -> None:
    """Puts `SOURCES` out of the wheels in `folder` into it."""
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in set(archive.namelist()) & set(SOURCES):
                archive.extract(name, folder)
    missing = [name for name in SOURCES if not (folder / name).is_file()]
    assert not missing, f"not in {[wheel.name for wheel in wheels]}: {missing}"
    for wheel in wheels:
        wheel.unlink()


def source(path: str) -> str:
    """Text of one of `SOURCES`; without it the test is skipped, and fails in CI."""
    file = FOLDER / path
    if not file.is_file():
        not_here(f"no {file}: run `make build/reference/readers`")
    return file.read_text()


def take(path: str, wanted: dict[str, tuple[str, ...]], **given: Any) -> dict[str, Any]:
    """Runs the definitions `wanted` of a source, with `given` as all that they see around them; all names at the end.

    A class without members named is taken whole; of another one only those are. Neither keeps bases or decorators that
    are neither `given` nor `wanted`, and imports inside functions of what is `given` are left out.
    """
    body = []
    for node in ast.parse(source(path)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in wanted:
            body.append(_reduced(node, wanted[node.name], set(given) | set(wanted)))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and _assigned(node) in wanted:
            body.append(node)
    module = ast.fix_missing_locations(ast.Module(body, type_ignores=[]))
    flags = __future__.annotations.compiler_flag
    names = {"__name__": __name__, **given}  # a dataclass looks its module up
    exec(compile(module, path, "exec", flags, dont_inherit=True), names)
    missing = [name for name in wanted if name not in names]
    assert not missing, f"{path} has no {missing}: its release has moved them"
    return names


def _assigned(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Assign | ast.AnnAssign):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        return target.id if isinstance(target, ast.Name) else None
    return getattr(node, "name", None)


def _reduced(
    node: ast.FunctionDef | ast.ClassDef, members: tuple[str, ...], known: set[str]
) -> ast.FunctionDef | ast.ClassDef:
    """A definition without what cannot run here."""
    if isinstance(node, ast.ClassDef):
        node.bases = [base for base in node.bases if ast.unparse(base) in known]
        node.keywords = []
        if members:
            found = {name for statement in node.body if (name := _assigned(statement))}
            assert set(members) <= found, f"{node.name} has no {set(members) - found}: its release has moved them"
            node.body = [statement for statement in node.body if _assigned(statement) in members]
    marks = known | {"staticmethod", "classmethod", "property"}
    for inside in ast.walk(node):
        if isinstance(inside, ast.FunctionDef | ast.ClassDef):
            inside.decorator_list = [m for m in inside.decorator_list if ast.unparse(m).partition("(")[0] in marks]
            inside.body = [s for s in inside.body if not _imports_only(s, known)]
    return node


def _imports_only(node: ast.stmt, known: set[str]) -> bool:
    return isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} <= known


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
