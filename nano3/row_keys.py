"""Keys of a row that nobody understands: which may be left out, and which must not.

A key that could change what the model is shown or trained on is refused by its name. One that annotates the row, or
whose name says nothing of prompt and loss, is harmless; whoever reads the row lists it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

FACTS = (
    "id",
    "source",
    "weight",
    "subject",
    "level",
    "split",
    "answer",
    "choices",
    "terms",
    "evaluation_only",
    "trace",
)
"""What a chat row may say beside its conversation."""

LETTERS = "ABCDEFGHIJ"
"""Names of a row's `choices`, in order; with `choices` its `answer` is one of them."""

HARMLESS = {
    "avg_rating", "category", "comment", "conversation_id", "created", "created_at", "date", "difficulty", "domain",
    "generator", "hash", "idx", "index", "lang", "language", "license", "margin", "meta", "metadata", "model",
    "num_turns", "origin", "prompt_id", "quality", "rating", "score", "score_chosen", "score_rejected", "tags", "task",
    "text_id", "timestamp", "token_count", "topic", "topic_name", "type", "url", "used_in_training", "uuid", "version",
}  # fmt: skip
"""Names that annotate a row, some of which would otherwise count as telling."""

_TELLING = re.compile(
    r"system|prompt|instruct|context|passage|history|prefix|suffix|tool|function|template|think|reason|loss|weight|mask"
    r"|train|label|document|image|audio|video|input|output|response|completion|message|turn|chosen|rejected|question"
    r"|query|answer|target|solution|rationale|explanation|choice|option|conversation|dialog|span|stop|stage|assistant"
    r"|user|role|developer|argument|kwargs|text|content|^cot$|_cot$|chain|hint|ending|distractor|correct|^ctx"
    r"|^[a-j]$|^op[a-j1-9]$|^opt"
)
"""Names that speak of what the model is shown or trained on."""


def is_harmless(key: str, value: Any, messages: Any) -> bool:
    """Whether a key that nobody understands says nothing that the model would have to see or learn.

    It does not where its value is empty, or is the text of one of the row's `messages` already.
    """
    if key in HARMLESS or not _TELLING.search(key.lower()) or value is None or value in ("", [], {}):
        return True
    if key == "reasoning" and str(value).lower() in ("on", "off", "true", "false"):
        return True  # NVIDIA's data notes so which mode a row was written in
    texts = messages if isinstance(messages, list) else []
    return any(isinstance(message, Mapping) and message.get("content") == value for message in texts)
