"""The file of golden answers: prompts as token ids, their log-probabilities, and how far a right server may be off.

A safetensors file: `tokens` (all tokens, one prompt after the other) int64, `lengths` (prompts,) int64, `logprobs` (all
tokens) float32, natural logarithms, of each token given those before it; 0 for the first of a prompt, which has none.
The header has `golden`, JSON: the texts, the tolerances, and where the numbers come from; and `sha256`, over that and
the three arrays. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import MinLen
from typing_extensions import TypedDict

from nano3.cli import UserError, fresh_file
from nano3.documents import NotNegative, parse_json

FORMAT = 2
"""Format 1, which is read too, had no hash."""


class ToleranceFields(TypedDict):
    """The fields of `Tolerance`."""

    largest: NotNegative
    mean: NotNegative
    overall: NotNegative


@dataclass(frozen=True)
class Tolerance:
    """How far the log-probabilities of a right server may be off, in nats: each (`largest`), those of a prompt on
    average (`mean`), and those of all prompts on average (`overall`, which sees a small change of everything)."""

    largest: float
    mean: float
    overall: float


class Header(TypedDict):
    """`golden` in the header. Facts that only people read are not named here."""

    format: Literal[1, 2]
    texts: Annotated[list[str], MinLen(1)]
    tolerance: ToleranceFields


@dataclass(frozen=True)
class Golden:
    """Golden answers. `tokens` and `logprobs` have an array for each prompt, both of its length; `facts` says what they
    were computed from."""

    texts: list[str]
    tokens: list[np.ndarray]
    logprobs: list[np.ndarray]
    tolerance: Tolerance
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, out: Path) -> None:
        """Writes the file whole or not at all."""
        from safetensors.numpy import save_file

        tensors: dict[str, np.ndarray] = {
            "tokens": np.concatenate(self.tokens).astype(np.int64),
            "lengths": np.array([len(tokens) for tokens in self.tokens], dtype=np.int64),
            "logprobs": np.concatenate(self.logprobs).astype(np.float32),
        }
        header = {"format": FORMAT, "texts": self.texts, "tolerance": asdict(self.tolerance), **self.facts}
        text = json.dumps(header)
        with fresh_file(out) as temporary:
            save_file(tensors, temporary, {"golden": text, "sha256": _sha256(text, **tensors)})

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Reads the file. Raises `UserError` when it is none, is damaged or is of another format."""
        from safetensors import SafetensorError, safe_open

        remedy = "write it with conversion/golden.py"
        try:
            with safe_open(path, "numpy") as file:
                said = file.metadata() or {}
                text, digest = said["golden"], said.get("sha256")
                tokens, lengths, logprobs = (file.get_tensor(name) for name in ("tokens", "lengths", "logprobs"))
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a file of golden answers ({error}); {remedy}") from None
        header: dict[str, Any] = dict(parse_json(text, Header, f"{path}: golden in the header", remedy))
        version = header.pop("format")
        if (digest or version == FORMAT) and digest != _sha256(text, tokens, lengths, logprobs):
            raise UserError(
                f"{path} is not a file of golden answers (not what was written: its SHA-256 is another); {remedy}"
            )
        texts, bounds = header.pop("texts"), header.pop("tolerance")
        whole = tokens.ndim == lengths.ndim == logprobs.ndim == 1 and tokens.dtype.kind == lengths.dtype.kind == "i"
        if not whole or logprobs.dtype != np.float32 or len(texts) != len(lengths) or lengths.min() < 1:
            raise UserError(f"{path} is not a file of golden answers (other arrays); {remedy}")
        if not len(tokens) == len(logprobs) == sum(lengths.tolist()) or not np.isfinite(logprobs).all():
            raise UserError(f"{path} is not a file of golden answers (its parts do not fit each other); {remedy}")
        cuts = np.cumsum(lengths)[:-1]
        tolerance = Tolerance(bounds["largest"], bounds["mean"], bounds["overall"])
        return cls(texts, np.split(tokens, cuts), np.split(logprobs, cuts), tolerance, header)


def _sha256(header: str, tokens: np.ndarray, lengths: np.ndarray, logprobs: np.ndarray) -> str:
    digest = hashlib.sha256(header.encode())
    for array in (tokens, lengths, logprobs):
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
