"""From logits to what decisions are made of: token, confidence and the rest, in fp32, once a step; and the noise."""

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from decoding.config import DecodeConfig
from models.predictor import TokenIds


class Noise:
    """Gumbel noise, one generator a row, so that what a row draws does not depend on the batch.

    Args:
        config: Temperature and seed.
        seeds: Seed of each prompt.
        device: Where the noise is needed.
    """

    def __init__(self, config: DecodeConfig, seeds: Sequence[int], device: torch.device) -> None:
        self.temperature, self.seed, self.seeds, self.device = config.temperature, config.seed, seeds, device
        self.generators: dict[int, torch.Generator] = {}

    def draw(self, rows: Sequence[int], counts: Sequence[int], size: int) -> Tensor | None:
        """Noise for ``counts[n]`` positions of row ``rows[n]``, one row after the other.

        Returns:
            ``(sum(counts), size)`` float32, scaled by the temperature; ``None`` at temperature 0.
        """
        if self.temperature == 0:
            return None
        for row in rows:
            if row not in self.generators:
                seed = self.seed * 1_000_003 + self.seeds[row]
                self.generators[row] = torch.Generator(self.device).manual_seed(seed)
        uniform = torch.cat(
            [
                torch.rand(count, size, generator=self.generators[row], device=self.device)
                for row, count in zip(rows, counts, strict=True)
            ]
        )
        return -(-uniform.clamp_(1e-20, 1 - 1e-7).log()).log() * self.temperature

    def forget(self, row: int) -> None:
        """Lets a finished row's generator go."""
        self.generators.pop(row, None)


def read_block(logits: Tensor, ids: TokenIds, needs: Set[str], noise: Tensor | None) -> dict[str, Tensor]:
    """What the predictor says at positions that may be committed.

    Args:
        logits: ``(N, V)``; fp32 logits are overwritten.
        ids: Special token ids; MASK is never chosen.
        needs: Which of ``margin``, ``entropy`` and ``divergence`` to compute beside token and confidence.
        noise: ``(N, V)`` float32, added before the token is chosen.

    Returns:
        ``token`` int64, ``confidence``, ``margin`` and ``entropy`` float32, each ``(N,)``; for ``divergence`` the
        ``log_probability`` ``(N, V)`` float32.
    """
    wide = logits.float()
    total = wide.logsumexp(-1)  # over the whole vocabulary; only the choice of the token excludes MASK
    fields: dict[str, Tensor] = {}
    if needs & {"entropy", "divergence"}:
        log_probability = wide - total[:, None]
        if "entropy" in needs:
            fields["entropy"] = torch.special.entr(log_probability.exp()).sum(-1)
        if "divergence" in needs:
            fields["log_probability"] = log_probability
    wide[:, ids.mask] = -torch.inf
    if noise is None:
        best, fields["token"] = wide.max(-1)
    else:
        fields["token"] = (wide + noise).argmax(-1)
        best = wide.gather(-1, fields["token"][:, None])[:, 0]
    fields["confidence"] = (best - total).exp_()
    if "margin" in needs:
        two = wide.topk(2, dim=-1).values
        fields["margin"] = two[:, 0] - two[:, 1]
    return fields


def read_eot(logits: Tensor, ids: TokenIds) -> dict[str, Tensor]:
    """Softmax ``probability`` of EoT, float32, and whether it is the ``top`` token; ``(N,)`` from logits ``(N, V)``."""
    wide = logits.float()
    probability = (wide[:, ids.eot] - wide.logsumexp(-1)).exp()
    best = wide.index_fill(-1, torch.full((1,), ids.mask, device=wide.device), -torch.inf).argmax(-1)
    return {"probability": probability, "top": best == ids.eot}
