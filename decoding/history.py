"""What a decode remembers of its earlier steps, for evidence that compares."""

import torch
from torch import Tensor

from decoding.evidence import compare_guesses, divergence
from decoding.plan import CACHES
from decoding.state import BatchState
from models.errors import InputError

BUDGET = 1 << 32
"""Bytes that the distributions of all rows may take."""


class History:
    """The last step's guesses in the active block.

    Args:
        state: The rows.
    """

    def __init__(self, state: BatchState) -> None:
        zero = torch.zeros(state.config.block_length, device=state.device)
        self.state = state
        # No id: a block's first step is like nothing before.
        self.token = state.register(zero.long() - 1, per_block=True)
        self.confidence = state.register(zero, per_block=True)
        self.steps = state.register(zero.long(), per_block=True)

    def compare(self, token: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
        """``stable`` and ``previous`` of :class:`models.features.Evidence`; remembers this step's guesses instead.

        Args:
            token: ``(b, K)`` int64, this step's guesses.
            confidence: ``(b, K)`` float32.
        """
        before = self.token.value, self.confidence.value, self.steps.value
        stable, previous = compare_guesses(self.state.masked_block, (token, confidence), before)
        self.token.value, self.confidence.value, self.steps.value = token, confidence, stable
        return stable, previous


class Distributions:
    """The last step's distributions over the vocabulary, of the active block and of the next, for KL divergences.

    A block's first step is compared with the last step of the block before. With a dual cache most forwards do not see the
    next block: there a block's first step has nothing to be compared with, and only the active block is kept.

    These are ``8 K V`` bytes a row, half of that with a dual cache: the one thing a decode keeps that grows with the vocabulary.
    All rows together have :data:`BUDGET`.

    Args:
        state: The rows.
        vocab_size: ``V``.

    Raises:
        InputError: They would take more.
    """

    def __init__(self, state: BatchState, vocab_size: int) -> None:
        self.state, self.kept = state, 2 if CACHES[state.config.cache].sees_ahead else 1
        rows, size = len(state.scheduler.slots), state.config.block_length
        if rows * size > (most := BUDGET // (4 * self.kept * vocab_size)):
            raise InputError(
                "batch_size x block_length", f"{rows} x {size}, whose last distributions are compared",
                f"at most {most} positions: {BUDGET >> 30} GiB of distributions over {vocab_size} tokens",
            )  # fmt: skip
        shape = (self.kept, state.config.block_length, vocab_size)
        self.stored = state.register(torch.zeros(shape, device=state.device))

    def diverge(self, now: Tensor, cells: Tensor) -> Tensor:
        """``KL(p_t || p_{t-1})`` in nats, ``(N,)`` float32, infinite where there is no step before; remembers ``now`` instead.

        Args:
            now: ``(N, V)`` float32 log-probabilities.
            cells: ``(N,)`` int64, positions in the flattened ``(b, K)`` of the active blocks.
        """
        state, size = self.state, self.state.config.block_length
        row, place = cells // size, cells
        if self.kept == 2:
            place = self._place(row, state.block[row], cells % size)
        stored = self.stored.value.view(-1, now.shape[1])
        changed = divergence(now, stored[place])
        stored.index_copy_(0, place, now)
        # A row may begin at any block, where part of its region is given.
        first = [(slot.steps if self.kept == 2 else slot.step_in_block) == 0 for slot in state.scheduler.slots]
        if not any(first):
            return changed
        return changed.masked_fill_(state.upload(first)[row], torch.inf)

    def keep(self, ahead: Tensor, row: Tensor, offset: Tensor) -> None:
        """Remembers log-probabilities ``(N, V)`` float32 at places ``offset`` ``(N,)`` of the next block of ``row`` ``(N,)``."""
        place = self._place(row, self.state.block[row] + 1, offset)
        self.stored.value.view(-1, ahead.shape[1]).index_copy_(0, place, ahead)

    def _place(self, row: Tensor, block: Tensor, offset: Tensor) -> Tensor:
        return (row * self.kept + block % self.kept) * self.state.config.block_length + offset
