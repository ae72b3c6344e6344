"""The decode loop: the only place that calls the predictor, and the only place that counts forwards."""

import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decoding.config import DecodeConfig
from decoding.eot import accepted_end, fill_after, published_cut
from decoding.state import BatchState, StepResult, StepTrace
from decoding.strategies import Step, Strategy
from models.errors import InputError
from models.features import Evidence
from models.predictor import MaskPredictor, TokenIds


@dataclass
class DecodeOutput:
    """A finished batch; tensors on the CPU, rows in the order of the prompts.

    Attributes:
        sequences: ``(B, gen_length)`` int64, without any MASK id.
        nfe: ``(B,)`` int64, forwards in which the row still had masked positions.
        forward_calls: Batched forwards launched.
        counts: Name to ``(B,)`` int64 totals of the strategy's events.
        trace: Steps in order, where recorded.
        predictor_seconds: Wall time inside the predictor's forwards, in seconds; on a GPU only that of launching them.
        seconds: Wall time of the decode, in seconds.
    """

    sequences: Tensor
    nfe: Tensor
    forward_calls: int = 0
    counts: dict[str, Tensor] = field(default_factory=dict)
    trace: list[StepTrace] = field(default_factory=list)
    predictor_seconds: float = 0.0
    seconds: float = 0.0


def decode(
    predictor: MaskPredictor,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    strategy: Strategy,
    references: Tensor | None = None,
    record: bool = False,
    record_eot: bool = False,
    seeds: Sequence[int] | None = None,
) -> DecodeOutput:
    """Decodes one batch to the end; see :func:`decode_steps` for the arguments and errors."""
    output = empty_output(len(prompts), config)
    for _ in decode_steps(predictor, prompts, config, strategy, output, references, record, record_eot, seeds):
        pass
    return output


def empty_output(batch: int, config: DecodeConfig) -> DecodeOutput:
    """An output for :func:`decode_steps` to fill."""
    return DecodeOutput(torch.zeros(batch, config.gen_length, dtype=torch.long), torch.zeros(batch, dtype=torch.long))


@torch.no_grad()
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
) -> Iterator[StepResult]:
    """Decodes one batch, yielding after every forward; ``output`` is filled on the way.

    Rows keep their own block pointer and leave the batch when they are finished, so a row decodes to the same tokens
    whatever shares its batch (up to the rounding of the kernels; exactly so in fp32 except at ties).

    Args:
        predictor: The mask predictor.
        prompts: Token ids of each row's prompt, not empty; lengths may differ.
        config: Decode settings.
        strategy: Chooses the commits.
        output: Receives sequences, counts and trace.
        references: ``(B, gen_length)`` int64, reference decodes for strategies that need them.
        record: Keep a :class:`~decoding.state.StepTrace` of every step, with evidence on all positions of the block.
        record_eot: Also record the EoT evidence over the whole generated region.
        seeds: Noise seed of each row; its place in the batch by default.

    Raises:
        InputError: An empty prompt, one that leaves no room for ``gen_length``, or a strategy that does not fit.
    """
    started = time.perf_counter()
    check_prompts(predictor, prompts, config)
    strategy.prepare(predictor, config)
    state = BatchState.start(predictor.ids, prompts, config, predictor.device)
    if references is not None:
        references = references.to(predictor.device)
    noise = _Noise(config, seeds if seeds is not None else range(len(prompts)), predictor.device)
    needs = strategy.needs | ({"margin", "entropy"} if record else frozenset())
    all_positions = strategy.all_positions or record
    see_region = record_eot or config.eot == "published"
    while state.rows.numel():
        if output.forward_calls >= config.gen_length:
            raise RuntimeError(f"strategy {strategy.name!r} left a row without a commit")
        columns, masked = state.active_block()
        wanted = state.masked.clone() if see_region else torch.zeros_like(state.masked)
        wanted.scatter_(1, columns, masked if not all_positions else torch.ones_like(masked))
        row, position = wanted.nonzero(as_tuple=True)
        at = row * state.ids.shape[1] + state.prompt_width + position
        called = time.perf_counter()
        logits = predictor(state.ids, state.attention, state.positions, at)
        output.predictor_seconds += time.perf_counter() - called
        output.forward_calls += 1
        output.nfe[state.rows.cpu()] += 1

        live = (torch.zeros_like(state.masked).scatter_(1, columns, masked))[row, position]
        fields = _read(logits, predictor.ids, needs, see_region, noise.draw(state.rows, row, live, logits))
        region = _lay_out(fields, row, position, state.masked.shape)
        evidence = _evidence(region, columns, masked, state, all_positions)
        local = None if references is None else references[state.rows].gather(1, columns)
        decision = strategy.decide(Step(evidence, state.quota(config), local))
        transfer = decision.transfer & masked
        tokens = evidence.token if decision.token is None else decision.token
        for name, count in decision.counts.items():
            output.counts.setdefault(name, torch.zeros_like(output.nfe)).index_add_(0, state.rows.cpu(), count.cpu())
        if record:
            output.trace.append(_trace(state, evidence, transfer, tokens, region, record_eot))

        before = state.masked.clone()
        state.commit(columns, transfer, tokens)
        if config.eot != "off":
            end = accepted_end(before & ~state.masked, state.generated, predictor.ids.eot)
            if config.eot == "published":
                cut = published_cut(region["eot_probability"], region["eot_top"], state.masked)
                end = torch.where(end < config.gen_length, end, cut)
            fill_after(state.generated, state.masked, end, predictor.ids.eot)
        result = StepResult(output.forward_calls, state.rows, before & ~state.masked, state.generated)
        state.remember(columns, evidence)
        finished = ~state.masked.any(1)
        output.sequences[state.rows[finished].cpu()] = state.generated[finished].cpu()
        state = state.select(~finished, config)
        output.seconds = time.perf_counter() - started
        yield result


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


