"""Which forwards a step takes: the whole sequence, or a part of it against cached keys and values (arXiv 2505.22618)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from decoding.config import DecodeConfig
    from decoding.state import BatchState


@dataclass(frozen=True)
class ForwardPlan:
    """One forward of the predictor within a step, in terms of the batch's storage; ``n`` rows run.

    Attributes:
        slots: Slots whose rows take part: their result is used.
        rows: What runs: ``(n,)`` int64 slots, or a range, which costs no copy of keys. In a range that holds more than ``slots``
            the others run along; the step then has another forward for them, later, which overwrites what this one stored.
        first: Storage column each row begins at, ``(n, 1)`` int64 or the same number for all; ``None`` for the whole window.
        length: Columns each row runs on.
        last: ``(n, 1)`` int64, column from which a row repeats itself: the same keys are written twice to the same place.
        stop: Column past the last one that is attended to; ``None`` for the window's.
        end: ``(n, 1)`` int64, the same for each row; ``None`` where all rows go as far.
    """

    slots: Sequence[int]
    rows: slice | Tensor
    first: Tensor | int | None = None
    length: int = 0
    last: Tensor | None = None
    stop: int | None = None
    end: Tensor | None = None

    @property
    def whole(self) -> bool:
        """True if the rows run on all that they attend to."""
        return self.first is None


class CachePolicy(ABC):
    """Splits a step into forwards.

    Attributes:
        name: Its name in settings.
        keeps_keys: True if it needs the predictor's cache.
        sees_ahead: True if every forward runs on what is right of the active block, too.
    """

    name: ClassVar[str]
    keeps_keys: ClassVar[bool] = True
    sees_ahead: ClassVar[bool] = True

    def plans(self, state: "BatchState", context: int) -> list[ForwardPlan]:
        """The step's forwards, in order; each live row takes part in one of them.

        A row runs on the whole sequence at its block's first step, whose result also decides, and then every ``refresh``
        steps. Rows are at different steps of their blocks, so a batch may need both kinds of forward.

        Args:
            state: The rows.
            context: The predictor's ``left_context``: columns that a part takes along left of the block. A prompt has at
                least one token, so there are as many.
        """
        slots, period = state.scheduler.slots, self.period(state.config)
        due = [number for number, slot in enumerate(slots) if slot.step_in_block % period == 0]
        if len(due) == len(slots):
            return [ForwardPlan(due, slice(0, len(slots)))]
        rest = [number for number in range(len(slots)) if slots[number].step_in_block % period]
        plans = [self.part(state, rest, context)]
        return [*plans, ForwardPlan(due, state.upload(due))] if due else plans

    def period(self, config: "DecodeConfig") -> int:
        """Steps from one whole forward of a block to its next."""
        return config.refresh or config.block_length + 1  # no block takes so many steps

    @abstractmethod
    def part(self, state: "BatchState", taking: list[int], context: int) -> ForwardPlan:
        """The partial forward of some slots, with ``context`` columns left of their blocks."""


class NoCache(CachePolicy):
    """Every forward runs on the whole sequence, and is exact."""

    name = "none"
    keeps_keys = False

    def plans(self, state: "BatchState", context: int) -> list[ForwardPlan]:
        every = range(len(state.scheduler.slots))
        return [ForwardPlan(every, slice(0, len(every)))]

    def part(self, state: "BatchState", taking: list[int], context: int) -> ForwardPlan:
        raise NotImplementedError("a forward without a cache has no parts")


class Prefix(CachePolicy):
    """Keeps the keys and values left of the active block."""

    name = "prefix"

    def part(self, state: "BatchState", taking: list[int], context: int) -> ForwardPlan:
        size, (_, high), rows = state.config.block_length, state.window, _range(taking)
        blocks = [slot.block for slot in state.scheduler.slots[rows]]
        length = high - state.prompt_width - min(blocks) * size + context
        last = None if len(set(blocks)) == 1 else torch.full_like(state.block[rows, None], high - 1)
        first = begin(state, range(rows.start, rows.stop), rows) - context
        return ForwardPlan(taking, rows, first, length, last)


class Dual(CachePolicy):
    """Keeps the keys and values on both sides of the active block."""

    name = "dual"
    sees_ahead = False

    def part(self, state: "BatchState", taking: list[int], context: int) -> ForwardPlan:
        rows = _range(taking)
        first = begin(state, range(rows.start, rows.stop), rows) - context
        return ForwardPlan(taking, rows, first, state.config.block_length + context)


CACHES: dict[str, CachePolicy] = {policy.name: policy for policy in (NoCache(), Prefix(), Dual())}
"""Name to policy. A new one is one class and one entry here."""


def _range(taking: Sequence[int]) -> slice:
    """The slots from the first to the last that take part."""
    return slice(min(taking), max(taking) + 1)


def begin(state: "BatchState", slots: Sequence[int], rows: slice | Tensor) -> Tensor | int:
    """Storage column of the active block of each of ``slots``, which are ``rows``; one number where all are at the same."""
    blocks = {state.scheduler.slots[number].block for number in slots}
    if len(blocks) == 1:
        return state.prompt_width + blocks.pop() * state.config.block_length
    return state.prompt_width + state.block[rows, None] * state.config.block_length
