"""What a strategy sees at a step and what it answers."""

from dataclasses import dataclass, field

from torch import Tensor

from models.errors import InputError
from models.features import Evidence


@dataclass(frozen=True)
class Step:
    """One step of the rows still being decoded; ``b`` rows, ``K`` positions of each row's active block.

    Attributes:
        evidence: What the predictor says there.
        log_confidence: ``(b, K)`` float32, nats: logarithm of the confidence, which is what ranks positions. Near 1 most
            confidences round to the same number and their logarithms do not. Finite where masked, elsewhere ``-inf``.
        quota: Tokens a fixed schedule commits at this step, at least 1; ``(b,)`` int64, or one number for all rows.
        reference: ``(b, K)`` int64, the reference decode's tokens, where the call was given one.
        decoded: ``(b,)`` float32, share of the row's whole generated region that is decoded; ``None`` unless asked for.
        divergence: ``(b, K)`` float32, nats: KL divergence of the position's distribution from the one a step earlier
            (``KL(p_t || p_{t-1})``), infinite at the row's first step, and with a dual cache at a block's first step;
            ``None`` unless the strategy asks for it.
        draw_entropy: ``(b, K)`` float32, nats: entropy of the distribution that the guess is drawn from, at the decode's
            temperature and within the strategy's ``top_p``; ``None`` unless the strategy asks for it.
        memory: What :meth:`BlockStrategy.memory` began the row's block with, or the row's last decision left.
        told: What of it the host knows, too, where the strategy asks for it: a number for each row.
    """

    evidence: Evidence
    log_confidence: Tensor
    quota: Tensor | int
    reference: Tensor | None = None
    decoded: Tensor | None = None
    divergence: Tensor | None = None
    draw_entropy: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    told: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What to commit.

    Attributes:
        transfer: ``(b, K)`` bool, positions to commit; masked ones only, at least one in each row.
        token: ``(b, K)`` int64, tokens to commit instead of the predictor's guesses, or ``None``.
        counts: Per-row int64 ``(b,)`` events worth reporting, such as commits that a learned component caused.
        memory: What the row's next step of the same block shall find in :attr:`Step.memory`; same names, shapes, dtypes.
        component: ``(b, K)`` float32, what the learned component computed, which has to be finite; ``None`` without one.
    """

    transfer: Tensor
    token: Tensor | None = None
    counts: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    component: Tensor | None = None


def check_finite(confidence: bool, component: bool) -> None:
    """Raises an InputError where a step computed something that is not finite: what is committed then means nothing.

    Args:
        confidence: A confidence is not.
        component: What the strategy's component computed is not.
    """
    if confidence:
        raise InputError("base model: confidence", "not finite", "weights and a dtype whose logits are finite")
    if component:
        raise InputError("filter: probability", "not finite", "a filter whose logits are finite")
