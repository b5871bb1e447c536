"""What the assistant's turn of a multiple-choice row says: the letter alone, or an explanation and the letter.

In each of them the letter's tokens are stage 5 of the token store, so that their loss is reported apart.
"""

from __future__ import annotations

from typing import Any

from nano3.cli import UserError

SAY = {
    "letter": "the letter alone",
    "reasoned": "the explanation as reasoning, then the letter",
    "explained": "the explanation and `Answer: ` with the letter, all of it the answer",
}
"""Name -> what the turn becomes."""
ANSWER = 5
"""Stage of the letter, that of the answer in step-aware traces."""
LEAD = "Answer:"


def said(fields: dict[str, Any], how: str) -> dict[str, Any]:
    """A chat row of `data_prep.sources.source.chosen` with its last turn as `how` says.

    Raises:
        UserError: the row is no multiple-choice question.
    """
    if not fields.get("choices"):
        raise UserError("the row has no choices; --say is for multiple-choice questions such as MedMCQA's")
    letter = str(fields["answer"])
    *before, turn = fields["messages"]
    reasoning = str(turn.get("reasoning_content") or "").strip()
    content = letter
    if how == "explained":
        # The blank belongs to the letter: many tokenizers have both in one token.
        content = f"{reasoning}\n\n{LEAD} {letter}" if reasoning else f"{LEAD} {letter}"
    whole = f"{reasoning}\n</think>\n{letter}" if reasoning and how == "reasoned" else content
    marked = {"start": len(whole) - len(letter) - (how == "explained"), "end": len(whole), "stage": ANSWER}
    kept = {"reasoning_content": reasoning} if reasoning and how == "reasoned" else {}
    return {**fields, "messages": [*before, {"role": turn["role"], "content": content, **kept, "spans": [marked]}]}
