"""Context parallelism: packs cut document by document, and two or four ranks that compute what one computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.hf_to_nemo import convert
from data_prep.packing import build_packs
from finetune.settings import LoraSettings, Settings, TrainSettings
from launch.plan.layout import Layout
from nano3.context_parallel import cut_batch
from nano3.cpu.te.context import Share
from nano3.cpu.te.partition import partitioned_indices
from nano3.token_store import TokenStore
from tests.helpers.probes import made_by
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_run import metrics, run, write_run
from tests.helpers.tiny_store import tiny_store


def cu(*bounds: int) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


@pytest.mark.parametrize(
    ("size", "bounds", "table"),
    [
        # documents of 4 and 8 in 4 pieces each: of 1 (0 1 2 3) and of 2 (4 5 | 6 7 | 8 9 | 10 11)
        (2, (0, 4, 12), [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]),
        # 6 pieces: of 2 positions, and of 1
        (
            3,
            (0, 12, 18),
            [[0, 1, 10, 11, 12, 17], [2, 3, 8, 9, 13, 16], [4, 5, 6, 7, 14, 15]],
        ),
        (4, (0, 8), [[0, 7], [1, 6], [2, 5], [3, 4]]),
        (1, (0, 2, 6), [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_every_document_is_cut_into_an_early_and_a_late_piece_per_rank(size, bounds, table):
    for rank, expected in enumerate(table):
        found = partitioned_indices(cu(*bounds), bounds[-1], size, rank)
        assert found.tolist() == expected
        assert found.dtype == torch.int32


@pytest.mark.parametrize(
    ("bounds", "total", "message"),
    [
        ((0, 4, 10), 10, r"document 1 of the pack has 6 positions, .* 2 \* cp = 4 equal pieces; .* --pad-multiple 4"),
        ((0, 4, 8), 12, "cu_seqlens run from 0 to 8, the pack has 12 positions"),
        ((4, 8), 8, "cu_seqlens run from 4 to 8"),
    ],
)
def test_documents_that_cannot_be_cut_are_refused(bounds, total, message):
    with pytest.raises(ValueError, match=message):
        partitioned_indices(cu(*bounds), total, 2, 0)


def test_a_batch_keeps_its_boundaries_and_cuts_what_has_one_value_per_position():
    batch = {
        "tokens": torch.arange(12)[None] + 100,
        "loss_mask": torch.arange(12.0)[None],
        "cu_seqlens": cu(0, 4, 12),
        "max_seqlen": torch.tensor(8),
    }
    cut = cut_batch(batch, 2, 1)
    assert cut["tokens"].tolist() == [[101, 102, 106, 107, 108, 109]]
    assert cut["loss_mask"].tolist() == [[1.0, 2.0, 6.0, 7.0, 8.0, 9.0]]
    assert cut["cu_seqlens"] is batch["cu_seqlens"]
    assert cut["max_seqlen"] is batch["max_seqlen"]
    assert cut_batch(batch, 1, 0) is batch


def test_queries_meet_the_keys_of_their_document_up_to_themselves():
    class Group:
        def size(self) -> int:
            return 2

        def rank(self) -> int:
            return 1

    share = Share(cu(0, 4, 12), Group())  # rank 1 holds 1 | 2 of the first document, 6 7 | 8 9 of the second
    assert [(p.queries, p.keys) for p in share.pieces()] == [
        (slice(0, 1), slice(0, 2)),
        (slice(1, 2), slice(0, 3)),
        (slice(2, 4), slice(4, 8)),
        (slice(4, 6), slice(4, 10)),
    ]
    assert share.pieces()[3].mask.int().tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    # rank after rank: 0 3 4 5 10 11, 1 2 6 7 8 9; position 1 is the seventh of these, and so on
    assert share.order.tolist() == [0, 6, 7, 1, 2, 3, 8, 9, 10, 11, 4, 5]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of tests/helpers/context_probe.py: Megatron-Core's model with all parameters trained, no NeMo."""
    out: Path = tmp_path_factory.mktemp("context") / "out.json"
    return json.loads(made_by("context_probe", out).read_text())


