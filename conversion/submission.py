"""An adapter as the zip file that the public reasoning challenge takes, checked by what vLLM demands of it. No GPU.

    python conversion/submission.py write ADAPTER OUT.zip
    python conversion/submission.py check FILE.zip --base MODEL

The zip has two files, adapter_config.json and adapter_model.safetensors, in the form of `adapter.py export --for vllm`.
`write` takes an adapter that training wrote (or conversion/combine_adapters.py), and refuses one that vLLM would refuse
or, worse, read in part: a rank above --max-rank, a name that vLLM does not have, a target without its tensors. `check`
takes a zip that any tool made. Not verified on a GPU:
vllm serve BASE --enable-lora --max-lora-rank 32 --lora-modules mine=FOLDER, FOLDER being what the zip holds.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
    from nano3.outputs import only_writer, scratch_folder
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import errno
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired

from typing_extensions import TypedDict

from conversion.adapter import export
from conversion.adapters.lora_json import read_lora_json
from conversion.adapters.peft_names import CONFIG, PARAMETERS, WEIGHTS, module_name, parts, tensor_name
from conversion.checkpoint.output_folder import require_space
from conversion.checkpoint.safetensors_layout import some
from nano3.arch import Arch, resolve_model
from nano3.documents import Name, read_json
from nano3.targets import is_routed

if TYPE_CHECKING:
    from conversion.adapters.peft_file import PeftFile

MAX_RANK = 32
"""The challenge's largest rank, and what its vLLM is started with."""
NAMES = (CONFIG, WEIGHTS)
DTYPES = ("BF16", "F16", "F32")
"""Dtypes that vLLM turns into its own when it loads an adapter (vllm/lora/lora_model.py)."""


class Targets(TypedDict):
    """What adapter_config.json targets: names of modules, or one pattern."""

    target_modules: NotRequired[list[Name] | Name | None]


def write_submission(adapter: Path, out: Path, max_rank: int = MAX_RANK) -> str:
    """Writes the zip of our adapter folder; returns what it holds, in a line.

    Raises `UserError`, and writes nothing, when vLLM would not load all of it.
    """
    if out.suffix != ".zip" or out.is_dir():
        raise UserError(f"{out} is no name of a zip file; give one such as submission.zip")
    info = read_lora_json(adapter)
    assert info.base_config is not None  # `read_lora_json` demands it
    arch = Arch.from_config(info.base_config, f"{adapter}/lora.json")
    out = out.resolve()
    with only_writer(out), scratch_folder(out) as scratch:
        export(adapter, scratch / "adapter", "vllm")
        holds = check_folder(scratch / "adapter", arch, max_rank)
        # Weights do not compress, and a reader may map them where they are not.
        with zipfile.ZipFile(scratch / "zip", "w", zipfile.ZIP_STORED) as packed:
            for name in NAMES:
                packed.write(scratch / "adapter" / name, name)
        os.replace(scratch / "zip", out)
    return holds


def check_submission(file: Path, base: Path, max_rank: int = MAX_RANK) -> str:
    """What a zip holds, in a line. Raises `UserError` for one that the challenge's vLLM would not load all of."""
    if not file.is_file():
        raise UserError(f"{file} is no file; give a zip such as submission.zip")
    with scratch_folder(file) as scratch:
        unpack(file, scratch)
        return check_folder(scratch, Arch.load(base), max_rank)


_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)
"""What `zipfile` raises for damaged, encrypted and foreign zips; OSError is a place before the file's beginning."""


def unpack(file: Path, folder: Path) -> None:
    """Writes the two files of a zip into `folder`. Raises `UserError` for other files, and for a damaged zip."""
    try:
        _copy_files(file, folder)
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # such as a full disk, which says nothing about the zip
        raise UserError(f"{file} cannot be read as a zip file ({error}); write it again") from None


def _copy_files(file: Path, folder: Path) -> None:
    with zipfile.ZipFile(file) as packed:
        found = sorted(packed.namelist())
        if found != sorted(NAMES):
            raise UserError(f"{file} holds {some(found)}; it must hold {' and '.join(NAMES)} and nothing else")
        require_space(folder, sum(one.file_size for one in packed.infolist()))
        for name in NAMES:
            with packed.open(name) as source, open(folder / name, "wb") as target:
                shutil.copyfileobj(source, target)


