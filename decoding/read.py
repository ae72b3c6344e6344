"""From hidden states to what decisions are made of: token, confidence and the rest, in fp32; and the noise of sampling."""

from collections.abc import Callable, Sequence, Set

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.config import DecodeConfig
from models.predictor import TokenIds

CHUNK_BYTES = 1 << 27
"""Logits that are read at a time, in fp32. Reading holds up to six tensors of this size, eight where a nucleus is sought."""

_PIECE = 16  # positions that share a generator
_SURE = 1e4  # log-odds beyond which nothing is told apart: finite in fp16


class Noise:
    """Gumbel noise. What a position draws depends on its row's seed, the row's draw and its place in it, and on nothing else.

    Args:
        config: Temperature and seed.
        seeds: Seed of each prompt.
        device: Where the noise is needed.
    """

    def __init__(self, config: DecodeConfig, seeds: Sequence[int], device: torch.device) -> None:
        self.temperature, self.seed, self.seeds, self.device = config.temperature, config.seed, seeds, device
        self.draws = [0] * len(seeds)
        self.generator = torch.Generator(device) if self.temperature else None

    def begin(self, rows: Sequence[int]) -> None:
        """Begins a new draw of these rows."""
        for row in rows:
            self.draws[row] += 1

    def add(self, scores: Tensor, rows: Sequence[int], counts: Sequence[int], start: int) -> Tensor:
        """Scores plus the noise of the rows' present draw; the scores themselves at temperature 0.

        Args:
            scores: ``(N, V)`` float32, a part of the positions of all ``rows``, one row after the other.
            rows: Index of each row's prompt.
            counts: Positions of each row.
            start: Where the part begins.
        """
        if self.generator is None:
            return scores
        noise, stop, begin = torch.empty_like(scores), start + len(scores), 0
        for row, count in zip(rows, counts, strict=True):
            for first in range(begin, begin + count, _PIECE):
                last = min(first + _PIECE, begin + count)
                low, high = max(first, start), min(last, stop)
                if low < high:
                    piece = self._piece(row, (first - begin) // _PIECE, scores.shape[1])
                    noise[low - start : high - start] = piece[low - first : high - first]
            begin += count
        noise.clamp_(1e-20, 1 - 1e-7).log_().neg_().log_().mul_(-self.temperature)
        return noise.add_(scores)

    def _piece(self, row: int, number: int, size: int) -> Tensor:
        assert self.generator is not None
        seed = self.seed
        for part in (self.seeds[row], self.draws[row], number):
            seed = (seed * 1_000_003 + part) % (1 << 63)
        self.generator.manual_seed(seed)
        return torch.rand(_PIECE, size, generator=self.generator, device=self.device)


def in_chunks(
    hidden: Tensor,
    logits: Callable[[Tensor], Tensor],
    vocab_size: int,
    read: Callable[[Tensor, slice], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Reads the vocabulary at a few positions at a time, so that memory does not grow with them.

    Args:
        hidden: ``(N, D)``, the positions.
        logits: Logits ``(n, V)`` of hidden states ``(n, D)``.
        vocab_size: ``V``.
        read: Fields ``(n, ...)`` of a chunk, given its logits (its own to overwrite) and its place.

    Returns:
        The fields of all positions, ``(N, ...)``.
    """
    size = max(1, CHUNK_BYTES // (4 * vocab_size))
    parts = [slice(start, min(start + size, len(hidden))) for start in range(0, max(1, len(hidden)), size)]
    if len(parts) == 1:
        return read(logits(hidden), parts[0])
    read_parts = [read(logits(hidden[part]), part) for part in parts]
    return {name: torch.cat([fields[name] for fields in read_parts]) for name in read_parts[0]}


def read_block(
    logits: Tensor, ids: TokenIds, needs: Set[str], noisy: Callable[[Tensor], Tensor] | None = None,
    temperature: float = 0.0, top_p: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """What the predictor says at positions that may be committed.

    Args:
        logits: ``(N, V)``; fp32 logits are overwritten.
        ids: Special token ids; MASK is never chosen.
        needs: Which of ``margin``, ``entropy``, ``draw_entropy`` and ``divergence`` to compute beside token and confidence.
        noisy: Adds noise to logits ``(N, V)`` before the token is chosen; ``None`` at temperature 0.
        temperature: That of the distribution which tokens are drawn from; 0 counts as 1.
        top_p: They are drawn from its :func:`nucleus` of this much probability; 1: from all of it.

    Returns:
        ``token`` int64, ``log_confidence``, ``margin``, ``entropy`` and ``draw_entropy`` float32, each ``(N,)``; for
        ``divergence`` the ``log_probability`` ``(N, V)`` float32.
    """
    fields: dict[str, Tensor] = {}
    wide = logits.float()
    of_mask = wide[:, ids.mask]
    mask = of_mask.clone()
    of_mask.fill_(-torch.inf)
    choice = wide if top_p == 1 else nucleus(wide, temperature or 1.0, top_p)
    if "draw_entropy" in needs:
        fields["draw_entropy"] = torch.special.entr(_at(choice, temperature or 1.0).softmax(-1)).sum(-1)
    if noisy is None:
        best, token = wide.max(-1)
    else:
        token = noisy(choice).argmax(-1)
        best = wide.gather(-1, token[:, None])[:, 0]
        if "margin" in needs:
            two = wide.topk(2, dim=-1).values
            fields["margin"] = two[:, 0] - two[:, 1]
    wide.scatter_(-1, token[:, None], -torch.inf)
    if "margin" in needs and noisy is None:
        fields["margin"] = best - wide.amax(-1)
    of_mask.copy_(mask)  # only the choice of the token excludes MASK
    others = wide.logsumexp(-1)
    fields |= {"token": token, "log_confidence": _log_share(best, others)}
    if needs & {"entropy", "divergence"}:
        wide.scatter_(-1, token[:, None], best[:, None])
        log_probability = wide - torch.logaddexp(best, others)[:, None]
        if "entropy" in needs:
            fields["entropy"] = torch.special.entr(log_probability.exp()).sum(-1)
        if "divergence" in needs:
            fields["log_probability"] = log_probability
    return fields


def nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Logits ``(N, V)`` float32 with those of all tokens outside the nucleus at -inf: they are never drawn.

    The nucleus is the fewest most probable tokens whose probability at the temperature exceeds ``top_p``; at least one.
    """
    share, order = _at(logits, temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    outside = F.pad(share.cumsum(-1)[:, :-1] > top_p, (1, 0))
    return logits.masked_fill(torch.zeros_like(outside).scatter_(-1, order, outside), -torch.inf)


def read_eot(logits: Tensor, ids: TokenIds) -> dict[str, Tensor]:
    """What the predictor says about EoT.

    Args:
        logits: ``(N, V)``; as they were when this returns.
        ids: Special token ids.

    Returns:
        ``log_odds`` of EoT against all other tokens, nats, float32, which tell apart what is near to certain, and whether EoT
        is the ``top`` token, bool, each ``(N,)``.
    """
    wide = logits.float()
    eot, mask = wide[:, ids.eot].clone(), wide[:, ids.mask].clone()
    wide[:, ids.eot] = -torch.inf
    log_odds = (eot - wide.logsumexp(-1)).clamp_(-_SURE, _SURE)
    wide[:, ids.eot], wide[:, ids.mask] = eot, -torch.inf
    top = wide.argmax(-1) == ids.eot
    wide[:, ids.mask] = mask
    return {"log_odds": log_odds, "top": top}


def _at(logits: Tensor, temperature: float) -> Tensor:
    """Logits ``(N, V)`` float32 at a temperature, the largest of them 0, so that none of them overflows."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def _log_share(value: Tensor, others: Tensor) -> Tensor:
    """Log-probability of a token, ``(N,)`` float32, from its logit and the logsumexp of all others, ``(N,)`` float32.

    Logit less the logsumexp of all rounds to 0 wherever the probability rounds to 1, and positions tie that are not equal;
    this tells them apart. It is finite, so that even the least of masked positions comes before a decoded one.
    """
    return F.logsigmoid(value - others).clamp_(min=torch.finfo(torch.float32).min)
