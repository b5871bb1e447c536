"""Golden answers: equal to the reference's, and a server that answers from something else is found out."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conversion.check_server import Server, check
from conversion.dequantize import dequantize
from conversion.fp8.golden_file import Golden
from conversion.fp8.golden_verdict import OVERALL, Limits, differences, of_all, of_prompt, unseen, way
from conversion.fp8.golden_verdict import problems as found_wrong
from conversion.fp8.selection import Selection
from conversion.golden import UNQUANTIZED, default_prompts, encode, golden, read_prompts
from conversion.quantize_fp8 import quantize
from evaluation.generation import load_tokenizer
from evaluation.hf_model import load_reference
from nano3.arch import PRESETS, Arch
from nano3.cli import UserError
from nano3.fp8_emulation import ActivationScales
from nano3.hf_config import FP8_ACTIVATIONS
from nano3.sealed_folder import seal
from pico.tasks import PRETRAINING, rows
from tests.helpers.golden_server import FakeServer, serve
from tests.helpers.tiny import tiny_hf_folder

TASKS = ("sort_ascending", "reverse_words", "count_letters")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`fp8`: pico quantized, calibrated on its own tasks; `plain`: read back; `golden.safetensors`."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("golden")
    questions = [row for task in TASKS for row in rows(PRETRAINING[task][0], 4, 7)]
    _, tokens = encode(PRESETS["pico"], questions)
    quantize(PRESETS["pico"], path / "fp8", Selection.published(Arch.load(PRESETS["pico"])), tokens)
    dequantize(path / "fp8", path / "plain")
    golden(path / "fp8", questions, path / "beside", PRESETS["pico"]).write(path / "golden.safetensors")
    scales = ActivationScales.read(path / "plain")
    shutil.copytree(path / "plain", path / "served")
    scales.as_served().write(path / "served")
    shutil.copytree(path / "plain", path / "unrounded")
    (path / "unrounded" / FP8_ACTIVATIONS).unlink()
    for copy in ("served", "unrounded"):
        seal(path / copy)
    return path


@pytest.fixture(scope="module")
def file(folder) -> Golden:
    return Golden.read(folder / "golden.safetensors")


def model_of(folder: Path, name: str = "served", dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model as a server has it: FP8 as vLLM reads it, `plain` as one with exact scales would."""
    return load_reference(folder / name, dtype)


def reference(folder: Path, name: str = "served") -> FakeServer:
    return FakeServer(model_of(folder, name), load_tokenizer(str(folder / "plain")))


def problems(fake: FakeServer, folder: Path) -> list[str]:
    with serve(fake) as url:
        return check(Server(url, 60), Golden.read(folder / "golden.safetensors"))


def said_by(model: Any, file: Golden) -> list[np.ndarray]:
    """What a model answers to the prompts of a file, without a server."""
    found = []
    for tokens in map(torch.from_numpy, file.tokens):
        with torch.no_grad():
            rows_of = model(tokens[None]).logits[0].float().log_softmax(-1)[:-1]
        chosen = rows_of.gather(1, tokens[1:, None])[:, 0]
        found.append(torch.cat([torch.zeros(1), chosen]).numpy())
    return found


def test_golden_answers_are_the_references(tmp_path):
    """Layer by layer, the last norm and lm_head in pieces: what the whole unquantized model says."""
    source = tiny_hf_folder(tmp_path / "hf", hybrid_override_pattern="MEM*E")
    texts = [{"prompt": "abcdefghijklmnop"}, {"prompt": "xyz 123"}]
    found = golden(source, texts, tmp_path / "out")
    model = load_reference(source, torch.float32)
    for mixer in (module for module in model.modules() if hasattr(module, "D")):
        mixer.D.data = mixer.D.data.bfloat16().float()  # servers keep it so
    assert [len(tokens) for tokens in found.tokens] == [16, 7]
    for tokens, logprobs in zip(found.tokens, found.logprobs, strict=True):
        with torch.no_grad():
            expected = model(torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1)[:-1]
        expected = expected.gather(1, torch.from_numpy(tokens)[1:, None])[:, 0].numpy()
        assert logprobs[0] == 0
        assert np.abs(logprobs[1:] - expected).max() < 1e-5
    assert found.facts["fp8"] is False
    assert not list(tmp_path.glob(".out*")), "nothing stays of the hidden states"


