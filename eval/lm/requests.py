"""lm-eval's requests in our terms: what they ask for, and in which portions they are worked off."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lm_eval.models.utils import normalize_gen_kwargs

from decoding.config import DecodeConfig
from models.errors import InputError

MAX_GEN_TOKS = 256
"""Tokens of an answer where neither the model's arguments nor the request say: as in lm-eval's other models."""

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """A request to be decoded.

    Attributes:
        key: See :func:`eval.lm.answers.answer_key`.
        prompt: Token ids.
        config: Decode settings.
        stop: Texts that end the answer.
        most: Tokens that the answer may have; whole blocks are decoded.
        arguments: The request as lm-eval gave it.
    """

    key: str
    prompt: list[int]
    config: DecodeConfig
    stop: tuple[str, ...]
    most: int
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Asked:
    """A request's generation arguments: texts that end the answer, its most tokens, and the temperature."""

    stop: tuple[str, ...]
    max_gen_toks: int
    temperature: float


def generation_arguments(arguments: dict[str, Any]) -> Asked:
    """Reads ``until``, ``max_gen_toks`` (by any of lm-eval's names for it), ``do_sample`` and ``temperature``.

    Without ``do_sample`` the temperature is 0; with it and no temperature, 1.

    Raises:
        InputError: Another argument.
    """
    if arguments.get("do_sample"):
        arguments = {"temperature": 1.0} | arguments
    given: dict[str, Any] = dict(normalize_gen_kwargs(arguments, MAX_GEN_TOKS))
    stop = tuple(text for text in given.pop("until") if text)
    length, sample, temperature = given.pop("max_gen_toks"), given.pop("do_sample"), given.pop("temperature", 0.0)
    for name, value in given.items():
        raise InputError(f"gen_kwargs.{name}", repr(value), "until | max_gen_toks | do_sample | temperature")
    return Asked(stop, length, float(temperature) if sample else 0.0)


def groups(jobs: Iterable[Job]) -> list[list[Job]]:
    """Jobs of equal settings together."""
    found: dict[tuple[DecodeConfig, tuple[str, ...]], list[Job]] = {}
    for job in jobs:
        found.setdefault((job.config, job.stop), []).append(job)
    return list(found.values())


def portions(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """``items`` in portions of ``size``; the last may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def positive(name: str, value: object) -> int:
    """A whole number of at least 1, which lm-eval may hand on as text.

    Raises:
        InputError: Anything else.
    """
    if not str(value).isdecimal() or int(str(value)) < 1:
        raise InputError(name, repr(value), "a whole number of at least 1")
    return int(str(value))


def number(name: str, value: object) -> float:
    """A number.

    Raises:
        InputError: Anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(name, repr(value), "a number")
    return float(value)
