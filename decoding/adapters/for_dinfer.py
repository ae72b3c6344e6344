"""dInfer: ``BlockWiseDiffusionLLM(model, LearnedParallelDecoder(engine), ...)``.

dInfer asks its decoders for ``block_init`` and ``decode`` and a few attributes, and for no base class, so this module imports
nothing of it. The interface was read from its sources of 2026; nothing here has run on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from decoding.engine import Engine, State


class LearnedParallelDecoder:
    """A decoder of one block of all samples at a time.

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
