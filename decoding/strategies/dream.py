"""Dream's own remasking: least entropy first."""

from dataclasses import dataclass
from typing import Any

import torch

from decoding.strategies.base import BlockStrategy, Decision, Step, top_k
from models.rules import SHARE, check


@dataclass(frozen=True)
class Dream(BlockStrategy):
    """Commits the quota's positions of least entropy; tokens are drawn from a nucleus (Dream's "entropy"; arXiv 2508.15487).

    Token and entropy are of one distribution: the logits at the decode's temperature, of which only the nucleus is kept. At a
    low temperature many nuclei are a single token, of entropy 0; of these the leftmost come first. Positions are not drawn
    (an ``alg_temp`` of 0). Steps share the positions evenly; the authors' code rounds down, so that with one step a token its
    first forward commits nothing and its last one two tokens.

    Args:
        top_p: Probability that the nucleus exceeds; 1 draws from all tokens.
    """

    top_p: float = 0.95
    name = "dream"
    needs = frozenset({"draw_entropy"})

    def __post_init__(self) -> None:
        check(vars(self), {"top_p": SHARE}, f"{self.name}.")

    def decide(self, step: Step) -> Decision:
        assert step.draw_entropy is not None
        masked = step.evidence.masked
        return Decision(top_k(torch.where(masked, -step.draw_entropy, -torch.inf), masked, step.quota))

    def settings(self) -> dict[str, Any]:
        return {"strategy": self.name, "top_p": self.top_p}