def by_hand(bf16: list[float], other: list[float]) -> Golden:
    """One prompt of tokens whose golden log-probability is -2."""
    arrays = [[np.array([0.0, *values])] for values in ([-2.0] * len(bf16), bf16, other)]
    tokens = [np.arange(len(bf16) + 1)]
    return Golden(["text"], tokens, arrays[0], arrays[1], {"no FP8": arrays[2]})


def test_limits_by_hand():
    """BF16 is off by 0.5 and 0: largest 0.5, mean 0.25; times 3, 2 and 1.5. Where it is exact the floors hold."""
    limits = Limits.of(by_hand([-2.5, -2.0], [-2.0, -3.0]))
    assert (limits.largest, limits.mean, limits.overall) == pytest.approx((1.5, 0.5, 0.375))
    exact = Limits.of(by_hand([-2.0, -2.0], [-2.0, -3.0]))
    assert (exact.largest, exact.mean, exact.overall) == (0.1, 0.02, 0.01)
    assert exact.ways == {"no FP8": 0.5}


def test_the_way_to_another_model_by_hand():
    """The other model is off by +0.98 and -0.48, BF16 by 0 and +0.98: weights 1 / 1 and 1 / 1.

    Answers half way at the first token and golden at the second: 0.5 * 0.98^2 / (0.98^2 + 0.48^2).
    """
    found = by_hand([-2.0, -1.02], [-1.02, -2.48])
    share = 0.98**2 / (0.98**2 + 0.48**2)
    assert way(found, [np.array([0.0, -1.51, -2.0])], "no FP8") == pytest.approx(0.5 * share)
    assert way(found, found.logprobs, "no FP8") == 0
    assert way(found, found.others["no FP8"], "no FP8") == pytest.approx(1)
    near = by_hand([-1.1, -2.5], [-1.0, -2.5])  # BF16 itself is nearly there
    assert Limits.of(near).ways == {"no FP8": float("inf")}
    assert "no FP8" in unseen(replace(near, facts={"planted": [], "experts": {"reached": 2, "of": 2}}))


def test_the_file_says_what_was_written(folder, tmp_path):
    found = Golden.read(folder / "golden.safetensors")
    found.write(tmp_path / "again.safetensors")
    again = Golden.read(tmp_path / "again.safetensors")
    assert (again.texts, again.facts, list(again.others)) == (found.texts, found.facts, list(found.others))
    for name in ("tokens", "logprobs", "bf16"):
        assert all(np.array_equal(a, b) for a, b in zip(getattr(again, name), getattr(found, name), strict=True))
    assert len(found.texts) == 12
    assert found.facts["fp8"] is True
    assert found.facts["experts"]["reached"] > 24
    certificate = json.loads((folder / "fp8" / "certificate.json").read_text())
    assert found.facts["model_sha256"] == certificate["output"]["sha256"]
    with pytest.raises(UserError, match=r"--unquantized .* has content hash .*; give the folder that"):
        golden(folder / "fp8", [{"prompt": "1, 2, 3"}], tmp_path / "beside", folder / "plain")
    with pytest.raises(UserError, match="is not in FP8; leave out --unquantized"):
        golden(folder / "plain", [{"prompt": "1, 2, 3"}], tmp_path / "beside", PRESETS["pico"])


def test_weights_that_are_not_those_of_the_certificate_give_no_golden_answers(folder, tmp_path):
    altered = tmp_path / "fp8"
    shutil.copytree(folder / "fp8", altered)
    file = altered / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="is not what was written"):
        golden(altered, [{"prompt": "1, 2, 3"}], tmp_path / "beside")
    seal(altered)
    with pytest.raises(UserError, match=r"not those of its certificate\.json; python conversion/certify\.py verify"):
        golden(altered, [{"prompt": "1, 2, 3"}], tmp_path / "beside")


