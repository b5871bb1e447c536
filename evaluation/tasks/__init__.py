"""Tasks: one file each, which owns its questions and its judge. `load_task("medmcqa")` finds medmcqa.py here.

A new task is one file with a function `task(variant: str) -> Task`, here or anywhere: `--task path/to/mine.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.judging.judges import Verdict
from evaluation.judging.questions import Question
from nano3.cli import UserError

FOLDER = Path(__file__).parent

LETTERS, GENERATION = "letters", "generate"


@dataclass(frozen=True)
class Task:
    """Questions and their judge.

    Args:
        name: as `--task` has it.
        title: what is asked, in a line.
        judge: question and the text that the model answered, thinking cut off -> verdict.
        form: what data_prep/convert.py calls the data set's own rows; chat rows need none.
        method: `letters` (the likeliest letter, one forward pass) or `generate`, unless the user says otherwise.
        room: tokens for an answer at least; more where the longest expected answer needs more.
        completion: a prompt without chat format, for base models and comparison with lm-evaluation-harness; the letter
            follows it after a space.
        data: where the questions come from, as `--questions` takes it; "" when the user must say.
        make: count and seed -> questions, for generators.
        published: subject -> questions, right before and right after tuning, of others' LoRA on this model.
    """

    name: str
    title: str
    judge: Callable[[Question, str], Verdict]
    form: str = ""
    method: str = GENERATION
    room: int = 40
    completion: Callable[[Question], str] | None = None
    data: str = ""
    make: Callable[[int, int], Iterator[Question]] | None = None
    published: Mapping[str, tuple[int, int, int]] | None = None


def names() -> list[str]:
    """Tasks that stand here."""
    return sorted(path.stem.replace("_", "-") for path in FOLDER.glob("[a-z]*.py"))


def load_task(name: str) -> Task:
    """The task of a name such as `gsm8k` or `reasoning-gym:syllogism`, or of a file of your own. Raises `UserError`."""
    stem, _, variant = name.partition(":")
    if stem.endswith(".py"):
        module: Any = _own(Path(stem))
    elif stem in names():
        module = importlib.import_module(f"evaluation.tasks.{stem.replace('-', '_')}")
    else:
        raise UserError(f"no task {stem!r}; there are {', '.join(names())}, and files of your own (path/to/task.py)")
    made = module.task(variant)
    if not isinstance(made, Task):
        raise UserError(f"task(variant) of {stem} returns {type(made).__name__}; it must return a Task")
    return made


def _own(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"no task at {path}; give a Python file with a function task(variant)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "task", None)):
        raise UserError(f"{path} has no function task(variant) that returns a Task; see evaluation/tasks/gsm8k.py")
    return module


def no_variant(name: str, variant: str) -> None:
    """Refuses a variant of a task that has none."""
    if variant:
        raise UserError(f"task {name} has no variants; leave out {':' + variant!r}")
