"""The decode loop: token ids in, token ids out, whatever the strategy."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from decoding.config import DecodeConfig
from decoding.output import DecodeOutput, StepResult, empty_output
from decoding.run import Request
from decoding.strategies import Strategy
from models.errors import InputError
from models.predictor import MaskPredictor


def decode(
    predictor: MaskPredictor,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    strategy: Strategy,
    references: Tensor | None = None,
    record: bool = False,
    record_eot: bool = False,
    seeds: Sequence[int] | None = None,
    batch_size: int | None = None,
    stop: Callable[[int, list[int]], bool] | None = None,
    finished: Callable[[int, list[int], int], None] | None = None,
) -> DecodeOutput:
    """Decodes prompts to the end; see :func:`decode_steps` for the arguments and errors."""
    output = empty_output(len(prompts), config)
    steps = decode_steps(
        predictor, prompts, config, strategy, output, references, record, record_eot, seeds, batch_size, stop, finished
    )
    for _ in steps:
        pass
    return output


@torch.inference_mode()
def decode_steps(
    predictor: MaskPredictor,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    strategy: Strategy,
    output: DecodeOutput,
    references: Tensor | None = None,
    record: bool = False,
    record_eot: bool = False,
    seeds: Sequence[int] | None = None,
    batch_size: int | None = None,
    stop: Callable[[int, list[int]], bool] | None = None,
    finished: Callable[[int, list[int], int], None] | None = None,
) -> Iterator[StepResult]:
    """Decodes prompts, yielding after every step of the batch; ``output`` is filled on the way.

    Rows keep their own block pointer. A finished row leaves the batch and the next prompt takes its place, so a row
    decodes to the same tokens whatever shares its batch (up to the rounding of the kernels; exactly so in fp32 except at
    ties).

    Args:
        predictor: The mask predictor.
        prompts: Token ids of each row's prompt, not empty; lengths may differ.
        config: Decode settings.
        strategy: Chooses the commits.
        output: Receives sequences, counts and trace.
        references: ``(B, gen_length)`` int64, reference decodes for strategies that need them.
        record: Keep a :class:`~decoding.output.StepTrace` of every step, with evidence on all positions of the block.
        record_eot: Also record the EoT evidence over the whole generated region.
        seeds: Noise seed of each row; its place in the batch by default.
        batch_size: Rows decoded together; all by default.
        stop: Called with a row's index and its decoded tokens, from the first generated one on, each time a block of it is
            done (with APD: each step); True ends the row there, as if an EoT followed.
        finished: Called with a row's index, its generated region and its NFE as soon as the row has ended.

    Raises:
        InputError: An empty prompt, one that leaves no room for ``gen_length``, or a strategy that does not fit.
    """
    check_prompts(predictor, prompts, config)
    strategy.prepare(predictor, config)
    request = Request(
        predictor, prompts, config, strategy, output, references, record, record_eot, seeds, batch_size, stop, finished
    )
    run = strategy.start(request)
    while run.scheduler.slots:
        yield run.step()
        run.retire()
    run.close()


def check_prompts(predictor: MaskPredictor, prompts: Sequence[Sequence[int]], config: DecodeConfig) -> None:
    """Raises an InputError for an empty prompt or one too long for the model."""
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
