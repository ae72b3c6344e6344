"""Fixed confidence threshold (Fast-dLLM)."""

from dataclasses import dataclass
from typing import Any

from decoding.strategies.base import BlockStrategy, Decision, Step, top_1
from models.rules import NOT_NEGATIVE, check


@dataclass(frozen=True)
class Threshold(BlockStrategy):
    """Commits every position of at least ``threshold`` confidence, and always the best one (arXiv 2505.22618).

    Args:
        threshold: Confidence in probability; above 1 equals one token a step.
    """

    threshold: float = 0.9
    name = "threshold"

    def __post_init__(self) -> None:
        check(vars(self), {"threshold": NOT_NEGATIVE}, f"{self.name}.")

    def decide(self, step: Step) -> Decision:
        evidence = step.evidence
        sure = (evidence.confidence >= self.threshold) & evidence.masked
        return Decision(sure | top_1(step.log_confidence))

    def settings(self) -> dict[str, Any]:
        return {"strategy": self.name, "threshold": self.threshold}
