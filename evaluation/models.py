"""What is evaluated: one way to ask, whatever holds the weights.

A `Model` answers questions and, where it can, scores letters. `HFModel` is a folder in plain transformers; the model
behind an OpenAI-compatible server is in `evaluation/server.py`, one on ranks in `evaluation/ranks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from evaluation.generation import Sampling
from evaluation.judging.extraction import THINK_END
from evaluation.judging.questions import Question
from evaluation.prompts import Prompts
from nano3.hf_config import FP8_ACTIVATIONS, is_plain, read_config
from nano3.outputs import scratch_folder


@dataclass(frozen=True)
class Written:
    """What a model wrote: its text, whether it stopped by itself, how many `tokens` it took, and how many it was
    `asked` (None: not known)."""

    text: str
    finished: bool
    tokens: int | None
    asked: int | None = None


class Model(Protocol):
    """Something that answers. `scores_letters`: whether `letters` are asked unless the user says otherwise; `identity`:
    hashes of its files."""

    name: str
    scores_letters: bool
    identity: dict[str, str]

    def answers(self, questions: Sequence[Question], limit: int, sampling: Sampling) -> list[list[Written]]:
        """Answers of at most `limit` tokens, `sampling.samples` to each question, in order."""

    def letters(self, questions: Sequence[Question]) -> list[list[float]]:
        """For each question the log-probabilities of its choices' letters, in nats."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens the texts have, or at most have where the tokenizer is not known."""

    def hashes(self) -> dict[str, str]:
        """`prompts` and `template` of what was asked so far: results compare only where they agree."""

    def facts(self) -> dict[str, Any]:
        """What else the result says of it."""


class HFModel:
    """A Hugging Face folder in plain transformers, FP32 on the CPU and BF16 on a GPU.

    Args:
        folder: of the model, not quantized (`plain_folder`).
        batch_size: sequences at a time.
        thinking: whether prompts open the model's reasoning.
        completion: prompts without chat format, by question; answers then end at an empty line.
        threads: PyTorch's, for the whole process; more than one slows small models down.
        progress: bars on stderr.
        prepare: called with the loaded model, to change it first.
        name: what results call it; the folder when empty.
    """

    scores_letters = True

    def __init__(
        self,
        folder: Path | str,
        batch_size: int = 128,
        thinking: bool = False,
        completion: Callable[[Question], str] | None = None,
        threads: int = 1,
        progress: bool = True,
        prepare: Callable[[Any], None] | None = None,
        name: str = "",
    ) -> None:
        import torch
        from transformers.utils import logging

        from evaluation.hf_model import load_reference

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.folder, self.name = Path(folder), name or str(folder)
        self.identity: dict[str, str] = {}
        self.batch_size, self.progress = batch_size, progress
        self.device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        self.dtype = str(dtype)
        self.prompts = Prompts(folder, thinking, completion)
        self.tokenizer = self.prompts.tokenizer
        self.model = load_reference(folder, dtype).to(self.device)
        if prepare is not None:
            prepare(self.model)

    def answers(self, questions: Sequence[Question], limit: int, sampling: Sampling) -> list[list[Written]]:
        """As `Model.answers`."""
        from evaluation.generation import write_answers

        prompts = self.prompts.encoded(questions, self.prompts.thinking)
        stops = self.prompts.stop_ids
        found = write_answers(self.model, prompts, limit, self.batch_size, self.progress, sampling, stops)
        return [[self._written(answer.tokens, answer.finished) for answer in several] for several in found]

    def continued(self, questions: Sequence[Question], begun: Sequence[str], limit: int) -> list[str]:
        """The model's reasoning and answer where its turn begins with `begun`, that included, greedy; at most `limit`
        tokens more."""
        from evaluation.generation import write_answers

        heads = self.tokenizer(list(begun), add_special_tokens=False)["input_ids"] if begun else []
        prompts = [prompt + head for prompt, head in zip(self.prompts.encoded(questions, True), heads, strict=True)]
        stops = self.prompts.stop_ids
        found = write_answers(self.model, prompts, limit, self.batch_size, self.progress, stop_ids=stops)
        texts = (self.tokenizer.decode(answer.tokens, skip_special_tokens=True) for (answer,) in found)
        return [head + text for head, text in zip(begun, texts, strict=True)]

    def _written(self, tokens: Sequence[int], finished: bool) -> Written:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if self.prompts.completion is None:
            return Written(text, finished and (not self.prompts.thinking or THINK_END in text), len(tokens))
        head, end, _ = text.partition("\n\n")
        return Written(head, finished or bool(end), len(tokens))

    def letters(self, questions: Sequence[Question]) -> list[list[float]]:
        """As `Model.letters`."""
        from evaluation.letters import continuation_logprobs

        pairs = self.prompts.letter_pairs(questions)
        found = continuation_logprobs(self.model, pairs, self.batch_size, self.progress)
        return [[one.logprob for one in several] for several in found]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """As `Model.count_tokens`."""
        return self.prompts.count_tokens(texts)

    def hashes(self) -> dict[str, str]:
        """As `Model.hashes`."""
        return self.prompts.hashes()

    def facts(self) -> dict[str, Any]:
        """As `Model.facts`."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "thinking": self.prompts.thinking,
            "chat_format": self.prompts.completion is None,
            "fp8_activations": (self.folder / FP8_ACTIVATIONS).exists(),
        }


@contextmanager
def plain_folder(folder: Path, near: Path) -> Iterator[Path]:
    """The folder itself; for a ModelOpt FP8 folder what its values stand for, in a folder beside the path `near` while
    it is needed.

    conversion/dequantize.py writes it; activations and cache are rounded as a server would.
    """
    quantized = read_config(folder).get("quantization_config")
    if not isinstance(quantized, dict) or quantized.get("quant_method") != "modelopt":
        yield folder  # other quantizations are refused when the model is loaded
        return
    from conversion.dequantize import dequantize

    with scratch_folder(near) as scratch:
        plain = scratch / "plain"
        count = dequantize(folder, plain)
        print(f"{folder}: {count} FP8 matrices read as the values they stand for", flush=True)
        yield plain


def beside(adapter: Path | None, base: Path) -> Callable[[Any], None] | None:
    """What puts an adapter beside the weights of a loaded base; None without one."""
    if adapter is None:
        return None
    if is_plain(base):
        return partial(_put_beside, adapter)
    from conversion.adapters.unmerged import with_adapter

    return with_adapter(adapter, base)


def _put_beside(adapter: Path, model: Any) -> None:
    """PEFT's own way, for a model in plain transformers; PEFT changes the model in place."""
    from peft import PeftModel

    PeftModel.from_pretrained(model, str(adapter)).eval()


def identity_of(folder: Path, adapter: Path | None) -> dict[str, str]:
    """Content hashes that evaluation/lineage.py finds the model by; one pass over its files."""
    from conversion.certificates.certificate import folder_sha256
    from conversion.identity import model_sha256

    found = {"model_sha256": model_sha256(folder)}
    return found | ({"adapter_sha256": folder_sha256(adapter)} if adapter else {})
