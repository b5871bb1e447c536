"""What bench_data.py prepares: chat rows of real questions, and a published tokenizer with the chat format's tokens."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results import ROOT

from nano3.cli import UserError
from nano3.messages import CONTROL_TOKENS

PACKAGES = ROOT / "build" / "reference" / "data"
"""What `make build/reference/data` fetches."""
_MEDMCQA = "evals/registry/data/medmcqa/samples.jsonl"


def questions() -> list[tuple[str, str]]:
    """MedMCQA's questions as they are asked, with the right letter."""
    found = sorted(PACKAGES.glob("evals-*.whl"))
    if not found:
        raise UserError(f"no evals package in {PACKAGES}; run: make build/reference/data")
    with zipfile.ZipFile(found[-1]) as archive:
        lines = archive.read(_MEDMCQA).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["input"][-1]["content"], row["ideal"]) for row in rows]


def chat_rows(count: int, asked: int, answered: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` conversations: so many questions `asked` at once and so many as the answer, or a question and its letter
    where `answered` is 0. No two rows are alike."""
    known = questions()
    drawn = random.Random(seed)
    for number in range(count):
        first, letter = drawn.choice(known)
        more = [drawn.choice(known)[0] for _ in range(asked - 1)]
        answer = "\n".join(drawn.choice(known)[0] for _ in range(answered)) or letter
        talk = [
            {"role": "user", "content": "\n".join([f"{number}. {first}", *more])},
            {"role": "assistant", "content": answer},
        ]
        yield {"id": str(number), "source": "bench", "messages": talk}


def with_control_tokens(source: Path, folder: Path) -> Path:
    """Writes `folder`/tokenizer.json: the byte-pair tokenizer `source` with the chat format's tokens at their ids.

    What had these ids moves to the end of the vocabulary; tokens that `source` adds itself are left out.
    """
    facts = json.loads(source.read_text())
    vocab = facts["model"]["vocab"]
    taken = {number: token for token, number in vocab.items() if number in CONTROL_TOKENS.values()}
    end = max(max(vocab.values()), *(token["id"] for token in facts["added_tokens"])) + 1
    for place, token in enumerate(taken.values()):
        vocab[token] = end + place
    vocab |= CONTROL_TOKENS  # a model's own vocabulary decides the ids of added tokens
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    facts["added_tokens"] = [{"id": number, "content": mark, **plain} for mark, number in CONTROL_TOKENS.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    return folder
