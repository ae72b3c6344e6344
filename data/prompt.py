"""One prompt, whatever source it comes from, and the part of a response to it that is judged."""

import hashlib
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Split = Literal["train", "validation", "test"]

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


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


def final_answer(text: str, numeric: bool = False) -> str:
    r"""The part of a response that is judged, found as lm-eval's filters find it.

    What follows the last ``####``; else what the last ``\boxed{}`` holds; else what follows "the answer is"; else, where the
    answer is a number, the last number; else all of it.

    Args:
        text: The response.
        numeric: Whether the answer is a number, which is then returned in plain digits.
    """
    found = text.strip()
    if "####" in text:
        found = text.rpartition("####")[2].strip()
    elif boxed := _boxed(text):
        found = boxed
    elif said := re.findall(r"(?i:the answer is):?\s*(.+)", text):
        found = said[-1].strip().removesuffix(".")
    if not numeric:
        return found
    numbers = _NUMBER.findall(found)
    # A mark is followed by the answer and perhaps by its unit; without a mark the last number is the result.
    return _plain(numbers[-1 if found == text.strip() else 0]) if numbers else ""


def is_right(text: str, answer: str) -> bool:
    """Whether a response ends with this answer; numbers are equal however they are written."""
    if is_number(answer):
        return final_answer(text, numeric=True) == _plain(answer)
    return final_answer(text) == answer.strip()


def is_number(answer: str) -> bool:
    """Whether an answer is one number and nothing else."""
    return _NUMBER.fullmatch(answer.strip()) is not None


def _boxed(text: str) -> str:
    r"""What the last ``\boxed{}`` holds, braces inside it included; empty if there is none or it is not closed."""
    start, depth = text.rfind("\\boxed{"), 0
    for place in range(start + 6, len(text)) if start >= 0 else ():
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[start + 7 : place].strip()
    return ""


def _plain(number: str) -> str:
    value = Decimal(re.sub(r"[$,\s]", "", number).rstrip("."))
    return format(value.normalize() if value else Decimal(0), "f")
