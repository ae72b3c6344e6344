"""One prompt, whatever source it comes from, and the part of a response to it that is judged."""

from dataclasses import dataclass


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


def final_answer(task: str, text: str) -> str:
    """The part of a response that is judged: what follows ``####`` for worked answers, else all of it."""
    return text.rsplit("####", 1)[-1].strip() if task.startswith("gsm") else text.strip()
