"""What requests cost, as sums by decode settings, so that processes add up correctly."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

Sums = dict[str, dict[str, float]]
"""Decode settings, as JSON, to name to sum."""


class Tally:
    """Sums of one process.

    Attributes:
        sums: See :data:`Sums`.
    """

    def __init__(self) -> None:
        self.sums: Sums = {}

    def add(self, settings: Mapping[str, Any], **amounts: float) -> None:
        """Adds amounts to the sums of these settings."""
        sums = self.sums.setdefault(json.dumps(settings, sort_keys=True), {})
        for name, amount in amounts.items():
            sums[name] = sums.get(name, 0) + amount


def summary(processes: Iterable[Sums]) -> list[dict[str, Any]]:
    """One row for each decode settings, over all processes.

    ``answers``, ``reused`` (of them, finished in an earlier run), ``nfe_mean``, ``tokens`` (before the first EoT),
    ``tokens_per_forward`` and ``empty_answers`` are of all answers; ``forward_calls`` and the seconds, summed over
    processes, of this run alone.
    """
    total = Tally()
    for sums in processes:
        for settings, amounts in sums.items():
            total.add(json.loads(settings), **amounts)
    return [{"settings": json.loads(settings)} | _means(amounts) for settings, amounts in total.sums.items()]


def _means(amounts: dict[str, float]) -> dict[str, float]:
    row = {name: amount for name, amount in amounts.items() if name != "nfe"}
    if nfe := amounts.get("nfe"):
        row |= {"nfe_mean": nfe / amounts["answers"], "tokens_per_forward": amounts["tokens"] / nfe}
    return row
