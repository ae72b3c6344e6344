"""The tensors of a batch while it is decoded."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from decoding.config import DecodeConfig
from decoding.eot import first_true
from decoding.scheduler import Changes, Scheduler
from decoding.step import check_finite
from models.errors import InputError
from models.predictor import TokenIds


class RowTensor:
    """A tensor with an entry for each live row, made by :meth:`BatchState.register`; it follows its row from slot to slot.

    Attributes:
        value: ``(b, ...)``, ``b`` live rows; replaced as a whole or written in place by its owner, and written in place when
            another row comes: nobody else may hold it.
        initial: ``(...)``, what an admitted row begins with.
        per_block: Back to ``initial`` whenever the row goes on to another block.
        told: What ``initial`` is, where the host is told a number of every row; else ``None``.
        known: What the host knows of each row: ``value``, as it was when the last step ended.
    """

    def __init__(self, initial: Tensor, rows: int, per_block: bool, told: int | None) -> None:
        self.initial, self.per_block, self.told = initial, per_block, told
        self.known = [] if told is None else [told] * rows
        self.value = initial.expand(rows, *initial.shape).clone()


class Begun:
    """Regions that are decoded in part, and how far each is.

    Args:
        regions: ``(B, G)`` int64, MASK where a position is to be decoded.
        prompts: ``B``.
        ids: Special token ids.
        config: Decode settings; unless their EoT rule is ``off``, a region ends at its first EoT.

    Attributes:
        ids: ``(B, G)`` int64, EoT right of the end.
        masked: ``(B, G)`` bool.
        end: ``(B,)`` int64, generated positions that are left.
        block: ``(B,)`` int64, the first block with a masked position.
        progress: Of each row, masked positions, those of its block, ``end`` and ``block``: what a scheduler knows.

    Raises:
        InputError: A region of another shape, or one in which nothing is left to decode.
    """

    def __init__(self, regions: Tensor, prompts: int, ids: TokenIds, config: DecodeConfig) -> None:
        if regions.shape != (prompts, config.gen_length):
            raise InputError("regions", tuple(regions.shape), f"shape ({prompts}, {config.gen_length})")
        last = torch.full_like(regions[:, 0], config.gen_length)
        if config.eot != "off":
            last = first_true(regions == ids.eot)
        after = torch.arange(config.gen_length, device=regions.device) > last[:, None]
        self.ids = regions.masked_fill(after, ids.eot)
        self.masked = (regions == ids.mask) & ~after
        self.end = (last + 1).clamp(max=config.gen_length)
        of_blocks = self.masked.unflatten(1, (-1, config.block_length)).sum(2)
        self.block = (of_blocks > 0).int().argmax(1)
        in_block = of_blocks.gather(1, self.block[:, None])[:, 0]
        self.progress = torch.stack((self.masked.sum(1), in_block, self.end, self.block), 1).tolist()
        for row, (left, *_) in enumerate(self.progress):
            if not left:
                raise InputError(f"regions: row {row}", "nothing to decode", f"MASK ({ids.mask}) before the text ends")


class BatchState:
    """What every decode keeps of its rows, and whatever else their owners register to follow them.

    Storage has ``P + G`` columns: prompts left-padded to the longest of the call, then the generated region; forwards see the
    columns of :meth:`window`. ``b`` is the number of live rows, the first dimension of every tensor here.

    Args:
        ids: Special token ids.
        prompts: All prompts of the call.
        config: Decode settings.
        scheduler: The rows.
        device: Where the predictor is.
        begun: What the rows begin with, where that is not MASK alone.

    Attributes:
        prompt_width: ``P``.
        region: ``(G,)`` int64, 0 to ``G - 1``; ``offsets`` are the first ``K`` of them.
        storage: ``(P + G,)`` int64, likewise, and ``cells``, ``K`` for each row that the batch began with.
        columns: ``(b, K)`` int64, the active block's positions in the generated region.
        masked_block: ``(b, K)`` bool, which of them are masked.
    """

    def __init__(
        self,
        ids: TokenIds,
        prompts: Sequence[Sequence[int]],
        config: DecodeConfig,
        scheduler: Scheduler,
        device: torch.device,
        begun: Begun | None = None,
    ) -> None:
        self.token_ids, self.prompts, self.config, self.scheduler, self.device = ids, prompts, config, scheduler, device
        self.begun = begun
        self.prompt_width = max(len(prompt) for prompt in prompts)
        self.owned: list[RowTensor] = []
        self.closes = False  # whether a rule leaves positions that are not decoded
        self._last: Tensor | None = None  # (b, 1) int64, where this step ends rows
        self.region = torch.arange(config.gen_length, device=device)
        self.offsets = self.region[: config.block_length]
        self.storage = torch.arange(self.prompt_width + config.gen_length, device=device)
        self.cells = torch.arange(len(scheduler.slots) * config.block_length, device=device)
        number = torch.zeros((), dtype=torch.long, device=device)
        self._row = self.register(number)
        self._ids = self.register(torch.full_like(self.storage, ids.mask))
        self._pad = self.register(number)
        self._positions = self.register(self.storage)
        self._masked = self.register(torch.ones_like(self.region, dtype=torch.bool))
        self._end = self.register(torch.full_like(number, config.gen_length))
        self._block = self.register(number)
        for slot in range(len(scheduler.slots)):
            self._admit(slot)
        self._look()

    row = property(lambda self: self._row.value, doc="``(b,)`` int64, index of each row's prompt.")
    ids = property(lambda self: self._ids.value, doc="``(b, P + G)`` int64.")
    positions = property(
        lambda self: self._positions.value, doc="``(b, P + G)`` int64, from the row's first real token."
    )
    masked = property(
        lambda self: self._masked.value,
        doc="``(b, G)`` bool, not decoded yet; tracked apart from ``ids``, so a prompt may hold any token.",
    )

    @property
    def text(self) -> Tensor:
        """``(b, G)`` int64, the generated region with EoT where nothing will be decoded."""
        if not self.closes:
            return self.generated
        closed = (self.generated == self.token_ids.mask) & ~self.masked
        return torch.where(closed, self.token_ids.eot, self.generated)

    end = property(lambda self: self._end.value, doc="``(b,)`` int64, generated positions that are left.")
    block = property(lambda self: self._block.value, doc="``(b,)`` int64, number of the active block.")

    def attention(self, rows: slice | Tensor, low: int, high: int) -> Tensor:
        """What some rows see of the columns ``low`` to ``high``: all but padding and what is right of an accepted end of text.

        Returns:
            ``(n, high - low)`` bool.
        """
        columns = self.storage[low:high]
        return (columns >= self._pad.value[rows, None]) & (columns < self.prompt_width + self.end[rows, None])

    @property
    def generated(self) -> Tensor:
        """``(b, G)`` int64 view of the generated region."""
        return self.ids[:, self.prompt_width :]

    @property
    def window(self) -> tuple[int, int]:
        """First and past-the-last column that any live row needs."""
        return self.prompt_width - self.scheduler.width, self.prompt_width + self.scheduler.end

    @property
    def quota(self) -> Tensor | int:
        """Tokens a fixed schedule commits at this step, ``(b,)`` int64, or one number where it is the same for all.

        The remainder falls on a block's first steps.
        """
        whole, rest = divmod(self.config.block_length, self.config.steps_per_block)
        counts = [whole + (slot.step_in_block < rest) for slot in self.scheduler.slots]
        return counts[0] if len(set(counts)) == 1 else self.upload(counts)

    def upload(self, values: Sequence[Any]) -> Tensor:
        """A tensor of what the host knows, nested as ``values``; nobody waits for the copy to a GPU."""
        made, there = torch.as_tensor(values), self.device.type == "cuda"
        return (made.pin_memory() if there else made).to(self.device, non_blocking=there)

    def register(self, initial: Tensor, per_block: bool = False, told: int | None = None) -> RowTensor:
        """Makes a tensor that follows the rows; the caller owns it.

        Args:
            initial: ``(...)``, what a row begins with, on the state's device.
            per_block: A row begins anew with every block.
            told: For an ``initial`` of shape ``(1,)`` int64 that number: a step's read then tells the host each row's.
        """
        self.owned.append(RowTensor(initial, len(self.scheduler.slots), per_block, told))
        return self.owned[-1]

    def commit(self, transfer: Tensor, tokens: Tensor) -> None:
        """Writes ``tokens`` ``(b, K)`` where ``transfer`` is True, which are masked positions; ``masked`` is made anew."""
        generated = self.generated
        generated.scatter_(1, self.columns, torch.where(transfer, tokens, generated.gather(1, self.columns)))
        self.masked_block = self.masked_block ^ transfer
        self._masked.value = self.masked.scatter(1, self.columns, self.masked_block)

    def finish_at(self, last: Tensor) -> None:
        """Ends rows: right of ``last`` ``(b,)`` nothing is masked. The rest of it is :meth:`write_end`, for rows that do end."""
        self._last = last[:, None]
        self.masked.logical_and_(self.region <= self._last)

    def write_end(self) -> None:
        """Right of where rows were just ended everything becomes EoT, and invisible to later forwards."""
        last, self._last = self._last, None
        assert last is not None
        self.generated.masked_fill_(self.region > last, self.token_ids.eot)
        self._end.value = torch.minimum(self.end, last[:, 0] + 1)

    def close_at(self, last: Tensor) -> None:
        """Decodes nothing right of ``last`` ``(b,)``; for the model it stays MASK, in the :attr:`text` it is EoT."""
        self.closes = True
        self.masked.masked_fill_(self.region > last[:, None], False)

    def advance(self, confidence: Tensor, component: Tensor | None = None) -> list[int]:
        """Counts the step, moves the block pointers on, and tells the scheduler what the step left.

        Args:
            confidence: ``(b, K)`` float32, what the step was decided by.
            component: ``(b, K)`` float32, what a learned component made of it.

        Returns:
            Slots whose row is finished.

        Raises:
            InputError: A confidence is not finite, or what a component made of it.
        """
        slots, size = self.scheduler.slots, self.config.block_length
        of_blocks = self.masked.unflatten(1, (-1, size)).sum(2)
        told = [(tensor, tensor.told) for tensor in self.owned if tensor.told is not None]
        # A sum is finite where all summands are.
        sums = [values.sum(1, keepdim=True) for values in (confidence, component) if values is not None]
        last = self.end[:, None] if self._last is None else self._last
        known = self.read(torch.cat((of_blocks, last, *(tensor.value for tensor, _ in told), *sums), 1))
        blocks = of_blocks.shape[1]
        wrong = [[not math.isfinite(row[place]) for row in known] for place in range(-len(sums), 0)]
        check_finite(any(wrong[0]), any(wrong[-1]))
        ends = [min(slot.end, int(row[blocks]) + 1) for slot, row in zip(slots, known, strict=True)]
        progress = [_progress(row[:blocks], end) for row, end in zip(known, ends, strict=True)]
        moved = [row[2] != slot.block for row, slot in zip(progress, slots, strict=True)]
        for place, (tensor, first) in enumerate(told, blocks + 1):
            begins = [new and tensor.per_block for new in moved]
            tensor.known = [first if new else int(row[place]) for row, new in zip(known, begins, strict=True)]
        ended = ends != [slot.end for slot in slots]
        if ended:
            self.write_end()
        self._last = None
        if any(moved):
            self._move_on()
        elif ended or self.closes:
            self.masked_block = self.masked.gather(1, self.columns)
        return self.scheduler.advance(progress)

    def _move_on(self) -> None:
        """Lets every row go on to its first block with a masked position."""
        block = self.masked.int().argmax(1) // self.config.block_length
        moved = block != self.block
        self._block.value = block
        for tensor in self.owned:
            if tensor.per_block:
                begins = moved.view(-1, *(1,) * tensor.initial.dim())
                tensor.value = torch.where(begins, tensor.initial, tensor.value)
        self._look()

    def read(self, known: Tensor) -> list[list[float]]:
        """The one place where a step waits for the device.

        Args:
            known: ``(b, G / K + 1 + n + s)`` float32, which counts exactly up to 2^24. Of each row: how many positions of each
                block are masked, the last one of its text or more than there are, the ``n`` numbers that the host is told, and
                ``s`` sums, of the confidences and of what a component computed.
        """
        return known.tolist()

    def follow(self, changes: Changes) -> None:
        """Lets every tensor follow what the scheduler did with the rows."""
        for tensor in self.owned:
            for source, target in changes.moves:
                tensor.value[target] = tensor.value[source]
                if tensor.told is not None:
                    tensor.known[target] = tensor.known[source]
            tensor.value = tensor.value[: len(self.scheduler.slots)]
            tensor.known = tensor.known[: len(self.scheduler.slots)]
        for slot in changes.admitted:
            for tensor in self.owned:
                tensor.value[slot] = tensor.initial
                if tensor.told is not None:
                    tensor.known[slot] = tensor.told
            self._admit(slot)
        if self.scheduler.slots:
            self._look()

    def _admit(self, slot: int) -> None:
        """Fills in what a row has of its prompt; all else it has from the registered tensors' beginnings."""
        row = self.scheduler.slots[slot].row
        prompt = self.prompts[row]
        pad = self.prompt_width - len(prompt)
        self.row[slot] = row
        self.ids[slot, :pad] = self.token_ids.pad
        self.ids[slot, pad : self.prompt_width] = self.upload(prompt)
        self._pad.value[slot] = pad
        self.positions[slot] = (self.storage - pad).clamp_(min=0)
        if (begun := self.begun) is not None:
            self.generated[slot], self.masked[slot] = begun.ids[row].to(self.device), begun.masked[row].to(self.device)
            self.end[slot], self.block[slot] = begun.end[row], begun.block[row]

    def _look(self) -> None:
        """Brings what follows from the active blocks up to date."""
        self.columns = self.block[:, None] * self.config.block_length + self.offsets
        self.masked_block = self.masked.gather(1, self.columns)


def _progress(of_blocks: Sequence[float], end: int) -> tuple[int, int, int, int]:
    """A slot's ``left``, ``block_masked``, ``block`` and ``end``, given how much of each block is masked."""
    block = next((number for number, masked in enumerate(of_blocks) if masked), 0)
    return int(sum(of_blocks)), int(of_blocks[block]), block, end
