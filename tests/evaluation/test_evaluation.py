"""Answers of a model: in batches as one by one, of a folder that is whole, as its own template asks; and the script."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation import evaluate, harness
from evaluation.evaluate import evaluate_model, main
from evaluation.generation import (
    STOP_IDS,
    Answer,
    Sampling,
    _cut,
    _Noise,
    encode_prompts,
    load_tokenizer,
    write_answers,
)
from evaluation.hf_model import load_reference
from evaluation.judging.questions import load_questions
from nano3.arch import resolve_model
from nano3.cli import UserError
from nano3.outputs import only_writer
from pico.tokenizer import save_tokenizer, vocabulary
from tests.helpers.tiny import tiny_hf_folder

STOP = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random FP32 model with a real tokenizer and chat template, made to end its turn now and then."""
    torch.set_num_threads(1)
    path = tiny_hf_folder(
        tmp_path_factory.mktemp("model") / "hf",
        vocab_size=len(vocabulary()),
        hybrid_override_pattern="MEM*EME",
        initializer_range=0.3,
        torch_dtype="float32",
    )
    save_tokenizer(path)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"][STOP] *= 1.6  # a longer vector wins more often
    # A small time step (softplus(-8) = 3.4e-4), below transformers' floor of 1e-3.
    tensors |= {name: value - 8 for name, value in tensors.items() if name.endswith("dt_bias")}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load_reference(folder, torch.float32)


def prompts(count: int, shortest: int = 5, longest: int = 40) -> list[list[int]]:
    generator = random.Random(0)
    length = [generator.randint(shortest, longest) for _ in range(count)]
    return [[generator.randrange(16, len(vocabulary())) for _ in range(size)] for size in length]


def rows(count: int) -> list[dict]:
    return [
        {
            "id": f"q{number}",
            "source": "odd" if number % 2 else "even",
            "messages": [
                {"role": "user", "content": f"Sort these numbers in ascending order: {number}, 3, 2"},
                {"role": "assistant", "content": f"2, 3, {number}"},
            ],
        }
        for number in range(count)
    ]


def write_rows(path: Path, content: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in content))
    return path


def test_a_batch_gives_the_answers_that_each_prompt_gets_alone(model):
    questions = prompts(24)
    together = greedy(model, questions, batch_size=24)
    alone = [greedy(model, [question], 1)[0] for question in questions]
    assert together == alone
    assert len({answer.tokens for answer in alone}) > 12  # a comparison of empty answers would show nothing
    assert {answer.finished for answer in alone} == {True, False}
    assert greedy(model, questions, batch_size=7) == alone


def test_samples_are_new_answers_and_depend_on_their_seed_only(model):
    """A sample's random numbers are its own: other batches give it again; almost no temperature, the greedy ones."""
    questions, sampling = prompts(6), Sampling(temperature=1.0, top_p=0.9, samples=3, seed=1)
    found = [write_answers(model, questions, 8, size, False, sampling) for size in (18, 5)]
    assert found[0] == found[1]
    assert [len(several) for several in found[0]] == [3] * 6
    assert sum(len(set(several)) > 1 for several in found[0]) >= 4
    assert write_answers(model, questions, 8, 18, False, replace(sampling, seed=2)) != found[0]
    cold = write_answers(model, questions, 8, 18, False, replace(sampling, temperature=1e-4, samples=1))
    assert [several[0] for several in cold] == greedy(model, questions, 6, 8)


def test_sampling_follows_the_probabilities():
    """Two tokens of log-odds ln 3 and one cut off by top-p: three quarters, one quarter, never."""
    noise = _Noise(Sampling(temperature=1.0, top_p=0.9, samples=1), (0, 0))
    scores = torch.tensor([3.0, 1.0, 0.1]).log()
    picks = [int(noise(scores).argmax()) for _ in range(4000)]
    assert picks.count(0) / 4000 == pytest.approx(0.75, abs=0.03)
    assert picks.count(2) == 0


def greedy(model, questions, batch_size: int, limit: int = 12) -> list[Answer]:
    return [several[0] for several in write_answers(model, questions, limit, batch_size, progress=False)]


def test_left_padding_is_harmless_only_with_its_mask(model):
    short, long = prompts(2, 9, 9)[0], prompts(1, 30, 30)[0]
    padded = torch.tensor([[0] * 21 + short, long])
    mask = (torch.arange(30) >= torch.tensor([[21], [0]])).long()
    with torch.inference_mode():
        expected = model(torch.tensor([short])).logits[0, -1]
        masked = model(padded, attention_mask=mask).logits[0, -1]
        unmasked = model(padded).logits[0, -1]
    assert (masked - expected).abs().max() < 1e-4
    assert (unmasked - expected).abs().max() > 1e-2


