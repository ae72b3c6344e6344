"""KLASS: commits guesses that are confident and have stopped changing."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoding.strategies.base import BlockStrategy, Decision, Step, top_k
from models.rules import COUNT, NOT_NEGATIVE, POSITIVE, check


@dataclass(frozen=True)
class Klass(BlockStrategy):
    """Commits every position that is confident and stable; where a row has none, the quota's most confident ones.

    Stable means that ``KL(p_t || p_{t-1})`` was below ``divergence`` at each of the last ``history`` steps, this one
    included, all of them in this block; the confidence is only asked for now. A block's first step is compared with the last
    step of the block before, as in the authors' code; with a dual cache, whose forwards do not see that far, it has nothing
    to be compared with, nor has a row's first step, and neither counts. Source: arXiv 2511.05664; the defaults are its
    settings for GSM8K.

    Args:
        threshold: Confidence in probability that has to be exceeded.
        divergence: KL divergence in nats that has to be kept below.
        history: Steps in a row of which it has to hold.
    """

    threshold: float = 0.6
    divergence: float = 0.015
    history: int = 2
    name = "klass"
    needs = frozenset({"divergence"})

    def __post_init__(self) -> None:
        rules = {"threshold": NOT_NEGATIVE, "divergence": POSITIVE, "history": COUNT}
        check(vars(self), rules, f"{self.name}.")

    def memory(self, batch: int, block_length: int) -> dict[str, Tensor]:
        """``stable``: ``(batch, block_length)`` int64, for how many steps in a row the divergence has been small."""
        return {"stable": torch.zeros(batch, block_length, dtype=torch.long)}

    def decide(self, step: Step) -> Decision:
        assert step.divergence is not None
        evidence = step.evidence
        stable = (step.memory["stable"] + 1) * (step.divergence < self.divergence)
        ready = (stable >= self.history) & (evidence.confidence > self.threshold) & evidence.masked
        quota = top_k(step.log_confidence, evidence.masked, step.quota)
        return Decision(torch.where(ready.any(1, keepdim=True), ready, quota), memory={"stable": stable})

    def settings(self) -> dict[str, Any]:
        return {
            "strategy": self.name,
            "threshold": self.threshold,
            "divergence": self.divergence,
            "history": self.history,
        }
