"""What the fuzzer gives to readers of data, runs and results; tests/helpers/fuzz.py has those of models and feeds both.

A reader that would write beside its file reads a copy of the folder.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensors_as_bytes

from conversion.adapters.peft_names import CONFIG, WEIGHTS, module_name
from conversion.submission import check_submission
from data_prep.chat_formats import NEMOTRON
from data_prep.chat_rows import read_conversations
from data_prep.documents import Options
from data_prep.job import Job
from data_prep.join import join
from data_prep.own_template import TemplateCheck
from data_prep.part_folder import Work
from data_prep.prepare import prepare_shards
from data_prep.steps.rows import step_rows
from evaluation.chat_completions import Again, Refused, likeliest, written
from evaluation.distill import Traces
from evaluation.judging.questions import Question, load_questions
from evaluation.models import Written
from evaluation.report import report
from evaluation.result_file import KIND, read_result
from evaluation.server import ServerModel
from evaluation.steps import right_trace, teachers
from evaluation.tasks import load_task
from finetune.config_file import read_config
from finetune.settings import Settings
from launch.slurm.bundle import FILES, OURS, hashes, refuse_stale
from nano3.arch import PRESETS, Arch
from nano3.cli import UserError
from nano3.documents import read_json
from nano3.mixture import read_mixture
from nano3.overrides import apply_values
from nano3.stage_weights import StageWeights
from nano3.training.divergence import Divergence
from tests.helpers.data_fixtures import row, write_jsonl, write_tokenizer

SHA = "0123456789abcdef" * 4


@dataclass(frozen=True)
class Reader:
    """A reader: the name of its file in a folder, a good one, and what reads it."""

    file: str
    good: bytes
    read: Callable[[Path], Any]
    beside: Callable[[Path], Any] = Path
    """Writes what else the folder must hold."""


def as_bytes(content: Any) -> bytes:
    """A JSON document as a file holds it."""
    return json.dumps(content, indent=1).encode() + b"\n"


def in_new_folder(write: Callable[[Path], bytes]) -> bytes:
    """What `write` makes of an empty folder."""
    with tempfile.TemporaryDirectory() as name:
        return write(Path(name))


def _in_a_copy(read: Callable[[Path], Any], folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "copy"
        shutil.copytree(folder, copy)
        read(copy)


MIXTURE = (
    b"stores:\n- {path: a/medical, weight: 0.7}\n- {path: b, weight: 3.0e-1}\ncurriculum: {order: level, blocks: 4}\n"
)
CONFIG_FILE = (
    b"# a run\nmodel: nano\ndata: /data/store\nranks: 2\nlocal: true\ntrain:\n  lr: 3e-4\n  epochs: 2\n"
    b"layout.ep: 2\nlora:\n  targets: [in_proj, 'q_proj']\n  dropout: 0.1\nstages: {weights: fixed}\n"
)


def _configured(folder: Path) -> None:
    _, values = read_config(folder / "config.yaml")
    apply_values(Settings(), values, "config.yaml")


UNFINISHED, PART = ".store.unfinished", "part-00001"


def _parts(folder: Path) -> None:
    """Two parts of a store that waits to be joined, of two sources, with weights and an order."""
    rows = [
        row(f"q{n}", "a" * n, "so" if n % 2 else None, "ab"[n % 2]) | {"level": n, "weight": n / 2} for n in (1, 2, 3)
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    job = Job.of([folder / "rows.jsonl"], write_tokenizer(folder / "tokenizer"), Options(order="level"), 2)
    prepare_shards(job, folder / "store", 1, 1)


def _part_file(name: str) -> bytes:
    return in_new_folder(lambda folder: _parts(folder) or (folder / UNFINISHED / name).read_bytes())


def _joined(folder: Path) -> None:
    _in_a_copy(lambda copy: join(Work(copy / "store"), 256), folder)


def _submission(folder: Path) -> bytes:
    """A zip as conversion/submission.py writes them: one adapter on every q_proj of pico."""
    arch = Arch.load(PRESETS["pico"])
    tensors = {}
    for layer in arch.attention_layers:
        name = "base_model.model." + module_name(f"backbone.layers.{layer}.mixer.q_proj.weight", "vllm")
        tensors[f"{name}.lora_A.weight"] = torch.ones(2, arch.hidden_size)
        tensors[f"{name}.lora_B.weight"] = torch.ones(arch.num_attention_heads * arch.head_dim, 2)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    with zipfile.ZipFile(folder / "s.zip", "w", zipfile.ZIP_STORED) as packed:
        packed.writestr(CONFIG, json.dumps(config))
        packed.writestr(WEIGHTS, tensors_as_bytes(tensors))
    return (folder / "s.zip").read_bytes()


QUESTION = Question("q1", "s", ({"role": "user", "content": "2+2?"},), "4", written="4")
ANSWER = {
    "choices": [
        {
            "message": {
                "content": "It is \\boxed{4}",
                "reasoning_content": "2+2",
                "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            "finish_reason": "stop",
            "logprobs": {"content": [{"top_logprobs": [{"token": "A", "logprob": -0.5}]}]},
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 9},
}


def _teacher(folder: Path) -> None:
    """A reply on its way into training data."""
    data = (folder / "r.json").read_bytes()
    try:
        likeliest(data, "server")
        found = written(data, "server", 40)
    except (Again, Refused) as error:
        raise UserError(str(error)) from None
    answer = Written(found["text"], found["finished"], found["tokens"], found["asked"])
    list(Traces(load_task("gsm8k"), [QUESTION], [[answer]], 1).rows())


KEPT_ANSWERS = (
    b'{"key": "a", "text": "4", "finished": true, "tokens": 3, "asked": null}\n'
    b'{"key": "b", "likeliest": {"A": -0.5, "B": -1.5}}\n'
)


def _kept(folder: Path) -> None:
    """The answers of an earlier start, read without a server."""
    model = object.__new__(ServerModel)
    model.cache = folder / "answers.jsonl"
    model._read_cache()


def _step_rows() -> bytes:
    return _lines(list(step_rows(2, 7, injected=0.5)))


def _traces(folder: Path) -> None:
    for one in teachers(load_questions(folder / "rows.jsonl")):
        right_trace(one)


ROWS = [
    row("2+2?", "4", "think") | {"weight": 0.5, "level": 3, "choices": ["3", "4"], "answer": "B"},
    {
        "id": "tools",
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": [1]}}]},
            {"role": "tool", "content": "y"},
            {"role": "assistant", "content": "z", "spans": [{"text": "z", "stage": 2}]},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
]


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in rows)


CSV = b'instruction,output,id\n"2+2, said",4,a\n1+1?,"2\n",b\n'


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:1]), buffer)
    return buffer.getvalue()


def _conversations(name: str, folder: Path) -> None:
    for _ in read_conversations(folder / name):
        pass


def _result(tuned: bool) -> bytes:
    rows = [
        {"id": name, "question": f"{name}?", "expected": "A", "answer": "A", "correct": tuned or name == "a"}
        | {"finished": True, "outcome": "right", "subject": name, "source": "s", "letter_correct": tuned}
        | ({"samples": [{"answer": "A", "correct": True}], "share": 0.5} if tuned else {})
        for name in ("a", "b")
    ]
    facts = {"kind": KIND, "format": 2, "n": 2, "accuracy": 0.5, "model": "m", "model_sha256": SHA}
    return as_bytes({**facts, "hashes": {"questions": SHA}, "settings": {"task": "own"}, "answers": rows})


def _run(folder: Path) -> None:
    """What a report reads of a run, but for the file that is fuzzed."""
    (folder / "scores-base.json").write_bytes(_result(tuned=False))
    (folder / "scores.json").write_bytes(_result(tuned=True))
    (folder / "metrics.jsonl").write_bytes(METRICS)
    (folder / "run.json").write_bytes(RUN_PATHS)


METRICS = b'{"step": 1, "loss": 2.5, "lr": 1e-4, "grad_norm": 1.0, "tokens": 64}\n{"step": 2, "loss": 2.25}\n'
RUN_PATHS = as_bytes({"model": "pico", "base": "base", "data": "store"})


def _reported(folder: Path) -> None:
    _in_a_copy(report, folder)


def _scored(folder: Path) -> None:
    read_result(folder / "scores.json")
    _reported(folder)


TOKENIZER_CONFIG = {
    "bos_token": {"content": "<s>"},
    "eos_token": "<|im_end|>",
    "chat_template": [{"name": "default", "template": NEMOTRON.template.read_text()}],
}
CALLBACKS = {
    "stages": {"weights": [1.0] * 7, "errors": [0.5] * 7, "shares": [0.1] * 7, "step": 3, "seen": True},
    "divergence": {"bad": 0, "first": 2.5, "lowest": 1.5, "recent": [1.5, 1.75]},
}
"""Of a checkpoint's callbacks, which lie in its run.pt."""