@pytest.mark.parametrize("layout", ["cp2", "cp4", "cp2.ep2", "tp2.cp2.ep2"])
def test_losses_and_gradients_equal_those_of_one_rank(probe, layout):
    errors = probe["errors"][f"fp64 {layout}"]
    assert errors["tensors"] > 40
    assert max(errors["loss"], errors["gradient"]) < 1e-9, errors
    assert errors["fp32_gradient"] < 1e-6, errors  # A_log and D are FP32 whatever the rest is
    assert errors["norm"] < 1e-6, errors  # Megatron-Core adds it up in FP32
    assert errors["drift"] == 0, "copies of one gradient differ between ranks"


@pytest.mark.parametrize("layout", ["cp2", "tp2.cp2.ep2"])
def test_in_fp32_too(probe, layout):
    errors = probe["errors"][f"fp32 {layout}"]
    assert max(errors["loss"], errors["gradient"], errors["fp32_gradient"]) < 1e-5, errors


@pytest.mark.parametrize("layout", ["cp2", "cp4"])
def test_every_token_has_the_loss_that_it_has_on_one_rank(probe, layout):
    assert probe["token_losses"][layout] < 1e-9


@pytest.mark.parametrize("fault", ["cut_as_a_whole", "swapped"])
def test_a_pack_cut_in_another_way_is_noticed(probe, fault):
    assert probe["faults"][fault]["loss"] > 1e-4
    assert probe["faults"][fault]["gradient"] > 1e-2


def seen(gradient: list[float]) -> set[int]:
    """Positions whose embedding has any influence on the loss: exact zeros are none."""
    return {position for position, size in enumerate(gradient) if size != 0}


@pytest.mark.parametrize(
    ("layout", "documents"),
    [
        ("cp2", [(4, 24), (24, 28), (0, 64)]),  # between a document of 2 * cp and others; of 2 * cp itself; alone
        ("cp2.ep2", [(4, 24)]),
        ("tp2", [(7, 31), (0, 64)]),
        ("pp2", [(7, 31), (0, 64)]),
    ],
)
def test_a_documents_loss_depends_on_that_document_only(probe, layout, documents):
    for gradient, (start, stop) in zip(probe["leaks"][layout], documents, strict=True):
        assert seen(gradient) == set(range(start, stop))


def test_a_leak_is_noticed(probe):
    assert seen(probe["planted_leak"]) == set(range(24))  # the state of the document before reaches the one at 4 to 24


@pytest.mark.full
def test_the_recipe_on_two_shares_equals_one_rank(tmp_path):
    """Documents fill multiples of 4 = 2 * cp positions, so that both layouts see the same packs."""
    source = tiny_hf_folder(tmp_path / "hf", dtypes={"": "F32"}, hybrid_override_pattern="MEM*E")
    convert(source, tmp_path / "nemo", context=False)
    store = tiny_store(tmp_path / "store", documents=40, longest=30, vocab_size=128, multiple=4)
    for multiple in (1, 4):
        build_packs(TokenStore(store), 64, pad_multiple=multiple)
    rows = {}
    for name, ranks, layout in (("one", 1, Layout()), ("cp2", 2, Layout(cp=2))):
        settings = Settings(
            layout=layout,
            lora=LoraSettings(rank=4, alpha=8.0),
            train=TrainSettings(steps=3, warmup=0, lr=1e-3, global_batch=4, seq_length=64),
        )
        rows[name] = metrics(run(write_run(tmp_path, name, ranks, settings, validate=True)))
    assert len(rows["cp2"]) == len(rows["one"]) > 3
    for ours, single in zip(rows["cp2"], rows["one"], strict=True):
        for key in {"loss", "grad_norm", "validation_loss", "validation_accuracy"} & set(single):
            assert ours[key] == pytest.approx(single[key], rel=1e-5), key
        assert ours.get("tokens") == single.get("tokens")