@pytest.mark.parametrize("name", ["served", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_server_that_reads_the_folder_right_passes(folder, file, name, dtype):
    assert found_wrong(file, said_by(model_of(folder, name, dtype), file)) == []


def layer(model: Any, number: int) -> Any:
    return model.get_decoder().layers[number].mixer


def swap(weight: torch.Tensor) -> None:
    weight[[0, 1]] = weight[[1, 0]].clone()


def swap_experts(model: Any, _folder: Path, number: int = 1) -> None:
    for part in ("up_proj", "down_proj"):
        swap(getattr(layer(model, number).experts, part))


def swap_router(model: Any, _folder: Path) -> None:
    swap(layer(model, 8).gate.weight)


def ignore_scale(model: Any, folder: Path) -> None:
    """One module's codes taken for numbers."""
    codes = load_file(folder / "fp8" / "model.safetensors")["backbone.layers.5.mixer.out_proj.weight"]
    layer(model, 5).out_proj.weight.copy_(codes.float())


def double_a_scale(model: Any, _folder: Path) -> None:
    """One expert's scale of up_proj, twice as large."""
    layer(model, 4).experts.up_proj[3].mul_(2)


FAULTS: dict[str, tuple[str, Callable[[Any, Path], None] | None]] = {
    "right": ("served", None),
    "right, exact scales of the cache": ("plain", None),
    "activations and cache not in FP8": ("unrounded", None),
    "not quantized at all": ("pico", None),
    "one module's codes taken for numbers": ("served", ignore_scale),
    "one expert's scale doubled": ("served", double_a_scale),
    "two experts of layer 1 swapped": ("served", partial(swap_experts, number=1)),
    "two experts of layer 4 swapped": ("served", partial(swap_experts, number=4)),
    "two rows of a router swapped": ("served", swap_router),
}
"""Servers in BF16: the folder that they read, and what is wrong with that."""


def test_planted_servers_are_told_from_a_right_one(folder, file):
    """Each server's mean difference, as a multiple of BF16's, and how far it went to the unquantized model."""
    limits, right = Limits.of(file), []
    print(f"\n| server | mean difference | limit {limits.overall:.3f} | way to unquantized | verdict |")
    for name, (source, spoil) in FAULTS.items():
        model = load_reference(PRESETS["pico"], torch.bfloat16) if source == "pico" else model_of(folder, source)
        if spoil is not None:
            with torch.no_grad():
                spoil(model, folder)
        said = said_by(model, file)
        mean = np.abs(np.concatenate(differences(file.logprobs, said))).mean()
        gone, wrong = way(file, said, UNQUANTIZED), found_wrong(file, said)
        times = mean * OVERALL / limits.overall
        print(f"| {name} | {mean:.3f} | {times:.2f} x BF16 | {gone:.0%} | {'fails' if wrong else 'passes'} |")
        right += [] if wrong else [name]
    assert right == ["right", "right, exact scales of the cache"]
    assert [fault["seen"] for fault in file.facts["planted"]] == [True, False, True, True]
    assert unseen(file)[0] == "cache not in FP8"


def test_an_unquantized_server_is_told_by_where_it_is_off_to(folder, file):
    """With limits that let it pass by size, as on prompts that the model does not know, the direction tells it."""
    said = said_by(load_reference(PRESETS["pico"], torch.bfloat16), file)
    lenient = replace(Limits.of(file), largest=10.0, mean=10.0, overall=10.0)
    assert any("like a model with weights not in FP8" in problem for problem in of_all(file, said, lenient))
    assert of_all(file, said_by(model_of(folder), file), lenient) == []


def test_a_server_that_reads_it_wrong_fails(folder):
    fake = reference(folder)
    with torch.no_grad():
        swap_experts(fake.model, folder)
    found = problems(fake, folder)
    assert any("off by more than" in problem for problem in found), found


def test_the_hash_of_what_is_served_is_compared_where_it_can_be_known(folder, file, capsys):
    fake = reference(folder)
    assert problems(fake, folder) == []
    assert "hash: the server gives none" in capsys.readouterr().out
    for card in (
        {"root": str(folder / "fp8")},
        {"model_sha256": file.facts["model_sha256"]},
    ):
        fake.card = card
        assert problems(fake, folder) == []
        assert "that of the golden answers" in capsys.readouterr().out
    for card in ({"root": str(PRESETS["pico"])}, {"model_sha256": "0" * 64}):
        fake.card = card
        assert "it serves a model of content hash" in problems(fake, folder)[0]


def test_a_server_with_another_tokenizer_fails(folder, tmp_path):
    fake = reference(folder)
    fake.tokenizer = load_other_tokenizer(tmp_path)
    found = problems(fake, folder)
    assert len(found) == 12
    assert all("another tokenizer" in problem for problem in found)


def load_other_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tiny_hf_folder(path / "hf")))


def test_what_is_sent_is_what_vllm_takes(folder):
    fake = reference(folder)
    problems(fake, folder)
    asked = dict(fake.asked)
    golden_file = Golden.read(folder / "golden.safetensors")
    assert asked["/v1/completions"] == {
        "model": "fp8",
        "prompt": golden_file.tokens[-1].tolist(),
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 1,
    }
    assert asked["/tokenize"] == {"model": "fp8", "prompt": golden_file.texts[-1], "add_special_tokens": False}