class _Noise:
    """Gumbel noise, one generator a row, so that what a row draws does not depend on the batch."""

    def __init__(self, config: DecodeConfig, seeds: Sequence[int], device: torch.device) -> None:
        self.temperature, self.device = config.temperature, device
        self.generators: list[torch.Generator] = []
        if config.temperature > 0:
            for seed in seeds:
                self.generators.append(torch.Generator(device).manual_seed(config.seed * 1_000_003 + seed))

    def draw(self, rows: Tensor, row: Tensor, live: Tensor, logits: Tensor) -> Tensor | None:
        """``(N, V)`` float32 noise scaled by the temperature, or ``None`` at temperature 0.

        Only positions that can be committed, ``live`` ``(N,)``, draw: a decode does not change with what else is looked at.
        """
        if not self.generators:
            return None
        counts = torch.bincount(row[live], minlength=len(rows)).tolist()
        uniform = torch.cat(
            [
                torch.rand(count, logits.shape[1], generator=self.generators[index], device=self.device)
                for index, count in zip(rows.tolist(), counts, strict=True)
            ]
        )
        noise = torch.zeros(logits.shape, device=self.device)
        noise[live] = -(-uniform.clamp_(1e-20, 1 - 1e-7).log()).log() * self.temperature
        return noise


def _read(logits: Tensor, ids: TokenIds, needs: Set[str], eot: bool, noise: Tensor | None) -> dict[str, Tensor]:
    """Token, confidence and whatever else was asked for, each ``(N,)``, from logits ``(N, V)``."""
    wide = logits.float()
    total = wide.logsumexp(-1)  # over the whole vocabulary; only the choice of the token excludes MASK
    allowed = wide.index_fill(-1, torch.tensor(ids.mask, device=wide.device), -torch.inf)
    token = (allowed if noise is None else allowed + noise).argmax(-1)
    fields = {"token": token, "confidence": (allowed.gather(-1, token[:, None])[:, 0] - total).exp()}
    if "margin" in needs:
        best = allowed.topk(2, dim=-1).values
        fields["margin"] = best[:, 0] - best[:, 1]
    if "entropy" in needs:
        log_probability = wide - total[:, None]
        fields["entropy"] = -(log_probability.exp() * log_probability).sum(-1)
    if eot:
        fields["eot_probability"] = (wide[:, ids.eot] - total).exp()
        fields["eot_top"] = token == ids.eot
    return fields


def _lay_out(fields: dict[str, Tensor], row: Tensor, position: Tensor, shape: torch.Size) -> dict[str, Tensor]:
    """Each field over the generated region, ``(b, G)``; zero where the head was not run."""
    laid = {name: values.new_zeros(shape) for name, values in fields.items()}
    for name, values in fields.items():
        laid[name][row, position] = values
    return laid


def _evidence(
    region: dict[str, Tensor], columns: Tensor, masked: Tensor, state: BatchState, all_positions: bool
) -> Evidence:
    block = {name: values.gather(1, columns) for name, values in region.items()}
    zero = torch.zeros(masked.shape, device=masked.device)
    same = masked & (block["token"] == state.last_token) & (state.step_in_block > 0)[:, None]
    confidence = block["confidence"]
    return Evidence(
        masked=masked,
        token=block["token"],
        confidence=confidence if all_positions else confidence * masked,
        margin=block.get("margin", zero) * masked,
        entropy=block.get("entropy", zero) * masked,
        stable=torch.where(same, state.stable + 1, 0),
        previous=state.last_confidence * masked,
    )


def _trace(
    state: BatchState, evidence: Evidence, transfer: Tensor, tokens: Tensor, region: dict[str, Tensor], eot: bool
) -> StepTrace:
    masked = state.masked
    return StepTrace(
        rows=state.rows.cpu().clone(),
        block=state.block.cpu(),
        step=state.steps.cpu().clone(),
        evidence=Evidence(**{name: value.cpu() for name, value in vars(evidence).items()}),
        transfer=transfer.cpu(),
        committed=tokens.cpu(),
        eot_probability=(region["eot_probability"] * masked).cpu() if eot else None,
        eot_top=(region["eot_top"] & masked).cpu() if eot else None,
    )
