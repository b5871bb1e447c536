"""A copy of a recipe is a recipe: its change runs on this machine, in the chain and in the job of a cluster."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import pytest

from conversion.hf_to_nemo import convert
from finetune import run_cluster
from finetune.settings import Run
from launch import pipeline
from nano3.arch import resolve_model
from nano3.cli import UserError
from tests.finetune.test_recipe import pico_store
from tests.helpers.rank_server import RankServer

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {
    "nemotron_lora": "nemotron_3_nano_lora",
    "flat_loop": "flat_loop",
    "demo": "pico_number_sorting",
    "medical_lora": "medical_lora",
    "challenge_lora": "challenge_lora",
    "reasoning_lora": "reasoning_lora",
    "step_aware_lora": "step_aware_lora",
    "nemotron_qlora": "nemotron_3_nano_qlora",
}
"""File -> the function in it."""
LINES = 120
SMALL = ["train.seq_length=64", "train.global_batch=2", "train.steps=2", "train.warmup=1", "layout.ep=1"]


def changed_copy(name: str, folder: Path) -> Path:
    """A copy of a recipe whose function says so and ends; nothing else is touched, its name least of all."""
    lines = (ROOT / "recipes" / f"{name}.py").read_text().splitlines(keepends=True)
    (function,) = [
        node
        for node in ast.parse("".join(lines)).body
        if isinstance(node, ast.FunctionDef) and node.name == RECIPES[name]
    ]
    first = function.body[1].lineno - 1  # after the docstring
    lines.insert(first, f"    raise UserError('the copy of {name} runs')\n    from nano3.cli import UserError\n")
    lines.insert(first, "    from nano3.cli import UserError\n")
    copy = folder / f"my_{name}.py"
    copy.write_text("".join(lines))
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of pico's tokenizer, and pico as a base."""
    folder = tmp_path_factory.mktemp("copies")
    pico_store(folder / "data", 50)
    convert(resolve_model("pico"), folder / "base", context=False)
    return folder


def command(monkeypatch: pytest.MonkeyPatch, ranks: RankServer, words: list[str]) -> int:
    """`python WORDS`, with ranks that are forks of a process that has imported NeMo already."""
    monkeypatch.setattr(
        "launch.local.run_ranks", lambda argv, number, logs, _: max(ranks.ranks(argv[1], argv[2:], number, logs))
    )
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(words[0], run_name="__main__")
    return int(ended.value.code or 0)


def said(out: Path) -> str:
    return (out / "logs" / "rank0.log").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_a_changed_copy_runs_here_in_the_chain_and_in_a_job(name, folder, tmp_path, monkeypatch, ranks):
    copy, words = changed_copy(name, tmp_path), f"UserError: the copy of {name} runs\n"
    # Here: the command, as it is typed.
    flags = ["--model", "pico", "--base", str(folder / "base"), "--data", str(folder / "data"), "--local", *SMALL]
    assert command(monkeypatch, ranks, [str(copy), *flags, "--out", str(tmp_path / "here")]) == 1
    assert said(tmp_path / "here").endswith(words)
    # In the chain: the command of its training stage.
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    named = ["--model", "pico", "--input", str(rows), "--questions", str(rows), "--out", str(tmp_path / "chain")]
    args = pipeline.parser().parse_intermixed_args([*named, "--recipe", str(copy), "--local", *SMALL])
    (words_of_stage,) = [stage.commands[0] for stage in pipeline.chain_of(args).stages() if stage.name == "train"]
    assert words_of_stage[0] == str(copy)
    (tmp_path / "chain").mkdir()
    for part in ("base", "data"):
        (tmp_path / "chain" / part).symlink_to(folder / part)
    assert command(monkeypatch, ranks, list(words_of_stage)) == 1
    assert said(tmp_path / "chain" / "lora").endswith(words)
    # In a job: what its script runs on every rank, after the file itself has gone.
    copy.unlink()
    written = tmp_path / "here" / "run.json"
    job = run_cluster.job_of(Run.from_json(written.read_text()))
    assert job.command == ["-m", "finetune.worker", str(written)]
    (tmp_path / "here" / "logs" / "rank0.log").unlink()
    assert ranks.ranks(job.command[1], job.command[2:], 1, tmp_path / "here" / "logs") == [1]
    assert said(tmp_path / "here").endswith(words)


def test_the_chain_names_a_recipe_by_file_or_by_module_and_function(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    named = [
        "--model",
        "pico",
        "--input",
        str(rows),
        "--questions",
        str(rows),
        "--out",
        str(tmp_path / "chain"),
        "--local",
    ]

    def chain(recipe: str, *more: str):
        return pipeline.chain_of(pipeline.parser().parse_intermixed_args([*named, "--recipe", recipe, *more]))

    monkeypatch.chdir(tmp_path)
    assert chain("recipes.flat_loop").script == chain(str(ROOT / "recipes" / "flat_loop.py")).script
    with pytest.raises(UserError, match=r"--recipe nowhere\.py: there is no .*/nowhere\.py"):
        chain("nowhere.py")
    asked = pipeline.ask_recipe(
        chain("recipes.demo:pico_number_sorting", "layout.ep=1"), None, "recipes.demo:pico_number_sorting"
    )
    assert asked.plan.train.seq_length == 1024  # the recipe's own, to which the data is packed
    with pytest.raises(UserError, match="the file runs pico_number_sorting; name that"):
        pipeline.ask_recipe(chain("recipes.demo:other", "layout.ep=1"), None, "recipes.demo:other")


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("[!_]*.py")), ids=lambda file: file.name)
def test_recipes_are_short_and_say_what_they_are(file):
    text = file.read_text()
    assert len(text.splitlines()) <= LINES
    docstring = ast.get_docstring(ast.parse(text)) or ""
    for word in ("Teaches ", "Data: ", "Cost: ", "Result: ", f"python recipes/{file.name}"):
        assert word in docstring, f"{file.name} does not say: {word}"
    assert f"[{file.name}]({file.name})" in (ROOT / "recipes" / "README.md").read_text()


def test_nothing_but_recipes_is_in_their_folder():
    names = {path.name for path in (ROOT / "recipes").iterdir()} - {"__init__.py", "__pycache__", "README.md"}
    recipes = {f"{name}.py" for name in RECIPES}
    assert recipes <= names
    assert all(name.endswith(".py") for name in names)
