"""Adaptive parallel decoding (arXiv 2506.00413): the diffusion model drafts, a small autoregressive helper judges."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from decoding.cache import Inputs
from decoding.output import Timer
from decoding.read import read_block
from decoding.run import Request, Run
from decoding.state import Slot
from decoding.strategies.apd import APD
from decoding.strategies.base import Decision
from models.features import Evidence


@dataclass(frozen=True)
class Draft:
    """The lookahead of some rows, ``n`` rows of ``m`` positions from each row's first masked one.

    Attributes:
        numbers: ``(n,)`` int64, their slots.
        slots: What the host knows of them.
        lengths: Positions looked at, one number a row.
        done: ``(n, 1)`` int64, committed positions.
        ahead: ``(n, 1)`` int64, ``lengths`` on the device; positions beyond repeat the last one and are not used.
    """

    numbers: Tensor
    slots: list[Slot]
    lengths: list[int]
    done: Tensor
    ahead: Tensor


class ApdRun(Run):
    """A request decoded left to right; the generated region is one block, of which a prefix is decoded.

    Args:
        request: What to decode.
        strategy: Its strategy.
    """

    def __init__(self, request: Request, strategy: APD) -> None:
        self.strategy = strategy
        super().__init__(request, replace(request.config, block_length=request.config.gen_length, steps=None))
        width, device = self.state.ids.shape[1], self.state.ids.device
        assert strategy.network is not None
        self.helper = strategy.network
        self.helper_cache = self.helper.allocate_cache(self.capacity, width) if strategy.mixture_weight < 1 else None
        if strategy.kv_window is not None:
            self.keep_keys()
        self.helper_timer = Timer(device)
        self.places = torch.arange(width, device=device)
        self.needs = frozenset({"margin", "entropy"}) if request.record else frozenset[str]()

    def decide(self) -> tuple[Evidence, Decision]:
        state = self.state
        fields: dict[str, Tensor] = {}
        accepted = state.masked.new_zeros(state.masked.shape)
        # Rows that begin have a whole prompt to go through; the others do not wait for them.
        for begins in (True, False):
            numbers = [number for number, slot in enumerate(state.slots) if (slot.steps == 0) is begins]
            if not numbers:
                continue
            draft = self._lookahead(numbers)
            logits = self._predict(draft)
            noise = self._draw(draft, logits)
            found = read_block(logits.flatten(0, 1), self.predictor.ids, self.needs, noise)
            token = found["token"].view(len(numbers), -1)
            kept = self._judge(draft, logits, token, noise)
            index = draft.numbers[:, None]
            offset = (state.region - draft.done).clamp(0, token.shape[1] - 1)
            inside = (state.region >= draft.done) & (state.region < draft.done + draft.ahead)
            accepted[draft.numbers] = inside & (state.region < draft.done + kept[:, None])
            for name, values in found.items():
                laid = fields.setdefault(name, values.new_zeros(state.masked.shape))
                laid[index, state.region] = values.view(len(numbers), -1).gather(1, offset) * inside
        for slot in state.slots:
            slot.before = self.config.gen_length - slot.left
        zero = torch.zeros_like(fields["confidence"])
        evidence = Evidence(
            state.masked_block, fields["token"], fields["confidence"], fields.get("margin", zero),
            fields.get("entropy", zero), torch.zeros_like(fields["token"]), zero,
        )  # fmt: skip
        asked = torch.full_like(state.block, int(self.helper_cache is not None))
        counts = {"helper_commits": accepted.sum(1) - 1, "helper_forwards": asked}
        return evidence, Decision(accepted, counts=counts)

    def _lookahead(self, numbers: list[int]) -> Draft:
        state, device = self.state, self.state.ids.device
        slots = [state.slots[number] for number in numbers]
        lengths = [min(slot.left, self.strategy.max_lookahead or slot.left) for slot in slots]
        known = torch.tensor([numbers, [self.config.gen_length - slot.left for slot in slots], lengths]).to(device)
        return Draft(known[0], slots, lengths, known[1, :, None], known[2, :, None])

    def _predict(self, draft: Draft) -> Tensor:
        """The predictor's logits for the lookahead, ``(n, m, V)`` float32."""
        state, window = self.state, self.strategy.kv_window
        low = state.window[0]
        base = state.prompt_width - low  # column of the first generated position
        ends = [
            base + self.config.gen_length - slot.left + length
            for slot, length in zip(draft.slots, draft.lengths, strict=True)
        ]
        high = max(ends)
        ids, positions = state.ids[draft.numbers, low : low + high], state.positions[draft.numbers, low : low + high]
        visible = state.attention[draft.numbers, low : low + high] & (
            self.places[:high] < base + draft.done + draft.ahead
        )
        arguments: dict[str, Any] = {}
        first: Tensor | int = 0
        if self.cache is not None:
            arguments = {"cache": self.cache.window(len(state.slots), low, low + high), "cache_rows": draft.numbers}
        if window is not None and draft.slots[0].steps:
            starts = [base + max(slot.before - window, -slot.width) for slot in draft.slots]
            length = max(end - start for start, end in zip(starts, ends, strict=True))
            first = torch.tensor(starts).to(ids.device)[:, None]
            columns = torch.minimum(first + self.places[:length], base + draft.done + draft.ahead - 1)
            arguments["cache_index"] = columns
            ids, positions = ids.gather(1, columns), positions.gather(1, columns)
        ahead = self._steps(draft)
        at = state.numbers[: len(ids), None] * ids.shape[1] + base + draft.done + ahead - first
        logits = self.forward(Inputs(ids, visible, positions, 0, arguments), at.view(-1))
        return logits.float().view(*ahead.shape, -1)

    def _steps(self, draft: Draft) -> Tensor:
        """0, 1, ... along the lookahead, ``(n, m)``, staying at each row's last position."""
        return torch.minimum(self.places[: max(draft.lengths)], draft.ahead - 1)

    def _draw(self, draft: Draft, logits: Tensor) -> Tensor | None:
        """One Gumbel draw a position, ``(n * m, V)``, for the draft and the target alike; ``None`` at temperature 0."""
        noise = self.noise.draw([slot.row for slot in draft.slots], draft.lengths, logits.shape[2])
        if noise is None:
            return None
        live = (self.places[: logits.shape[1]] < draft.ahead).view(-1).nonzero_static(size=sum(draft.lengths))[:, 0]
        laid = noise.new_zeros(len(draft.lengths) * logits.shape[1], logits.shape[2])
        return laid.index_copy_(0, live, noise)

    def _judge(self, draft: Draft, logits: Tensor, token: Tensor, noise: Tensor | None) -> Tensor:
        """Length of the draft's accepted prefix.

        Args:
            draft: The lookahead.
            logits: ``(n, m, V)`` float32 of the predictor, MASK at minus infinity.
            token: ``(n, m)`` int64, the draft.
            noise: ``(n * m, V)`` float32, what the draft was drawn with.

        Returns:
            ``(n,)`` int64, at least 1.
        """
        weight = self.strategy.mixture_weight
        if self.helper_cache is None:
            return draft.ahead[:, 0]
        with self.helper_timer:
            said = self._ask(draft, token)
        target = torch.full_like(logits, -torch.inf)  # ids beyond the helper's vocabulary are never accepted
        size = min(said.shape[2], logits.shape[2])
        target[..., :size] = said[..., :size].float().log_softmax(-1) * (1 - weight)
        if weight > 0:
            target += logits.log_softmax(-1) * weight
        target[..., self.predictor.ids.mask] = -torch.inf
        if noise is not None:
            target += noise.view(target.shape)
        agreed = target.argmax(-1) == token
        agreed[:, 0] = True
        agreed &= self.places[: token.shape[1]] < draft.ahead
        return agreed.long().cumprod(1).sum(1)

    def _ask(self, draft: Draft, token: Tensor) -> Tensor:
        """The helper's logits for the lookahead given the draft's own prefix, ``(n, m, V')``.

        Its cache holds the tokens before the last committed one: what was rejected lies right of that, is written over here,
        and is invisible until then, because the helper is causal.
        """
        assert self.helper_cache is not None
        state = self.state
        width = torch.tensor([slot.width for slot in draft.slots]).to(token.device)[:, None]
        offset = (state.region - draft.done).clamp(0, token.shape[1] - 1)
        text = torch.where(state.region < draft.done, state.generated[draft.numbers], token.gather(1, offset))
        row = torch.cat((state.ids[draft.numbers, : state.prompt_width], text), 1)
        begins = not draft.slots[0].steps
        start = torch.zeros_like(width) if begins else width + draft.done - 1
        length = max(slot.width for slot in draft.slots) if begins else 1
        columns = torch.minimum(
            start + self.places[: length + token.shape[1] - 1], width + draft.done + draft.ahead - 2
        )
        ids = row.gather(1, state.prompt_width - width + columns)
        logits = self.helper(ids, columns, self.helper_cache, draft.numbers)
        answers = width + draft.done - 1 - start + self._steps(draft)
        return logits.gather(1, answers[..., None].expand(-1, -1, logits.shape[2]))

    def text_length(self, slot: Slot) -> int:
        return self.config.gen_length - slot.left

    def moved(self, source: int, target: int) -> None:
        super().moved(source, target)
        if self.helper_cache is not None:
            self.helper_cache.move(source, target)

    def close(self) -> None:
        super().close()
        self.output.helper_seconds = self.helper_timer.read()
