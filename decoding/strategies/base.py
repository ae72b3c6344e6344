"""What a strategy is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from decoding.blocks import BlockRun
from decoding.config import DecodeConfig
from decoding.run import Request, Run
from decoding.step import Decision, Step
from models.predictor import MaskPredictor


class Strategy(ABC):
    """A way to choose what is committed.

    Attributes:
        name: Its name in the registry, in YAML and on the command line.
        component: The event among its counts that tells whether its learned component did anything; empty without one.
    """

    name: ClassVar[str]
    component: str = ""

    def prepare(self, predictor: MaskPredictor, config: DecodeConfig) -> None:  # noqa: B027 - most have nothing to check
        """Checks, before the first step, that the strategy fits the predictor and the settings.

        Raises:
            InputError: It does not.
        """

    def outlined(self, predictor: MaskPredictor, config: DecodeConfig) -> "Strategy":
        """The strategy as :func:`decoding.memory_plan.plan_memory` counts it; a component need not have its weights.

        Args:
            predictor: Of which only the sizes mean something.
            config: Decode settings.

        Raises:
            InputError: It does not fit the settings, or its component has another vocabulary.
        """
        return self

    def taken(self, config: DecodeConfig) -> DecodeConfig:
        """The settings less those that mean nothing to it."""
        return config

    @property
    def networks(self) -> list[nn.Module]:
        """Its learned component's, once it is there; what a decode calls of each is its ``base_model`` if it has one."""
        return []

    def fingerprints(self) -> dict[str, str]:
        """Identity of the weights of its learned components: name of the setting to 16 hex digits."""
        return {}

    @property
    def parameters(self) -> int:
        """Weights of its learned component, once it is there; 0 without one."""
        return sum(weights.numel() for network in self.networks for weights in network.parameters())

    @property
    def beyond_block(self) -> str:
        """What it reads beyond the logits and ids of its block; where nothing, other engines can run it."""
        return "the whole sequence"

    @abstractmethod
    def start(self, request: Request) -> Run:
        """The decode of a request, ready for its first step."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that determines its decisions, for result rows and manifests."""


class BlockStrategy(Strategy):
    """Maps what was seen at a step to the positions of the active block that are committed.

    Attributes:
        needs: Evidence beyond token and confidence: any of ``margin``, ``entropy``, ``draw_entropy``, ``divergence``, ``decoded``
            and ``history``, which stands for ``stable`` and ``previous``.
        told: Which of its memory, ``(b, 1)`` int64, our own loop tells it on the host, too, in :attr:`Step.told`: name to what a
            block begins with.
        top_p: Tokens are drawn from the fewest most probable ones that have more than this probability together; 1: from all.
        all_positions: True if it reads token and confidence at decoded positions of the block too.
    """

    needs: frozenset[str] = frozenset()
    told: ClassVar[Mapping[str, int]] = MappingProxyType({})
    all_positions: bool = False
    top_p: float = 1.0

    @property
    def beyond_block(self) -> str:
        return ""

    def start(self, request: Request) -> Run:
        return BlockRun(request, self)

    def memory(self, batch: int, block_length: int) -> dict[str, Tensor]:
        """What it remembers between the steps of a block, as a block begins: name to a CPU tensor ``(batch, ...)``."""
        return {}

    @abstractmethod
    def decide(self, step: Step) -> Decision:
        """Chooses the commits of one step; a pure function of ``step``."""


def top_k(score: Tensor, masked: Tensor, count: Tensor | int) -> Tensor:
    """The ``count`` best masked positions of each row.

    Args:
        score: ``(b, K)`` float, ``-inf`` where nothing is masked.
        masked: ``(b, K)`` bool, somewhere in each row.
        count: ``(b,)`` int64, or one number for all; rows with fewer masked positions give all of them.

    Returns:
        ``(b, K)`` bool. Ties go to the leftmost position.
    """
    if isinstance(count, int) and count == 1:
        return top_1(score)
    order = score.argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(order.shape[1], device=order.device) < (count if isinstance(count, int) else count[:, None])
    return torch.empty_like(masked).scatter_(1, order, chosen.expand_as(order)) & masked


def top_1(score: Tensor) -> Tensor:
    """The best position of each row, ``(b, K)`` bool; the leftmost of equals. ``-inf`` keeps a position from being it."""
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.argmax(dim=1, keepdim=True), True)