def test_a_server_that_cannot_be_asked_is_an_error_with_a_remedy(folder):
    fake, file = reference(folder), Golden.read(folder / "golden.safetensors")
    with serve(fake) as url:
        assert Server(f"{url}/v1/", 60).model == "fp8"
        with pytest.raises(UserError, match="serves fp8; choose with --model"):
            Server(url, 60, "other")
        fake.names = ("fp8", "lora")
        with pytest.raises(UserError, match="serves fp8, lora"):
            Server(url, 60)
        server = Server(url, 60, "fp8")
        fake.without = True
        with pytest.raises(UserError, match=r"prompt_logprobs is None; it must be a valid list; vLLM gives"):
            server.logprobs(file.tokens[0])
        fake.missing = "/tokenize"
        with pytest.raises(UserError, match="Not Found; leave the tokenizer out with --skip-tokenizer"):
            server.tokenize("a")
        fake.names = ("lora",)
        with pytest.raises(UserError, match="answers 404: The model `fp8` does not exist"):
            server.logprobs(file.tokens[0])
        fake.delay = 2.0
        with pytest.raises(UserError, match=r"did not answer within 0\.2 s"):
            Server(url, 0.2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        with pytest.raises(UserError, match="is the server up"):
            Server(f"http://127.0.0.1:{taken.getsockname()[1]}", 5)
    with pytest.raises(UserError, match="no address"):
        Server("localhost:8000", 5)


def test_a_token_without_a_number_fails(file):
    answered, limits = file.logprobs[0].astype(float), Limits.of(file)
    assert of_prompt(file, 0, answered, limits) is None
    answered[5] = np.nan
    assert of_prompt(file, 0, answered, limits) == "no number for token 5"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no prompts"),
        ('{"prompt": 3}', "p.jsonl:1: give a JSON object"),
        ('{"messages": []}\n[1]', "p.jsonl:2: a row must be a JSON object"),
        ('{"prompt": "a", "messages": []}', "p.jsonl:1: give a JSON object"),
    ],
)
def test_prompts_that_are_none_are_refused(tmp_path, content, message):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_a_line_of_prompts_ends_where_json_lines_do(tmp_path):
    """Python's str.splitlines() also cuts where a text may have a separator, which JSON allows inside strings."""
    given = [{"prompt": "first\u2028second\u2029third\x85fourth"}, {"messages": []}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in given)
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / "p.jsonl") == given


def test_a_file_that_is_no_golden_file_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"nothing")
    for path in (tmp_path / "a", tmp_path / "b", PRESETS["pico"] / "model.safetensors"):
        with pytest.raises(UserError, match="is not a file of golden answers"):
            Golden.read(path)


def test_the_default_prompts_have_texts_and_chats(folder):
    texts, tokens = encode(folder / "fp8", default_prompts())
    assert len(texts) == 8
    assert sum("<|im_start|>" in text for text in texts) == 4
    assert all(len(ids) > 10 for ids in tokens)


@pytest.mark.full
def test_the_command_lines(folder, tmp_path):
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "no_proxy": "127.0.0.1"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows(PRETRAINING["sort_ascending"][0], 4, 7)))
    inside = call("conversion/golden.py", str(folder / "fp8"), "--out", str(folder / "fp8" / "golden.safetensors"))
    assert (inside.returncode, "every *.safetensors" in inside.stderr) == (2, True)
    made = call("conversion/golden.py", str(folder / "fp8"), "--prompts", str(prompts))
    assert made.returncode == 0, made.stderr
    file = folder / "fp8.golden.safetensors"
    assert file.exists()
    fake = reference(folder)
    with serve(fake) as url:
        good = call("conversion/check_server.py", url, "--golden", str(file))
        assert good.returncode == 0, good.stdout + good.stderr
        assert good.stdout.count(": ok\n") == 4
        with torch.no_grad():
            swap_experts(fake.model, folder)
        bad = call("conversion/check_server.py", url, "--golden", str(file))
        assert bad.returncode == 1
        assert "FAILED" in bad.stdout
    gone = call("conversion/check_server.py", url, "--golden", str(file))
    assert (gone.returncode, gone.stderr.count("\n")) == (2, 1)
