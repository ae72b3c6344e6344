"""Learn2PD's extremely greedy parallel decode: the bound every learned filter is measured against."""

from typing import Any

import torch

from decoding.strategies.base import BlockStrategy, Decision, Step, top_1
from models.errors import InputError


class Oracle(BlockStrategy):
    """Commits exactly the guesses that equal the reference decode (arXiv 2509.25188).

    Where none does, it commits the reference's token at the most confident position and counts a stall, so the reference
    is reproduced exactly.
    """

    name = "oracle"

    @property
    def beyond_block(self) -> str:
        return "a reference decode"

    def decide(self, step: Step) -> Decision:
        evidence = step.evidence
        if step.reference is None:
            raise InputError("references", "none", "one reference sequence a prompt; the oracle needs them")
        right = evidence.masked & (evidence.token == step.reference)
        stalled = ~right.any(dim=1)
        forced = top_1(step.log_confidence) & stalled[:, None]
        return Decision(
            right | forced, token=torch.where(forced, step.reference, evidence.token), counts={"stalls": stalled.long()}
        )

    def settings(self) -> dict[str, Any]:
        return {"strategy": self.name}
