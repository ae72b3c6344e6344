"""What a strategy sees and what it answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from decoding.config import DecodeConfig
from models.errors import InputError
from models.features import Evidence
from models.predictor import MaskPredictor


@dataclass(frozen=True)
class Step:
    """One step of the rows still being decoded; ``b`` rows, ``K`` positions of each row's active block.

    Attributes:
        evidence: What the predictor says there.
        quota: ``(b,)`` int64, tokens a fixed schedule commits at this step, at least 1.
        reference: ``(b, K)`` int64, the reference decode's tokens, where the call was given one.
        decoded: ``(b,)`` float32, share of the row's whole generated region that is decoded.
        divergence: ``(b, K)`` float32, nats: KL divergence of the position's distribution from the one a step earlier
            (``KL(p_t || p_{t-1})``), infinite at a block's first step; ``None`` unless the strategy asks for it.
        memory: What :meth:`BlockStrategy.memory` began the row's block with, or the row's last decision left.
    """

    evidence: Evidence
    quota: Tensor
    reference: Tensor | None = None
    decoded: Tensor | None = None
    divergence: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What to commit.

    Attributes:
        transfer: ``(b, K)`` bool, positions to commit; masked ones only, at least one in each row.
        token: ``(b, K)`` int64, tokens to commit instead of the predictor's guesses, or ``None``.
        counts: Per-row int64 ``(b,)`` events worth reporting, such as commits that a learned component caused.
        memory: What the row's next step of the same block shall find in :attr:`Step.memory`; same names, shapes, dtypes.
    """

    transfer: Tensor
    token: Tensor | None = None
    counts: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)


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

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that determines its decisions, for result rows and manifests."""


class BlockStrategy(Strategy):
    """Maps what was seen at a step to the positions of the active block that are committed.

    Attributes:
        needs: Evidence beyond token and confidence: any of ``margin``, ``entropy``, ``divergence`` and
            ``history``, which stands for ``stable`` and ``previous``.
        all_positions: True if it reads token and confidence at decoded positions of the block too.
    """

    needs: frozenset[str] = frozenset()
    all_positions: bool = False

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
    order = score.masked_fill(~masked, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < count[:, None]) & masked


def top_1(score: Tensor, masked: Tensor) -> Tensor:
    """The best masked position of each row, ``(b, K)`` bool; the leftmost of equals."""
    best = score.masked_fill(~masked, -torch.inf).argmax(dim=1, keepdim=True)
    return torch.zeros_like(masked).scatter_(1, best, True) & masked


def require_range(strategy: str, name: str, value: float, accepted: str, fits: Callable[[float], bool]) -> None:
    """Raises an InputError for a setting out of range."""
    if not fits(value):
        raise InputError(f"{strategy}.{name}", value, accepted)