def check_folder(folder: Path, arch: Arch, max_rank: int) -> str:
    """What the adapter in `folder` is, in a line. Raises `UserError` naming the first thing that vLLM would refuse or
    leave out: names, shapes and a missing expert by `PeftFile`, NaN, and what is in `_problems`."""
    from conversion.adapters.adapter_folder import Adapter
    from conversion.adapters.peft_file import PeftFile

    file = PeftFile(folder, arch)
    problem = next(_problems(file, max_rank), None)
    if problem is not None:
        raise UserError(f"vLLM would not load all of this adapter: {problem}")
    Adapter(folder, arch)  # reads every value: NaN is refused
    modules = [module for found in file.modules.values() for module in found]
    dtypes = sorted({file.dtype(module, "lora_A") for module in modules})
    size = sum((folder / name).stat().st_size for name in NAMES)
    return f"rank {file.config.rank}, {len(modules)} modules, {', '.join(dtypes)}, {size / 1e6:.1f} MB"


def _problems(file: PeftFile, max_rank: int) -> Iterator[str]:
    """What vLLM demands beyond a PEFT adapter that fits the model. Rules: vllm/lora/peft_helper.py, lora_model.py, and
    vllm/model_executor/models/nemotron_h.py (`hf_to_vllm_mapper`, `embedding_modules`)."""
    rank, alpha = file.config.rank, file.config.alpha
    if rank > max_rank:
        yield f"rank {rank} is above {max_rank}, the largest that it is started with"
    if file.config.dora:
        yield "it is DoRA, which vLLM does not load"
    for path, modules in file.modules.items():
        for module in modules:
            if module.part is None:
                yield f"{module.name} holds all experts stacked; vLLM takes a module for each expert of this model"
                continue
            names = [module_name(module.part.tensor, consumer) for consumer in ("vllm", "peft-legacy")]
            if module.name not in names:
                yield f"{module.name} is called {names[0]} there"
            if module.rank != rank or module.alpha != alpha:
                yield f"{module.name} has a rank or an alpha of its own, and vLLM reads no patterns"
            if file.dtype(module, "lora_A") not in DTYPES:
                yield f"{module.name} is {file.dtype(module, 'lora_A')}; it takes {', '.join(DTYPES)}"
        layer, _, last = path.rpartition(".")
        if is_routed(path):
            other = next(name for name in PARAMETERS if name != last)
            if f"{layer}.{other}" not in file.modules:
                yield f"{path} has no {other} beside it, and vLLM requires both matrices of routed experts"
    yield from _missing(file)


def _missing(file: PeftFile) -> Iterator[str]:
    """Targets of the configuration whose tensors are not there: the model would be tuned in part, without a word."""
    there = {module.part.tensor for modules in file.modules.values() for module in modules if module.part is not None}
    routed = any(map(is_routed, file.modules))
    tensors = [
        part.tensor for path, linear in file.linears.items() if routed or not is_routed(path) for part in parts(linear)
    ]
    targets = read_json(file.folder / CONFIG, Targets).get("target_modules")
    for target in targets if isinstance(targets, list) else ():
        names = {tensor_name(target), tensor_name(f"model.{target}")}
        named = [name for name in tensors if name in names or name.endswith(f".{target}.weight")]
        lost = [name for name in named if name not in there]
        if lost or not named:
            yield f"{CONFIG} targets {target}, and there are no tensors for {some(lost) if lost else 'it'}"


def main() -> int:
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parse.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="our adapter -> a zip", allow_abbrev=False)
    write.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter folder of ours")
    write.add_argument("zip", metavar="OUT.zip", type=Path, help="file to write, replaced when it exists")
    check = commands.add_parser("check", help="whether a zip is one that vLLM loads all of", allow_abbrev=False)
    check.add_argument("zip", metavar="FILE.zip", type=Path, help="zip that any tool made")
    check.add_argument("--base", metavar="MODEL", required=True, help="folder, or a preset such as nano, of its base")
    for command in (write, check):
        command.add_argument("--max-rank", type=int, default=MAX_RANK, help=f"largest rank (default: {MAX_RANK})")
    args = parse.parse_args()
    if args.command == "check":
        print(f"{args.zip}: {check_submission(args.zip, resolve_model(args.base), args.max_rank)}")
    else:
        print(f"{args.zip}: {write_submission(args.adapter, args.zip, args.max_rank)}")
    return 0


if __name__ == "__main__":
    run(main)
