"""What the predictor said in one block at one step, and the columns a filter reads from it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.constants import constant

EVIDENCE = frozenset({"margin", "entropy", "history", "text"})
"""What can be asked for beyond token and confidence and is always kept in records."""


@dataclass
class Evidence:
    """The predictor's word on the active block of every row at one step; fp32, computed from the logits.

    Only masked positions carry evidence; elsewhere every field is zero, except for strategies that ask for all positions
    (the published filter does), where ``token`` and ``confidence`` are filled everywhere; right of an accepted end of the
    text the confidence is zero all the same, for the published code has cut the sequence there. Fields beyond these two
    are there for who asks for them and ``None`` for everybody else, so that nobody reads what was not computed.

    Attributes:
        masked: ``(B, K)`` bool, True where the position is not decoded yet.
        token: ``(B, K)`` int64, argmax over the vocabulary without the MASK id.
        confidence: ``(B, K)`` float32, softmax probability of ``token``.
        margin: ``(B, K)`` float32, largest minus second largest logit. Asked for by its name.
        entropy: ``(B, K)`` float32, nats. Asked for by its name.
        stable: ``(B, K)`` int64, for how many previous steps of this block in a row the argmax has been ``token``. Asked for as
            ``history``.
        previous: ``(B, K)`` float32, the confidence one step earlier in this block, 0 at its first step. Likewise.
        text: ``(B, K)`` int64, the block's tokens as they stand: what is decoded, and the guess where it is masked. Asked for by
            its name.
        hidden: ``(B, K, D)`` in the weights' dtype, the predictor's last hidden state, which its head reads. Asked for by its
            name; the head has it anyway.
    """

    masked: Tensor
    token: Tensor
    confidence: Tensor
    margin: Tensor = None  # type: ignore[assignment]
    entropy: Tensor = None  # type: ignore[assignment]
    stable: Tensor = None  # type: ignore[assignment]
    previous: Tensor = None  # type: ignore[assignment]
    text: Tensor = None  # type: ignore[assignment]
    hidden: Tensor = None  # type: ignore[assignment]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Evidence":
        """Evidence whose every field has gone through ``change``."""
        return Evidence(**{name: change(value) for name, value in self.present().items()})

    def to(self, device: torch.device | str) -> "Evidence":
        """The same on a device."""
        return self.each(lambda value: value.to(device))

    def present(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @staticmethod
    def cat(parts: Sequence["Evidence"]) -> "Evidence":
        """The rows of all parts, one after the other; fields that every part has."""
        names = [name for name in parts[0].present() if all(getattr(part, name) is not None for part in parts)]
        return Evidence(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def run_to_the_left(flags: Tensor) -> Tensor:
    """Length of the unbroken run of masked positions immediately left of each position.

    Args:
        flags: ``(B, K + 2)`` float32, as a :class:`Feature` is given them.

    Returns:
        ``(B, K)`` float32.
    """
    place = _places(flags.shape[1] - 2, flags.device)
    known = place * (1 - flags[:, :-2])  # where the position to the left is decoded, how many there are up to it
    return place - known.cummax(dim=1).values


def _rank(evidence: Evidence) -> Tensor:
    """Share of the block's positions that are more confident, by the confidence as it is rounded to fp32.

    Everything that decides ranks log-confidences, which tell positions apart whose confidences both round to 1; these here count
    as equal, and the leftmost comes first. Records hold confidences alone, and filters are trained on records.
    """
    confidence = torch.where(evidence.masked, evidence.confidence, -1.0)
    order = confidence.argsort(dim=1, descending=True, stable=True)
    place = _places(order.shape[1], order.device).expand_as(confidence)
    return torch.empty_like(confidence).scatter_(1, order, place) / order.shape[1]


@constant
def _places(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Feature:
    """A column that a filter reads.

    Attributes:
        column: ``(B, K)`` float32 of the evidence and of ``flags`` ``(B, K + 2)`` float32: 1 where a position of the block is
            masked, with a 0 for the position on either side of the block.
        needs: What it reads beyond token and confidence, as a strategy asks for it: of ``margin``, ``entropy``, ``history``.
        flag: It says something of decoded positions, too; the others are zero there.
    """

    column: Callable[[Evidence, Tensor], Tensor]
    needs: frozenset[str] = frozenset()
    flag: bool = False


_HISTORY = frozenset({"history"})
FEATURES: dict[str, Feature] = {
    "confidence": Feature(lambda e, flags: e.confidence),
    "log_margin": Feature(lambda e, flags: e.margin.log1p(), frozenset({"margin"})),
    "entropy": Feature(lambda e, flags: e.entropy, frozenset({"entropy"})),
    "stable": Feature(lambda e, flags: e.stable.log1p(), _HISTORY),
    "previous_confidence": Feature(lambda e, flags: e.previous, _HISTORY),
    "masked": Feature(lambda e, flags: flags[:, 1:-1], flag=True),
    "masked_left": Feature(lambda e, flags: flags[:, :-2], flag=True),
    "masked_right": Feature(lambda e, flags: flags[:, 2:], flag=True),
    "run_left": Feature(lambda e, flags: run_to_the_left(flags) / e.masked.shape[1]),
    "share_masked": Feature(lambda e, flags: flags[:, 1:-1].mean(1, keepdim=True).expand_as(e.confidence)),
    "rank": Feature(lambda e, flags: _rank(e)),
}
"""Feature name to what it is. A new feature is one entry."""


def needs_of(names: Iterable[str]) -> frozenset[str]:
    """What the named features read beyond token and confidence."""
    return frozenset().union(*(FEATURES[name].needs for name in names))


def feature_columns(evidence: Evidence, names: list[str] | tuple[str, ...]) -> Tensor:
    """The named columns, ``(B, K, F)`` float32; zero at positions that are already decoded, save for the mask flags."""
    flags = F.pad(evidence.masked.float(), (1, 1))
    columns = torch.stack([FEATURES[name].column(evidence, flags) for name in names], dim=-1)
    return torch.where(evidence.masked[..., None] | _flags(tuple(names), columns.device), columns, 0.0)


@constant
def _flags(names: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([FEATURES[name].flag for name in names], device=device)