def test_the_reference_does_not_clamp_the_time_step(model):
    """Token by token transformers never clamps: a prompt at once agrees with it only when its floor is gone."""
    prompt = torch.tensor([prompts(1, 20, 20)[0]])
    mixers = [module for module in model.modules() if hasattr(module, "time_step_limit")]
    assert len(mixers) == 3
    assert {mixer.time_step_limit for mixer in mixers} == {(0.0, math.inf)}
    with torch.inference_mode():
        at_once = model(prompt).logits[0, -1]
        cache = model(prompt[:, :1], use_cache=True).past_key_values
        for position in range(1, prompt.shape[1]):
            stepwise = model(prompt[:, position : position + 1], past_key_values=cache, use_cache=True).logits[0, -1]
        for mixer in mixers:
            mixer.time_step_limit = (1e-3, math.inf)
        clamped = model(prompt).logits[0, -1]
    for mixer in mixers:
        mixer.time_step_limit = (0.0, math.inf)
    assert (at_once - stepwise).abs().max() < 1e-4
    assert (clamped - stepwise).abs().max() > 1e-3


def test_the_reference_keeps_clear_of_the_cpu_stand_ins():
    """In a process that has them, the reference runs transformers' own formulas; imported over them, it says so."""
    code = """
import importlib, inspect, sys, torch
from nano3.cpu import mamba_standin
from evaluation import hf_model
mamba_standin.install()
hf_model._import_without_stand_ins()
model_code = sys.modules[hf_model._MODEL_CODE]
chosen = inspect.getclosurevars(model_code.mamba2_chunk_scan).nonlocals["implementation"]
import mamba_ssm
print(chosen.__module__, hasattr(mamba_ssm, "ops"))
importlib.reload(model_code)
try:
    hf_model._import_without_stand_ins()
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    clean, refused = done.stdout.splitlines()
    assert clean == "transformers.models.nemotron_h.modeling_nemotron_h True"
    assert "call load_reference earlier" in refused


def test_an_answer_ends_before_the_first_stop_token():
    assert _cut([5, 6, 11, 0, 0], STOP_IDS) == Answer((5, 6), True)
    assert _cut([2, 7], STOP_IDS) == Answer((), True)
    assert _cut([5, 6], STOP_IDS) == Answer((5, 6), False)


def test_prompts_come_from_the_folders_own_template(folder):
    tokenizer = load_tokenizer(str(folder))
    [ids] = encode_prompts(tokenizer, [[{"role": "user", "content": "Sort"}]])
    text = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nSort<|im_end|>\n<|im_start|>assistant\n<think></think>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids[0] == 10  # <|im_start|>; no <s> before it


def test_scores_of_a_folder(folder, tmp_path):
    questions = load_questions(write_rows(tmp_path / "q.jsonl", rows(6)))
    first = evaluate_model(folder, questions, max_new_tokens=8, progress=False)
    told = [replace(question, answer=row["answer"]) for question, row in zip(questions, first["answers"], strict=True)]
    second = evaluate_model(folder, told, max_new_tokens=8, progress=False)
    finished = sum(row["finished"] and bool(row["answer"].strip()) for row in first["answers"])
    assert first["correct"] == 0
    assert second["correct"] == finished  # an answer that did not end is not right, whatever it says
    assert first["n"] == second["n"] == 6
    assert first["unfinished"] == sum(not row["finished"] for row in first["answers"])
    assert {source: part["n"] for source, part in first["by_source"].items()} == {"even": 3, "odd": 3}


def test_the_prompt_opens_or_closes_the_reasoning():
    tokenizer = load_tokenizer(str(resolve_model("pico")))
    for thinking, end in ((True, "<think>\n"), (False, "<think></think>")):
        (ids,) = encode_prompts(tokenizer, [[{"role": "user", "content": "x"}]], thinking)
        assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n" + end)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is empty; give a file"),
        ([rows(1)[0], "{oops"], r"q.jsonl:2: not valid JSON"),
        ([{"id": 1, "source": "s"}], r"q.jsonl:1: no 'messages'; the row has 'id', 'source'"),
        ([{"id": 1, "source": "s", "messages": "x"}], r":1: 'messages' must be a list"),
        ([{"id": 1, "source": "s", "messages": [{"role": "user", "content": "x"}]}], r":1: the last message must"),
        ([rows(1)[0], "", rows(1)[0]], r":3: id q0 comes twice"),
        (["[1]"], r":1: a row must be a JSON object"),
    ],
)  # fmt: skip
def test_bad_questions_name_file_and_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load_questions(write_rows(tmp_path / "q.jsonl", content))


def test_rows_may_leave_out_id_and_source_and_hold_any_text(tmp_path):
    text = "first\u2028second\x0bthird"  # str.splitlines() would cut a row here
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "1"}]
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    [question] = load_questions(path)
    assert (question.id, question.source, question.text, question.answer) == (f"{path}:1", "held", text, "1")


def test_missing_questions_and_limits(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_questions(tmp_path / "none.jsonl")
    path = write_rows(tmp_path / "q.jsonl", rows(5))
    assert [question.id for question in load_questions(path, limit=2)] == ["q0", "q1"]
    with pytest.raises(UserError, match="limit is 0"):
        load_questions(path, limit=0)


def truncated(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["backbone.layers.0.mixer.in_proj.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def of_another_width(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 32}))


def quantized(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt"}
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "cannot load"),
        (without_a_tensor, "1 missing keys, first .*layers.0.mixer.in_proj.weight"),
        (of_another_width, "cannot load|mismatched"),
        (quantized, "quantized by modelopt"),
        (lambda path: (path / "config.json").unlink(), "no config.json"),
    ],
    ids=["truncated", "missing tensor", "another architecture", "quantized", "no config"],
)
def test_a_damaged_folder_is_refused(folder, tmp_path, damage, message):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    damage(copy)
    with pytest.raises(UserError, match=message):
        load_reference(copy, torch.float32)


def test_the_script_writes_a_result_whole_or_refuses(folder, tmp_path, monkeypatch, capsys):
    questions = write_rows(tmp_path / "q.jsonl", rows(3))
    out = tmp_path / "new" / "result.json"
    command = ["evaluate.py", str(folder), "--questions", str(questions), "--out", str(out), "--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    assert main() == 0  # our own result may be replaced
    assert json.loads(out.read_text())["n"] == 3
    assert os.listdir(out.parent) == ["result.json"]
    assert "0 of 3 right" in capsys.readouterr().out
    out.write_text("{}")
    with pytest.raises(UserError, match="is not a result of this script"):
        main()
    assert out.read_text() == "{}"


@pytest.mark.parametrize("script", [main, harness.main], ids=["evaluate", "harness"])
def test_two_writers_of_a_result_exclude_each_other(folder, tmp_path, monkeypatch, script):
    """From the beginning on: both would work for hours, and one of them for nothing."""
    monkeypatch.setattr(evaluate, "HFModel", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(harness, "HFModel", lambda *_, **__: pytest.fail("a model was loaded"))
    questions = write_rows(tmp_path / "q.jsonl", rows(3))
    what = ["--tasks", "own"] if script is harness.main else ["--questions", str(questions)]
    monkeypatch.setattr("sys.argv", ["script", str(folder), *what, "--out", str(tmp_path / "result.json")])
    with only_writer(tmp_path / "result.json"), pytest.raises(UserError, match="another process is writing"):
        script()
    assert sorted(os.listdir(tmp_path)) == ["q.jsonl"]


def test_the_script_refuses_fast_and_without_a_traceback(tmp_path):
    """Exit code 2 and one line, before torch is imported."""
    script = Path(__file__).parents[2] / "evaluation" / "evaluate.py"
    command = [sys.executable, str(script), str(tmp_path), "--questions", "none.jsonl", "--out", "x.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: model '{tmp_path}' is neither a preset")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--task", "reasoning-gym:chain_sum", "--limit", "-5"], "--limit is -5"),
        (["--bias", "--plain", "--task", "medmcqa"], "--bias moves options and letters in the chat format"),
        (["--bias"], "have \\[0\\] options; give questions with equally many, or no --bias"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(folder, tmp_path, monkeypatch, flags, message):
    questions = write_rows(tmp_path / "q.jsonl", rows(3))
    command = ["evaluate.py", str(folder), "--questions", str(questions), "--out", str(tmp_path / "r.json"), *flags]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr("evaluation.evaluate.HFModel", None)
    with pytest.raises(UserError, match=message):
        main()


def test_a_question_is_asked_with_its_tools_and_a_template_may_refuse_it():
    tokenizer = load_tokenizer("nano3/presets/pico")
    asked = [[{"role": "user", "content": "x"}]] * 2
    with_tools, without = encode_prompts(tokenizer, asked, tools=[[{"name": "now", "parameters": None}], []])
    assert "<name>now</name>" in tokenizer.decode(with_tools)
    assert "now" not in tokenizer.decode(without)
    tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(UserError, match=r"refuses question 1 \(division by zero\)"):
        encode_prompts(tokenizer, asked)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match=r"refuses question 1 \(no\)"):
        encode_prompts(tokenizer, asked)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *(("tokenizer.json", text) for text in ("{}", "[]", "null", "[" * 3000)),
        *(("tokenizer_config.json", text) for text in ("[]", '{"model_max_length": "x"}', '{"eos_token": 5}')),
    ],
)
def test_a_tokenizer_that_is_none_is_refused_in_words(folder, tmp_path, file, text):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        if (folder / name).is_file():
            shutil.copy(folder / name, tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match="cannot load a tokenizer from"):
        load_tokenizer(str(tmp_path))
