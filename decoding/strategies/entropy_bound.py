"""Entropy bound: how much the positions committed together may depend on each other (EB-sampler)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from decoding.strategies.base import BlockStrategy, Decision, Step
from models.rules import NOT_NEGATIVE, check


@dataclass(frozen=True)
class EntropyBound(BlockStrategy):
    """Commits the ``n`` positions of least entropy, ``n`` the largest whose sum less its maximum is at most ``gamma``.

    That difference bounds the mutual information of the positions; it is 0 for ``n = 1``, which is always committed.
    Source: arXiv 2505.24857.

    Args:
        gamma: The bound, in nats.
    """

    gamma: float = 0.1
    name = "entropy_bound"
    needs = frozenset({"entropy"})

    def __post_init__(self) -> None:
        check(vars(self), {"gamma": NOT_NEGATIVE}, f"{self.name}.")

    def decide(self, step: Step) -> Decision:
        masked = step.evidence.masked
        # Rounding can leave a certain position an entropy just below 0.
        entropy = torch.where(masked, step.evidence.entropy.clamp(min=0), torch.inf)
        least, order = entropy.sort(dim=1, stable=True)
        # In ascending order the maximum is the last summand: what is left is the sum of those before it.
        before = F.pad(least[:, :-1], (1, 0)).cumsum(1)
        return Decision(torch.empty_like(masked).scatter_(1, order, before <= self.gamma) & masked)

    def settings(self) -> dict[str, Any]:
        return {"strategy": self.name, "gamma": self.gamma}
