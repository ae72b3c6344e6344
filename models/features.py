"""What the predictor said in one block at one step, and the columns a filter reads from it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Evidence:
    """The predictor's word on the active block of every row at one step; fp32, computed from the logits.

    Only masked positions carry evidence; elsewhere every field is zero, except for strategies that ask for all positions
    (the published filter does), where ``token`` and ``confidence`` are filled everywhere. Fields beyond these two are
    zero unless the strategy needs them.

    Attributes:
        masked: ``(B, K)`` bool, True where the position is not decoded yet.
        token: ``(B, K)`` int64, argmax over the vocabulary without the MASK id.
        confidence: ``(B, K)`` float32, softmax probability of ``token``.
        margin: ``(B, K)`` float32, largest minus second largest logit.
        entropy: ``(B, K)`` float32, nats.
        stable: ``(B, K)`` int64, for how many previous steps of this block in a row the argmax has been ``token``.
        previous: ``(B, K)`` float32, the confidence one step earlier in this block, 0 at its first step.
    """

    masked: Tensor
    token: Tensor
    confidence: Tensor
    margin: Tensor
    entropy: Tensor
    stable: Tensor
    previous: Tensor


def run_to_the_left(masked: Tensor) -> Tensor:
    """Length of the unbroken run of masked positions immediately left of each position; ``(B, K)`` bool to int64."""
    index = torch.arange(masked.shape[1], device=masked.device).expand_as(masked)
    last_known = torch.where(masked, -1, index).cummax(dim=1).values  # at or left of each position
    before = torch.cat((torch.full_like(last_known[:, :1], -1), last_known[:, :-1]), dim=1)
    return index - 1 - before


def _shift(flag: Tensor, by: int) -> Tensor:
    out = torch.zeros_like(flag)
    if by > 0:
        out[:, by:] = flag[:, :-by]
    else:
        out[:, :by] = flag[:, -by:]
    return out


def _rank(evidence: Evidence) -> Tensor:
    confidence = evidence.confidence.masked_fill(~evidence.masked, -1.0)
    order = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return order / evidence.masked.shape[1]


FEATURES: dict[str, Callable[[Evidence], Tensor]] = {
    "confidence": lambda e: e.confidence,
    "log_margin": lambda e: e.margin.log1p(),
    "entropy": lambda e: e.entropy,
    "stable": lambda e: e.stable.float().log1p(),
    "previous_confidence": lambda e: e.previous,
    "masked": lambda e: e.masked.float(),
    "masked_left": lambda e: _shift(e.masked, 1).float(),
    "masked_right": lambda e: _shift(e.masked, -1).float(),
    "run_left": lambda e: run_to_the_left(e.masked) / e.masked.shape[1],
    "share_masked": lambda e: e.masked.float().mean(1, keepdim=True).expand_as(e.confidence),
    "rank": _rank,
}
"""Feature name to a function ``Evidence -> (B, K)`` float32. A new feature is one entry."""


def feature_columns(evidence: Evidence, names: list[str] | tuple[str, ...]) -> Tensor:
    """The named columns, ``(B, K, F)`` float32; zero at positions that are already decoded, save for the mask flags."""
    columns = torch.stack([FEATURES[name](evidence) for name in names], dim=-1)
    keep = evidence.masked[..., None] | torch.tensor(
        [name.startswith("masked") for name in names], device=columns.device
    )
    return torch.where(keep, columns, 0.0)
