"""Letters on ranks: those of plain transformers with the adapter beside the weights, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conversion.hf_to_nemo import convert
from data_prep.packing import build_packs
from evaluation.generation import GREEDY
from evaluation.judging.questions import Question
from evaluation.models import HFModel, beside
from evaluation.ranks import RESULTS, RankModel
from finetune.eval_only import evaluation_run
from finetune.recipe_file import keep
from finetune.settings import LogSettings, LoraSettings, Run, Settings, TrainSettings
from launch.plan.layout import Layout
from nano3.cli import UserError
from pico.tokenizer import save_tokenizer, vocabulary
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_run import run, write_run
from tests.helpers.tiny_store import tiny_store

pytestmark = pytest.mark.full

QUESTIONS = [
    Question(str(n), "s", ({"role": "user", "content": f"Sort {n}, 1" + ", 2" * n},), "A", choices=("a", "b", "c"))
    for n in range(5)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, its NeMo checkpoint, and a run of three steps with a large rate, whose adapter moves the letters."""
    path = tmp_path_factory.mktemp("letters")
    hf = tiny_hf_folder(path / "hf", dtypes={"": "F32"}, vocab_size=len(vocabulary()))
    save_tokenizer(hf)
    convert(hf, path / "nemo", context=False)
    build_packs(_store(path / "store"), 64)
    settings = Settings(
        lora=LoraSettings(rank=4, alpha=8.0),
        train=TrainSettings(steps=3, warmup=0, lr=0.02, global_batch=4, seq_length=64),
        log=LogSettings(tensorboard=False, wandb="off"),
    )
    run(write_run(path, "run", 1, settings))
    return path


def _store(path: Path):
    from nano3.token_store import TokenStore

    return TokenStore(tiny_store(path, documents=40, longest=30, vocab_size=len(vocabulary())))


def on_ranks(folder: Path, ranks, layout: Layout, count: int, adapter: str) -> Callable[[Path, int, Path], None]:
    """What the recipe's --eval-only does, on forks of the process that has imported NeMo."""

    def evaluate(store: Path, seq_length: int, out: Path) -> None:
        there = Run.from_json((folder / "run.json").read_text())
        train = replace(there.settings.train, seq_length=seq_length, pad_multiple=16)
        settings = replace(there.settings, layout=layout, train=train)
        into = out / RESULTS.parent
        there = replace(there, data="", out=str(into), validation=str(store), ranks_per_node=count, settings=settings)
        into.mkdir(parents=True)
        keep(there.recipe, into)
        (out / "run.json").write_text(evaluation_run(there, adapter).to_json())
        codes = ranks.run(out / "run.json")
        assert codes == [0] * count, (into / "logs" / "rank0.log").read_text()[-3000:]

    return evaluate


def test_letters_on_ranks_are_those_of_plain_transformers(folder, ranks, tmp_path):
    adapter = folder / "run" / "adapter"
    plain = HFModel(folder / "hf", progress=False)
    base = torch.tensor(plain.letters(QUESTIONS))
    tuned = HFModel(folder / "hf", progress=False, prepare=beside(adapter, folder / "hf"))
    expected = torch.tensor(tuned.letters(QUESTIONS))
    assert (expected - base).abs().max() > 0.05  # the adapter says something
    for layout, count in ((Layout(), 1), (Layout(ep=2), 2)):
        model = RankModel(folder / "nemo", tmp_path, on_ranks(folder, ranks, layout, count, str(adapter)))
        found = torch.tensor(model.letters(QUESTIONS))
        assert torch.allclose(found, expected, rtol=0, atol=1e-4), (found - expected).abs().max()
        assert model.hashes() == tuned.hashes()
    alone = RankModel(folder / "nemo", tmp_path, on_ranks(folder, ranks, Layout(ep=2), 2, "none"))
    assert torch.allclose(torch.tensor(alone.letters(QUESTIONS)), base, rtol=0, atol=1e-4)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="ranks score letters only"):
        alone.answers(QUESTIONS, 8, GREEDY)
