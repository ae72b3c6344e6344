"""What settings accept, one rule each, and the one check of them: it names the field, what was found and what is accepted.

``models/`` and ``decoding/`` have to do without a library for this; ``data/typed.py`` is what pydantic checks.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from models.errors import InputError

LONGEST = 1 << 20
"""Most positions of anything: beyond every model, and little enough to be counted through."""


@dataclass(frozen=True)
class Rule:
    """What a setting accepts.

    Attributes:
        accepted: That in words.
        accepts: Whether a value is accepted, whatever its type.
    """

    accepted: str
    accepts: Callable[[Any], bool]

    def or_null(self) -> "Rule":
        """The same, or ``None``."""
        return Rule(f"{self.accepted}, or null", lambda value: value is None or self.accepts(value))


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def number(accepted: str, fits: Callable[[Any], bool] = lambda value: True) -> Rule:
    """A finite number in a range."""
    return Rule(accepted, lambda value: is_number(value) and fits(value))


def whole(least: int, most: int | None = None) -> Rule:
    """A whole number, and none that is written with a decimal point."""
    end = f"of at least {least}" if most is None else f"from {least} to {most}"

    def accepts(value: Any) -> bool:
        return (
            isinstance(value, Integral)
            and not isinstance(value, bool)
            and int(value) >= least
            and (most is None or int(value) <= most)
        )

    return Rule(f"a whole number {end}", accepts)


def one_of(choices: Collection[str]) -> Rule:
    """One of some words."""
    return Rule(" | ".join(choices), lambda value: isinstance(value, str) and value in choices)


def list_of(rule: Rule, accepted: str) -> Rule:
    """A list, or another sequence but text, of values that a rule accepts."""
    return Rule(
        f"a list of {accepted}",
        lambda value: isinstance(value, Sequence) and not isinstance(value, str) and all(map(rule.accepts, value)),
    )


def instance(kind: type) -> Rule:
    """An object of a class."""
    return Rule(f"a {kind.__name__}", lambda value: isinstance(value, kind))


SHARE = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
NOT_NEGATIVE = number("a number of at least 0", lambda value: value >= 0)
POSITIVE = number("a number above 0", lambda value: value > 0)
COUNT = whole(1)
LENGTH = whole(1, LONGEST)
SEED = whole(0, 2**63 - 1)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("a string that is not empty", lambda value: isinstance(value, str) and value != "")
FOLDER = Rule("a folder", lambda value: isinstance(value, Path) or TEXT.accepts(value))
DTYPES = ("float32", "bfloat16", "float16")
SETTINGS = Rule(
    "a mapping from the names of settings to their values",
    lambda value: isinstance(value, Mapping) and all(isinstance(name, str) for name in value),
)
CALLABLE = Rule("something that can be called", callable)
FIGURES = Rule(
    "an object of finite numbers or nulls",
    lambda value: isinstance(value, dict) and all(entry is None or is_number(entry) for entry in value.values()),
)


def check(values: Mapping[str, Any], rules: Mapping[str, Rule], where: str = "") -> None:
    """Raises an InputError for the first value that its rule does not accept.

    Args:
        values: Every value that has a rule, by name.
        rules: The rules, by name.
        where: What goes before the name of a field, such as ``"threshold."``.
    """
    for name, rule in rules.items():
        if not rule.accepts(values[name]):
            raise InputError(f"{where}{name}", repr(values[name])[:80], rule.accepted)
