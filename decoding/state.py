"""The state of a batch while it is decoded."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.config import DecodeConfig
from models.predictor import TokenIds


@dataclass
class Slot:
    """What the host knows of one row, so that it can plan a forward without asking the device.

    Attributes:
        row: Index of its prompt.
        width: Tokens of the prompt.
        left: Masked positions of the generated region.
        here: Masked positions of the active block.
        block: Number of the active block.
        end: Generated positions that are left after the end of the text was accepted.
        steps: Forwards so far.
        step_in_block: Forwards so far in the active block.
        before: Committed positions at the last forward, where they are committed left to right.
        checked: Positions of the text that the call's ``stop`` has been asked about.
    """

    row: int
    width: int
    left: int
    here: int
    end: int
    block: int = 0
    steps: int = 0
    step_in_block: int = 0
    before: int = 0
    checked: int = 0


class BatchState:
    """The rows being decoded, one a slot; a finished row's slot goes to the next prompt, or is closed.

    Storage has ``P + G`` columns: prompts left-padded to the longest of the call, then the generated region. It is
    allocated once; forwards see the columns of :meth:`window`. ``b`` is the number of live slots, the first dimension of
    every tensor here.

    Attributes:
        slots: The host's knowledge, ``b`` entries.
        rows: ``(b,)`` int64 on the CPU, index of each slot's prompt.
        numbers: ``(b,)`` int64, 0 to ``b - 1``.
        ids: ``(b, P + G)`` int64.
        attention: ``(b, P + G)`` bool, False on padding and right of an accepted end of the text.
        positions: ``(b, P + G)`` int64, counted from the row's first real token.
        masked: ``(b, G)`` bool, not decoded yet; tracked apart from ``ids``, so a prompt may hold any token.
        end: ``(b,)`` int64, generated positions that are left.
        block: ``(b,)`` int64, number of the active block.
        columns: ``(b, K)`` int64, the active block's positions in the generated region.
        masked_block: ``(b, K)`` bool, which of them are masked.
        step_in_block: ``(b,)`` int64, forwards so far in the active block.
        last_token: ``(b, K)`` int64, the guesses one step earlier.
        last_confidence: ``(b, K)`` float32, their confidence; zero at a block's first step.
        stable: ``(b, K)`` int64, see :class:`models.features.Evidence`.
        memory: The strategy's own, see :class:`decoding.strategies.Step`.
        distribution: ``(b, K, V)`` float32 log-probabilities one step earlier, where the strategy needs them.
    """

    def __init__(
        self,
        ids: TokenIds,
        prompts: Sequence[Sequence[int]],
        config: DecodeConfig,
        slots: int,
        device: torch.device,
        memory: Mapping[str, Tensor],
        distribution: int = 0,
    ) -> None:
        """Fills the first ``slots`` prompts in.

        Args:
            ids: Special token ids.
            prompts: All prompts of the call.
            config: Decode settings.
            slots: Rows decoded together.
            device: Where the predictor is.
            memory: The strategy's memory of one row as a block begins, ``(1, ...)`` tensors.
            distribution: Vocabulary size if the last step's distributions are to be kept, else 0.
        """
        self.token_ids, self.prompts, self.config = ids, prompts, config
        self.prompt_width = max(len(prompt) for prompt in prompts)
        size, region = config.block_length, config.gen_length
        length = self.prompt_width + region

        def empty(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        self.ids, self.positions = empty(length), empty(length)
        self.attention, self.masked = empty(length, dtype=torch.bool), empty(region, dtype=torch.bool)
        self.end, self.block, self.step_in_block = empty(), empty(), empty()
        self.last_token, self.stable = empty(size), empty(size)
        self.last_confidence = empty(size, dtype=torch.float32)
        self.initial = {name: value.to(device) for name, value in memory.items()}
        self.memory = {name: value.expand(slots, *value.shape[1:]).clone() for name, value in self.initial.items()}
        self.distribution = empty(size, distribution, dtype=torch.float32) if distribution else None
        self.every = torch.arange(slots, device=device)
        self.offsets, self.region = torch.arange(size, device=device), torch.arange(region, device=device)
        self.waiting = deque(range(len(prompts)))
        self.slots = [self._fill(slot, self.waiting.popleft()) for slot in range(slots)]
        self._look()

    def _fill(self, slot: int, row: int) -> Slot:
        """Puts a prompt and a fully masked region into a slot."""
        prompt, region = self.prompts[row], self.config.gen_length
        pad = self.prompt_width - len(prompt)
        ids = torch.full((self.ids.shape[1],), self.token_ids.mask)
        ids[:pad] = self.token_ids.pad
        ids[pad : self.prompt_width] = torch.as_tensor(prompt)
        columns = torch.arange(len(ids))
        self.ids[slot] = ids.to(self.ids.device)
        self.attention[slot] = (columns >= pad).to(self.ids.device)
        self.positions[slot] = (columns - pad).clamp(min=0).to(self.ids.device)
        self.masked[slot] = True
        self.end[slot] = region
        self.block[slot] = self.step_in_block[slot] = 0
        return Slot(row, len(prompt), left=region, here=self.config.block_length, end=region)

    def _look(self) -> None:
        """Brings what depends on the slots and their blocks up to date."""
        self.rows = torch.tensor([slot.row for slot in self.slots])
        self.numbers = self.every[: len(self.slots)]
        self.columns = self.block[:, None] * self.config.block_length + self.offsets
        self.masked_block = self.masked.gather(1, self.columns)

    @property
    def generated(self) -> Tensor:
        """``(b, G)`` int64 view of the generated region."""
        return self.ids[:, self.prompt_width :]

    @property
    def window(self) -> tuple[int, int]:
        """First and past-the-last column that any live row needs, the latter at a block's end."""
        size = self.config.block_length
        last = max(slot.end for slot in self.slots)
        return self.prompt_width - max(slot.width for slot in self.slots), self.prompt_width + -(-last // size) * size

    @property
    def all_attended(self) -> bool:
        """True if every live row needs every column of the window, so that no attention mask is needed."""
        first, last = self.slots[0], self.window[1] - self.prompt_width
        return all(slot.width == first.width and slot.end == last for slot in self.slots)

    @property
    def quota(self) -> Tensor:
        """Tokens a fixed schedule commits at this step, ``(b,)``; the remainder falls on a block's first steps."""
        whole, rest = divmod(self.config.block_length, self.config.steps_per_block)
        return whole + (self.step_in_block < rest).long()

    def commit(self, transfer: Tensor, tokens: Tensor) -> None:
        """Writes ``tokens`` ``(b, K)`` where ``transfer`` is True, in place."""
        generated = self.generated
        generated.scatter_(1, self.columns, torch.where(transfer, tokens, generated.gather(1, self.columns)))
        self.masked_block = self.masked_block & ~transfer
        self.masked.scatter_(1, self.columns, self.masked_block)

    def finish_at(self, last: Tensor) -> None:
        """Ends rows: right of ``last`` ``(b,)`` everything becomes EoT, decoded, and invisible to later forwards."""
        after = self.region > last[:, None]
        self.generated.masked_fill_(after, self.token_ids.eot)
        self.masked.logical_and_(~after)
        self.attention[:, self.prompt_width :].logical_and_(~after)
        self.end = torch.minimum(self.end, last + 1)

    def advance(self) -> list[int]:
        """Counts the step, moves the block pointers on, and reads, in one transfer, what the host has to know.

        Returns:
            Slots whose row is finished.
        """
        left = self.masked.sum(1)
        block = self.masked.int().argmax(1) // self.config.block_length
        moved = block != self.block
        self.block = block
        self.step_in_block = (self.step_in_block + 1).masked_fill_(moved, 0)
        self.columns = block[:, None] * self.config.block_length + self.offsets
        self.masked_block = self.masked.gather(1, self.columns)
        known = torch.stack((left, self.masked_block.sum(1), block, self.end)).tolist()
        for slot, (count, here, number, end) in zip(self.slots, zip(*known, strict=True), strict=True):
            slot.steps += 1
            slot.step_in_block = slot.step_in_block + 1 if number == slot.block else 0
            slot.left, slot.here, slot.block, slot.end = count, here, number, end
        if self.memory:
            for name, value in self.memory.items():
                self.memory[name] = torch.where(_like(moved, value), self.initial[name], value)
        return [number for number, slot in enumerate(self.slots) if not slot.left]

    def release(self, finished: Sequence[int]) -> list[tuple[int, int]]:
        """Gives the slots of finished rows to waiting prompts; closes those that are left over.

        Returns:
            ``(source, target)`` for each slot that moved into a closed one's place, in order.
        """
        moves = []
        for slot in reversed(finished):
            if self.waiting:
                self.slots[slot] = self._fill(slot, self.waiting.popleft())
                for name, value in self.initial.items():
                    self.memory[name][slot] = value[0]
                continue
            last = len(self.slots) - 1
            if slot != last:
                moves.append((last, slot))
                self.slots[slot] = self.slots[last]
            self.slots.pop()
        for value in self._tensors().values():
            for source, target in moves:
                value[target] = value[source]
        if len(self.slots) < len(self.ids):
            for name, value in self._tensors().items():
                where = self.memory if name in self.memory else vars(self)
                where[name] = value[: len(self.slots)]
        if finished and self.slots:
            self._look()
        return moves

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that has a slot dimension and outlives a step."""
        names = ["ids", "attention", "positions", "masked", "end", "block", "step_in_block"]
        names += ["last_token", "last_confidence", "stable"] + (
            ["distribution"] if self.distribution is not None else []
        )
        return {name: getattr(self, name) for name in names} | self.memory


def _like(flag: Tensor, value: Tensor) -> Tensor:
    """``flag`` ``(b,)`` with as many dimensions as ``value`` ``(b, ...)``."""
    return flag.view(-1, *(1,) * (value.dim() - 1))
