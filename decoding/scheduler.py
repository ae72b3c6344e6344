"""Which prompt is in which row of the batch: what the host knows, without a tensor."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from decoding.config import DecodeConfig


@dataclass
class Slot:
    """What the host knows of one row, so that it can plan a forward without asking the device.

    Attributes:
        row: Index of its prompt.
        width: Tokens of the prompt.
        left: Masked positions of the generated region.
        block_masked: Masked positions of the active block.
        end: Generated positions that are left after the end of the text was accepted.
        block: Number of the active block.
        steps: Forwards so far.
        step_in_block: Forwards so far in the active block.
        last_committed: Committed positions at the last forward, where they are committed left to right.
        checked: Positions of the text that the call's ``stop`` has been asked about.
    """

    row: int
    width: int
    left: int
    block_masked: int
    end: int
    block: int = 0
    steps: int = 0
    step_in_block: int = 0
    last_committed: int = 0
    checked: int = 0


@dataclass(frozen=True)
class Changes:
    """What :meth:`Scheduler.retire` did; tensors follow by doing ``moves`` in order, then ``admitted``, then closing.

    Attributes:
        moves: ``(source, target)`` slots: a row that took the place of a retired one.
        admitted: Slots that hold a new prompt.
    """

    moves: list[tuple[int, int]]
    admitted: list[int]


class Scheduler:
    """Rows of a batch: the longest prompts first, so that memory peaks at the start; a retired row's slot goes to the next.

    Args:
        widths: Tokens of each prompt.
        config: Decode settings.
        capacity: Most rows at a time.
        begun: For each prompt whose region is not all MASK, a slot's ``left``, ``block_masked``, ``end`` and ``block``.

    Attributes:
        slots: The live rows.
    """

    def __init__(
        self, widths: Sequence[int], config: DecodeConfig, capacity: int, begun: Sequence[Sequence[int]] | None = None
    ) -> None:
        fresh = (config.gen_length, config.block_length, config.gen_length, 0)
        self.widths, self.config, self.begun = widths, config, begun or [fresh] * len(widths)
        self.waiting = deque(sorted(range(len(widths)), key=lambda row: -widths[row]))
        self.slots = [self._admit() for _ in range(capacity)]

    def _admit(self) -> Slot:
        row = self.waiting.popleft()
        return Slot(row, self.widths[row], *self.begun[row])

    @property
    def rows(self) -> list[int]:
        """Index of each live row's prompt."""
        return [slot.row for slot in self.slots]

    @property
    def width(self) -> int:
        """Tokens of the longest prompt among the live rows."""
        return max(slot.width for slot in self.slots)

    @property
    def end(self) -> int:
        """Generated positions that any live row still needs, up to a block's end."""
        size = self.config.block_length
        return -(-max(slot.end for slot in self.slots) // size) * size

    @property
    def unpadded(self) -> bool:
        """True if every live row needs every column from the first prompt token to :attr:`end`: no attention mask is needed."""
        width, end = self.slots[0].width, self.end
        return all(slot.width == width and slot.end == end for slot in self.slots)

    def advance(self, progress: Sequence[tuple[int, int, int, int]]) -> list[int]:
        """Counts a step.

        Args:
            progress: What the device says of each row afterwards: ``left``, ``block_masked``, ``block`` and ``end`` of a slot.

        Returns:
            Slots whose row has nothing masked any more.
        """
        for slot, known in zip(self.slots, progress, strict=True):
            slot.steps += 1
            slot.step_in_block = slot.step_in_block + 1 if known[2] == slot.block else 0
            slot.left, slot.block_masked, slot.block, slot.end = known
        return [number for number, slot in enumerate(self.slots) if not slot.left]

    def retire(self, finished: Sequence[int]) -> Changes:
        """Takes finished rows out; admits a waiting prompt into each of their slots, closes those that are left over."""
        places = sorted(finished)
        refilled = min(len(places), len(self.waiting))
        changes = Changes([], places[:refilled])
        for number in changes.admitted:
            self.slots[number] = self._admit()
        for number in reversed(places[refilled:]):  # all of them above those: what is moved is never a new row
            last = len(self.slots) - 1
            if number != last:
                changes.moves.append((last, number))
                self.slots[number] = self.slots[last]
            self.slots.pop()
        return changes
