"""The decode loop: token ids in, token ids out, whatever the strategy."""

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from decoding.config import DecodeConfig
from decoding.output import DecodeOutput, StepResult, empty_output
from decoding.run import Request
from decoding.strategies import Strategy
from models.errors import InputError
from models.predictor import MaskPredictor


def decode(
    predictor: MaskPredictor, prompts: Sequence[Sequence[int]], config: DecodeConfig, strategy: Strategy,
    references: Tensor | None = None, **options: Any,
) -> DecodeOutput:  # fmt: skip
    """Decodes prompts to the end; see :func:`decode_steps` for the arguments and errors."""
    output = empty_output(len(prompts), config)
    for _ in decode_steps(predictor, prompts, config, strategy, output, references, **options):
        pass
    return output


@torch.inference_mode()
def decode_steps(
    predictor: MaskPredictor, prompts: Sequence[Sequence[int]], config: DecodeConfig, strategy: Strategy,
    output: DecodeOutput, references: Tensor | None = None, **options: Any,
) -> Iterator[StepResult]:  # fmt: skip
    """Decodes prompts, yielding after every step of the batch; ``output`` is filled on the way.

    Rows keep their own block pointer. A finished row leaves the batch and the next prompt takes its place, so a row
    decodes to the same tokens whatever shares its batch (up to the rounding of the kernels; exactly so in fp32 except at
    ties).

    Args:
        predictor: See :class:`decoding.run.Request`, as for all others.
        prompts: Token ids of each row's prompt.
        config: Decode settings.
        strategy: Chooses the commits.
        output: Receives sequences, counts and trace.
        references: Reference decodes, for strategies that need them.
        **options: Its further fields: ``record``, ``record_eot``, ``record_hidden``, ``seeds``, ``batch_size``,
            ``stop``, ``finished``.

    Raises:
        InputError: An empty prompt, one that leaves no room for ``gen_length``, or a strategy that does not fit.
    """
    check_prompts(predictor, prompts, config)
    strategy.prepare(predictor, config)
    run = strategy.start(Request(predictor, prompts, config, strategy, output, references, **options))
    while run.scheduler.slots:
        yield run.step()
        run.retire()
    run.close()


def check_prompts(predictor: MaskPredictor, prompts: Sequence[Sequence[int]], config: DecodeConfig) -> None:
    """Raises an InputError for a prompt that is empty, too long for the model, or has ids that it does not have."""
    room = predictor.max_length - config.gen_length
    if room < 1:
        raise InputError("gen_length", config.gen_length, f"below the model's {predictor.max_length} tokens")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {index}", "no tokens", "at least one token")
        if len(prompt) > room:
            raise InputError(
                f"prompt {index}", f"{len(prompt)} tokens",
                f"at most {room}: the model's {predictor.max_length} less gen_length {config.gen_length}",
            )  # fmt: skip
        if wrong := [
            token
            for token in prompt
            if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= token < predictor.vocab_size
        ]:
            raise InputError(f"prompt {index}", f"token {wrong[0]!r}", f"ids from 0 to {predictor.vocab_size - 1}")
