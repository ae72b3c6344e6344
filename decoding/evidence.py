"""From fields of single positions to the evidence on a block: what the decode loop and other engines' shells share."""

from collections.abc import Callable, Set

import torch
from torch import Tensor

from models.features import Evidence

Compare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From token and confidence, ``(b, K)``, to ``stable`` and ``previous`` of :class:`models.features.Evidence`."""


def lay_out(laid: dict[str, Tensor], fields: dict[str, Tensor], places: Tensor | None, shape: torch.Size) -> None:
    """Writes fields ``(N, ...)`` to their ``places`` ``(N,)`` in ``laid``, of ``shape``; ``None``: they are all of it.

    Where nothing was read a field is zero, and a ``log_confidence`` that of zero.
    """
    for name, values in fields.items():
        rest = values.shape[1:]
        if places is None:
            laid[name] = values.view(*shape, *rest)
            continue
        if name not in laid:
            laid[name] = values.new_full((*shape, *rest), -torch.inf if name == "log_confidence" else 0)
        laid[name].view(-1, *rest).index_copy_(0, places, values)


def evidence_of(
    fields: dict[str, Tensor], needs: Set[str], masked: Tensor, ids: Tensor | None, inside: Tensor | None,
    compare: Compare | None,
) -> Evidence:  # fmt: skip
    """What a strategy is shown of the blocks.

    Args:
        fields: Fields of :func:`decoding.read.read_block`, ``(b, K)``, and ``hidden`` ``(b, K, D)``, as :func:`lay_out` does.
        needs: What the strategy asks for.
        masked: ``(b, K)`` bool.
        ids: ``(b, K)`` int64, the blocks' tokens; ``None`` unless ``text`` is asked for.
        inside: ``(b, K)`` bool, True up to the end of the text, where decoded positions were read, too; ``None`` where only
            masked ones were.
        compare: Compares with the step before; ``None`` unless ``history`` is asked for.
    """
    token, confidence = fields["token"], fields["log_confidence"].exp()
    found = {name: fields[name] for name in ("margin", "entropy", "hidden") if name in needs}
    if inside is not None:
        found = {name: values * _like(masked, values) for name, values in found.items()}
        confidence = confidence * inside
    if compare is not None:
        found["stable"], found["previous"] = compare(token, confidence)
    if ids is not None:
        found["text"] = torch.where(masked, token, ids)
    return Evidence(masked, token, confidence, **found)


def compare_guesses(
    masked: Tensor, now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """``stable`` ``(b, K)`` int64 and ``previous`` ``(b, K)`` float32.

    Args:
        masked: ``(b, K)`` bool.
        now: This step's token ``(b, K)`` int64 and confidence ``(b, K)`` float32.
        before: The last step's, and its ``stable``; token -1 and zeros at a block's first step.
    """
    same = masked & (now[0] == before[0])
    stable = torch.where(same, before[2] + 1, 0)
    return stable, before[1] * masked


def divergence(now: Tensor, before: Tensor) -> Tensor:
    """``KL(now || before)`` in nats, ``(N,)`` float32, of log-probabilities ``(N, V)`` float32."""
    return (now.exp() * (now - before)).sum(-1)


def _like(flags: Tensor, values: Tensor) -> Tensor:
    """``flags`` ``(b, K)`` with as many dimensions as ``values`` ``(b, K, ...)``."""
    return flags.view(*flags.shape, *(1,) * (values.dim() - 2))
