"""SGLang: ``--dllm-algorithm LearnedDecoding --dllm-algorithm-config learned.yaml``; the YAML names strategy and filter.

The package's entry point in the group ``sglang.srt.plugins`` calls :func:`register`. What the interface looks like was read
from SGLang's sources of 2026; nothing here has run on a GPU.
"""

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from decoding.engine import Engine, join, split
from decoding.strategies import make_strategy
from models.errors import InputError
from models.rules import SETTINGS, check

NAME = "LearnedDecoding"


def register() -> None:
    """Adds the algorithm to SGLang's, under :data:`NAME`."""
    from sglang.srt.dllm.algorithm import algo_name_to_cls  # type: ignore[import-not-found]
    from sglang.srt.dllm.algorithm.base import DllmAlgorithm  # type: ignore[import-not-found]

    algo_name_to_cls[NAME] = type(NAME, (Learned, DllmAlgorithm), {})


def engine_of(settings: Mapping[str, Any], mask_id: int, block_length: int) -> Engine:
    """The engine that a configuration file asks for.

    Args:
        settings: ``strategy`` and its settings; ``eot_id``, ``steps`` and ``base`` of :class:`decoding.engine.Engine`; SGLang's
            own ``block_size``, which has to be the block length.
        mask_id: Id of an undecoded position.
        block_length: Positions of a block.

    Raises:
        InputError: A setting that there is not, or a strategy that does not run here.
    """
    check({"algorithm_config": settings}, {"algorithm_config": SETTINGS})
    options = dict(settings)
    if (size := options.pop("block_size", block_length)) != block_length:
        raise InputError("block_size", repr(size), f"{block_length}, the engine's")
    known = {name: options.pop(name) for name in ("eot_id", "steps", "base") if name in options}
    return Engine(make_strategy(options.pop("strategy", "learn2pd"), options), mask_id, block_length, **known)


class Learned:
    """The algorithm without its base class, which owns the loop and calls :meth:`step` after every forward."""

    block_size: int
    mask_id: int
    supported_architectures: ClassVar[tuple[str, ...]] = ()  # as SGLang has it: any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        try:
            self.engine = engine_of(config.algorithm_config, self.mask_id, self.block_size)
        except InputError as error:  # SGLang reports any error here as an unknown algorithm
            logging.getLogger(__name__).error("%s: %s", NAME, error)
            raise

    def step(self, forward_batch: Any, full_logits: Any, states: list[Any]) -> list[bool]:
        """Writes one step's tokens into the batch.

        Args:
            forward_batch: Its ``input_ids`` ``(b * K,)`` int64 are written in place; ``dllm_prompt_mask`` ``(b, K)`` bool, where
                there is one, tells the prompt's positions.
            full_logits: ``(b * K, V)``, or the logits output that holds them.
            states: What each block carries from round to round, ``None`` before its first; replaced in place.

        Returns:
            For each block whether it was complete before this step, so that its keys are those of its final tokens.
        """
        logits = full_logits if isinstance(full_logits, Tensor) else full_logits.full_logits
        if logits is None:
            raise InputError(f"{NAME}: logits output", "no full_logits", "logits of every position of the block")
        rows = forward_batch.batch_size
        logits, ids = logits.view(rows, self.block_size, -1), forward_batch.input_ids.view(rows, self.block_size)
        prompt = getattr(forward_batch, "dllm_prompt_mask", None)
        masked = ids == self.mask_id
        done = ~(masked if prompt is None else masked & ~prompt).any(1)
        fresh = [None] * rows if all(state is not None for state in states) else split(self.engine.begin(logits))
        state = join([known if known is not None else new for known, new in zip(states, fresh, strict=True)])
        transfer, tokens, state = self.engine.commit(logits, ids, state, prompt)
        forward_batch.input_ids.copy_(tokens.where(transfer, ids).view(-1))
        states[:] = split(state)
        return done.tolist()
