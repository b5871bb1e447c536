"""`python -m nano3.parity`: layouts that hold, faults that do not, and what it says of a layout that it cannot read."""

import json
import os
import subprocess
import sys

import pytest

from nano3.cli import UserError
from nano3.parity.case import PACKS, Case, Sizes
from nano3.parity.layouts import parse_layouts
from tests.helpers.probes import made_by
from tests.helpers.rank_server import done_by

FAST = tuple(f"{sizes}@MEM*E" for sizes in ("tp2", "tp4", "ep2", "pp3", "cp2", "dp2", "tp2.ep2", "cp2.ep2"))
FAST += ("tp2@M*E+gated", "pp2@ME*M+gated+full", "tp2.cp2@M*E+chunked")


def test_eleven_layouts_give_the_answer_of_one_rank(tmp_path):
    command = [sys.executable, "-m", "nano3.parity", *FAST, "--precision", "fp64"]
    command += ["--out", str(tmp_path / "parity.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NANO3_CPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result = json.loads((tmp_path / "parity.json").read_text())
    assert [row["layout"] for row in result["rows"]] == list(FAST)
    assert result["holds"]
    for row in result["rows"]:
        assert max(row["loss"], row["gradient"], row["trained"]) <= 1e-9
        assert row["norm"] <= 1e-6
        assert row["drift"] == 0
    assert done.stdout.splitlines()[0].split() == [
        "layout",
        "ranks",
        "loss",
        "gradient",
        "norm",
        "3",
        "steps",
        "drift",
        "s",
    ]


@pytest.mark.full
def test_all_layouts_in_both_precisions(tmp_path):
    done_by("nano3.parity", "--out", tmp_path / "parity.json")
    rows = json.loads((tmp_path / "parity.json").read_text())["rows"]
    assert {row["precision"] for row in rows} == {"fp64", "fp32"}
    assert max(row["ranks"] for row in rows) == 8
    assert max(row["gradient"] for row in rows) <= 1e-5


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return json.loads(made_by("parity_faults", tmp_path_factory.mktemp("faults") / "rows.json").read_text())


@pytest.mark.full
@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("a_missing_reduction", "gradient"),
        ("a_wrong_section_split", "gradient"),
        ("a_swapped_slice", "gradient"),
        ("a_leaked_document", "gradient"),
        ("a_missing_exchange", "gradient"),
        ("a_copy_counted_twice", "norm"),
        ("quantized_after_cutting", "gradient"),
        ("a_gate_one_token_late", "gradient"),
        ("another_micro_batchs_gate", "gradient"),
        ("a_label_of_the_position_before", "loss"),
        ("a_chunk_without_its_mask", "loss"),
        ("a_chunk_that_is_not_added_up", "gradient"),
    ],
)
def test_a_deliberate_fault_is_beyond_the_bounds(faults, fault, where):
    assert faults[faults[fault]["layout"]]["holds"]
    assert not faults[fault]["holds"]
    assert faults[fault][where] == "inf" or faults[fault][where] > 1e-3


@pytest.mark.full
def test_copies_of_an_experts_matrix_are_equal_whatever_the_order_of_a_sum(faults):
    assert faults["a_last_bit_of_another_order"]["drift"] > 0
    assert not faults["a_last_bit_of_another_order"]["holds"]
    assert faults["mended"]["drift"] == 0
    assert faults["mended"]["holds"]


@pytest.mark.full
def test_beyond_the_bound_of_fp32_are_values_whose_gradient_is_almost_nothing(tmp_path):
    """A dense pattern under TP2, 8.9e-5 off after three steps, and gated adapters under CP2, 1.4e-4: one value each,
    whose gradient Adam divides by its own size. In FP64 nothing of it is left, and with a larger epsilon in Adam
    nothing beyond the bound."""
    found = json.loads(made_by("small_gradients", tmp_path / "found.json").read_text())
    for name, fp64 in (("dense", 1e-14), ("gated", 1e-12)):
        case = found[name]
        assert all(share < 1e-5 for share in case["shares"])
        assert case["rest"] < 5e-6
        assert case["larger_epsilon"] < 5e-6
        assert case["fp64"] < fp64


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("tp", "layout 'tp': write sizes of tp, pp"),
        ("xp2", "layout 'xp2'"),
        (
            "tp2+lora",
            "variants are each, dora, gated, allgather, distributed, recompute, full, chunked, nf4, not 'lora'",
        ),
    ],
)
def test_a_layout_that_is_none_is_refused(layout, words):
    with pytest.raises(UserError, match=words):
        parse_layouts(["tp2", layout])


def test_a_layout_names_sizes_pattern_and_adapters():
    plain, whole = parse_layouts(["ep2", "tp2.ep2@M-E+each"])
    assert (plain.sizes, plain.case) == (Sizes(ep=2), Case())
    assert (whole.sizes, whole.case) == (Sizes(tp=2, ep=2), Case(pattern="M-E", adapters="each"))


def test_variants_may_be_several():
    (both,) = parse_layouts(["tp2@M-E+nf4+each"])
    assert (both.sizes, both.case) == (Sizes(tp=2), Case(pattern="M-E", nf4=True, adapters="each"))
    with pytest.raises(UserError, match="not ''"):
        parse_layouts(["tp2+"])


def test_one_rank_computes_the_plain_way():
    """Dispatcher, distributed optimizer, recomputation and chunks are compared with a run that has none of them."""
    for variant in parse_layouts(["ep2+allgather", "dp2+distributed", "cp2+recompute", "cp2+full", "tp2+chunked"]):
        assert variant.case != Case()
        assert variant.case.plain == Case()
    (each,) = parse_layouts(["ep2+each"])
    assert each.case.plain == each.case


def test_sizes():
    assert Sizes.parse("tp2.pp2.cp2.ep2") == Sizes(tp=2, pp=2, cp=2, ep=2)
    assert (Sizes.parse("tp2.pp2.cp2.ep2").ranks, Sizes.parse("tp2.pp2.cp2.ep2").copies) == (8, 1)
    assert (Sizes.parse("ep4").ranks, Sizes.parse("ep4").copies) == (4, 4)
    assert (Sizes.parse("tp2.ep2").ranks, Sizes.parse("tp2.ep2").copies) == (2, 1)
    assert (Sizes.parse("tp2.dp2").ranks, Sizes.parse("one").ranks) == (4, 1)


def test_batches_are_the_same_whoever_asks_and_hold_short_and_long_documents():
    assert all(sum(lengths) == 64 for lengths in PACKS)
    assert {8, 64} <= {length for lengths in PACKS for length in lengths}
    first, again, other = Case().batch(0, 1), Case().batch(0, 1), Case().batch(1, 1)
    assert first["tokens"].equal(again["tokens"])
    assert not first["tokens"].equal(other["tokens"])
    assert first["cu_seqlens"].tolist() == [0, 64]
    whole = Case().whole("output_layer.weight", (128, 32))
    assert whole[:120].equal(Case().whole("output_layer.weight", (256, 32))[:120])  # padding does not move the rest
    assert not whole[120:].any()
