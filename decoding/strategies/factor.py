"""Confidence factor: how many tokens may be wrong at once (Fast-dLLM)."""

from dataclasses import dataclass
from typing import Any

import torch

from decoding.strategies.base import BlockStrategy, Decision, Step
from models.rules import POSITIVE, check


@dataclass(frozen=True)
class Factor(BlockStrategy):
    """Commits the ``n`` most confident positions, ``n`` the largest with ``(n + 1)(1 - c_(n)) < factor``; at least one.

    ``c_(n)`` is the ``n``-th largest confidence. Source: arXiv 2505.22618. Unlike public
    code, the last remaining position is not accepted on top of ``n`` when it fails the test.

    Args:
        factor: Larger commits more.
    """

    factor: float = 1.0
    name = "factor"

    def __post_init__(self) -> None:
        check(vars(self), {"factor": POSITIVE}, f"{self.name}.")

    def decide(self, step: Step) -> Decision:
        masked = step.evidence.masked
        order = step.log_confidence.argsort(dim=1, descending=True, stable=True)
        best = torch.where(masked, step.evidence.confidence, -torch.inf).gather(1, order)
        count = torch.arange(2, masked.shape[1] + 2, device=masked.device)
        # The left side never falls along the order, so it holds for a prefix, of length n; decoded positions make it infinite.
        fits = (1 - best) * count < self.factor
        fits[:, 0] = True
        return Decision(torch.empty_like(masked).scatter_(1, order, fits))

    def settings(self) -> dict[str, Any]:
        return {"strategy": self.name, "factor": self.factor}
