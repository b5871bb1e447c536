"""Run by tests/project/test_no_foreign_code.py: this project's commands over folders that would run code.

    python -m tests.helpers.audit_probe FOLDER

Python tells an audit hook of every class that a pickle names, of every text that is compiled, of every command that is
run. What the hostile files would do is known: the names and the word in it (tests/helpers/hostile.py). Each command
runs in a fork, and where it meets such a file again with the readers that this project had, or that its libraries have.
Prints a line of JSON: how each command ended and what was seen.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from nano3 import checkpoint_metadata, documents, pickles
from nano3.cli import UserError
from tests.helpers import hostile

ROOT = Path(__file__).parents[2]
NAMES = {("builtins", "eval"), ("posix", "system"), ("os", "system")}
seen: list[str] = []


def hook(event: str, arguments: Any) -> None:
    """Notes what a hostile file does."""
    if event == "pickle.find_class" and tuple(arguments[:2]) in NAMES:
        seen.append(f"{event} {arguments[0]}.{arguments[1]}")
    elif event in ("compile", "exec", "os.system", "subprocess.Popen") and hostile.WORD in repr(arguments):
        seen.append(event)


@dataclass(frozen=True)
class Command:
    """A script with its arguments; words in capitals that name a folder of `hostile.make` stand for its path.

    `meets`: it gets as far as a file that the old readers run.
    """

    script: str
    arguments: str
    meets: bool = False


COMMANDS = {
    "adapter export": Command("conversion/adapter.py", "export @adapter @out/a --for peft-legacy", True),
    "adapter export, a chunk": Command("conversion/adapter.py", "export @adapter-chunk @out/a --for peft-legacy", True),
    "adapter import": Command("conversion/adapter.py", "import @peft @out/a --base @hf"),
    "adapter accept": Command("conversion/adapter.py", "accept @adapter"),
    "certify a checkpoint": Command("conversion/certify.py", "verify @nemo", True),
    "certify a merge": Command("conversion/certify.py", "verify @merged --against @hf --adapter @adapter", True),
    "certify, card": Command("conversion/certify.py", "card @merged"),
    "check_server": Command("conversion/check_server.py", "http://127.0.0.1:9 --golden @golden.safetensors"),
    "combine": Command("conversion/combine_adapters.py", "@hf @out/a @good-adapter @adapter", True),
    "a submission": Command("conversion/submission.py", "write @adapter @out/s.zip", True),
    "another's submission": Command("conversion/submission.py", "check @rows.parquet --base @hf"),
    "dequantize": Command("conversion/dequantize.py", "@fp8 @out/plain"),
    "golden": Command("conversion/golden.py", "@merged --out @out/g.safetensors", True),
    "import": Command("conversion/hf_to_nemo.py", "@hf @out/nemo --no-context"),
    "identity": Command("conversion/identity.py", "@hf"),
    "identity of a checkpoint": Command("conversion/identity.py", "@nemo", True),
    "lint": Command("conversion/lint_export.py", "@fp8"),
    "merge": Command("conversion/merge_lora.py", "@hf @adapter @out/merged", True),
    "merge, a chunk": Command("conversion/merge_lora.py", "@hf @adapter-chunk @out/merged", True),
    "merge of PEFT's": Command("conversion/merge_lora.py", "@hf @peft @out/merged"),
    "merge into NeMo": Command("conversion/merge_lora.py", "@nemo @adapter @out/merged --nemo", True),
    "export": Command("conversion/nemo_to_hf.py", "@nemo @out/hf", True),
    "push": Command("conversion/push.py", "@fp8 someone/model"),
    "quantize": Command("conversion/quantize_fp8.py", "@merged @out/fp8 --calibration @store --samples 2"),
    "quantize, a selection": Command(
        "conversion/quantize_fp8.py", "@hf @out/fp8 --dry-run --selection @selection.yaml", True
    ),
    "check_overlap": Command("data_prep/check_overlap.py", "@rows.parquet @rows.jsonl"),
    "clean": Command("data_prep/clean.py", "@rows.parquet --out @out/rows.jsonl"),
    "convert": Command("data_prep/convert.py", "@rows.parquet --out @out/rows.jsonl"),
    "generate": Command(
        "data_prep/generate.py", "--task number_sorting --size 2 --seed 1 --out @out/r.jsonl --exclude @rows.parquet"
    ),
    "prepare": Command(
        "data_prep/prepare.py", "--input @rows.jsonl --tokenizer @tokenizer --out @out/store --seq-length 64", True
    ),
    "export packs": Command("data_prep/export.py", "@store --seq-length 64 --to nemo-npy --out @out/p.npy"),
    "import packs": Command(
        "data_prep/export.py", "@rows.parquet --seq-length 64 --to store --tokenizer @tokenizer --out @out/packs"
    ),
    "repack": Command("data_prep/repack.py", "@store --seq-length 32"),
    "xray": Command("data_prep/xray.py", "@store --tokenizer @tokenizer"),
    "chat": Command("evaluation/chat.py", "@merged --max-new-tokens 1"),
    "compare": Command("evaluation/compare.py", "@result.json @result.json"),
    "evaluate": Command(
        "evaluation/evaluate.py", "@merged --questions @rows.jsonl --out @out/r.json --max-new-tokens 1", True
    ),
    "evaluate, the model's own code": Command(
        "evaluation/evaluate.py", "@hf-plain --questions @rows.jsonl --out @out/r.json --max-new-tokens 1"
    ),
    "golden, the model's own code": Command("conversion/golden.py", "@hf-plain --out @out/g.safetensors"),
    "evaluate an adapter": Command(
        "evaluation/evaluate.py",
        "@hf --adapter @adapter --questions @rows.jsonl --out @out/r.json --max-new-tokens 1",
        True,
    ),
    "steps": Command("evaluation/steps.py", "@hf --adapter @adapter --questions @rows.jsonl --out @out/s.json", True),
    "distill": Command(
        "evaluation/distill.py", "ftp://127.0.0.1 --task own --questions @rows.parquet --out @out/traces.jsonl"
    ),
    "harness": Command("evaluation/harness.py", "@merged --tasks own --include @tasks --out @out/r.json"),
    "lineage": Command("evaluation/lineage.py", "@ended"),
    "report": Command("evaluation/report.py", "@ended --before @result.json --after @result.json"),
    "pipeline": Command(
        "launch/pipeline.py",
        "run --model @hf --input @rows.jsonl --questions @rows.jsonl --out @pipeline --local --dry-run",
    ),
    "pipeline, a site": Command(
        "launch/pipeline.py",
        "run --model @hf --input @rows.jsonl --questions @rows.jsonl --out @out/p --cluster @cluster.yaml --dry-run",
        True,
    ),
    "preflight": Command("launch/preflight.py", "--hardware h100 --model @nemo --data @store"),
    "slurm": Command("launch/slurm.py", "--cluster @cluster.yaml --dry-run -- -m finetune.worker x", True),
    "a medical run": Command(
        "recipes/medical_lora.py", "--model @hf --data @mixture.yaml --out @out/run --local --dry-run", True
    ),
    "a step-aware run": Command(
        "recipes/step_aware_lora.py", "--model @hf --data @mixture.yaml --out @out/run --local --dry-run", True
    ),
    "a challenge run": Command(
        "recipes/challenge_lora.py", "--model @hf --data @mixture.yaml --out @out/run --local --dry-run", True
    ),
    "a reasoning run": Command(
        "recipes/reasoning_lora.py", "--model @hf --data @mixture.yaml --out @out/run --local --dry-run", True
    ),
    "a sweep": Command(
        "recipes/sweep.py",
        "--model @hf --data @mixture.yaml --validation @store --try lora.rank=4,8 --out @out/s --local --dry-run",
        True,
    ),
    "a run in four bits": Command(
        "recipes/nemotron_qlora.py", "--model @hf --data @mixture.yaml --out @out/run --local --dry-run", True
    ),
    "a run in plain transformers": Command(
        "recipes/qwen3_qlora.py", "--model @hf --data @store --out @out/run --seq-length 64"
    ),
    "a recipe": Command(
        "recipes/nemotron_lora.py", "--model @hf --data @mixture.yaml --out @out/run --local --dry-run", True
    ),
    "a recipe, its configuration": Command("recipes/nemotron_lora.py", "--config @config.yaml --local --dry-run", True),
    "a recipe, evaluation": Command(
        "recipes/demo.py",
        "--model @hf --base @nemo --validation @store --adapter @adapter --local --ranks 2 --eval-only --dry-run",
    ),
    "a job's first step": Command("finetune/run_cluster.py", "@begun/run.json"),
}
NOT_PROBED = {
    "launch/guard.py": "reads no file",
    "launch/slurm/inside.py": "reads versions of packages, and becomes the command that it is given",
    "launch/slurm/bundle.py": "copies installed packages, which are trusted",
    "launch/plan/recommend.py": "reads no file",
    "finetune/setting_sentences.py": "reads our own source",
    "nano3/parity/__main__.py": "makes its own data",
    "pico/pretrain.py": "makes its own data",
    "recipes/flat_loop.py": "takes the command line and the readers of recipes/nemotron_lora.py",
}
"""Scripts that no command here runs, with the reason."""
RUN_BY_RANKS = {"finetune/worker.py"}
"""Scripts that `ranks` runs."""


def script(root: Path, command: Command) -> Callable[[], Any]:
    """One of the project's commands, run in this process."""

    def run() -> None:
        words = [str(root / word[1:]) if word[0] == "@" else word for word in command.arguments.split()]
        sys.argv = [str(ROOT / command.script), *words]
        runpy.run_path(sys.argv[0], run_name="__main__")

    return run


