"""A recipe is the file that its function stands in: named, kept, hashed, loaded, and refused where ranks could not."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from conversion.hf_to_nemo import convert
from data_prep.packing import build_packs
from finetune.recipe_file import Recipe, keep, load_recipe, recipe_of, refuse_while_loading
from finetune.run_identity import run_identity
from finetune.settings import Run, Settings, TrainSettings
from nano3.checkpoints.checkpoint_folder import refuse_other_run
from nano3.cli import UserError
from nano3.token_store import TokenStore, file_sha256, tokenizer_sha256
from recipes import nemotron_lora
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_store import tiny_store

SOURCE = """
from recipes.nemotron_lora import settings

def mine(run):
    return "mine"
"""


@pytest.fixture
def written(tmp_path: Path, request: pytest.FixtureRequest):
    """Writes a recipe's file and imports it, as a command does."""

    def write(source: str, name: str = "my_recipe.py") -> ModuleType:
        file = tmp_path / name
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(f"written_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        request.addfinalizer(lambda: sys.modules.pop(spec.name, None))
        spec.loader.exec_module(module)
        return module

    return write


def test_a_recipe_is_named_by_the_file_of_its_function(written, tmp_path):
    recipe = recipe_of(written(SOURCE).mine)
    assert recipe.name == "my_recipe.py:mine"
    assert recipe.file == str(tmp_path / "my_recipe.py")
    assert list(recipe.sha256) == ["my_recipe.py", "recipes/nemotron_lora.py"]  # which it imports
    ours = recipe_of(nemotron_lora.nemotron_3_nano_lora)
    assert ours.name == "recipes.nemotron_lora:nemotron_3_nano_lora"
    assert list(ours.sha256) == ["recipes/nemotron_lora.py"]


def test_ranks_load_the_file_as_it_was_kept(written, tmp_path):
    recipe = recipe_of(written(SOURCE).mine)
    keep(recipe, tmp_path / "out")
    (tmp_path / "my_recipe.py").write_text(SOURCE.replace('"mine"', '"changed"'))  # while the job waits in the queue
    assert load_recipe(recipe, tmp_path / "out")(None) == "mine"
    (tmp_path / "my_recipe.py").unlink()  # on another node it never was
    assert load_recipe(recipe, tmp_path / "out")(None) == "mine"


def test_a_file_that_is_not_the_one_of_the_start_is_refused(written, tmp_path):
    recipe = recipe_of(written(SOURCE).mine)
    (tmp_path / "my_recipe.py").write_text(SOURCE + "# changed\n")
    with pytest.raises(UserError, match=r"my_recipe\.py has changed since the run was started"):
        keep(recipe, tmp_path / "out")
    (tmp_path / "my_recipe.py").write_text(SOURCE)
    kept = keep(recipe, tmp_path / "out")
    kept.write_text("def mine(run): ...\n")
    with pytest.raises(UserError, match=r"out/recipe/my_recipe\.py has changed"):
        load_recipe(recipe, tmp_path / "out")
    kept.unlink()
    with pytest.raises(UserError, match=r"out/recipe/my_recipe\.py is not there"):
        load_recipe(recipe, tmp_path / "out")
    parent = Recipe(recipe.name, recipe.file, recipe.sha256 | {"recipes/nemotron_lora.py": "0" * 64})
    kept.write_text(SOURCE)
    with pytest.raises(UserError, match=r"recipes/nemotron_lora\.py has changed .*my_recipe\.py imports it"):
        load_recipe(parent, tmp_path / "out")


def test_a_run_without_a_recipe_starts_no_rank(tmp_path):
    with pytest.raises(UserError, match="names no recipe"):
        load_recipe(None, tmp_path)


@pytest.mark.parametrize(
    ("source", "take", "message"),
    [
        (SOURCE, lambda module: lambda run: module.mine(run), "not a function at the top level"),
        (SOURCE, lambda module: functools.partial(module.mine), "a recipe is a function written with def"),
        ("def make():\n    def inner(run): ...\n    return inner\n", lambda module: module.make(), "at the top level"),
        ("def mine(run): ...\nother = mine\nmine = print\n", lambda module: module.other, "under its own name"),
    ],
    ids=["lambda", "partial", "nested", "rebound"],
)
def test_what_ranks_could_not_find_is_refused(written, source, take, message):
    with pytest.raises(UserError, match=message):
        recipe_of(take(written(source)))


def test_a_decorated_function_is_a_recipe(written, tmp_path):
    decorated = "import functools\ndef loud(f):\n    @functools.wraps(f)\n    def run(r):\n        return f(r) + '!'\n"
    recipe = recipe_of(written(f"{decorated}    return run\n@loud\ndef mine(run):\n    return 'mine'\n").mine)
    keep(recipe, tmp_path / "out")
    assert load_recipe(recipe, tmp_path / "out")(None) == "mine!"


def test_a_recipe_is_one_file(written, tmp_path):
    (tmp_path / "my_helper.py").write_text("")
    with pytest.raises(UserError, match=r"my_recipe\.py imports my_helper, which lies beside it.*one file"):
        recipe_of(written("def mine(run):\n    import my_helper\n").mine)
    recipe = recipe_of(written("def mine(run): ...\n", "late.py").mine)
    keep(recipe, tmp_path / "out")
    kept = tmp_path / "out" / "recipe" / "late.py"
    kept.write_text("import nowhere_to_be_found\ndef mine(run): ...\n")
    again = recipe_of(written("def mine(run): ...\n", "late.py").mine)
    changed = Recipe(again.name, again.file, {"late.py": file_sha256(kept)})
    with pytest.raises(UserError, match=r"late\.py cannot be loaded here: No module named 'nowhere_to_be_found'"):
        load_recipe(changed, tmp_path / "out")


def test_a_recipe_that_starts_a_run_when_it_is_imported_is_refused(written, tmp_path):
    source = "from finetune.recipe_file import refuse_while_loading\ndef mine(run): ...\nrefuse_while_loading()\n"
    recipe = recipe_of(written(source).mine)  # the command itself may
    keep(recipe, tmp_path / "out")
    with pytest.raises(UserError, match=r'my_recipe\.py starts a run whenever it is imported.*"__main__"'):
        load_recipe(recipe, tmp_path / "out")
    refuse_while_loading()  # and afterwards the process is what it was


def test_a_recipe_whose_file_changed_does_not_resume(written, tmp_path):
    model = tiny_hf_folder(tmp_path / "hf")
    convert(model, tmp_path / "nemo", context=False)
    tiny_store(tmp_path / "store", 20, 30, 128, tokenizer=tokenizer_sha256(model))
    build_packs(TokenStore(tmp_path / "store"), 64)

    def identity(source: str, function: str = "mine") -> dict:
        settings = Settings(train=TrainSettings(steps=4, seq_length=64))
        paths = [str(tmp_path / name) for name in ("hf", "nemo", "store")]
        recipe = recipe_of(getattr(written(source), function))
        run = Run(*paths, None, "", 1, 1, True, settings, recipe=recipe)
        assert Run.from_json(run.to_json()) == run
        return run_identity(run.to_json())

    before = identity(SOURCE)
    folder = tmp_path / "out" / "checkpoints" / "step-000004"
    (folder / "training").mkdir(parents=True)
    state = {"format": 2, "step": 4, "samples": 512, "layout": {"ranks": 1}, "identity": before}
    (folder / "training" / "state.json").write_text(json.dumps(state))
    refuse_other_run(folder, identity(SOURCE))
    with pytest.raises(UserError, match=r"of another run: the recipe's file my_recipe\.py was '\w+' and is '\w+'\."):
        refuse_other_run(folder, identity(SOURCE + "# a comment\n"))
    with pytest.raises(UserError, match=r"recipe was 'my_recipe\.py:mine' and is 'my_recipe\.py:other'"):
        refuse_other_run(folder, identity(SOURCE.replace("mine(", "other("), "other"))
