"""What a decode hands out: results, commits as they happen, traces on request, and the predictor's time."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from decoding.config import DecodeConfig
from models.features import Evidence

if TYPE_CHECKING:
    from decoding.state import BatchState


@dataclass(frozen=True)
class StepResult:
    """What one batched forward changed; valid until the next one.

    Attributes:
        forward_call: Number of the forward, from 1.
        rows: ``(b,)`` int64, index of each row in the list of prompts.
        masked_before: ``(b, G)`` bool, as the step found it.
        state: The rows' tensors.
    """

    forward_call: int
    rows: Tensor
    masked_before: Tensor
    state: "BatchState"

    @property
    def changed(self) -> Tensor:
        """``(b, G)`` bool, positions decoded in this step, the fill after an EoT included."""
        return self.masked_before ^ self.state.masked

    @property
    def sequences(self) -> Tensor:
        """``(b, G)`` int64, the generated region after the step."""
        return self.state.text


@dataclass
class StepTrace:
    """One batched step as the strategy saw it; tensors on the CPU, one entry for each row that took part.

    Attributes:
        rows: ``(b,)`` int64, index of each row in the list of prompts.
        block: ``(b,)`` int64, number of the row's active block.
        step: ``(b,)`` int64, forwards the row had before this one.
        evidence: What the predictor said about the active block, ``(b, K)`` fields.
        transfer: ``(b, K)`` bool, positions committed by the strategy.
        committed: ``(b, K)`` int64, the tokens committed there (meaningless elsewhere).
        eot_log_odds: ``(b, G)`` float32, nats, log-odds of EoT at each position of the generated region that was masked
            before this step, 0 elsewhere; ``None`` unless the decode recorded it.
        eot_top: ``(b, G)`` bool, True where EoT was the argmax; ``None`` unless recorded.
    """

    rows: Tensor
    block: Tensor
    step: Tensor
    evidence: Evidence
    transfer: Tensor
    committed: Tensor
    eot_log_odds: Tensor | None = None
    eot_top: Tensor | None = None


@dataclass
class DecodeOutput:
    """What a decode gives; tensors on the CPU once it has ended, rows in the order of the prompts.

    Attributes:
        sequences: ``(B, gen_length)`` int64, without any MASK id.
        nfe: ``(B,)`` int64, forwards in which the row still had masked positions.
        forward_calls: Batched forwards launched.
        counts: Name to ``(B,)`` int64 totals of the strategy's events.
        trace: Steps in order, where recorded.
        predictor_seconds: Wall time inside the predictor's forwards, in seconds.
        helper_seconds: Wall time inside the helper's forwards, in seconds.
        seconds: Wall time of the decode, in seconds.
    """

    sequences: Tensor
    nfe: Tensor
    forward_calls: int = 0
    counts: dict[str, Tensor] = field(default_factory=dict)
    trace: list[StepTrace] = field(default_factory=list)
    predictor_seconds: float = 0.0
    helper_seconds: float = 0.0
    seconds: float = 0.0


def empty_output(batch: int, config: DecodeConfig) -> DecodeOutput:
    """An output for :func:`decode_steps` to fill."""
    return DecodeOutput(torch.zeros(batch, config.gen_length, dtype=torch.long), torch.zeros(batch, dtype=torch.long))


class Timer:
    """Seconds spent in the predictor: of wall time on a CPU; on a GPU between events, so that nothing waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.total = device.type == "cuda", 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self.cuda:
            self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.events[-1][0].record()
        else:
            self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.events[-1][1].record()
        else:
            self.total += time.perf_counter() - self.started

    def read(self) -> float:
        """Seconds so far; on a GPU this waits for the last forward."""
        if self.events:
            self.events[-1][1].synchronize()
        return self.total + sum(start.elapsed_time(end) for start, end in self.events) / 1000
