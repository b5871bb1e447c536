"""Runs one model by vLLM, in this process, and writes what it answers and how it read the folder.

    build/vllm/bin/python -m tests.vllm_cpu.probe JOB.json OUT.json

JOB (`Job`): `engine`, arguments of vllm.LLM; `rows`, token ids whose log-probabilities are wanted, where there are no
adapters; `prompts` to answer greedily, in `longest` tokens at most, once with each of `adapters`, name -> PEFT folder.
OUT (`Found`): `logprobs`, of each token of a row but the first; `answers`, name of the adapter -> token ids for each
prompt, without the stop token; `said`, the log-probability of each of those; `coded`, modules of vLLM whose weights are
FP8; `cache`, attention layer -> scales of its keys and values.
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
    logprobs: list[list[float]]
    answers: dict[str, list[list[int]]]
    said: dict[str, list[list[float]]]
    coded: list[str]
    cache: dict[str, list[float]]


def logprobs(llm: Any, rows: list[list[int]]) -> list[list[float]]:
    """Natural logarithms, a list for each row. vLLM on a CPU has none for prompts where an adapter is loaded."""
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=row) for row in rows], asked, use_tqdm=False)
    return [
        [entry[token].logprob for token, entry in zip(row[1:], output.prompt_logprobs[1:], strict=True)]
        for row, output in zip(rows, outputs, strict=True)
    ]


def answers(llm: Any, job: Job, adapter: Any) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens for each prompt, until a stop token, and their log-probabilities."""
    stop = list(STOP_IDS)
    asked = SamplingParams(max_tokens=job["longest"], temperature=0, stop_token_ids=stop, detokenize=False, logprobs=0)
    given = [TokensPrompt(prompt_token_ids=prompt) for prompt in job["prompts"]]
    written = [output.outputs[0] for output in llm.generate(given, asked, lora_request=adapter, use_tqdm=False)]
    tokens = [list(takewhile(lambda token: token not in STOP_IDS, one.token_ids)) for one in written]
    said = [
        [entry[token].logprob for token, entry in zip(row, one.logprobs, strict=False)]
        for row, one in zip(tokens, written, strict=True)
    ]
    return tokens, said


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
    requests = [LoRARequest(name, number, path) for number, (name, path) in enumerate(job["adapters"].items(), 1)]
    written = {request.lora_name: answers(llm, job, request) for request in requests}
    return {
        "logprobs": logprobs(llm, job["rows"]) if job["rows"] else [],
        "answers": {name: tokens for name, (tokens, _) in written.items()},
        "said": {name: said for name, (_, said) in written.items()},
        "coded": coded,
        "cache": cache,
    }


if __name__ == "__main__":
    found = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # vLLM's own end of an engine in this process can hang