def worker(root: Path, name: str, base: str = "good-nemo", init_from: str = "", planted: str = "") -> Callable[[], Any]:
    """A rank of a run: on a base, from an adapter, or resuming from a checkpoint in one of whose files is code."""

    def run() -> None:
        from finetune import worker
        from launch.local import rendezvous_store, world_of

        hostile.write_training(root, name, base, init_from, planted)
        store = rendezvous_store()
        os.environ.update(world_of(1, store.port), RANK="0", LOCAL_RANK="0")
        sys.argv = ["worker", str(root / f"{name}.json")]
        sys.exit(worker.main())

    return run


def ranks(root: Path) -> dict[str, Callable[[], Any]]:
    """What ranks do with a folder, by NeMo's and Megatron-Core's readers too."""
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import FileSystemReader

    base, adapter, training = root / "nemo/weights", root / "adapter/weights", "training/"
    return {
        "NeMo's load of the base": lambda: FileSystemReader(base).read_metadata(),
        "Megatron's common state": lambda: dist_checkpointing.load_common_state_dict(str(base)),
        "Megatron's load of an adapter": lambda: checkpoint_metadata.load_sharded({}, adapter),
        "a base": worker(root, "base", base="nemo"),
        "a base, its common state": worker(root, "common", base="nemo-common"),
        "an adapter to start from": worker(root, "init", init_from="run/start"),
        "a resumed adapter": worker(root, "resumed-adapter", planted="weights/.metadata"),
        "a resumed state": worker(root, "resumed-run", planted=training + "run.pt"),
        "resumed random numbers": worker(root, "resumed-ranks", planted=training + "ranks.pt"),
        "a resumed optimizer": worker(root, "resumed-optimizer", planted=training + "optimizer/.metadata"),
        "a resumed optimizer's common state": worker(root, "resumed-common", planted=training + "optimizer/common.pt"),
        "an import with NeMo's context": script(root, Command("conversion/hf_to_nemo.py", "@hf @out/nemo")),
    }


