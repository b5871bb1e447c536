"""The same recipe on one rank, with expert parallel 2 and with tensor parallel 2: one loss, one gradient."""

import json
from pathlib import Path

import numpy as np
import pytest

from conversion.checkpoint.torch_dist import TorchDistReader
from conversion.hf_to_nemo import convert
from data_prep.epochs import Epochs
from data_prep.packing import build_packs
from finetune.settings import LogSettings, LoraSettings, Settings, TrainSettings
from launch.plan.layout import Layout
from nano3.targets import PRESETS
from nano3.token_store import TokenStore
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_run import metrics, run, write_run
from tests.helpers.tiny_store import tiny_store

SEQ_LENGTH = 64
LAYOUTS = {"one": (1, Layout()), "ep2": (2, Layout(ep=2)), "tp2": (2, Layout(tp=2))}
TARGETS = [*PRESETS["all"], "word_embeddings", "output_layer"]
MORE = {"pp2": (2, Layout(pp=2)), "tp2ep2": (2, Layout(tp=2, ep=2))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the outputs of all layouts."""
    folder = tmp_path_factory.mktemp("parity")
    source = tiny_hf_folder(folder / "hf", dtypes={"": "F32"}, hybrid_override_pattern="MEM*EM", vocab_size=133)
    convert(source, folder / "nemo", context=False)
    tiny_store(folder / "store", documents=60, longest=30, vocab_size=133)  # the last 5 on the second rank of tp2
    build_packs(TokenStore(folder / "store"), SEQ_LENGTH)
    for name, (ranks, layout) in (LAYOUTS | MORE).items():
        settings = Settings(
            layout=layout,
            lora=LoraSettings(rank=4, alpha=8.0, plus_ratio=8.0, targets=TARGETS),
            train=TrainSettings(
                steps=1, warmup=0, global_batch=4, seq_length=SEQ_LENGTH, clip=1e9, lr=1e-3, weight_decay=0.0
            ),
            log=LogSettings(tensorboard=False, wandb="off"),
        )
        write_run(folder, name, ranks, settings, validate=True)
    for name in LAYOUTS:
        launch(folder, name, f"{name}-grad")
    return folder


def launch(folder: Path, name: str, gradients: str, **environment: str) -> None:
    paths = (str(folder / part) for part in ("initial", gradients))
    run(folder / f"{name}.json", "tests.helpers.parity_worker", *paths, **environment)


def largest_errors(folder: Path, gradients: str) -> dict[str, float]:
    """Largest error of every adapter gradient against one rank's, relative to that gradient's largest value."""
    reader, expected = (TorchDistReader(folder / name / "weights") for name in (gradients, "one-grad"))
    assert set(reader.shapes) == set(expected.shapes)
    # Sixteen adapted layers, three of them an in_proj with five sections, embedding and output layer.
    assert len(expected.shapes) == 2 * 16 + 3 * 4 + 2 * 2
    errors = {}
    for key in expected.shapes:
        reference = expected.whole(key)
        assert reference.abs().max() > 0, f"{key} has no gradient at all"
        errors[key] = float((reader.whole(key) - reference).abs().max() / reference.abs().max())
    return errors


@pytest.mark.parametrize("layout", ["ep2", "tp2", *(pytest.param(name, marks=pytest.mark.full) for name in MORE)])
def test_loss_and_gradients_equal_those_of_one_rank(runs, layout):
    if layout in MORE:
        launch(runs, layout, f"{layout}-grad")
    ours, single = metrics(runs / layout), metrics(runs / "one")
    assert ours[0]["loss"] == pytest.approx(single[0]["loss"], rel=1e-5)
    assert ours[0]["grad_norm"] == pytest.approx(single[0]["grad_norm"], rel=1e-5)
    assert ours[0]["tokens"] == single[0]["tokens"]
    assert ours[-1]["validation_loss"] == pytest.approx(single[-1]["validation_loss"], rel=1e-5)
    errors = largest_errors(runs, f"{layout}-grad")
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.full
def test_a_forgotten_reduction_is_noticed(runs):
    run = json.loads((runs / "ep2.json").read_text()) | {"out": str(runs / "fault"), "validation": None}
    (runs / "fault.json").write_text(json.dumps(run))
    with pytest.raises(AssertionError, match="8 tensors differ between ranks that must hold the same"):
        launch(runs, "fault", "fault-grad", FAULT="reduction")
    assert not (runs / "fault" / "adapter").exists()
    wrong = {key for key, error in largest_errors(runs, "fault-grad").items() if error > 1e-5}
    assert wrong == {key for key in largest_errors(runs, "ep2-grad") if ".mlp.experts." in key}


@pytest.mark.full
def test_an_adapter_outside_the_graph_stops_the_run_by_name(runs):
    with pytest.raises(AssertionError, match="linear_out") as stopped:
        launch(runs, "ep2", "dead-grad", FAULT="detach")
    assert "learned nothing" in str(stopped.value)
    assert "layers.0.mixer.out_proj.adapter" in str(stopped.value)
    assert not (runs / "dead-grad").exists()


def test_the_router_has_one_hash_on_every_layout(runs):
    digests = {json.loads((runs / name / "adapter" / "lora.json").read_text())["router_sha256"] for name in LAYOUTS}
    assert len(digests) == 1


def test_a_recipe_rebuilt_in_a_fresh_process_is_equal(runs):
    # Compared by the ranks themselves (tests/helpers/parity_worker.py): they would have ended with an error.
    assert all((runs / f"{name}.recipe").is_file() for name in LAYOUTS)


def test_packs_without_a_gap_are_what_one_rank_sees():
    class Packs:
        blocks = (5,)

        def __len__(self) -> int:
            return 5

    order = Epochs(Packs(), 12, seed=1, shuffle=True)
    first, second = [order.pack_of(i) for i in range(5)], [order.pack_of(i) for i in range(5, 10)]
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    assert first != second
    assert [order.pack_of(i) for i in (7, 2, 7)] == [second[2], first[2], second[2]]
    assert np.array_equal([Epochs(Packs(), 12, 1, False).pack_of(i) for i in range(6)], [0, 1, 2, 3, 4, 0])
