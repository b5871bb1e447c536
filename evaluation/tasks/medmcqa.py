"""MedMCQA: medical entrance questions, judged by letter (openlifescienceai/medmcqa; Apache-2.0).

Everyone scores the 4,183 of the validation split: the test split has no answers.
"""

from __future__ import annotations

from evaluation.judging.judges import Verdict, letter
from evaluation.judging.questions import Question
from evaluation.tasks import LETTERS, Task, no_variant

PUBLISHED = {
    "Dental": (1318, 476, 694), "Surgery": (369, 123, 240), "Pathology": (337, 103, 243), "Medicine": (295, 105, 193),
    "Pharmacology": (243, 87, 176), "Anatomy": (234, 79, 150), "Pediatrics": (234, 77, 127),
    "Gynaecology & Obstetrics": (224, 76, 141), "Biochemistry": (171, 62, 132), "Physiology": (171, 57, 126),
    "Social & Preventive Medicine": (129, 45, 82), "Microbiology": (122, 35, 76), "Radiology": (69, 25, 42),
    "Forensic Medicine": (67, 28, 36), "Ophthalmology": (58, 17, 37), "ENT": (53, 20, 33), "Anaesthesia": (34, 15, 22),
    "Orthopaedics": (20, 7, 7), "Skin": (17, 5, 10), "Psychiatry": (16, 5, 14), "Unknown": (2, 2, 1),
}  # fmt: skip
"""Subject -> questions, right of the base, right of a published medical LoRA on this model: 1,449 and 2,582 of 4,183.
Rebuilt from its table of percentages, which leaves out the last row."""


def task(variant: str) -> Task:
    no_variant("medmcqa", variant)
    return Task(
        "medmcqa",
        "medical entrance questions",
        _judge,
        form="medmcqa",
        method=LETTERS,
        completion=_completion,
        data="hub:openlifescienceai/medmcqa@main?split=validation",
        published=PUBLISHED,
    )


def _judge(question: Question, answer: str) -> Verdict:
    return letter(question.answer, answer, question.choices)


def _completion(question: Question) -> str:
    """As lm-evaluation-harness asks it: the prompt that its published figures belong to."""
    stem = question.text.rpartition("\n\nA. ")[0]
    options = "".join(f"{name}. {text}\n" for name, text in zip("ABCD", question.choices, strict=True))
    return f"Question: {stem}\nChoices:\n{options}Answer:"
