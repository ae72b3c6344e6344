"""Prompts: where they come from, how they are split, how an answer is judged."""

import hashlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Prompt:
    """One instruction.

    Attributes:
        id: Unique within its source.
        task: Name used to report results apart.
        prompt: The user's message, before the chat template.
        response: The reference response, as text; empty where the source has none.
        answer: The final answer inside the response; empty where the source has none.
        metadata: JSON text that the task's scorer may need.
    """

    id: str
    task: str
    prompt: str
    response: str = ""
    answer: str = ""
    metadata: str = "{}"


def prompt_hash(text: str) -> str:
    """First 16 hex digits of the SHA-256 of the prompt text without surrounding white space."""
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def split_of(text: str, validation: float = 0.05, test: float = 0.05) -> Split:
    """Split of a prompt by the hash of its text: stable under reordering, and equal prompts never part.

    Args:
        text: Prompt text, before the chat template.
        validation: Share of prompts in the validation split.
        test: Share of prompts in the test split.
    """
    place = int(prompt_hash(text), 16) / 16**16
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


def final_answer(task: str, text: str) -> str:
    """The part of a response that is judged: what follows ``####`` for worked answers, else all of it."""
    return text.rsplit("####", 1)[-1].strip() if task.startswith("gsm") else text.strip()
