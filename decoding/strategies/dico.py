"""DiCo: divide a block into clusters, conquer them in parallel, finalize the rest."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from decoding.config import DecodeConfig
from decoding.strategies.base import Decision, Step, top_1
from decoding.strategies.learn2pd import FilterStrategy
from models.constants import constant
from models.filter import FilterConfig
from models.predictor import MaskPredictor
from models.rules import COUNT, LONGEST, NOT_NEGATIVE, POSITIVE, SHARE, check, number, whole

DIVIDE, CONQUER, FINALIZE = 0, 1, 2

_CUT = number("a number above 0 and at most 1", lambda value: 0 < value <= 1)
# The cuts that a cluster grows over exclude 0: a decoded position, whose confidence counts as 0, never passes them.
_RULES = {
    "divide_steps": COUNT, "seeds": whole(1, 4096), "seed_threshold": _CUT, "grow_threshold": _CUT, "alpha": NOT_NEGATIVE,
    "tolerance": whole(0, LONGEST), "beta": _CUT, "sigma": POSITIVE, "divide_exit": NOT_NEGATIVE, "patience": COUNT,
    "growth": POSITIVE, "sure": NOT_NEGATIVE, "factor": NOT_NEGATIVE, "top_threshold": NOT_NEGATIVE,
    "spread_threshold": NOT_NEGATIVE, "conquer_exit": NOT_NEGATIVE, "finalize_share": SHARE, "margin": NOT_NEGATIVE,
}  # fmt: skip


@dataclass
class DiCo(FilterStrategy):
    """Three phases a block: Divide plants and grows clusters, Conquer commits inside them, Finalize commits the rest.

    ``c`` is the confidence, ``w = c * W`` the confidence under trajectory guidance: ``W`` falls exponentially from 1 at
    the block's first masked position to ``min(1, beta + alpha * decoded share of the region)`` at its end.

    *Divide* commits up to ``seeds`` positions, those that Soft-NMS on ``w`` ranks first, until one has too low a ``w``.
    Seeds and the known clusters they fall into grow over positions with ``w >= grow_threshold``. *Conquer* commits every
    ``c > sure`` and, in each cluster, the ``n`` best with ``(n + 1)(1 - c_(n)) <= factor``, else the block's best;
    clusters then grow where ``c > spread_threshold``. *Finalize* commits every ``margin > margin`` or ``c > sure``, else
    the best.
    Source: arXiv 2602.23792. What the paper leaves open:

    - A cluster is a run of marked positions, so clusters that touch are one. ``tolerance`` bridges misses to a position
      that is worth having, never to another growing cluster: those merge by touching only.
    - A decoded position is always a miss, there being no evidence on it.
    - A Divide forward without a seed serves as a Conquer step if a cluster has masked positions, else as a Finalize step.
    - A Conquer step that no rule lets commit anything commits the block's best and counts it as ``forced``.
    - Conquer's growth counts positions committed in the same step, on which there still is evidence, as hits.

    Args:
        divide_steps: Longest Divide phase, in steps.
        seeds: Most seeds a step.
        seed_threshold: Least ``w`` of a seed, as it was before Soft-NMS.
        grow_threshold: Least ``w`` over which a cluster grows in Divide.
        tolerance: Misses in a row that growth steps over, in positions.
        alpha: Weight of the region's decoded share in the guidance.
        beta: Guidance at the block's end while nothing is decoded.
        sigma: Width of Soft-NMS, as a share of the block.
        divide_exit: Divide ends at this mean ``w`` over masked positions in clusters.
        patience: Divide ends after so many steps in a row without a new seed and without growth.
        growth: Least relative growth of a cluster that counts.
        sure: Confidence above which Conquer and Finalize commit anywhere in the block.
        factor: Conquer's bound inside a cluster.
        top_threshold: Confidence from which the best position of a block is a proper commit, not a forced one.
        spread_threshold: Confidence over which a cluster grows in Conquer.
        conquer_exit: Conquer ends below this mean confidence over masked positions in clusters.
        finalize_share: Decoded share of the block from which the end of Conquer leads to Finalize, not to Divide.
        margin: Logit margin above which Finalize commits.
        filter: Folder of an exported filter, whose probability then takes the place of ``c`` in Conquer.
        network: A filter network to use instead of one loaded from ``filter``, with its ``config``.
        config: Configuration of ``network``.
    """

    divide_steps: int = 10
    seeds: int = 4
    seed_threshold: float = 0.3
    grow_threshold: float = 0.3
    tolerance: int = 2
    alpha: float = 0.5
    beta: float = 0.05
    sigma: float = 1 / 3
    divide_exit: float = 0.6
    patience: int = 2
    growth: float = 0.1
    sure: float = 0.98
    factor: float = 1.0
    top_threshold: float = 0.6
    spread_threshold: float = 0.6
    conquer_exit: float = 0.6
    finalize_share: float = 0.8
    margin: float = 3.0
    filter: str | Path | None = None
    network: nn.Module | None = field(default=None, repr=False)
    config: FilterConfig | None = field(default=None, repr=False)
    name = "dico"
    needs = frozenset({"margin", "decoded"})
    told: ClassVar[Mapping[str, int]] = {"phase": DIVIDE}

    def __post_init__(self) -> None:
        check(vars(self), _RULES, f"{self.name}.")
        if (self.filter, self.network, self.config) != (None, None, None):
            self.take_filter()
            self.needs = self.needs | DiCo.needs
            self.component = "filter_commits"

    @property
    def beyond_block(self) -> str:
        return "how much of the whole text is decoded (alpha 0 does without)" if self.alpha else super().beyond_block

    def prepare(self, predictor: MaskPredictor, config: DecodeConfig) -> None:
        if self.network is not None:
            super().prepare(predictor, config)

    def memory(self, batch: int, block_length: int) -> dict[str, Tensor]:
        """What a row remembers in a block.

        ``phase``, ``steps`` and ``stalled`` are ``(batch, 1)`` int64: the phase of its next step, and Divide's steps so far
        and without progress. ``inside`` is ``(batch, block_length)`` bool: the positions in clusters.
        """
        count = torch.zeros(batch, 1, dtype=torch.long)
        inside = torch.zeros(batch, block_length, dtype=torch.bool)
        return {"phase": count, "steps": count.clone(), "stalled": count.clone(), "inside": inside}

    def decide(self, step: Step) -> Decision:
        # Each row goes through every phase that any row is in, and keeps its own; an engine does not say which these are.
        phases = set(step.told.get("phase", (DIVIDE, CONQUER, FINALIZE)))
        if phases == {FINALIZE}:
            return self._finalize(step)
        evidence, before = step.evidence, step.memory["inside"]
        masked = evidence.masked
        c = evidence.confidence * masked
        run, members = _run(before), before & masked
        conquering, seeds = step.memory["phase"] == CONQUER, torch.zeros_like(masked)
        w, dividing = c, seeds[:, :1]
        if DIVIDE in phases:
            assert step.decoded is not None
            w = c * self._guidance(masked, step.decoded)
            places, found = self._pick(w)
            divide = step.memory["phase"] == DIVIDE
            dividing = divide & found
            conquering = conquering | (divide & ~found & members.any(1, keepdim=True))
            seeds.scatter_(1, places, dividing.expand_as(places))

        score, order, logit = c, step.log_confidence, None
        if self.network is not None:
            logit = self.network(evidence)
            score, order = torch.where(conquering & masked, logit.sigmoid(), c), torch.where(conquering, logit, order)
        rank = torch.where(masked, order, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        by_rule = torch.where(conquering, self._conquered(members, run, score, rank), evidence.margin > self.margin)
        transfer = torch.where(dividing, seeds, (by_rule | (score > self.sure)) & masked)
        rescue = (rank == 0) & ~transfer.any(1, keepdim=True)
        transfer = transfer | rescue
        forced = (rescue & conquering & (score < self.top_threshold)).sum(1)
        counts = {"forced": forced}
        if self.network is not None:
            counts["filter_commits"] = (transfer & conquering).sum(1) - forced

        strength = torch.where(dividing, w, score)
        hit = torch.where(dividing, strength >= self.grow_threshold, strength > self.spread_threshold)
        active = _active(before, torch.where(dividing, seeds, masked) & before, dividing) | seeds
        inside = (before & dividing) | _grow(active, hit, self.tolerance)
        progress = ((seeds & ~before) | self._grown(before, run, inside)).any(1, keepdim=True)
        return Decision(
            transfer, counts=counts, component=logit,
            memory=self._next(step.memory, inside, masked & ~transfer, strength, dividing, conquering, progress),
        )  # fmt: skip

    def _finalize(self, step: Step) -> Decision:
        """A step of rows that are all in Finalize, where they stay until their blocks end."""
        evidence, masked = step.evidence, step.evidence.masked
        transfer = ((evidence.margin > self.margin) | (evidence.confidence > self.sure)) & masked
        best = top_1(step.log_confidence)
        none = masked.new_zeros(len(masked), dtype=torch.long)
        counts = {"forced": none} | ({} if self.network is None else {"filter_commits": none})
        return Decision(torch.where(transfer.any(1, keepdim=True), transfer, best), counts=counts, memory=step.memory)

    def settings(self) -> dict[str, Any]:
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("network", "config")}
        return {"strategy": self.name} | own | {"filter": str(self.filter) if self.filter else None}

    def _guidance(self, masked: Tensor, decoded: Tensor) -> Tensor:
        """``W`` ``(b, K)``; 1 left of the first masked position, where its power could be infinite."""
        size = masked.shape[1]
        first = masked.byte().argmax(1, keepdim=True)
        share = (_places(size, masked.device) - first).clamp(min=0) / (size - 1 - first).clamp(min=1)
        return (self.beta + self.alpha * decoded[:, None]).clamp(max=1) ** share

    def _pick(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Soft-NMS: places of the seeds, ``(b, seeds)`` with repetitions, and whether there is one at all, ``(b, 1)``."""
        decay = _decay(w.shape[1], self.sigma, w.dtype, w.device)
        height, picks = w, [w.argmax(1)]
        for _ in range(self.seeds - 1):
            height = height * decay[picks[-1]]
            picks.append(height.argmax(1))
        places = torch.stack(picks, 1)
        # Heights only rank. The first place whose own weight is too low ends the search; the rest repeat the first seed.
        good = (w.gather(1, places) >= self.seed_threshold).byte().cumprod(1).bool()
        return torch.where(good, places, places[:, :1]), good[:, :1]

    def _conquered(self, members: Tensor, run: Tensor, score: Tensor, rank: Tensor) -> Tensor:
        """``members`` ``(b, K)`` that the factor rule commits within their clusters, numbered by ``run`` ``(b, K)``."""
        group = torch.where(members, run, -1) * rank.shape[1]
        key = group + rank  # sorts by cluster, then by score
        order = key.sort(dim=1).values
        better = torch.searchsorted(order, key) - torch.searchsorted(order, group)  # members of the cluster ahead
        return ((better + 2) * (1 - score) <= self.factor) & members

    def _grown(self, before: Tensor, run: Tensor, now: Tensor) -> Tensor:
        """Positions of clusters, numbered by ``run``, that are now part of a sufficiently larger one, ``(b, K)`` bool."""
        old = _sum_per_run(run, before)
        return (_sum_per_run(_run(now), now) - old >= self.growth * old) & before

    def _next(
        self, memory: dict[str, Tensor], inside: Tensor, left: Tensor, strength: Tensor,
        dividing: Tensor, conquering: Tensor, progress: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The memory after a step that leaves ``left`` ``(b, K)`` masked and clusters ``inside`` ``(b, K)``."""
        rest = inside & left
        mean = (strength * rest).sum(1, keepdim=True) / rest.sum(1, keepdim=True)  # NaN without any, and so not strong
        strong = torch.where(dividing, mean >= self.divide_exit, mean >= self.conquer_exit)
        steps = (memory["steps"] + 1) * dividing
        stalled = (memory["stalled"] + 1) * (dividing & ~progress)
        leave = strong | (steps >= self.divide_steps) | (stalled >= self.patience)
        full = (~left).sum(1, keepdim=True) >= self.finalize_share * left.shape[1]
        after = torch.where(strong, CONQUER, FINALIZE * full)
        return {
            "phase": torch.where(dividing, CONQUER * leave, torch.where(conquering, after, FINALIZE)),
            "steps": steps,
            "stalled": stalled,
            "inside": inside & (dividing | strong),
        }


@constant
def _places(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device)


@constant
def _decay(size: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a seed at ``i`` leaves of the weight at ``j`` under Soft-NMS, ``(size, size)``."""
    place = _places(size, device).to(dtype)
    return -torch.expm1(-(((place[:, None] - place) / (sigma * size)) ** 2))


def _run(member: Tensor) -> Tensor:
    """A number for each run of ``member``, shared with the position before the run; ``(b, K)`` bool to int64."""
    return (~member).cumsum(1)


def _sum_per_run(run: Tensor, flag: Tensor) -> Tensor:
    """How often ``flag`` holds in the run that a position belongs to; ``(b, K)`` int64, meaningless outside runs."""
    return run.new_zeros(run.shape[0], run.shape[1] + 1).scatter_add_(1, run, flag.long()).gather(1, run)


def _active(inside: Tensor, flag: Tensor, whole: Tensor) -> Tensor:
    """The clusters that growth starts from.

    Args:
        inside: ``(b, K)`` bool, the clusters.
        flag: ``(b, K)`` bool, some of their positions.
        whole: ``(b, 1)`` bool, True for the whole clusters that hold a flag, False for the span of each one's flags.

    Returns:
        ``(b, K)`` bool.
    """
    place = 2 * _places(inside.shape[1], inside.device)
    # The nearest flag or end of the cluster on either side, odd where it is a flag. The -2 of other positions yields to
    # anything on its left, and the 2K it leaves as a remainder to anything on its right.
    mark = torch.where(flag, place + 1, torch.where(inside, -2, place))
    left = mark.cummax(1).values & 1
    right = mark.remainder(2 * inside.shape[1] + 2).flip(1).cummin(1).values.flip(1) & 1
    return left + right + whole > 1  # for a whole cluster one side is enough


def _grow(active: Tensor, hit: Tensor, tolerance: int) -> Tensor:
    """Clusters after growth: ``active``, the hits that can be reached from it, and the misses stepped over on the way.

    A hit is reached from a position of the cluster if at most ``tolerance`` misses lie between. Misses between two active
    clusters are not stepped over.

    Args:
        active: ``(b, K)`` bool.
        hit: ``(b, K)`` bool.
        tolerance: Number of misses.

    Returns:
        ``(b, K)`` bool.
    """
    free = hit & ~active
    place = 4 * _places(hit.shape[1], hit.device) + free  # odd where the position is a free hit
    end = 4 * (hit.shape[1] + tolerance + 2)
    marked = free | active
    left = torch.where(marked, place, -end).cummax(1).values
    right = torch.where(marked, place, end).flip(1).cummin(1).values.flip(1)
    # Of a gap, the marked positions on both sides; of a marked position, itself.
    bridged = (right - left <= 4 * tolerance + 5) & ((left | right) & 1).bool()
    solid = active | bridged
    return (_sum_per_run(_run(solid), active) > 0) & solid
