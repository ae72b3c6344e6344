"""dInfer: ``BlockWiseDiffusionLLM(model, LearnedParallelDecoder(engine), ...)``.

dInfer asks its decoders for ``block_init``, ``decode`` and ``batch_decode`` and a few attributes, and for no base class, so this
module imports nothing of it. The interface was read from its sources of 2026; nothing here has run on a GPU.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from decoding.engine import Engine, State, join, split


class LearnedParallelDecoder:
    """A decoder of one block of all samples at a time, or of samples that are at different blocks.

    Args:
        engine: The engine, with dInfer's block length.
        eos_id: Id that dInfer stops at; the engine's own by default.

    Attributes:
        temperature: 0; the engine takes the most probable token.
        mask_id: Id of an undecoded position.
    """

    temperature = 0.0
    remasking = "low_confidence"

    def __init__(self, engine: Engine, eos_id: int | None = None) -> None:
        self.engine, self.mask_id = engine, engine.mask_id
        self.eos_id = engine.eot_id if eos_id is None else eos_id
        self.state: State | None = None
        self.prompt: Tensor | None = None
        self.at: tuple[int, ...] = ()
        self.begun: defaultdict[tuple[int, bytes], list[tuple[State, Tensor]]] = defaultdict(list)

    def block_init(self, block_x: Tensor, block_id: int) -> None:
        """Begins a block of token ids ``(b, K)`` int64; what is not MASK at its first step is prompt."""
        self.state = None

    def decode(self, logits: Tensor, block_start: int, block_end: int, x: Any, iter_threshold: Any = None) -> None:
        """Writes one step's tokens.

        Args:
            logits: ``(b, K, V)`` of the block.
            block_start: Its first position.
            block_end: Past its last.
            x: dInfer's token array; ``x[:, block_start:block_end]`` is read and written.
            iter_threshold: A threshold for other decoders; a strategy has its own.
        """
        ids = x[:, block_start:block_end]
        at = block_start, block_end, len(ids)
        if self.state is None or self.at != at:  # not every loop of dInfer's announces its blocks
            self.state, self.prompt, self.at = None, ids != self.mask_id, at
        transfer, tokens, self.state = self.engine.commit(logits, ids, self.state, self.prompt)
        x[:, block_start:block_end] = torch.where(transfer, tokens, ids)

    def batch_decode(
        self, logits: Tensor, block_start: Tensor, x: Any, block_length: int, iter_threshold: Any = None
    ) -> None:
        """Writes one step's tokens of samples that are at different blocks.

        Which samples a call is about, dInfer does not say, and it changes from call to call. What a block has carried so far is
        therefore found by the sample's ids, which are still what the last call left.

        Args:
            logits: ``(b, K, V)`` of each sample's block.
            block_start: ``(b,)`` int64, its first position.
            x: dInfer's token array of these samples; ``x.data`` ``(b, T)`` is read and written.
            block_length: ``K``; blocks are whole.
            iter_threshold: As in :meth:`decode`.
        """
        place = block_start[:, None] + torch.arange(block_length, device=block_start.device)
        ids = x.data.gather(1, place)
        fresh, unknown = split(self.engine.begin(logits)), ids != self.mask_id
        known = []
        for row, key in enumerate(_keys(block_start, x.data)):
            waiting = self.begun.pop(key, [])
            known.append(waiting.pop() if waiting else (fresh[row], unknown[row : row + 1]))
            if waiting:  # another sample with the same ids
                self.begun[key] = waiting
        state, prompt = join([each for each, _ in known]), torch.cat([each for _, each in known])
        transfer, tokens, state = self.engine.commit(logits, ids, state, prompt)
        ids = torch.where(transfer, tokens, ids)
        x.data.scatter_(1, place, ids)
        left = (ids == self.mask_id).any(1).tolist()
        for row, key in enumerate(_keys(block_start, x.data)):
            if left[row]:
                self.begun[key].append((split(state)[row], prompt[row : row + 1]))


def _keys(block_start: Tensor, ids: Tensor) -> list[tuple[int, bytes]]:
    """What tells one sample's block from another's: where it begins, and all of the sample's ids."""
    return [(start, row.tobytes()) for start, row in zip(block_start.tolist(), ids.cpu().numpy(), strict=True)]
