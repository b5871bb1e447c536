"""Golden answers: equal to the reference's, and a server that answers from something else is found out."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conversion.check_server import Server, check, judge
from conversion.dequantize import dequantize
from conversion.fp8.golden_file import Golden, Tolerance
from conversion.fp8.selection import Selection
from conversion.golden import default_prompts, encode, golden, read_prompts, tolerance
from conversion.quantize_fp8 import quantize
from evaluation.generation import load_tokenizer
from evaluation.hf_model import load_reference
from nano3.arch import PRESETS, Arch
from nano3.cli import UserError
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
    golden(path / "fp8", questions, path / "beside").write(path / "golden.safetensors")
    return path


def reference(folder: Path, dtype: torch.dtype = torch.bfloat16) -> FakeServer:
    return FakeServer(load_reference(folder / "plain", dtype), load_tokenizer(str(folder / "plain")))


def problems(fake: FakeServer, folder: Path) -> list[str]:
    with serve(fake) as url:
        return check(Server(url, 60), Golden.read(folder / "golden.safetensors"))


def test_golden_answers_are_the_references(tmp_path):
    """Layer by layer, the last norm and lm_head in pieces: what the whole unquantized model says."""
    source = tiny_hf_folder(tmp_path / "hf", hybrid_override_pattern="MEM*E")
    texts = [{"prompt": "abcdefghijklmnop"}, {"prompt": "xyz 123"}]
    found = golden(source, texts, tmp_path / "out")
    model = load_reference(source, torch.float32)
    assert [len(tokens) for tokens in found.tokens] == [16, 7]
    for tokens, logprobs in zip(found.tokens, found.logprobs, strict=True):
        with torch.no_grad():
            expected = model(torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1)[:-1]
        expected = expected.gather(1, torch.from_numpy(tokens)[1:, None])[:, 0].numpy()
        assert logprobs[0] == 0
        assert np.abs(logprobs[1:] - expected).max() < 1e-5
    assert found.facts["fp8"] is False
    assert not list(tmp_path.glob(".out*")), "nothing stays of the hidden states"


def test_tolerances_by_hand():
    exact = [np.array([0.0, -1.0, -2.0]), np.array([0.0, -3.0])]
    rounded = [np.array([0.0, -1.5, -2.0]), np.array([0.0, -3.1])]
    # differences 0.5, 0 and 0.1: largest 0.5, mean of a prompt 0.25, of all 0.2; times 3, 2 and 1.75
    found = tolerance(exact, rounded)
    assert (found.largest, found.mean, found.overall) == pytest.approx((1.5, 0.5, 0.35))
    assert tolerance(exact, exact) == Tolerance(0.1, 0.02, 0.01)


def test_the_file_says_what_was_written(folder, tmp_path):
    found = Golden.read(folder / "golden.safetensors")
    found.write(tmp_path / "again.safetensors")
    again = Golden.read(tmp_path / "again.safetensors")
    assert (again.texts, again.tolerance, again.facts) == (found.texts, found.tolerance, found.facts)
    assert all(np.array_equal(a, b) for a, b in zip(again.tokens, found.tokens, strict=True))
    assert len(found.texts) == 12
    assert found.facts["fp8"] is True
    assert found.facts["experts"]["reached"] > 24
    certificate = json.loads((folder / "fp8" / "certificate.json").read_text())
    assert found.facts["model_sha256"] == certificate["output"]["sha256"]
    assert Golden.read(folder / "golden.safetensors").tolerance.overall < 0.3


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


def test_a_server_that_reads_the_folder_right_passes(folder):
    assert problems(reference(folder), folder) == []
    assert problems(reference(folder, torch.float32), folder) == []


def layer(model: Any, number: int) -> Any:
    return model.get_decoder().layers[number].mixer


def swap(weight: torch.Tensor) -> None:
    weight[[0, 1]] = weight[[1, 0]].clone()


def swap_experts(model: Any, _folder: Path) -> None:
    for part in ("up_proj", "down_proj"):
        swap(getattr(layer(model, 1).experts, part))


def swap_router(model: Any, _folder: Path) -> None:
    swap(layer(model, 8).gate.weight)


def ignore_scale(model: Any, folder: Path) -> None:
    """One module's codes taken for numbers."""
    codes = load_file(folder / "fp8" / "model.safetensors")["backbone.layers.5.mixer.out_proj.weight"]
    layer(model, 5).out_proj.weight.copy_(codes.float())


FAULTS: dict[str, Callable[[Any, Path], None]] = {
    "two experts swapped": swap_experts,
    "two rows of a router swapped": swap_router,
    "FP8 scales ignored": ignore_scale,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_reads_it_wrong_fails(folder, fault):
    fake = reference(folder)
    with torch.no_grad():
        FAULTS[fault](fake.model, folder)
    found = problems(fake, folder)
    assert any("off by more than" in problem for problem in found), found


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


def test_a_token_without_a_number_fails(folder):
    file = Golden.read(folder / "golden.safetensors")
    answered = file.logprobs[0].astype(float)
    assert judge(file, 0, answered, None).problem is None
    answered[5] = np.nan
    assert judge(file, 0, answered, None).problem == "no number for token 5"


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
