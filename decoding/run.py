"""One call of the decode, whatever its way of choosing: the only place that calls the predictor and counts forwards."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from decoding.config import DecodeConfig
from decoding.eot import RULES, EotStep
from decoding.output import DecodeOutput, StepResult, StepTrace, Timer
from decoding.plan import ForwardPlan
from decoding.read import Noise
from decoding.scheduler import Scheduler, Slot
from decoding.state import BatchState, Begun
from decoding.step import Decision
from models.features import Evidence
from models.layers import KVCache
from models.predictor import MaskPredictor

if TYPE_CHECKING:
    from decoding.strategies.base import Strategy


@dataclass(frozen=True)
class Request:
    """What to decode, and how.

    Attributes:
        predictor: The mask predictor.
        prompts: Token ids of each row's prompt, not empty; lengths may differ.
        config: Decode settings.
        strategy: Chooses the commits.
        output: Receives sequences, counts and trace.
        references: ``(B, gen_length)`` int64, reference decodes for strategies that need them.
        regions: ``(B, gen_length)`` int64, what each row begins from: MASK where it is to be decoded; all MASK by default.
        record: Keep a :class:`~decoding.output.StepTrace` of every step, with evidence on all positions of the block.
        record_eot: Also record the EoT evidence over the whole generated region.
        record_hidden: Also record the hidden states of the block's masked positions, in fp16.
        seeds: Noise seed of each row; its place among the prompts by default.
        batch_size: Rows decoded together; all by default.
        stop: Called with a row's index and its decoded tokens, from the first generated one on, each time a block of it is
            done (with APD: each step); True ends the row there, as if an EoT followed.
        finished: Called with a row's index, its generated region and its NFE as soon as the row has ended.
    """

    predictor: MaskPredictor
    prompts: Sequence[Sequence[int]]
    config: DecodeConfig
    strategy: "Strategy"
    output: DecodeOutput
    references: Tensor | None = None
    regions: Tensor | None = None
    record: bool = False
    record_eot: bool = False
    record_hidden: bool = False
    seeds: Sequence[int] | None = None
    batch_size: int | None = None
    stop: Callable[[int, list[int]], bool] | None = None
    finished: Callable[[int, list[int], int], None] | None = None


class Run(ABC):
    """The rows of a request and what happens to them at every step; subclasses choose what is committed.

    Args:
        request: What to decode.
        config: Decode settings with the block length that the state is to have.

    Attributes:
        scheduler: Which prompt is in which row.
        state: The rows' tensors.
        rows: ``(b,)`` int64 on the CPU, index of each live row's prompt.
        cache: The predictor's keys and values, a row a slot, from storage column ``cache_first`` on, where a subclass keeps them.
        eot: EoT evidence of the step over the generated region, ``(b, G)`` fields; empty where none was looked at.
    """

    def __init__(self, request: Request, config: DecodeConfig) -> None:
        self.started = time.perf_counter()
        self.request, self.predictor, self.config = request, request.predictor, config
        self.output, device = request.output, request.predictor.device
        prompts = request.prompts
        self.sequences = self.output.sequences.to(device)
        self.noise = Noise(config, request.seeds if request.seeds is not None else range(len(prompts)), device)
        capacity = min(request.batch_size or len(prompts), len(prompts))
        ids, widths = request.predictor.ids, [len(prompt) for prompt in prompts]
        begun = None if request.regions is None else Begun(request.regions, len(prompts), ids, config)
        self.scheduler = Scheduler(widths, config, capacity, begun and begun.progress)
        self.state = BatchState(ids, prompts, config, self.scheduler, device, begun)
        self.rule = RULES[config.eot]()
        self.rule.prepare(config, request.predictor)
        self.rule.begin(self.state)
        self.timer = Timer(device)
        self.cache: KVCache | None = None
        self.cache_first = 0
        self._window: tuple[tuple[int, ...], KVCache] | None = None
        self.finished: list[int] = []
        self.rows = torch.tensor(self.scheduler.rows)
        self.eot: dict[str, Tensor] = {}

    @abstractmethod
    def decide(self) -> tuple[Evidence, Decision]:
        """Runs the forwards of a step and chooses its commits in the state's active blocks, ``(b, K)``."""

    def step(self) -> StepResult:
        """One forward of every live row, and what follows from it."""
        state, output, ids = self.state, self.output, self.predictor.ids
        evidence, decision = self.decide()
        transfer = decision.transfer & state.masked_block
        tokens = evidence.token if decision.token is None else decision.token
        for name, count in decision.counts.items():
            if name not in output.counts:
                output.counts[name] = count.new_zeros(len(output.nfe))
            output.counts[name].index_add_(0, state.row, count)
        if self.request.record:
            output.trace.append(self._trace(evidence, transfer, tokens))

        masked_before = state.masked
        state.commit(transfer, tokens)
        if self.config.eot != "off":
            committed = torch.where(transfer & (tokens == ids.eot), state.columns, self.config.gen_length).amin(1)
            seen = EotStep(committed, state.masked, state.end, self.eot.get("log_odds"), self.eot.get("top"))
            state.finish_at(self.rule.last(seen))
            if (closed := self.rule.closed(seen)) is not None:
                state.close_at(closed)
        self.finished = state.advance(evidence.confidence, decision.component)
        if self.request.stop is not None:
            self._stop(self.request.stop)
        output.seconds, output.predictor_seconds = time.perf_counter() - self.started, self.timer.total
        if any(slot.steps > self.config.gen_length for slot in self.scheduler.slots):
            raise RuntimeError(f"strategy {self.request.strategy.name!r} left a row without a commit")
        return StepResult(output.forward_calls, self.rows, masked_before, state)

    def forward(self, plan: ForwardPlan, wanted: Tensor) -> Tensor:
        """Runs one planned forward, counted and timed.

        Args:
            plan: Rows and columns; ``n`` rows run.
            wanted: ``(N,)`` int64, positions among the flattened rows and columns of the plan.

        Returns:
            ``(N, D)`` hidden states.
        """
        state, rows = self.state, plan.rows
        low, high = state.window
        high = plan.stop or high
        seen = None
        if not self.scheduler.unpadded or plan.end is not None:
            seen = state.attention(rows, low, high)
            seen = seen if plan.end is None else seen & (state.storage[low:high] < plan.end)
        arguments: dict[str, Any] = {}
        if self.cache is not None:
            every = isinstance(rows, slice)
            held = rows if every else slice(0, len(self.scheduler.slots))
            bounds = held.start, held.stop, low - self.cache_first, high - self.cache_first
            if self._window is None or self._window[0] != bounds:
                self._window = bounds, self.cache.window(*bounds)
            arguments["cache"] = self._window[1]
            arguments["cache_rows"] = None if every else rows
        if plan.first is None:
            ids, positions = state.ids[rows, low:high], state.positions[rows, low:high]
        elif isinstance(plan.first, int):
            first, last = plan.first, plan.first + plan.length
            ids, positions = state.ids[rows, first:last], state.positions[rows, first:last]
            arguments["cache_index"] = slice(first - low, last - low)
        else:
            ids = state.ids[rows]
            columns = (plan.first + state.storage[: plan.length]).expand(len(ids), -1)
            if plan.last is not None:
                columns = torch.minimum(columns, plan.last)
            arguments["cache_index"] = columns - low
            ids, positions = ids.gather(1, columns), state.positions[rows].gather(1, columns)
        with self.timer:
            hidden = self.predictor(ids, seen, positions, wanted, **arguments)
        self.output.forward_calls += 1
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The predictor's logits ``(N, V)`` of hidden states ``(N, D)``; their time is part of the forward's."""
        with self.timer:
            return self.predictor.logits(hidden)

    def text_length(self, slot: Slot) -> int:
        """Positions of a row, from its first generated one, in which nothing is masked."""
        return slot.block * self.config.block_length

    def _stop(self, asked: Callable[[int, list[int]], bool]) -> None:
        """Ends the rows whose text has grown to where nothing more is wanted."""
        state, region = self.state, self.config.gen_length
        last = [region] * len(self.scheduler.slots)
        for number, slot in enumerate(self.scheduler.slots):
            length = self.text_length(slot)
            if slot.left and length > slot.checked:
                slot.checked = length
                if asked(slot.row, state.text[number, :length].tolist()):
                    last[number], slot.left = length - 1, 0
        ended = [number for number, place in enumerate(last) if place < region]
        if ended:
            state.finish_at(state.upload(last))
            state.write_end()
            self.finished = sorted({*self.finished, *ended})

    def retire(self) -> None:
        """Stores the rows that finished in this step; their slots go to the prompts that wait."""
        if not self.finished:
            return
        state = self.state
        text = state.text
        for number in self.finished:
            slot = self.scheduler.slots[number]
            self.sequences[slot.row], self.output.nfe[slot.row] = text[number], slot.steps
            if self.request.finished is not None:
                self.request.finished(slot.row, text[number].tolist(), slot.steps)
        changes = self.scheduler.retire(self.finished)
        state.follow(changes)
        for source, target in changes.moves:
            self.moved(source, target)
        self.rows = torch.tensor(self.scheduler.rows)
        self.shrink()

    def moved(self, source: int, target: int) -> None:
        """A row went from one slot to another; whatever is stored by slot has to follow."""
        if self.cache is not None:
            self.cache.move(source, target)

    def keep_keys(self) -> None:
        """Allocates the predictor's cache for the live rows, as wide as the longest."""
        self.cache_first = self.state.window[0]
        width = len(self.state.storage) - self.cache_first
        self.cache = self.predictor.allocate_cache(len(self.scheduler.slots), width)

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        return 0 if self.cache is None else self.cache.nbytes

    def shrink(self) -> None:
        """Gives memory back where the live rows need no more than half of the keys' storage."""
        if self.cache is None or not self.scheduler.slots:
            return
        live, low, total = len(self.scheduler.slots), self.state.window[0], len(self.state.storage)
        rows, width = self.cache.keys.shape[1], self.cache.keys.shape[3]
        if live * (total - low) * 2 <= rows * width:
            self.cache = self.cache.window(0, live, low - self.cache_first, width).clone()
            self.cache_first, self._window = low, None

    def close(self) -> None:
        """Brings the results to the CPU."""
        output = self.output
        output.predictor_seconds = self.timer.read()
        output.sequences.copy_(self.sequences)
        output.counts = {name: count.cpu() for name, count in output.counts.items()}
        output.seconds = time.perf_counter() - self.started

    def _trace(self, evidence: Evidence, transfer: Tensor, tokens: Tensor) -> StepTrace:
        state, slots = self.state, self.scheduler.slots
        eot = self.eot if self.request.record_eot else {}
        most = torch.finfo(torch.float16).max
        wanted = self.request.record_hidden and evidence.hidden is not None
        hidden: Any = evidence.hidden.clamp(-most, most).half() if wanted else None
        evidence = replace(evidence, hidden=hidden)
        return StepTrace(
            rows=self.rows,
            block=torch.tensor([slot.block for slot in slots]),
            step=torch.tensor([slot.steps for slot in slots]),
            evidence=evidence.each(_kept),
            transfer=_kept(transfer),
            committed=_kept(tokens),
            eot_log_odds=_kept(eot["log_odds"] * state.masked) if eot else None,
            eot_top=_kept(eot["top"] & state.masked) if eot else None,
        )


def _kept(tensor: Tensor) -> Tensor:
    """A copy on the CPU; the decode writes over its own when another row comes.

    Nobody waits for a device: the copy is there once the step's read of the device, which comes later, has returned.
    """
    return tensor.clone() if tensor.device.type == "cpu" else tensor.to("cpu", non_blocking=True)
