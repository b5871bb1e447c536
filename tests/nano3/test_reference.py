"""One rank of Megatron-Core with adapters against plain transformers, the same adapters applied by plain PyTorch.

The parity suite compares layouts with that rank; here the rank itself: loss and every adapter gradient.
"""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaluation.hf_model import load_reference
from nano3.parity.case import ALPHA, RANK, Case
from nano3.targets import PRESETS, select
from nano3.tensor_names import Linear, adaptable, adapter_shapes, megatron_tensors
from tests.helpers.probes import made_by
from tests.helpers.tiny import TINY_CONFIG

pytestmark = pytest.mark.full

CASE = Case(dtype=torch.float32)


def place(blocks, rows: Tensor, into: dict[str, list[tuple[int, Tensor]]]) -> None:
    """Puts rows in Megatron's order where the Hugging Face tensors have them."""
    for block, part in zip(blocks, rows.split([block.count for block in blocks]), strict=True):
        into.setdefault(block.name, []).append((block.start, part))


def stacked(parts: dict[str, list[tuple[int, Tensor]]]) -> dict[str, Tensor]:
    return {
        name: torch.cat([rows for _, rows in sorted(found, key=lambda part: part[0])]) for name, found in parts.items()
    }


def hf_folder(folder: Path) -> Path:
    """The case's model as Hugging Face files."""
    folder.mkdir()
    arch = CASE.arch
    fields = {key: getattr(arch, key) for key in TINY_CONFIG if hasattr(arch, key)}
    config = TINY_CONFIG | fields | {"hybrid_override_pattern": arch.pattern, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for tensor in megatron_tensors(arch):
        rows = CASE.whole(tensor.key, tensor.shape)
        place(tensor.blocks, rows.flatten(0, 1) if tensor.experts else rows, parts)
    shapes = {name: spec.shape for name, spec in arch.tensors().items()}
    tensors = {name: value.reshape(shapes[name]).float().contiguous() for name, value in stacked(parts).items()}
    assert tensors.keys() == shapes.keys()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def adapters() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The case's adapter tensors by Megatron's key, and the Hugging Face tensors' deltas, functions of them."""
    leaves: dict[str, Tensor] = {}
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    linears = adaptable(CASE.arch)
    for path in select(CASE.arch, PRESETS["all"], "shared"):
        linear: Linear = linears[path]
        prefix = path.removesuffix(linear.module) + linear.module_key + ".adapter."
        made = {
            prefix + name: CASE.whole(prefix + name, shape).float().requires_grad_()
            for name, shape in adapter_shapes(linear, RANK, each=False, dora=False).items()
        }
        leaves |= made
        low, *high = made.values()
        delta = ALPHA / RANK * torch.cat(high) @ low
        place(linear.blocks, delta.repeat(linear.experts or 1, 1), parts)
    return leaves, stacked(parts)


def changed(model: torch.nn.Module, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's parameters with the deltas added; transformers has the experts of a layer in one tensor."""
    result, left = {}, dict(deltas)
    for name, value in model.named_parameters():
        file = name.replace("model.", "backbone.", 1)
        if file in left:
            result[name] = value.detach() + left.pop(file)
        elif value.dim() == 3 and ".experts." in name:
            stem, kind = file.rsplit(".", 1)
            each = [left.pop(f"{stem}.{expert}.{kind}.weight") for expert in range(value.shape[0])]
            result[name] = value.detach() + torch.stack(each)
    assert not left, sorted(left)[:3]
    return result


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    out = tmp_path_factory.mktemp("reference") / "out.safetensors"
    return load_file(made_by("reference_probe", out))


def test_loss_and_adapter_gradients_are_those_of_plain_transformers(megatron, tmp_path):
    model = load_reference(hf_folder(tmp_path / "hf"), torch.float32)
    leaves, deltas = adapters()
    weights = changed(model, deltas)
    total, number = torch.zeros(()), torch.zeros(())
    for pack in range(len(CASE.packs)):
        batch = CASE.batch(0, pack)
        for start, stop in pairwise(batch["cu_seqlens"].tolist()):  # one document at a time
            tokens, labels, mask = (batch[key][:, start:stop] for key in ("tokens", "labels", "loss_mask"))
            logits = torch.func.functional_call(model, weights, (tokens,)).logits[0]
            total = total + (torch.nn.functional.cross_entropy(logits, labels[0], reduction="none") * mask[0]).sum()
            number = number + mask.sum()
    loss = total / number
    assert float(loss.detach()) == pytest.approx(float(megatron["loss"]), rel=1e-6)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert gradients.keys() == megatron.keys() - {"loss"}
    errors = {key: float((megatron[key] - g).abs().max() / g.abs().max()) for key, g in gradients.items()}
    assert len(errors) > 60
    assert max(errors.values()) < 1e-5, {key: error for key, error in errors.items() if error > 1e-6}
