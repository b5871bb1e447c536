"""The file of golden answers: prompts as token ids, their log-probabilities, and what tells a right server from others.

A safetensors file: `tokens` (all tokens, one prompt after the other) int64, `lengths` (prompts,) int64, `logprobs` (all
tokens) float32, natural logarithms, of each token given those before it; 0 for the first of a prompt, which has none.
`bf16` are the same as a server in BF16 gives them, `other.NAME` those of another model that could be served by mistake.
The header has `golden`, JSON: the texts, and where the numbers come from; and `sha256`, over that and the arrays.
conversion/fp8/golden_verdict.py compares. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import MinLen
from typing_extensions import TypedDict

from nano3.cli import UserError
from nano3.documents import Count, Name, NotNegative, Sha256, parse_json
from nano3.outputs import fresh_file

FORMAT = 3
"""Formats 1 and 2 had tolerances in place of the BF16 answers, and no other models."""
OTHER = "other."


class Fault(TypedDict):
    """A fault that was planted when the file was made, and whether the comparison sees it."""

    name: Name
    mean: NotNegative
    seen: bool


class Experts(TypedDict):
    """How many of the routed experts the prompts reached."""

    reached: Count
    of: Count


class Header(TypedDict):
    """`golden` in the header. Facts that only people read are not named here."""

    format: Literal[3]
    texts: Annotated[list[str], MinLen(1)]
    model_sha256: Sha256
    experts: Experts
    planted: list[Fault]


@dataclass(frozen=True)
class Golden:
    """Golden answers. `tokens`, `logprobs`, `bf16` and each of `others` have an array for each prompt, of its length;
    `facts` says what they were computed from."""

    texts: list[str]
    tokens: list[np.ndarray]
    logprobs: list[np.ndarray]
    bf16: list[np.ndarray]
    others: dict[str, list[np.ndarray]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, out: Path) -> None:
        """Writes the file whole or not at all."""
        from safetensors.numpy import save_file

        answers = {"logprobs": self.logprobs, "bf16": self.bf16}
        answers |= {OTHER + name: found for name, found in self.others.items()}
        tensors: dict[str, np.ndarray] = {
            "tokens": np.concatenate(self.tokens).astype(np.int64),
            "lengths": np.array([len(tokens) for tokens in self.tokens], dtype=np.int64),
            **{name: np.concatenate(found).astype(np.float32) for name, found in answers.items()},
        }
        header = {"format": FORMAT, "texts": self.texts, **self.facts}
        text = json.dumps(header)
        with fresh_file(out) as temporary:
            save_file(tensors, temporary, {"golden": text, "sha256": _sha256(text, tensors)})

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Reads the file. Raises `UserError` when it is none, is damaged or is of another format."""
        from safetensors import SafetensorError, safe_open

        remedy = "write it with conversion/golden.py"

        def refused(reason: object) -> UserError:
            return UserError(f"{path} is not a file of golden answers ({reason}); {remedy}")

        if not path.is_file():  # a pipe would never end
            raise refused("there is no plain file")
        try:
            with safe_open(path, "numpy") as file:
                said = file.metadata() or {}
                text, digest = said["golden"], said.get("sha256")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise refused(error) from None
        header: dict[str, Any] = dict(parse_json(text, Header, f"{path}: golden in the header", remedy))
        if digest != _sha256(text, arrays):
            raise refused("not what was written: its SHA-256 is another")
        if not {"tokens", "lengths", "logprobs", "bf16"} <= arrays.keys():
            raise refused("an array is missing")
        return cls._of_arrays(arrays, header, refused)

    @classmethod
    def _of_arrays(cls, arrays: dict[str, np.ndarray], header: dict[str, Any], refused: Any) -> Golden:
        """The parts, one array a prompt; raises what `refused` makes where they do not fit each other."""
        texts, lengths, tokens = header.pop("texts"), arrays.pop("lengths"), arrays.pop("tokens")
        header.pop("format")
        if not tokens.ndim == lengths.ndim == 1 or not tokens.dtype.kind == lengths.dtype.kind == "i":
            raise refused("other arrays")
        if len(texts) != len(lengths) or lengths.min() < 1 or len(tokens) != sum(lengths.tolist()):
            raise refused("its parts do not fit each other")
        for name, found in arrays.items():
            if found.dtype != np.float32 or found.shape != tokens.shape or not np.isfinite(found).all():
                raise refused(f"{name} does not fit the tokens")
        cut = {name: np.split(found, np.cumsum(lengths)[:-1]) for name, found in arrays.items()}
        others = {name.removeprefix(OTHER): found for name, found in cut.items() if name.startswith(OTHER)}
        apart = np.split(tokens, np.cumsum(lengths)[:-1])
        return cls(texts, apart, cut["logprobs"], cut["bf16"], others, header)


def _sha256(header: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
