"""What FP8 does to activations and cache, in the reference model: by hand, and against ModelOpt's quantizers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.dequantize import dequantize
from evaluation.evaluate import evaluate_model
from evaluation.hf_model import load_reference
from evaluation.judging.questions import Question
from evaluation.models import plain_folder
from nano3.arch import PRESETS
from nano3.cli import UserError
from nano3.fp8_emulation import ActivationScales, rounded
from nano3.reference_linears import tap_model
from tests.conversion.test_fp8 import PICO_KEPT, modelopt_model, pico, samples  # noqa: F401  # a fixture
from tests.helpers.tiny import tiny_hf_folder

IN_PROJ = "backbone.layers.0.mixer.in_proj"
EXPERT = "backbone.layers.1.mixer.experts.{}.{}"


def tokens() -> torch.Tensor:
    return torch.from_numpy(samples()[2])[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits.float()


def test_rounding_by_hand():
    # E4M3 has 3 bits behind the point: 1, 1.125, 1.25, ...; 17 lies between 16 and 18, and 500 beyond the largest, 448.
    value = torch.tensor([1.0, 1.06, 1.07, 17.0, -500.0, 0.0])
    assert rounded(value, 1.0).tolist() == [1.0, 1.0, 1.125, 16.0, -448.0, 0.0]
    assert rounded(2 * value, 2.0).tolist() == [2.0, 2.0, 2.25, 32.0, -896.0, 0.0]
    assert rounded(value.bfloat16(), 1.0).dtype == torch.bfloat16


def test_experts_of_a_layer_take_the_largest_scale():
    inputs = {IN_PROJ: 3.0, EXPERT.format(0, "up_proj"): 1.0, EXPERT.format(1, "up_proj"): 2.0}
    inputs[EXPERT.format(0, "down_proj")] = 0.5
    shared = ActivationScales.shared(inputs, {}).inputs
    assert shared == {**inputs, EXPERT.format(0, "up_proj"): 2.0}


def test_taps_see_and_change_exactly_the_layers_named(tmp_path):
    folder = tiny_hf_folder(tmp_path / "hf")
    plain = logits(load_reference(folder, torch.float32))
    seen: dict[str, torch.Size] = {}

    def look(name):
        def note(value):
            seen[name] = value.shape
            return value

        return note

    names = [IN_PROJ, "backbone.layers.3.mixer.k_proj", "backbone.layers.1.mixer.shared_experts.up_proj"]
    names += [EXPERT.format(number, part) for number in range(8) for part in ("up_proj", "down_proj")]
    model = load_reference(folder, torch.float32)
    tap_model(model, {name: look(name) for name in names}, {})
    assert torch.allclose(logits(model), plain, rtol=0, atol=2e-6)  # our own loop over the experts computes the same
    assert set(seen) >= set(names[:3])
    assert seen[IN_PROJ] == (1, 64, 32)
    routed = [shape for name, shape in seen.items() if ".experts." in name and name.endswith("up_proj")]
    assert sum(shape[0] for shape in routed) == 64 * 2  # two experts for each token

    model = load_reference(folder, torch.float32)
    weight = load_file(folder / "model.safetensors")[EXPERT.format(3, "down_proj") + ".weight"].float()
    tap_model(model, {}, {EXPERT.format(3, "down_proj"): lambda value, _output: 2 * value @ weight.T})
    moved = load_reference(folder, torch.float32)
    with torch.no_grad():
        moved.get_decoder().layers[1].mixer.experts.down_proj[3] *= 2
    assert torch.allclose(logits(model), logits(moved), rtol=0, atol=2e-6)
    assert (logits(model) - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"not in this model, first backbone\.layers\.9"):
        tap_model(model, {"backbone.layers.9.mixer.in_proj": look("x")}, {})


def modelopt_scales(model) -> ActivationScales:
    """amax / 448 of every quantizer of inputs and cache in ModelOpt's model, under the names of this project."""
    inputs, cache = {}, {}
    for path, quantizer in model.named_modules():
        name = path.replace("model.layers", "backbone.layers")
        if not name.endswith("_quantizer") or not quantizer.is_enabled or "weight_quantizer" in name:
            continue
        scale = float(quantizer.amax) / 448
        if "_bmm_" in name:
            cache[name.replace("_bmm_quantizer", "_proj")] = scale
        elif ".experts." in name:
            module, _, part = name.removesuffix("_input_quantizer").rpartition(".")
            inputs.update({f"{module}.{number}.{part}": scale for number in range(8)})
        else:
            inputs[name.removesuffix(".input_quantizer")] = scale
    return ActivationScales(inputs, cache)


