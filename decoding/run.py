"""One call of the decode, whatever its way of choosing: the only place that calls the predictor and counts forwards."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.cache import Inputs
from decoding.config import DecodeConfig
from decoding.eot import first_true
from decoding.output import DecodeOutput, StepResult, StepTrace, Timer
from decoding.read import Noise
from decoding.state import BatchState, Slot
from decoding.strategies.base import Decision, Strategy
from models.features import Evidence
from models.llada import KVCache
from models.predictor import MaskPredictor


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`decoding.loop.decode_steps`; see there."""

    predictor: MaskPredictor
    prompts: Sequence[Sequence[int]]
    config: DecodeConfig
    strategy: Strategy
    output: DecodeOutput
    references: Tensor | None = None
    record: bool = False
    record_eot: bool = False
    seeds: Sequence[int] | None = None
    batch_size: int | None = None
    stop: Callable[[int, list[int]], bool] | None = None
    finished: Callable[[int, list[int], int], None] | None = None


class Run(ABC):
    """The rows of a request and what happens to them at every step; subclasses choose what is committed.

    Args:
        request: What to decode.
        config: Decode settings with the block length that the state is to have.
        memory: See :class:`decoding.state.BatchState`.
        distribution: See there.

    Attributes:
        cache: The predictor's keys and values, a row a slot, where a subclass keeps them.
        eot: EoT evidence of the step over the generated region, ``(b, G)`` fields; empty where none was looked at.
    """

    def __init__(
        self, request: Request, config: DecodeConfig, memory: Mapping[str, Tensor] | None = None, distribution: int = 0
    ) -> None:
        self.started = time.perf_counter()
        self.request, self.predictor, self.config = request, request.predictor, request.config
        self.output, device = request.output, request.predictor.device
        prompts = request.prompts
        self.sequences = self.output.sequences.to(device)
        self.noise = Noise(config, request.seeds if request.seeds is not None else range(len(prompts)), device)
        self.capacity = min(request.batch_size or len(prompts), len(prompts))
        ids = request.predictor.ids
        self.state = BatchState(ids, prompts, config, self.capacity, device, memory or {}, distribution)
        self.timer = Timer(device)
        self.cache: KVCache | None = None
        self.finished: list[int] = []
        self.eot: dict[str, Tensor] = {}

    @abstractmethod
    def decide(self) -> tuple[Evidence, Decision]:
        """Runs the forwards of a step and chooses its commits in the state's active blocks, ``(b, K)``."""

    def step(self) -> StepResult:
        """One forward of every live row, and what follows from it."""
        state, output = self.state, self.output
        evidence, decision = self.decide()
        output.nfe[state.rows] += 1
        transfer = decision.transfer & state.masked_block
        tokens = evidence.token if decision.token is None else decision.token
        for name, count in decision.counts.items():
            if name not in output.counts:
                output.counts[name] = count.new_zeros(len(output.nfe))
            output.counts[name].index_add_(0, state.rows.to(count.device), count)
        if self.request.record:
            eot = self.eot if self.request.record_eot else {}
            output.trace.append(_trace(state, evidence, transfer, tokens, eot))

        before, current = state.masked.clone(), state.rows
        state.memory = decision.memory
        state.commit(transfer, tokens)
        if self.config.eot != "off":
            state.finish_at(self.last(transfer & (tokens == self.predictor.ids.eot)))
        self.finished = state.advance()
        if self.request.stop is not None:
            self._stop(self.request.stop)
        result = StepResult(output.forward_calls, current, before & ~state.masked, state.generated)
        output.seconds, output.predictor_seconds = time.perf_counter() - self.started, self.timer.total
        if any(slot.steps > self.config.gen_length for slot in state.slots):
            raise RuntimeError(f"strategy {self.request.strategy.name!r} left a row without a commit")
        return result

    def forward(self, given: Inputs, at: Tensor) -> Tensor:
        """One forward of the predictor, counted and timed; logits ``(N, V)`` at the flat positions ``at`` ``(N,)``."""
        with self.timer:
            logits = self.predictor(given.ids, given.attention, given.positions, at, **given.cache)
        self.output.forward_calls += 1
        return logits

    def last(self, ended: Tensor) -> Tensor:
        """Last position of each row's text, ``(b,)`` int64, ``G`` while it has no end.

        Args:
            ended: ``(b, K)`` bool, positions of the active block that were committed as EoT.
        """
        size = ended.shape[1]
        inside = first_true(ended)
        return torch.where(inside < size, self.state.block * size + inside, self.config.gen_length)

    def text_length(self, slot: Slot) -> int:
        """Positions of a row, from its first generated one, in which nothing is masked."""
        return slot.block * self.config.block_length

    def _stop(self, asked: Callable[[int, list[int]], bool]) -> None:
        """Ends the rows whose text has grown to where nothing more is wanted."""
        state, region = self.state, self.config.gen_length
        last = [region] * len(state.slots)
        for number, slot in enumerate(state.slots):
            length = self.text_length(slot)
            if slot.left and length > slot.checked:
                slot.checked = length
                if asked(slot.row, state.generated[number, :length].tolist()):
                    last[number], slot.left = length - 1, 0
        ended = [number for number, place in enumerate(last) if place < region]
        if ended:
            state.finish_at(torch.tensor(last, device=state.end.device))
            self.finished = sorted({*self.finished, *ended})

    def moved(self, source: int, target: int) -> None:
        """A row went from one slot to another; whatever is stored by slot has to follow."""
        if self.cache is not None:
            self.cache.move(source, target)

    def hand_out(self) -> None:
        """Stores the rows that finished in this step and gives their slots away."""
        state = self.state
        for number in self.finished:
            row = state.slots[number].row
            self.sequences[row] = state.generated[number]
            if self.request.finished is not None:
                self.request.finished(row, state.generated[number].tolist(), int(self.output.nfe[row]))
            self.noise.forget(row)
        for move in state.release(self.finished):
            self.moved(*move)

    def keep_keys(self) -> None:
        """Allocates the predictor's cache for all slots and columns."""
        self.cache = self.predictor.allocate_cache(self.capacity, self.state.ids.shape[1])

    def close(self) -> None:
        """Brings the results to the CPU."""
        output = self.output
        output.predictor_seconds = self.timer.read()
        output.sequences.copy_(self.sequences)
        output.counts = {name: count.cpu() for name, count in output.counts.items()}
        output.seconds = time.perf_counter() - self.started


def _trace(
    state: BatchState, evidence: Evidence, transfer: Tensor, tokens: Tensor, eot: dict[str, Tensor]
) -> StepTrace:
    return StepTrace(
        rows=state.rows,
        block=torch.tensor([slot.block for slot in state.slots]),
        step=torch.tensor([slot.steps for slot in state.slots]),
        evidence=Evidence(**{name: value.to("cpu", copy=True) for name, value in vars(evidence).items()}),
        transfer=transfer.cpu(),
        committed=tokens.cpu(),
        eot_probability=(eot["probability"] * state.masked).cpu() if eot else None,
        eot_top=(eot["top"] & state.masked).cpu() if eot else None,
    )
