"""Strategies: one file each, behind one registry."""

import inspect
from collections.abc import Mapping
from typing import Any

from decoding.strategies.apd import APD
from decoding.strategies.base import BlockStrategy, Decision, Step, Strategy
from decoding.strategies.dico import DiCo
from decoding.strategies.dream import Dream
from decoding.strategies.entropy_bound import EntropyBound
from decoding.strategies.factor import Factor
from decoding.strategies.full_step import FullStep
from decoding.strategies.klass import Klass
from decoding.strategies.learn2pd import Learn2PD
from decoding.strategies.oracle import Oracle
from decoding.strategies.threshold import Threshold
from models.errors import InputError
from models.rules import SETTINGS, check, one_of

STRATEGIES: dict[str, type[Strategy]] = {
    cls.name: cls for cls in (FullStep, Threshold, Factor, EntropyBound, Dream, Klass, DiCo, Oracle, Learn2PD, APD)
}
"""Name to class. A new strategy is one file and one entry here."""


def make_strategy(name: str, options: Mapping[str, Any] | None = None, /, **more: Any) -> Strategy:
    """Builds a strategy by name.

    Args:
        name: Key of :data:`STRATEGIES`.
        options: Its settings, as a file or a command line has them.
        **more: Further ones.

    Raises:
        InputError: Unknown name, unknown option, or an option out of range.
    """
    rules = {"strategy": one_of(STRATEGIES), "options": SETTINGS.or_null()}
    check({"strategy": name, "options": options}, rules)
    options = {**(options or {}), **more}
    accepted = [key for key in inspect.signature(STRATEGIES[name]).parameters if key not in ("args", "kwargs")]
    for key in options:
        if key not in accepted:
            raise InputError(f"{name}.{key}", "an unknown setting", ", ".join(accepted) or "no settings")
    return STRATEGIES[name](**options)


__all__ = ["APD", "STRATEGIES", "BlockStrategy", "Decision", "Step", "Strategy", "make_strategy"]
