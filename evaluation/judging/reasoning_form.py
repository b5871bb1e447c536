"""Whether an answer keeps the form of reasoning that was asked for, apart from whether it is right.

The form: one block of reasoning that is opened once and closed once, something in it, and an answer behind it. Where
the prompt itself opens the block, as Nemotron's does, the text has no `<think>` of its own.
"""

from __future__ import annotations

from evaluation.judging.extraction import THINK_END

THINK = "<think>"
KEPT = "kept"
FORMS = {
    KEPT: "one block of reasoning, and an answer behind it",
    "no reasoning": "the block is empty, or there is none",
    "not closed": "the reasoning does not end, or was cut",
    "several blocks": "reasoning begins or ends more than once",
    "text before": "something stands before the reasoning",
    "no answer": "nothing stands behind the reasoning",
}
"""What can be said of an answer's form, and the words for it."""


def reasoning_form(text: str, finished: bool) -> str:
    """One of `FORMS` for all that a model wrote in its turn; `finished`: it stopped by itself."""
    opened, closed = text.count(THINK), text.count(THINK_END)
    if opened > 1 or closed > 1:
        return "several blocks"
    if not closed:
        return "not closed" if opened or not finished else "no reasoning"
    head, _, answer = text.partition(THINK_END)
    before, _, reasoning = head.rpartition(THINK)
    if before.strip():
        return "text before"
    if not reasoning.strip():
        return "no reasoning"
    return KEPT if answer.strip() else "no answer"
