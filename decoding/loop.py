"""The decode loop: the only place that calls the predictor, and the only place that counts forwards."""

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from decoding.cache import inputs, looks
from decoding.config import DecodeConfig
from decoding.eot import first_true, published_cut
from decoding.output import DecodeOutput, StepResult, StepTrace, Timer, empty_output
from decoding.read import Noise, read_block, read_eot
from decoding.state import BatchState, Slot
from decoding.strategies import Step, Strategy
from models.errors import InputError
from models.features import Evidence
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
) -> DecodeOutput:
    """Decodes prompts to the end; see :func:`decode_steps` for the arguments and errors."""
    output = empty_output(len(prompts), config)
    steps = decode_steps(
        predictor, prompts, config, strategy, output, references, record, record_eot, seeds, batch_size
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

    Raises:
        InputError: An empty prompt, one that leaves no room for ``gen_length``, or a strategy that does not fit.
    """
    check_prompts(predictor, prompts, config)
    strategy.prepare(predictor, config)
    run = _Run(predictor, prompts, config, strategy, output, references, record, record_eot, seeds, batch_size)
    while run.state.slots:
        yield run.step()
        run.hand_out()
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


class _Run:
    """One call of :func:`decode_steps`; see there for the arguments."""

    def __init__(
        self,
        predictor: MaskPredictor,
        prompts: Sequence[Sequence[int]],
        config: DecodeConfig,
        strategy: Strategy,
        output: DecodeOutput,
        references: Tensor | None,
        record: bool,
        record_eot: bool,
        seeds: Sequence[int] | None,
        batch_size: int | None,
    ) -> None:
        self.started = time.perf_counter()
        device = predictor.device
        self.predictor, self.config, self.strategy, self.output = predictor, config, strategy, output
        self.record, self.record_eot = record, record_eot
        self.needs = strategy.needs | ({"margin", "entropy", "history"} if record else frozenset())
        self.all_positions = strategy.all_positions or record
        self.see_region = record_eot or config.eot == "published"
        self.references = None if references is None else references.to(device)
        self.sequences = output.sequences.to(device)
        self.noise = Noise(config, seeds if seeds is not None else range(len(prompts)), device)
        slots = min(batch_size or len(prompts), len(prompts))
        self.state = BatchState(
            predictor.ids, prompts, config, slots, device, strategy.memory(1, config.block_length),
            predictor.vocab_size if "divergence" in self.needs else 0,
        )  # fmt: skip
        width = self.state.ids.shape[1]
        self.cache = predictor.allocate_cache(slots, width) if config.cache != "none" else None
        self.timer = Timer(device)
        self.finished: list[int] = []

    def step(self) -> StepResult:
        """One forward of every live row, and what follows from it."""
        state, output, config = self.state, self.output, self.config
        block, eot = self._see()
        output.nfe[state.rows] += 1
        evidence = self._evidence(block)
        rows = state.rows if state.ids.device.type == "cpu" else state.rows.to(state.ids.device)
        local = None if self.references is None else self.references[rows].gather(1, state.columns)
        decoded = 1 - state.masked.float().mean(1)
        divergence = block.get("divergence")
        decision = self.strategy.decide(Step(evidence, state.quota, local, decoded, divergence, state.memory))
        transfer = decision.transfer & state.masked_block
        tokens = evidence.token if decision.token is None else decision.token
        for name, count in decision.counts.items():
            if name not in output.counts:
                output.counts[name] = count.new_zeros(len(output.nfe))
            output.counts[name].index_add_(0, rows, count)
        if self.record:
            output.trace.append(_trace(state, evidence, transfer, tokens, eot if self.record_eot else None))

        before, current = state.masked.clone(), state.rows
        state.memory = decision.memory
        state.last_token, state.last_confidence, state.stable = evidence.token, evidence.confidence, evidence.stable
        state.commit(transfer, tokens)
        if config.eot != "off":
            state.finish_at(self._last(transfer & (tokens == self.predictor.ids.eot), eot))
        result = StepResult(output.forward_calls, current, before & ~state.masked, state.generated)
        self.finished = state.advance()
        output.seconds, output.predictor_seconds = time.perf_counter() - self.started, self.timer.total
        if any(slot.steps > config.gen_length for slot in state.slots):
            raise RuntimeError(f"strategy {self.strategy.name!r} left a row without a commit")
        return result

    def close(self) -> None:
        """Brings the results to the CPU."""
        output = self.output
        output.predictor_seconds = self.timer.read()
        output.sequences.copy_(self.sequences)
        output.counts = {name: count.cpu() for name, count in output.counts.items()}
        output.seconds = time.perf_counter() - self.started

    def _see(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Runs the step's forwards.

        Returns:
            Fields of :func:`decoding.read.read_block` over the active blocks, ``(b, K)``, and those of
            :func:`decoding.read.read_eot` over the generated region, ``(b, G)``; zero where the head was not run.
        """
        state, size = self.state, self.config.block_length
        block: dict[str, Tensor] = {}
        eot: dict[str, Tensor] = {}
        for look in looks(state.slots, self.config):
            index = None if look.slots is None else torch.tensor(look.slots).to(state.ids.device)
            slots = state.slots if look.slots is None else [state.slots[number] for number in look.slots]
            given = inputs(state, look, index, self.cache)
            numbers = state.numbers if index is None else index  # slot of each row of the forward
            starts = state.numbers[: len(slots), None] * given.ids.shape[1] + given.first
            at = (starts + state.offsets).view(-1)
            cells = (numbers[:, None] * size + state.offsets).view(-1)
            masked = state.masked_block if index is None else state.masked_block[index]
            if not self.all_positions and any(slot.here < size for slot in slots):
                some = masked.view(-1).nonzero_static(size=sum(slot.here for slot in slots))[:, 0]
                at, cells = at[some], cells[some]
            rest = None
            if self.see_region and (look.whole or self.config.cache == "prefix"):
                right = (state.masked if index is None else state.masked[index]) & (
                    state.region >= (state.block[numbers, None] + 1) * size
                )
                rest = right.view(-1).nonzero_static(size=sum(slot.left - slot.here for slot in slots))[:, 0]
                beyond = starts - state.block[numbers, None] * size + state.region
                at = torch.cat((at, beyond.view(-1)[rest]))
            with self.timer:
                logits = self.predictor(given.ids, given.attention, given.positions, at, **given.cache)
            self.output.forward_calls += 1
            if self.see_region:
                self._lay_out_eot(eot, read_eot(logits, self.predictor.ids), cells, rest, numbers)
            noise = self._draw(slots, masked, logits)
            found = read_block(logits[: len(cells)], self.predictor.ids, self.needs, noise)
            if "divergence" in self.needs:
                found["divergence"] = self._diverge(found.pop("log_probability"), cells)
            for name, values in found.items():
                if len(values) == state.masked_block.numel():
                    block[name] = values
                else:
                    block.setdefault(name, values.new_zeros(state.masked_block.numel())).index_copy_(0, cells, values)
        return {name: values.view(-1, size) for name, values in block.items()}, eot

    def _draw(self, slots: Sequence[Slot], masked: Tensor, logits: Tensor) -> Tensor | None:
        """Noise for the masked positions of the active blocks: a decode does not change with what else is looked at."""
        counts = [slot.here for slot in slots]
        noise = self.noise.draw([slot.row for slot in slots], counts, logits.shape[1])
        if noise is None or not self.all_positions:
            return noise
        live = masked.view(-1).nonzero_static(size=sum(counts))[:, 0]
        return noise.new_zeros(masked.numel(), logits.shape[1]).index_copy_(0, live, noise)

    def _diverge(self, now: Tensor, cells: Tensor) -> Tensor:
        """KL divergence ``(N,)`` from the last step's distributions at ``cells`` ``(N,)``, which ``now`` replaces."""
        assert self.state.distribution is not None
        stored = self.state.distribution.view(-1, now.shape[1])
        divergence = (now.exp() * (now - stored[cells])).sum(-1)
        stored.index_copy_(0, cells, now)
        first = self.state.step_in_block[cells // self.config.block_length] == 0
        return divergence.masked_fill_(first, torch.inf)

    def _lay_out_eot(
        self, eot: dict[str, Tensor], fields: dict[str, Tensor], cells: Tensor, rest: Tensor | None, numbers: Tensor
    ) -> None:
        """Writes EoT fields, first of the block's ``cells`` and then of the ``rest`` right of them, into ``(b, G)``."""
        state, size, region = self.state, self.config.block_length, self.config.gen_length
        slot = cells // size
        where = slot * region + state.block[slot] * size + cells % size
        if rest is not None:
            where = torch.cat((where, numbers[rest // region] * region + rest % region))
        for name, values in fields.items():
            laid = eot.setdefault(name, values.new_zeros(state.masked.shape))
            laid.view(-1).index_copy_(0, where, values)

    def _evidence(self, block: dict[str, Tensor]) -> Evidence:
        state = self.state
        masked, confidence = state.masked_block, block["confidence"]
        zero = torch.zeros_like(confidence)
        stable, previous = torch.zeros_like(state.columns), zero
        if "history" in self.needs:
            first = (state.step_in_block == 0)[:, None]
            same = masked & (block["token"] == state.last_token) & ~first
            stable = torch.where(same, state.stable + 1, 0)
            previous = (state.last_confidence * masked).masked_fill_(first, 0.0)
        margin, entropy = block.get("margin", zero), block.get("entropy", zero)
        if self.all_positions:  # else the head ran on masked positions only
            margin, entropy = margin * masked, entropy * masked
        return Evidence(masked, block["token"], confidence, margin, entropy, stable, previous)

    def _last(self, ended: Tensor, eot: dict[str, Tensor]) -> Tensor:
        """Last position of each row's text, ``(b,)`` int64, ``G`` while it has no end.

        Args:
            ended: ``(b, K)`` bool, positions of the active block that were committed as EoT.
            eot: EoT evidence over the region, for the published rule.
        """
        state, size, region = self.state, self.config.block_length, self.config.gen_length
        inside = first_true(ended)
        last = torch.where(inside < size, state.block * size + inside, region)
        if self.config.eot == "published":
            cut = published_cut(eot["probability"], eot["top"], state.masked)
            last = torch.where(last < region, last, cut)
        return last

    def hand_out(self) -> None:
        """Stores the rows that finished in this step and gives their slots away."""
        state = self.state
        for number in self.finished:
            row = state.slots[number].row
            self.sequences[row] = state.generated[number]
            self.noise.forget(row)
        for source, target in state.release(self.finished):
            if self.cache is not None:
                self.cache.move(source, target)


def _trace(
    state: BatchState, evidence: Evidence, transfer: Tensor, tokens: Tensor, eot: dict[str, Tensor] | None
) -> StepTrace:
    return StepTrace(
        rows=state.rows,
        block=torch.tensor([slot.block for slot in state.slots]),
        step=torch.tensor([slot.steps for slot in state.slots]),
        evidence=Evidence(**{name: value.to("cpu", copy=True) for name, value in vars(evidence).items()}),
        transfer=transfer.cpu(),
        committed=tokens.cpu(),
        eot_probability=None if eot is None else (eot["probability"] * state.masked).cpu(),
        eot_top=None if eot is None else (eot["top"] & state.masked).cpu(),
    )
