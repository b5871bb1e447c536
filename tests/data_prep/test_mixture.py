"""Mixtures: whose turn it is by hand, the same order whatever runs, and what the file may say."""

import os
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from torch.utils.data import DataLoader

from data_prep.mixture import Blend, TrainingSamples, check_length
from data_prep.packing import PackedDataset, build_packs
from data_prep.store import StoreWriter
from nano3.cli import UserError
from nano3.mixture import read_mixture
from nano3.outputs import fresh_output
from nano3.pack_index import Curriculum
from nano3.token_store import KIND, TokenStore
from tests.helpers.tiny_store import tiny_store


def folder_bytes(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    for seed, (name, documents) in enumerate((("a", 60), ("b", 20))):
        build_packs(TokenStore(tiny_store(folder / name, documents, longest=30, vocab_size=300, seed=seed)), 32)
    return folder


def write_mixture(folder: Path, name: str = "mix.yaml", **entry: object) -> Path:
    (folder / name).write_text(yaml.safe_dump(entry))
    return folder / name


def weighted(folder: Path, a: float, b: float, **more: object) -> Path:
    return write_mixture(folder, stores=[{"path": "a", "weight": a}, {"path": "b", "weight": b}], **more)


def test_turns_by_hand() -> None:
    """Of the first n samples the stores have shares of n, rounded; a store's own samples come in order."""
    blend = Blend([Fraction(7, 10), Fraction(1, 10), Fraction(2, 10)], seed=1)
    found = [blend.locate(sample) for sample in range(2500)]
    assert [sum(store == s for store, _ in found[:1000]) for s in range(3)] == [700, 100, 200]
    assert [sum(store == s for store, _ in found[:2000]) for s in range(3)] == [1400, 200, 400]
    for store in range(3):
        numbers = [number for s, number in found if s == store]
        assert numbers == list(range(len(numbers)))
    # Another order of asking, another object: the same answers.
    again = Blend([Fraction(7, 10), Fraction(1, 10), Fraction(2, 10)], seed=1)
    assert [again.locate(sample) for sample in (2400, 5, 1234, 5)] == [found[n] for n in (2400, 5, 1234, 5)]
    other = Blend([Fraction(7, 10), Fraction(1, 10), Fraction(2, 10)], seed=2)
    assert [other.locate(sample) for sample in range(50)] != found[:50]


def test_thirds_stay_exact_over_many_cycles() -> None:
    blend = Blend([Fraction(1, 3), Fraction(2, 3)], seed=0)
    counts = np.bincount([blend.locate(sample)[0] for sample in range(3000)])
    assert counts.tolist() == [1000, 2000]


@pytest.mark.parametrize("rounds", [(3, 5), (2500, 4), (1, 2999)])
def test_epochs_meet_every_pack_as_often_as_they_say(rounds: tuple[int, int]) -> None:
    total = sum(rounds)
    blend = Blend([Fraction(count, total) for count in rounds], seed=3, period=total)
    for lap in range(2):
        found = [blend.locate(sample) for sample in range(lap * total, (lap + 1) * total)]
        for store, count in enumerate(rounds):
            numbers = [number for s, number in found if s == store]
            assert numbers == list(range(lap * count, (lap + 1) * count))


def test_a_mixture_gives_packs_of_its_stores_with_their_sources(stores: Path) -> None:
    samples = TrainingSamples(weighted(stores, 1, 3), 32, 1, samples=40, seed=5)
    packs = [PackedDataset(stores / name, 32) for name in "ab"]
    for sample in range(40):
        store, number = samples.pack_of(sample)
        item, expected = samples[sample], packs[store][number]
        assert np.array_equal(item["tokens"], expected["tokens"])
        assert np.array_equal(
            item["source"][expected["source"] >= 0], expected["source"][expected["source"] >= 0] + store
        )
        assert np.array_equal(item["source"] < 0, expected["source"] < 0)
        assert sum(samples.lengths(sample)) == (expected["source"] >= 0).sum()
    first = [samples.pack_of(sample) for sample in range(len(packs[0]) * 5)]
    mine = [number for store, number in first if store == 0]
    assert sorted(mine[: len(packs[0])]) == list(range(len(packs[0]))), "an epoch of a store is each of its packs"


def test_one_store_keeps_the_order_that_it_had_before_mixtures(stores: Path) -> None:
    packs = PackedDataset(stores / "a", 32)
    alone = TrainingSamples(stores / "a", 32, 1, samples=50, seed=7)
    order = np.concatenate([np.random.default_rng([7, epoch]).permutation(len(packs)) for epoch in range(3)])
    assert [alone.pack_of(sample) for sample in range(2 * len(packs))] == [(0, n) for n in order[: 2 * len(packs)]]


def test_ranks_restarts_and_workers_change_nothing(stores: Path) -> None:
    """What each rank reads, by Megatron's rule (a rank takes every n-th of a step's samples), adds up to one order."""
    mixture, steps, batch = weighted(stores, 2, 1), 10, 4
    whole = [TrainingSamples(mixture, 32, 1, steps * batch, seed=1)[n]["tokens"] for n in range(steps * batch)]
    for ranks in (1, 2, 4):
        for restart in range(0, steps, 5):
            fresh = [TrainingSamples(mixture, 32, 1, steps * batch, seed=1) for _ in range(ranks)]
            for sample in range(restart * batch, steps * batch):
                assert np.array_equal(fresh[sample % ranks][sample]["tokens"], whole[sample])
    for workers in (0, 2):
        loader = DataLoader(
            TrainingSamples(mixture, 32, 1, 12, seed=1),
            num_workers=workers,
            collate_fn=lambda items: items[0]["tokens"],
        )
        assert all(np.array_equal(got, expected) for got, expected in zip(loader, whole, strict=False))


def test_other_weights_rewrite_the_file_and_nothing_else(stores: Path) -> None:
    mixture = weighted(stores, 1, 1)
    list(map(TrainingSamples(mixture, 32, 1, 20, seed=1).__getitem__, range(20)))
    before = folder_bytes(stores)
    mixture = weighted(stores, 1, 9)
    counts = np.bincount([TrainingSamples(mixture, 32, 1, 1000, 1).pack_of(n)[0] for n in range(1000)])
    assert counts.tolist() == [100, 900]
    changed = [name for name, facts in folder_bytes(stores).items() if before.get(name) != facts]
    assert changed == [str(mixture)]
    assert os.path.getsize(mixture) < 1 << 20


def test_a_curriculum_goes_through_its_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    levels = rng.permutation(40)
    with fresh_output(tmp_path / "a", KIND) as folder:
        writer = StoreWriter(folder, order="level")
        for level in levels.tolist():
            tokens = np.full(int(rng.integers(4, 12)), 3 + level, np.int32)
            mask = np.ones(len(tokens), np.uint8)
            mask[0] = 0
            writer.add(tokens, mask, "x", order=level)
        writer.finish(SimpleNamespace(sha256="0" * 64, vocab_size=300))  # type: ignore[arg-type]
    curriculum = Curriculum("level", 4)
    facts = build_packs(TokenStore(tmp_path / "a"), 32, curriculum=curriculum)
    assert sum(facts["blocks"]) == facts["packs"]
    assert facts["documents"] == 40
    path = write_mixture(tmp_path, stores=[{"path": "a", "epochs": 2}], curriculum={"order": "level", "blocks": 4})
    samples = TrainingSamples(path, 32, 1, 2 * facts["packs"], seed=1)
    for epoch in range(2):
        seen = []
        for sample in range(epoch * facts["packs"], (epoch + 1) * facts["packs"]):
            item = samples[sample]
            seen.append({int(token) - 3 for token in item["tokens"][item["source"] >= 0]})
        blocks = [level // 10 for pack in seen for level in pack]
        assert blocks == sorted(blocks), "levels 0 to 9 before 10 to 19, and so on"
        assert all(len({level // 10 for level in pack}) == 1 for pack in seen), "no pack holds two blocks"
        assert sorted(level for pack in seen for level in pack) == list(range(40))


def test_a_run_longer_than_its_epochs_is_refused(stores: Path) -> None:
    path = write_mixture(stores, "epochs.yaml", stores=[{"path": "a", "epochs": 1}, {"path": "b", "epochs": 2.5}])
    packs = [len(PackedDataset(stores / name, 32)) for name in "ab"]
    period = packs[0] + round(2.5 * packs[1])
    check_length(path, 32, 1, steps=-(-period // 4), global_batch=4)
    with pytest.raises(UserError, match=rf"its epochs are {period} packs.*set train.steps={-(-period // 4)}"):
        check_length(path, 32, 1, steps=-(-period // 4) + 1, global_batch=4)
    check_length(weighted(stores, 1, 1), 32, 1, steps=10**6, global_batch=4)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({}, "stores is missing"),
        ({"stores": []}, "stores"),
        ({"stores": [{"path": "a"}]}, "every store needs a weight, or every store epochs"),
        ({"stores": [{"path": "a", "weight": 1}, {"path": "b", "epochs": 1}]}, "cannot be mixed"),
        ({"stores": [{"path": "a", "weight": 1, "epochs": 1}]}, "cannot be mixed"),
        ({"stores": [{"path": "a", "weight": 0}]}, r"stores\[0\].weight is 0"),
        ({"stores": [{"path": "a", "weight": float("nan")}]}, r"stores\[0\].weight is nan"),
        ({"stores": [{"path": "a", "weight": 1}, {"path": "./a", "weight": 1}]}, "is given twice"),
        (
            {"stores": [{"path": "a", "weight": 1, "wieght": 2}]},
            r"stores\[0\]\.wieght means nothing here; a mixture has stores",
        ),
        ({"stores": [{"path": "a", "weight": 1}], "curiculum": {}}, "curiculum means nothing here"),
        ({"stores": [{"path": "a", "weight": 1}], "curriculum": {"order": "x", "blocks": 1}}, "curriculum.blocks is 1"),
        ({"stores": [{"path": "a", "weight": 1}, {"path": "b", "weight": 1e-9}]}, "smallest weight"),
    ],
)
def test_files_that_say_something_else_are_refused(tmp_path: Path, entry: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read_mixture(write_mixture(tmp_path, **entry))


def test_a_missing_store_or_index_is_named(stores: Path) -> None:
    path = write_mixture(stores, "none.yaml", stores=[{"path": "a", "weight": 1}, {"path": "none", "weight": 1}])
    with pytest.raises(UserError, match="none is not a token store"):
        TrainingSamples(path, 32, 1, 4, 1)
    path = write_mixture(
        stores, "ordered.yaml", stores=[{"path": "a", "weight": 1}], curriculum={"order": "length", "blocks": 2}
    )
    with pytest.raises(UserError, match=r"has no packs-32-by-length-2 .*repack\.py .* --order-by length --blocks 2"):
        TrainingSamples(path, 32, 1, 4, 1)