def _project(folder: Path) -> None:
    """A project without a line of code."""
    for name in OURS:
        (folder / name).mkdir()
    for name in FILES:
        (folder / name).write_text("")


def _bundle(folder: Path) -> bytes:
    _project(folder)
    return as_bytes({"python": "3.11", "packages": {"a": "1"}, "project": hashes(folder)})


def _template(folder: Path) -> None:
    TemplateCheck(folder).check([{"role": "user", "content": "x"}], [])


def _callbacks(folder: Path) -> None:
    states = read_json(folder / "callbacks.json", dict[str, Any])
    StageWeights([1.0] * 5, 0.5).restore(states.get("stages"))
    Divergence(2.0).load_state_dict(states.get("divergence"))


def run_readers() -> dict[str, Reader]:
    """Name -> reader, of the formats of data, runs and results."""
    part, job = f"{UNFINISHED}/{PART}/part.json", f"{UNFINISHED}/job.json"
    inside = functools.partial
    return {
        "mixture.yaml": Reader("mixture.yaml", MIXTURE, lambda f: read_mixture(f / "mixture.yaml")),
        "config.yaml": Reader("config.yaml", CONFIG_FILE, _configured),
        "part.json": Reader(part, _part_file(f"{PART}/part.json"), _joined, _parts),
        "job.json": Reader(job, _part_file("job.json"), _joined, _parts),
        "submission.zip": Reader(
            "s.zip", in_new_folder(_submission), lambda f: check_submission(f / "s.zip", PRESETS["pico"])
        ),
        "server: answer": Reader("r.json", as_bytes(ANSWER), _teacher),
        "answers.jsonl": Reader("answers.jsonl", KEPT_ANSWERS, _kept),
        "step rows": Reader("rows.jsonl", _step_rows(), _traces),
        "rows.jsonl": Reader("rows.jsonl", _lines(ROWS), inside(_conversations, "rows.jsonl")),
        "rows.json": Reader("rows.json", as_bytes(ROWS), inside(_conversations, "rows.json")),
        "rows.csv": Reader("rows.csv", CSV, inside(_conversations, "rows.csv")),
        "rows.jsonl.gz": Reader(
            "rows.jsonl.gz", gzip.compress(_lines(ROWS), mtime=0), inside(_conversations, "rows.jsonl.gz")
        ),
        "rows.parquet": Reader("rows.parquet", _parquet(), inside(_conversations, "rows.parquet")),
        "scores.json": Reader("scores.json", _result(tuned=True), _scored, _run),
        "report: metrics.jsonl": Reader("metrics.jsonl", METRICS, _reported, _run),
        "report: run.json": Reader("run.json", RUN_PATHS, _reported, _run),
        "bundle.json": Reader("bundle.json", in_new_folder(_bundle), lambda f: refuse_stale(f, f), _project),
        "tokenizer_config.json": Reader(
            "tokenizer_config.json", as_bytes(TOKENIZER_CONFIG), _template, write_tokenizer
        ),
        "chat_template.jinja": Reader(
            "chat_template.jinja", NEMOTRON.template.read_bytes(), _template, write_tokenizer
        ),
        "callbacks": Reader("callbacks.json", as_bytes(CALLBACKS), _callbacks),
    }
