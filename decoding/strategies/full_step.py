"""LLaDA's low-confidence remasking, the quality reference."""

from typing import Any

from decoding.strategies.base import BlockStrategy, Decision, Step, top_k


class FullStep(BlockStrategy):
    """Commits the quota's most confident positions; with steps = gen_length, one token a forward (arXiv 2502.09992)."""

    name = "full_step"

    def decide(self, step: Step) -> Decision:
        return Decision(top_k(step.log_confidence, step.evidence.masked, step.quota))

    def settings(self) -> dict[str, Any]:
        return {"strategy": self.name}