def old_readers() -> None:
    """The readers of before, and the libraries' own: Python's unpickler, all of YAML, templates in no sandbox."""
    import jinja2.sandbox

    def load(source: Any, *_: Any, **__: Any) -> Any:
        return torch.load(source, map_location="cpu", weights_only=False)

    def metadata(path: Path, *_: Any) -> Any:
        return pickle.loads((path / ".metadata" if path.is_dir() else path).read_bytes())

    _replace(checkpoint_metadata.read_metadata, metadata)
    _replace(checkpoint_metadata.check_folder, metadata)
    _replace(pickles.unpickle, lambda data, *_: pickle.loads(data))
    _replace(pickles.load_state, load)
    _replace(checkpoint_metadata.guard, lambda: None)
    documents._yaml_loader = lambda: yaml.UnsafeLoader
    jinja2.sandbox.SandboxedEnvironment.is_safe_attribute = lambda *_: True  # type: ignore[method-assign]
    jinja2.sandbox.SandboxedEnvironment.is_safe_callable = lambda *_: True  # type: ignore[method-assign]


def _replace(function: Any, other: Any) -> None:
    """Puts `other` in the place of a function of ours, wherever it was imported to."""
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()):
            if value is function:
                setattr(module, name, other)


def watched(command: Callable[[], Any], root: Path, before: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """Runs a command in a fork, in a folder of its own: how it ended, what it said at last, what was seen."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = io.StringIO()
        try:
            before()
            (root / "out").mkdir(exist_ok=True)
            os.chdir(root / "out")
            sys.stdin = io.StringIO("")
            sys.addaudithook(hook)
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                ended = _ended(command)
            os.write(
                writing,
                json.dumps({"ended": ended, "seen": sorted(set(seen)), "said": said.getvalue()[-400:]}).encode(),
            )
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        told = answer.read()
    os.waitpid(pid, 0)
    shutil.rmtree(root / "out", ignore_errors=True)
    return json.loads(told)


def _ended(command: Callable[[], Any]) -> str:
    """`refused`, `exit N` or the error that came out."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}")
        return "refused"
    except SystemExit as end:
        return "refused" if end.code == 2 else f"exit {end.code or 0}"
    except BaseException as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"[:200]
    return "exit 0"


def main() -> int:
    root = Path(sys.argv[1]).resolve()
    os.environ["NANO3_CACHE"] = str(root / "cache")
    hostile.make(root)
    if "--ranks" in sys.argv:
        made = watched(worker(root, "run"), root)
        assert made["ended"] == "exit 0", made
        hostile.copy(root / "run/adapter", "start", "weights/.metadata")
        commands, meets = ranks(root), set(ranks(root)) - {"an import with NeMo's context"}
    else:
        commands = {name: script(root, command) for name, command in COMMANDS.items()}
        meets = {name for name, command in COMMANDS.items() if command.meets}
    results = {name: watched(command, root) for name, command in commands.items()}
    old = {name: watched(commands[name], root, old_readers) for name in commands if name in meets}
    print(json.dumps({"ours": results, "old": old}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