def round_weights(mine, modelopt, names) -> None:
    """Every matrix named, in place, as ModelOpt's own quantizer rounds it."""
    state = mine.state_dict()
    for name in names:
        module, number, part = name.replace("backbone", "model").rsplit(".", 2)
        with torch.no_grad():
            if number.isdigit():
                quantizer = modelopt.get_submodule(f"{module}.{part}_weight_quantizers.{number}")
                weight = state[f"{module}.{part}"][int(number)]
            else:
                quantizer = modelopt.get_submodule(f"{module}.{number}.{part}.weight_quantizer")
                weight = state[f"{module}.{number}.{part}.weight"]
            weight.copy_(quantizer(weight))


def first(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_every_layer_computes_what_modelopts_own_quantizers_compute():
    """Layer by layer on the same input: from end to end this model's routers magnify what differs in the last bit."""
    modelopt = modelopt_model(PRESETS["pico"], PICO_KEPT, torch.float32)
    scales, mine = modelopt_scales(modelopt), load_reference(PRESETS["pico"], torch.float32)
    assert (len(scales.inputs), len(scales.cache)) == (76, 4)
    round_weights(mine, modelopt, scales.inputs)
    calls = []
    for layer in modelopt.get_decoder().layers:
        layer.register_forward_hook(lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True)
    with torch.no_grad():
        modelopt(tokens(), use_cache=False)

    def differences() -> list[torch.Tensor]:
        with torch.no_grad():
            outputs = [layer(*a, **k) for layer, (a, k, _) in zip(mine.get_decoder().layers, calls, strict=True)]
        return [(first(out) - first(call[2])).abs() for out, call in zip(outputs, calls, strict=True)]

    without = differences()
    scales.attach(mine)
    for number, (before, after) in enumerate(zip(without, differences(), strict=True)):
        assert after.max() < 1e-5, number
        assert before.square().mean().sqrt() > 1e-2 or number == 2, number  # layer 2 is kept as it is


def test_every_scale_counts(pico, tmp_path):  # noqa: F811
    """Inputs and cache each change the logits, and a scale that is too small clips."""
    dequantize(pico, tmp_path / "plain")
    scales = ActivationScales.read(tmp_path / "plain")
    assert len(scales.inputs) == 76
    assert sorted(scales.cache) == [f"backbone.layers.{n}.mixer.{part}_proj" for n in (3, 7) for part in "kv"]
    stored = load_file(pico / "model.safetensors")
    assert scales.inputs[IN_PROJ] == stored[f"{IN_PROJ}.input_scale"].item()
    dequantize(pico, tmp_path / "weights", activations=False)
    assert ActivationScales.read(tmp_path / "weights") is None
    plain = logits(load_reference(tmp_path / "weights", torch.float32))
    for part in (ActivationScales(scales.inputs, {}), ActivationScales({}, scales.cache)):
        part.write(tmp_path / "weights")
        assert (logits(load_reference(tmp_path / "weights", torch.float32)) - plain).abs().max() > 1e-3


def test_a_result_says_whether_activations_were_rounded(pico, tmp_path):  # noqa: F811
    question = Question("a", "b", ({"role": "user", "content": "Sort 2, 1"},), "1, 2")
    for activations in (True, False):
        dequantize(pico, tmp_path / "plain", activations)
        result = evaluate_model(tmp_path / "plain", [question], max_new_tokens=2, progress=False)
        assert result["settings"]["fp8_activations"] is activations


def test_an_fp8_folder_is_scored_as_the_values_it_stands_for(pico, tmp_path):  # noqa: F811
    """What evaluate.py does for the user: the answers of a dequantized folder, which is gone afterwards."""
    question = Question("a", "b", ({"role": "user", "content": "Sort 2, 1"},), "1, 2")
    dequantize(pico, tmp_path / "plain")
    expected = evaluate_model(tmp_path / "plain", [question], max_new_tokens=4, progress=False)
    with plain_folder(pico, tmp_path / "near") as folder:
        result = evaluate_model(folder, [question], max_new_tokens=4, progress=False)
    assert result["answers"] == expected["answers"]
    assert result["settings"]["fp8_activations"]
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    with plain_folder(tmp_path / "plain", tmp_path / "near") as folder:
        assert folder == tmp_path / "plain"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "fp8_activations.json: not valid JSON"),
        (json.dumps({"inputs": {IN_PROJ: 0.0}, "cache": {}}), "is 0.0; it must be above 0.0"),
        (json.dumps({"inputs": {"backbone.layers.77.mixer.in_proj": 1.0}, "cache": {}}), "scales of another model"),
    ],
)
def test_a_folder_with_wrong_scales_is_refused(tmp_path: Path, content, message):
    folder = tiny_hf_folder(tmp_path / "hf")
    (folder / "fp8_activations.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_reference(folder, torch.float32)
