"""Adaptive parallel decoding (arXiv 2506.00413): the diffusion model drafts, a small autoregressive helper judges."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decoding.config import DecodeConfig
from decoding.eot import RULES, first_true
from decoding.evidence import lay_out
from decoding.output import Timer
from decoding.plan import CACHES, ForwardPlan
from decoding.read import in_chunks, read_block
from decoding.run import Request, Run
from decoding.scheduler import Slot
from decoding.step import Decision
from decoding.strategies.base import Strategy
from models.errors import InputError
from models.features import EVIDENCE, Evidence
from models.helper import Helper, HelperConfig, check_helper
from models.predictor import MaskPredictor, fingerprint, fingerprint_in_memory
from models.rules import FOLDER, LENGTH, SHARE, Rule, check
from models.stock import helper_folder, load_any_helper, outline_helper


@dataclass
class APD(Strategy):
    """Decodes left to right; accepts the draft's longest prefix that the mixture of both models would have drawn as well.

    The draft is ``x_j ~ p_D``, each position by itself; the target is ``p_T ~ p_D^R p_AR^(1-R)``, ``p_AR`` conditioned on the
    draft's own prefix. Both are drawn with the same Gumbel noise, and agree as often as the two distributions do. The first
    position is always accepted. Source: arXiv 2506.00413.

    Args:
        helper: Folder of an exported helper; or folder or hub id of a causal language model over the predictor's token ids, as
            it was published.
        mixture_weight: R: 1 accepts every draft, 0 only what the helper itself would say.
        kv_window: W: the predictor's keys and values are computed anew for the last so many committed tokens, beside those
            accepted since; older ones are kept. ``None`` keeps none, which is exact.
        max_lookahead: M: MASK positions that the predictor is given; ``None`` for all that are left.
        network: A helper to use instead of the one in ``helper``, which is loaded to the predictor's device at the first decode.
    """

    helper: str | Path | None = None
    mixture_weight: float = 0.7
    kv_window: int | None = None
    max_lookahead: int | None = None
    network: Helper | None = field(default=None, repr=False)
    name = "apd"
    component = "helper_commits"

    def __post_init__(self) -> None:
        window = LENGTH.or_null()
        rules = {"helper": FOLDER.or_null(), "mixture_weight": SHARE, "kv_window": window, "max_lookahead": window}
        rules["network"] = Rule(
            "a Helper", lambda value: isinstance(getattr(value, "config", None), HelperConfig)
        ).or_null()
        check(vars(self), rules, f"{self.name}.")
        if self.network is None:
            if self.helper is None:
                raise InputError("helper", None, "the folder of an exported helper")
            helper_folder(self.helper)

    def fingerprints(self) -> dict[str, str]:
        if self.helper:
            return {"helper": fingerprint(helper_folder(self.helper))}
        assert self.network is not None
        return {"helper": fingerprint_in_memory(self.network.model)}

    def prepare(self, predictor: MaskPredictor, config: DecodeConfig) -> None:
        if self.network is None:
            assert self.helper is not None
            self.network = load_any_helper(helper_folder(self.helper), predictor)
        _check_settings(config)
        differences = check_helper(
            self.network.config, family=predictor.family, vocab_size=predictor.vocab_size, mask_id=predictor.ids.mask,
            eot_id=predictor.ids.eot, fingerprint=predictor.fingerprint, gen_length=config.gen_length,
        )  # fmt: skip
        for difference in differences:
            warnings.warn(difference, stacklevel=2)
        self.network.to(predictor.device)

    def outlined(self, predictor: MaskPredictor, config: DecodeConfig) -> Strategy:
        _check_settings(config)
        if self.network is not None:
            return self
        assert self.helper is not None
        return replace(self, network=outline_helper(helper_folder(self.helper), predictor))

    def taken(self, config: DecodeConfig) -> DecodeConfig:
        return replace(config, block_length=config.gen_length, steps=None, cache="none", refresh=None)

    @property
    def networks(self) -> list[nn.Module]:
        return [] if self.network is None else [self.network.model]

    def start(self, request: Request) -> Run:
        if request.regions is not None:
            raise InputError("regions", "given", "none with apd, which decodes from the first position on")
        return ApdRun(request, self)

    def settings(self) -> dict[str, Any]:
        return {
            "strategy": self.name, "mixture_weight": self.mixture_weight, "kv_window": self.kv_window,
            "max_lookahead": self.max_lookahead, "helper": str(self.helper) if self.helper else None,
        }  # fmt: skip


def _check_settings(config: DecodeConfig) -> None:
    if RULES[config.eot].reads_region:
        accepted = " | ".join(name for name, rule in RULES.items() if not rule.reads_region)
        raise InputError("eot", f"{config.eot!r} with apd, which decodes left to right", accepted)
    if CACHES[config.cache].keeps_keys:
        raise InputError("cache", f"{config.cache!r} with apd, which has its own", "none, and apd.kv_window")


@dataclass(frozen=True)
class Draft:
    """The lookahead of some rows: ``n`` rows, ``N`` positions in all, one row's after the other's.

    Attributes:
        numbers: Their slots, on the host.
        slots: What the host knows of them.
        lengths: Positions looked at, one number a row.
        ends: Place past the last of them, likewise.
        rows: Their slots, ``(n,)`` int64, or a range where they are all of them, in order.
        inside: ``(n, G)`` bool, the positions of the generated region that are looked at.
        row: ``(N,)`` int64, number of each position's row among the ``n``.
        place: ``(N,)`` int64, its place in the generated region.
        done: ``(n, 1)`` int64, committed positions; the lookahead begins there.
        end: ``(n, 1)`` int64, place past the last one looked at.
    """

    numbers: list[int]
    slots: list[Slot]
    lengths: list[int]
    ends: list[int]
    rows: slice | Tensor
    inside: Tensor
    row: Tensor
    place: Tensor
    done: Tensor
    end: Tensor


class ApdRun(Run):
    """A request decoded left to right; the generated region is one block, of which a prefix is decoded.

    Args:
        request: What to decode.
        strategy: Its strategy.
    """

    def __init__(self, request: Request, strategy: APD) -> None:
        self.strategy = strategy
        super().__init__(request, strategy.taken(request.config))
        assert strategy.network is not None
        self.helper = strategy.network
        self.helper_cache = None
        if strategy.mixture_weight < 1:
            self.helper_cache = self.helper.allocate_cache(len(self.scheduler.slots), len(self.state.storage))
        if strategy.kv_window is not None:
            self.keep_keys()
        self.helper_timer = Timer(self.state.device)
        self.needs = EVIDENCE if request.record else frozenset[str]()

    def decide(self) -> tuple[Evidence, Decision]:
        state, slots = self.state, self.scheduler.slots
        fields: dict[str, Tensor] = {}
        accepted, looked = torch.zeros_like(state.masked), torch.zeros_like(state.masked)
        self.noise.begin(self.scheduler.rows)
        # Rows that begin have a whole prompt to go through; the others do not wait for them.
        for begins in (True, False):
            numbers = [number for number, slot in enumerate(slots) if (slot.steps == 0) is begins]
            if not numbers:
                continue
            draft = self._lookahead(numbers)
            hidden = self._predict(draft)
            found = self._read(draft, hidden)
            row = draft.row if isinstance(draft.rows, slice) else draft.rows[draft.row]
            lay_out(fields, found, row * len(state.region) + draft.place, state.masked.shape)
            looked[draft.rows] = draft.inside
            accepted[draft.rows] = self._judge(draft, hidden, found["token"], fields["token"][draft.rows])
        for slot in slots:
            slot.last_committed = self.config.gen_length - slot.left
        kept = {name: fields[name] for name in ("margin", "entropy") if name in fields}
        confidence = fields["log_confidence"].exp()
        if self.request.record:  # a position is judged once: it has no history
            kept |= {"stable": torch.zeros_like(fields["token"]), "previous": torch.zeros_like(confidence)}
        evidence = Evidence(state.masked_block, fields["token"], confidence, **kept)
        return evidence, Decision(accepted, counts=self._counts(accepted, looked, evidence.token))

    def _counts(self, accepted: Tensor, looked: Tensor, token: Tensor) -> dict[str, Tensor]:
        """What the helper did, ``(b,)`` int64 each, from what was looked at and accepted and the draft, ``(b, G)`` each.

        ``helper_commits`` are positions accepted beyond the first that stay in the text, its EoT included;
        ``helper_refusals`` is 1 where one was refused, not where the text or the lookahead ended first.
        """
        state, asked = self.state, torch.full_like(self.state.block, int(self.helper_cache is not None))
        last = torch.full_like(asked, self.config.gen_length)
        if self.config.eot != "off":
            last = first_true(accepted & (token == self.predictor.ids.eot))
        stays = (accepted & (state.region <= last[:, None])).sum(1)
        refused = (last == self.config.gen_length) & (accepted != looked).any(1)
        return {"helper_commits": asked * (stays - 1), "helper_refusals": asked * refused, "helper_forwards": asked}

    def _lookahead(self, numbers: list[int]) -> Draft:
        state, region = self.state, self.state.region
        slots = [self.scheduler.slots[number] for number in numbers]
        lengths = [min(slot.left, self.strategy.max_lookahead or slot.left) for slot in slots]
        starts = [self.config.gen_length - slot.left for slot in slots]
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        known = state.upload([numbers, starts, ends])
        done, end = known[1, :, None], known[2, :, None]
        rows = slice(0, len(numbers)) if len(numbers) == len(self.scheduler.slots) else known[0]
        inside = (region >= done) & (region < end)
        at = inside.view(-1).nonzero_static(size=sum(lengths))[:, 0]
        return Draft(numbers, slots, lengths, ends, rows, inside, at // len(region), at % len(region), done, end)

    def _predict(self, draft: Draft) -> Tensor:
        """The predictor's hidden states of the lookahead, ``(N, D)``."""
        state, window = self.state, self.strategy.kv_window
        base, low = state.prompt_width, state.window[0]
        stop = base + max(draft.ends)
        rows, end = draft.rows, None if base + min(draft.ends) == stop else base + draft.end
        if window is None or not draft.slots[0].steps:
            plan, length, first = ForwardPlan(draft.numbers, rows, stop=stop, end=end), stop - low, low
        else:
            window = max(window, self.predictor.left_context)  # the lookahead begins right of what is committed
            starts = [max(slot.last_committed - window, -slot.width) for slot in draft.slots]
            length = max(end - start for start, end in zip(starts, draft.ends, strict=True))
            begins = base + state.upload(starts)
            plan = ForwardPlan(draft.numbers, rows, begins[:, None], length, base + draft.end - 1, stop, end)
            first = begins[draft.row]
        return self.forward(plan, draft.row * length + base + draft.place - first)

    def _read(self, draft: Draft, hidden: Tensor) -> dict[str, Tensor]:
        """The draft itself, and what else is asked for of it; fields ``(N,)`` of :func:`decoding.read.read_block`."""
        ids = self.predictor.ids

        def read(logits: Tensor, part: slice) -> dict[str, Tensor]:
            return read_block(logits, ids, self.needs, self._noisy(draft, part) if self.config.temperature else None)

        return in_chunks(hidden, self.logits, self.predictor.vocab_size, read)

    def _noisy(self, draft: Draft, part: slice) -> Callable[[Tensor], Tensor]:
        """Adds a part of the draft's noise to scores: one Gumbel draw a position, the same for the draft and the target."""
        rows = [slot.row for slot in draft.slots]
        return lambda scores: self.noise.add(scores, rows, draft.lengths, part.start)

    def _judge(self, draft: Draft, hidden: Tensor, token: Tensor, text: Tensor) -> Tensor:
        """The draft's accepted prefixes, ``(n, G)`` bool, at least one position each.

        The target is ``p_D^R p_AR^(1-R)``. Neither is normalised: what that would take off is the same for every token.

        Args:
            draft: The lookahead.
            hidden: ``(N, D)``, the predictor's.
            token: ``(N,)`` int64, the draft.
            text: ``(n, G)`` int64, the same laid out in the generated region.
        """
        weight, mask = self.strategy.mixture_weight, self.predictor.ids.mask
        if self.helper_cache is None:
            return draft.inside

        def read(said: Tensor, part: slice) -> dict[str, Tensor]:
            # Ids beyond the helper's vocabulary are never accepted.
            target = torch.full((len(said), self.predictor.vocab_size), -torch.inf, device=said.device)
            size = min(said.shape[1], target.shape[1])
            target[:, :size] = said[:, :size].float() * (1 - weight)
            if weight > 0:
                target += self.predictor.logits(hidden[part]).float().mul_(weight)
            target[:, mask] = -torch.inf
            return {"refused": self._noisy(draft, part)(target).argmax(-1) != token[part]}

        with self.helper_timer:
            said = self._ask(draft, text)
            refused = in_chunks(said, self.helper.logits, self.predictor.vocab_size, read)["refused"]
        refused &= draft.place != draft.done[draft.row, 0]
        laid = torch.zeros_like(draft.inside)
        laid.view(-1).index_copy_(0, draft.row * laid.shape[1] + draft.place, refused)
        return draft.inside & (laid.cumsum(1) == 0)

    def _ask(self, draft: Draft, text: Tensor) -> Tensor:
        """The helper's hidden states for the lookahead given the draft's own prefix, ``(N, D)``.

        Its cache holds the tokens before the last committed one: what was rejected lies right of that, is written over here,
        and is invisible until then, because the helper is causal.
        """
        assert self.helper_cache is not None
        state = self.state
        width = state.upload([slot.width for slot in draft.slots])[:, None]
        text = torch.where(state.region < draft.done, state.generated[draft.rows], text)
        row = torch.cat((state.ids[draft.rows, : state.prompt_width], text), 1)
        begins = not draft.slots[0].steps
        start = torch.zeros_like(width) if begins else width + draft.done - 1
        length = max(slot.width for slot in draft.slots) if begins else 1
        columns = start + state.storage[: length + max(draft.lengths) - 1]
        columns = torch.minimum(columns, width + draft.end - 2)
        ids = row.gather(1, state.prompt_width - width + columns)
        stop = max(slot.width + end for slot, end in zip(draft.slots, draft.ends, strict=True)) - 1
        rows = None if isinstance(draft.rows, slice) else draft.rows
        hidden = self.helper.hidden(ids, columns, self.helper_cache, rows, stop)
        at = (width - 1 - start)[draft.row, 0] + draft.place
        return hidden.flatten(0, 1)[draft.row * columns.shape[1] + at]

    def text_length(self, slot: Slot) -> int:
        return self.config.gen_length - slot.left

    @property
    def key_bytes(self) -> int:
        return super().key_bytes + (0 if self.helper_cache is None else self.helper_cache.nbytes)

    def shrink(self) -> None:
        super().shrink()
        if self.helper_cache is not None and self.scheduler.slots:
            self.helper_cache.shrink(len(self.scheduler.slots), self.scheduler.width + self.config.gen_length)

    def moved(self, source: int, target: int) -> None:
        super().moved(source, target)
        if self.helper_cache is not None:
            self.helper_cache.move(source, target)

    def close(self) -> None:
        super().close()
        self.output.helper_seconds = self.helper_timer.read()
