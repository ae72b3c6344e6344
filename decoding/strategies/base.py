"""What a strategy is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

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

    def fingerprints(self) -> dict[str, str]:
        """Identity of the weights of its learned components: name of the setting to 16 hex digits."""
        return {}

    @property
    def parameters(self) -> int:
        """Weights of its learned component, once a decode has loaded it; 0 without one that is reported."""
        return 0

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


def top_k(score: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """The ``count`` best masked positions of each row.

    Args:
        score: ``(b, K)`` float.
        masked: ``(b, K)`` bool.
        count: ``(b,)`` int64; rows with fewer masked positions give all of them.

    Returns:
        ``(b, K)`` bool. Ties go to the leftmost position.
    """
    order = torch.where(masked, score, -torch.inf).argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return torch.empty_like(masked).scatter_(1, order, chosen) & masked


def top_1(score: Tensor, masked: Tensor) -> Tensor:
    """The best masked position of each row, ``(b, K)`` bool; the leftmost of equals."""
    best = torch.where(masked, score, -torch.inf).argmax(dim=1, keepdim=True)
    return torch.zeros_like(masked).scatter_(1, best, True) & masked
