"""Runs one model by vLLM, in this process, and writes what it answers and how it read the folder.

    build/vllm/bin/python -m tests.vllm_cpu.probe JOB.json OUT.json

JOB (`Job`): `engine`, arguments of vllm.LLM; `rows`, token ids whose log-probabilities are wanted; `prompts` to answer
greedily, in `longest` tokens at most; both with each of `adapters`, name -> PEFT folder, or once without any, under
the name "". OUT (`Found`): `logprobs`, of each token of a row but the first; `answers`, token ids for each prompt,
without the stop token; `coded`, modules of vLLM whose weights are FP8; `cache`, attention layer -> scales of its keys
and values.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any, TypedDict

import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

from tests.vllm_cpu.plugin import register

STOP_IDS = (2, 11)


class Job(TypedDict):
    engine: dict[str, Any]
    rows: list[list[int]]
    prompts: list[list[int]]
    longest: int
    adapters: dict[str, str]


class Found(TypedDict):
    logprobs: dict[str, list[list[float]]]
    answers: dict[str, list[list[int]]]
    coded: list[str]
    cache: dict[str, list[float]]


def logprobs(llm: Any, rows: list[list[int]], adapter: Any) -> list[list[float]]:
    """Natural logarithms, a list for each row."""
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    given = [TokensPrompt(prompt_token_ids=row) for row in rows]
    outputs = llm.generate(given, asked, lora_request=adapter, use_tqdm=False)
    return [
        [entry[token].logprob for token, entry in zip(row[1:], output.prompt_logprobs[1:], strict=True)]
        for row, output in zip(rows, outputs, strict=True)
    ]


def answers(llm: Any, prompts: list[list[int]], longest: int, adapter: Any) -> list[list[int]]:
    """Greedy tokens for each prompt, until a stop token."""
    asked = SamplingParams(max_tokens=longest, temperature=0, stop_token_ids=list(STOP_IDS), detokenize=False)
    given = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    outputs = llm.generate(given, asked, lora_request=adapter, use_tqdm=False)
    return [list(takewhile(lambda token: token not in STOP_IDS, output.outputs[0].token_ids)) for output in outputs]


def reading(model: torch.nn.Module) -> tuple[list[str], dict[str, list[float]]]:
    """Modules whose weights are FP8 codes; attention layer -> scales of keys and values."""
    coded, cache = set(), {}
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float8_e4m3fn:
            coded.add(name.rpartition(".")[0])
    for name, module in model.named_modules():
        if hasattr(module, "_k_scale_float"):
            cache[name] = [module._k_scale_float, module._v_scale_float]
    return sorted(coded), cache


def main(job: Job) -> Found:
    register()
    llm = LLM(enforce_eager=True, disable_log_stats=True, seed=0, **job["engine"])
    coded, cache = llm.apply_model(reading)[0]
    requests: dict[str, Any] = {
        name: LoRARequest(name, n, job["adapters"][name]) for n, name in enumerate(job["adapters"], 1)
    }
    requests = requests or {"": None}
    return {
        "logprobs": {name: logprobs(llm, job["rows"], request) for name, request in requests.items()},
        "answers": {name: answers(llm, job["prompts"], job["longest"], request) for name, request in requests.items()},
        "coded": coded,
        "cache": cache,
    }


if __name__ == "__main__":
    found = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # vLLM's own end of an engine in this process can hang
