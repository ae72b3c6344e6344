"""What the task files beside this one call: their data, wherever the command is started, and how an answer is read."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from data.prompt import final_answer, is_number


def load(file: str, **_: Any) -> dict[str, Dataset]:
    """The rows of a JSONL file of this folder, as lm-eval's test split.

    Args:
        file: Name of the file.
        **_: lm-eval also hands on the task's metadata and the model's arguments.
    """
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").split("\n")
    return {"test": Dataset.from_list([json.loads(line) for line in lines if line])}


def final_answers(responses: list[list[str]], docs: list[dict[str, Any]]) -> list[str]:
    """A filter of lm-eval: the part of each first response that is judged."""
    return [final_answer(texts[0], is_number(doc["answer"])) for texts, doc in zip(responses, docs, strict=True)]
