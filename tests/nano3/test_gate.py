"""Adapters that wait for a mark: where their gate is open, and that training on packs is what a model does that
switches them on while it writes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.adapters.combination import Rule
from conversion.adapters.unmerged import with_adapter
from conversion.combine_adapters import combine_adapters
from conversion.hf_to_nemo import convert
from conversion.merge_lora import merge
from evaluation.hf_model import load_reference
from nano3.arch import Arch, resolve_model
from nano3.cli import UserError
from nano3.gate import Gate, mark_ids, open_positions
from nano3.targets import LoraSettings
from tests.helpers.rank_server import done_by

LENGTHS = (37, 52, 1, 40)
"""As in tests/helpers/gate_probe.py, which only its own process may import."""
BOUND = 5e-5


def opened(tokens: list[int], mark: list[int], starts: list[int] | None = None) -> str:
    found = open_positions(torch.tensor([tokens]), mark, None if starts is None else torch.tensor(starts))
    return "".join("1" if one else "0" for one in found[0].tolist())


def test_a_gate_is_open_from_the_marks_last_token_to_the_end_of_the_turn():
    assert opened([5, 7, 8, 9, 6, 11, 4], [7, 8]) == "0011100", "position 2 is the first that knows of the mark"
    assert opened([7, 5, 8, 7, 7, 8], [7, 8]) == "000001"
    assert opened([7, 4, 2, 4, 7], [7]) == "11001", "either token that ends a turn closes it"
    assert opened([8, 4, 7], [7, 8]) == "000", "nothing wraps round"
    two = open_positions(torch.tensor([[7, 4, 4], [4, 4, 7]]), [7])
    assert two.tolist() == [[True, True, True], [False, False, True]]


def test_a_mark_opens_nothing_in_the_next_document_of_a_pack():
    assert opened([4, 7, 4, 4, 4, 7], [7], [0, 3]) == "011001"
    assert opened([4, 4, 7, 8, 7, 8], [7, 8], [0, 3]) == "000001", "half of it in each is no mark"


def test_a_gate_without_a_micro_batch_or_of_another_length_is_our_fault():
    gate = Gate()
    with pytest.raises(AssertionError, match="outside of a micro batch"):
        gate(torch.ones(3, 1, 2))
    gate.enter(torch.tensor([[True, False]]))
    with pytest.raises(AssertionError, match="3 positions, and a gate of 2"):
        gate(torch.ones(3, 1, 2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dora": True, "preset": "peft"}, "lora.dora=true with lora.mark='V'"),
        ({}, "mlp.experts.linear_fc1 cannot wait for a mark"),
        ({"targets": ["linear_qkv", "output_layer"]}, "output_layer cannot wait"),
        ({"targets": ["word_embeddings"]}, "embedding.word_embeddings cannot wait"),
    ],
)
def test_what_cannot_wait_for_a_mark_is_refused_by_name(settings, words):
    arch = Arch.load(resolve_model("pico"))
    assert LoraSettings(preset="peft", mark="V").paths(arch) == LoraSettings(preset="peft").paths(arch)
    with pytest.raises(UserError, match=words):
        LoraSettings(mark="V", **settings).paths(arch)


def test_the_tokens_of_a_mark():
    assert mark_ids(resolve_model("pico"), "") == []
    assert len(mark_ids(resolve_model("pico"), "[VERIFY]")) == 8
    assert len(mark_ids(resolve_model("pico"), "V")) == 1
    with pytest.raises(UserError, match="no text that can stand in a turn"):
        mark_ids(resolve_model("pico"), "<|im_end|>")


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], Path]:
    """What tests/helpers/gate_probe.py found, and its adapter."""
    folder = tmp_path_factory.mktemp("gate")
    convert(resolve_model("pico"), folder / "nemo", context=False)
    done_by("tests.helpers.gate_probe", folder / "nemo", folder / "adapter", folder / "out.safetensors")
    return load_file(folder / "out.safetensors"), folder / "adapter"


def written(model: torch.nn.Module, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """Logits (s, vocabulary) of a model that reads `first` tokens at once and goes on one by one, its cache kept."""
    with torch.no_grad():
        found = model(tokens[None, :first], use_cache=True)
        logits = [found.logits[0]]
        for place in range(first, len(tokens)):
            found = model(tokens[None, place : place + 1], past_key_values=found.past_key_values, use_cache=True)
            logits.append(found.logits[0])
    return torch.cat(logits)


def test_training_on_packs_is_generation_that_switches_the_adapter_on_at_the_mark(probe):
    results, adapter = probe
    model, base = (load_reference(resolve_model("pico"), torch.float32) for _ in range(2))
    with_adapter(adapter, resolve_model("pico"))(model)
    ours, late = results["logits"].split(LENGTHS), results["late"].split(LENGTHS)
    gates = results["gate"].bool().split(LENGTHS)
    assert [int(gate.sum()) for gate in gates] == [37 - 14, 52 - 22, 0, (20 - 7) + (40 - 32)]
    for tokens, packed, wrong, gate in zip(results["tokens"].split(LENGTHS), ours, late, gates, strict=True):
        step_by_step = written(model, tokens, min(3, len(tokens)))
        assert (step_by_step - packed).abs().max() < BOUND
        if gate.any():
            first = int(gate.nonzero()[0])
            plain = written(base, tokens, first)[:first]
            assert (packed[:first] - plain).abs().max() < BOUND, "before the mark it is the model without the adapter"
            assert (written(base, tokens, first) - packed)[first:].abs().max() > 0.1
            assert (step_by_step - wrong).abs().max() > 1e-2, "a gate that opens one token late is another model"


def test_tokens_before_the_mark_teach_a_gated_adapter_nothing(probe):
    results, _ = probe
    assert (results["before.gradients"] == 0).all()
    assert (results["after.gradients"] > 0).all()


def test_rows_of_a_batch_have_gates_of_their_own(probe):
    """Padded on the left, one row behind its mark, the other before it; then a batch of other rows."""
    results, adapter = probe
    model = load_reference(resolve_model("pico"), torch.float32)
    with_adapter(adapter, resolve_model("pico"))(model)
    first, second, *_ = results["tokens"].split(LENGTHS)
    rows = torch.zeros(2, 37, dtype=torch.long)
    rows[0], rows[1, 17:] = first, second[:20]
    mask = (rows > 0).long()
    with torch.no_grad():
        for _ in range(2):  # a second batch begins anew
            found = model(rows, attention_mask=mask, use_cache=True)
            after = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            step = model(torch.tensor([[30], [105]]), attention_mask=after, past_key_values=found.past_key_values)
    ours = results["logits"].split(LENGTHS)
    assert (found.logits[0] - ours[0]).abs().max() < BOUND
    assert (found.logits[1, 17:] - ours[1][:20]).abs().max() < BOUND
    assert (step.logits[1, 0] - ours[1][20]).abs().max() < BOUND


def test_what_would_make_it_act_everywhere_refuses_it(probe, tmp_path):
    _, adapter = probe
    with pytest.raises(UserError, match=r"acts from its mark .* a merge would make it act everywhere"):
        merge(resolve_model("pico"), adapter, tmp_path / "merged")
    with pytest.raises(UserError, match="a combination would make it act everywhere"):
        combine_adapters(resolve_model("pico"), tmp_path / "sum", [adapter, adapter], [1.0, 1.0], 4, Rule())
