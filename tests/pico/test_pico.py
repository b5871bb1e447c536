"""pico: its tokenizer, its fast training path, its tasks, and the committed model."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, NemotronHConfig

from data_prep.chat import render, text_of
from data_prep.overlap import HeldOut
from evaluation.hf_model import load_reference
from nano3.arch import PRESETS, Arch
from nano3.cli import UserError
from nano3.messages import CONTROL_TOKENS
from pico import pretrain
from pico import tasks as pico_tasks
from pico.model import (
    FLOAT32_NAMES,
    build_model,
    checkpoint_tensors,
    export,
    mamba_mixers,
    pico_config,
    routers,
)
from pico.tokenizer import SPECIAL_TOKENS, build_tokenizer, save_tokenizer, vocabulary

PICO = PRESETS["pico"]


@pytest.mark.parametrize(
    "text", ["Sort these: 14, 250", "ünïcödé 😗\t\n\n  x", "Ġ ,,  , a|", "\x00\x7f don't <|im_end|"]
)
def test_tokenizer_gives_any_text_back(text):
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_has_the_real_ids_and_splits_numbers_into_digits():
    tokenizer = build_tokenizer()
    assert {token: tokenizer.token_to_id(token) for token in CONTROL_TOKENS} == CONTROL_TOKENS
    assert tokenizer.encode("<think></think>").ids == [12, 13]
    assert tokenizer.encode(" order 14").tokens == ["Ġorder", "Ġ", "1", "4"]
    assert tokenizer.encode(" ordering").tokens == list("Ġordering"), "a word that is not listed falls into bytes"
    assert len(vocabulary()) % 8 == 0
    assert sorted(vocabulary().values()) == list(range(len(vocabulary())))


def test_every_word_of_the_vocabulary_occurs_in_pretraining():
    """LoRA leaves embeddings frozen: a word that pretraining never shows would stay noise."""
    tokenizer = build_tokenizer()
    used: set[int] = set()
    for example in itertools.islice(pretrain.mixture(tokenizer, 1, {name: [] for name in pico_tasks.PRETRAINING}), 400):
        used.update(example[0])
    reserved = set(SPECIAL_TOKENS) | {token for token in vocabulary() if token.startswith("<SPECIAL_")}
    words = {token: i for token, i in vocabulary().items() if len(token) > 1 and token not in reserved}
    assert len(words) > 20
    assert [word for word, i in words.items() if i not in used] == []
    demo = tokenizer.encode(pico_tasks.rows(pico_tasks.DEMO, 1, 1)[0]["messages"][0]["content"]).ids
    assert set(demo) <= used | {tokenizer.token_to_id(digit) for digit in "0123456789"}


def test_transformers_tokenizer_and_chat_template_agree_with_ours(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Reverse this list of words: a, b"}]
    text = text_of(render(messages, thinking=False, add_generation_prompt=True))
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert shown == text
    assert tokenizer(text).input_ids == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 11)


def test_labels_are_the_answer_and_its_end_of_turn():
    tokenizer = build_tokenizer()
    tokens, labels = pretrain.encode(
        tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "71"}]
    )
    answer = [tokenizer.token_to_id(token) for token in ("7", "1", "<|im_end|>")]
    assert [label for label in labels if label != pretrain.IGNORED] == answer
    first = labels.index(answer[0])
    assert tokens[first] == CONTROL_TOKENS["</think>"], "the prompt's last token predicts the answer's first"
    assert tokens[first + 1 : first + 3] == answer[:2]


def test_training_forward_equals_transformers():
    torch.manual_seed(0)
    model = build_model()
    reference = AutoModelForCausalLM.from_config(NemotronHConfig(**pico_config()), dtype=torch.float32)
    reference.load_state_dict(model.state_dict())
    for mixer in mamba_mixers(reference):
        mixer.time_step_limit = (0.0, float("inf"))
    tokens = torch.randint(16, 300, (3, 70))  # 70 is more than one of transformers' chunks
    for candidate in (model, reference):
        candidate(tokens, use_cache=False).logits.square().mean().backward()
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, reference(tokens).logits, atol=1e-5)
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-6), name


def test_expert_bias_rises_for_idle_experts_and_only_in_training():
    model = build_model()
    pretrain.balance_experts(model)
    router = routers(model)[0]
    router.e_score_correction_bias[:2] = 10.0  # everything goes to experts 0 and 1
    before = router.e_score_correction_bias.clone()
    with torch.no_grad():
        model(torch.full((1, 4), 20))
    assert torch.equal(router.e_score_correction_bias, before)
    model(torch.full((1, 4), 20))
    moved = router.e_score_correction_bias - before
    assert moved.tolist() == pytest.approx([-pretrain.BIAS_STEP] * 2 + [pretrain.BIAS_STEP] * 6, rel=1e-3)


def test_export_has_the_real_layout_and_loads_without_missing_or_unexpected_keys(tmp_path):
    torch.manual_seed(0)
    model = build_model()
    export(model, tmp_path)
    arch = Arch.load(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == {name: spec.shape for name, spec in arch.tensors().items()}
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(16, 300, (2, 30))
    for parameter in model.parameters():
        if parameter.dim() > 1 or parameter.numel() > 8:
            parameter.data = parameter.data.bfloat16().float()
    for mixer in mamba_mixers(model):
        mixer.dt_bias.data = mixer.dt_bias.data.bfloat16().float()
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, load_reference(tmp_path, torch.float32)(tokens).logits, atol=1e-4)


def test_only_the_float32_families_stay_float32():
    tensors = checkpoint_tensors(build_model())
    float32 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert {name.rsplit(".", 1)[-1] for name in float32} == set(FLOAT32_NAMES)
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in tensors.items() if name not in float32)


@pytest.mark.parametrize("name", [*pico_tasks.PRETRAINING, "demo"])
def test_rows_are_distinct_and_clear_of_held_out_ones(name):
    task = pico_tasks.DEMO if name == "demo" else pico_tasks.PRETRAINING[name][0]
    held_out = pico_tasks.rows(task, 50, 1)
    same_seed = pico_tasks.rows(task, 50, 1, HeldOut(pico_tasks.conversations(held_out)))
    questions = [row["messages"][0]["content"] for row in held_out + same_seed]
    assert len(set(questions)) == 100, "the same seed gives other questions when its first ones are held out"


def test_answers_are_right():
    first = {name: pico_tasks.rows(task, 40, 3) for name, (task, _) in pico_tasks.PRETRAINING.items()}
    for row in first["sort_ascending"] + pico_tasks.rows(pico_tasks.DEMO, 40, 3):
        question, answer = (message["content"] for message in row["messages"])
        numbers = [int(number) for number in question.split(": ")[1].split(", ")]
        assert [int(number) for number in answer.split(", ")] == sorted(numbers)
    for row in first["spell_backward"]:
        question, answer = (message["content"] for message in row["messages"])
        assert question == f"Spell this word backward: {answer[::-1]}"
    for row in first["filter_numbers"]:
        question, answer = (message["content"] for message in row["messages"])
        assert answer
        assert set(answer.split(", ")) <= set(question.split(": ")[1].split(", "))


def test_the_demo_task_is_not_in_pretraining():
    longest = max(
        len(row["messages"][1]["content"].split(", "))
        for row in pico_tasks.rows(pico_tasks.PRETRAINING["sort_ascending"][0], 300, 1)
    )
    shortest = min(len(row["messages"][1]["content"].split(", ")) for row in pico_tasks.rows(pico_tasks.DEMO, 300, 1))
    assert (longest, shortest) == (5, 8)


def test_an_exhausted_task_says_so(monkeypatch):
    letters = pico_tasks.Task("spell", "spell_backward", pico_tasks._spelling, {"min_word_len": 3, "max_word_len": 3})
    monkeypatch.setattr(pico_tasks, "TRIES", 1)
    with pytest.raises(UserError, match=r"task spell has only \d+ of 5000"):
        pico_tasks.rows(letters, 5000, 1)


def test_the_committed_model_answers_as_its_curve_says():
    """On 60 of the 500 held-out questions of the main task; a broken file or tokenizer answers none."""
    curve = json.loads((PICO / "curve.json").read_text())
    tokenizer = Tokenizer.from_file(str(PICO / "tokenizer.json"))
    assert (PICO / "tokenizer.json").read_text() == build_tokenizer().to_str(pretty=True)
    model = load_reference(PICO, torch.float32)
    task = pico_tasks.PRETRAINING["sort_ascending"][0]
    held_out = [
        pretrain.encode(tokenizer, row["messages"]) for row in pico_tasks.rows(task, 60, pretrain.HELD_OUT_SEED)
    ]
    score = pretrain.accuracies(model, {"sort_ascending": held_out}, 60)["sort_ascending"]
    assert abs(score - curve["final_accuracy"]["sort_ascending"]) < 0.12
    assert sum(file.stat().st_size for file in PICO.iterdir()) < 12e6


def test_greedy_generation_agrees_with_the_one_pass_score():
    tokenizer = AutoTokenizer.from_pretrained(PICO)
    model = load_reference(PICO, torch.float32)
    task = pico_tasks.PRETRAINING["sort_ascending"][0]
    for row in pico_tasks.rows(task, 6, 5):
        prompt = text_of(render(row["messages"][:1], thinking=False, add_generation_prompt=True))
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=40)[0, inputs.input_ids.shape[1] :]
        answer = tokenizer.decode(output, skip_special_tokens=True)
        example = pretrain.encode(Tokenizer.from_file(str(PICO / "tokenizer.json")), row["messages"])
        with torch.no_grad():
            right = pretrain.example_losses(model, *pretrain.collate([example]))[1].item()
        assert (answer == row["messages"][1]["content"]) == right
