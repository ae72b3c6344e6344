"""Which forwards a step takes: the whole sequence, or a part of it against cached keys and values (arXiv 2505.22618)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from decoding.config import DecodeConfig
from decoding.state import BatchState, Slot
from models.llada import KVCache


@dataclass(frozen=True)
class Look:
    """One forward of the predictor within a step.

    Attributes:
        slots: Slots of the rows that take part; ``None`` for all.
        whole: True over the whole sequence, False over what the cache does not hold.
    """

    slots: list[int] | None
    whole: bool


@dataclass
class Inputs:
    """What a forward is given; ``n`` rows of ``T`` columns, ``S`` columns attended to.

    Attributes:
        ids: ``(n, T)`` int64.
        attention: ``(n, S)`` bool, or ``None`` if everything is attended to.
        positions: ``(n, T)`` int64.
        first: Column of the active block's first position in the forward: ``(n, 1)`` int64, or one number for all.
        cache: The predictor's cache arguments; empty without one.
    """

    ids: Tensor
    attention: Tensor | None
    positions: Tensor
    first: Tensor | int
    cache: dict[str, Any] = field(default_factory=dict)


def looks(slots: Sequence[Slot], config: DecodeConfig) -> list[Look]:
    """Splits a step into at most two forwards.

    A row takes the whole sequence at its block's first step, whose result also decides, and then every ``refresh`` steps.
    Rows are at different steps of their blocks, so a batch may need both kinds of forward; each row is in one of them.
    """
    if config.cache == "none":
        return [Look(None, whole=True)]
    due = [slot.step_in_block % (config.refresh or config.block_length + 1) == 0 for slot in slots]
    if all(due) or not any(due):
        return [Look(None, whole=due[0])]
    return [Look([n for n, is_due in enumerate(due) if is_due is whole], whole) for whole in (True, False)]


def inputs(state: BatchState, look: Look, index: Tensor | None, cache: KVCache | None) -> Inputs:
    """Gathers a forward's inputs.

    Args:
        state: The rows being decoded.
        look: Which rows, and how much of them.
        index: ``look.slots`` on the device, ``None`` for all.
        cache: Storage for all slots and columns, where there is one.

    Returns:
        The inputs. In a partial forward over a batch whose blocks differ, short rows repeat their last column: the same
        keys are then written twice to the same place.
    """
    low, high = state.window
    size, base = state.config.block_length, state.prompt_width - low

    def rows(value: Tensor) -> Tensor:
        return value if index is None else value[index]

    ids, positions = rows(state.ids[:, low:high]), rows(state.positions[:, low:high])
    attention = None if state.all_attended else rows(state.attention[:, low:high])
    first = base + rows(state.block)[:, None] * size
    arguments: dict[str, Any] = {}
    if cache is not None:
        arguments = {"cache": cache.window(len(state.slots), low, high), "cache_rows": index}
    if look.whole:
        return Inputs(ids, attention, positions, first, arguments)
    length = size
    if state.config.cache == "prefix":
        taking = state.slots if look.slots is None else [state.slots[number] for number in look.slots]
        length = high - state.prompt_width - min(slot.block for slot in taking) * size
    columns = first + state.region[:length]
    if state.config.cache == "prefix":
        columns = columns.clamp(max=high - low - 1)
    arguments["cache_index"] = columns
    return Inputs(ids.gather(1, columns), attention, positions.gather(1, columns), 0, arguments)
