"""The state of a batch while it is decoded, and what a decode hands out: commits as they happen, traces on request."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from decoding.config import DecodeConfig
from models.features import Evidence
from models.predictor import TokenIds


@dataclass
class BatchState:
    """The rows still being decoded: ``b`` rows of ``P`` prompt columns (left-padded) and ``G`` generated positions.

    Attributes:
        rows: ``(b,)`` int64, index of each row in the list of prompts.
        ids: ``(b, P + G)`` int64.
        attention: ``(b, P + G)`` bool, False on padding.
        positions: ``(b, P + G)`` int64, counted from the row's first real token.
        masked: ``(b, G)`` bool, not decoded yet; tracked apart from ``ids``, so a prompt may hold any token.
        block: ``(b,)`` int64, number of the active block.
        steps: ``(b,)`` int64, forwards so far.
        step_in_block: ``(b,)`` int64, forwards so far in the active block.
        last_token: ``(b, K)`` int64, the block's guesses one step earlier.
        last_confidence: ``(b, K)`` float32, their confidence; zero at a block's first step.
        stable: ``(b, K)`` int64, see :class:`models.features.Evidence`.
    """

    rows: Tensor
    ids: Tensor
    attention: Tensor
    positions: Tensor
    masked: Tensor
    block: Tensor
    steps: Tensor
    step_in_block: Tensor
    last_token: Tensor
    last_confidence: Tensor
    stable: Tensor

    @classmethod
    def start(
        cls, ids: TokenIds, prompts: Sequence[Sequence[int]], config: DecodeConfig, device: torch.device
    ) -> "BatchState":
        """Left-padded prompts followed by a fully masked region."""
        width = max(len(prompt) for prompt in prompts)
        batch, length = len(prompts), width + config.gen_length
        x = torch.full((batch, length), ids.mask)
        attention = torch.ones(batch, length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            x[row, : width - len(prompt)] = ids.pad
            attention[row, : width - len(prompt)] = False
            x[row, width - len(prompt) : width] = torch.as_tensor(prompt)
        positions = (attention.long().cumsum(1) - 1).clamp(min=0)
        count, block = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, config.block_length, dtype=torch.long)
        state = cls(
            rows=torch.arange(batch),
            ids=x,
            attention=attention,
            positions=positions,
            masked=torch.ones(batch, config.gen_length, dtype=torch.bool),
            block=count,
            steps=count.clone(),
            step_in_block=count.clone(),
            last_token=block,
            last_confidence=block.float(),
            stable=block.clone(),
        )
        return cls(**{field.name: getattr(state, field.name).to(device) for field in fields(cls)})

    @property
    def prompt_width(self) -> int:
        """Columns before the generated region."""
        return self.ids.shape[1] - self.masked.shape[1]

    @property
    def generated(self) -> Tensor:
        """``(b, G)`` int64 view of the generated region."""
        return self.ids[:, self.prompt_width :]

    def active_block(self) -> tuple[Tensor, Tensor]:
        """Columns of each row's active block in the generated region ``(b, K)`` and which of them are masked."""
        size = self.last_token.shape[1]
        columns = self.block[:, None] * size + torch.arange(size, device=self.block.device)
        return columns, self.masked.gather(1, columns)

    def quota(self, config: DecodeConfig) -> Tensor:
        """Tokens a fixed schedule commits at this step, ``(b,)``; the remainder falls on a block's first steps."""
        whole, rest = divmod(config.block_length, config.steps_per_block)
        return (whole + (self.step_in_block < rest).long()).clamp(min=1)

    def commit(self, columns: Tensor, transfer: Tensor, tokens: Tensor) -> None:
        """Writes ``tokens`` ``(b, K)`` where ``transfer`` is True, in place."""
        generated = self.generated
        generated.scatter_(1, columns, torch.where(transfer, tokens, generated.gather(1, columns)))
        self.masked.scatter_(1, columns, self.masked.gather(1, columns) & ~transfer)

    def remember(self, columns: Tensor, evidence: Evidence) -> None:
        """Advances the counters and keeps what the next step of the same block needs to know about this one."""
        self.last_token, self.last_confidence, self.stable = evidence.token, evidence.confidence, evidence.stable
        self.steps += 1
        self.step_in_block += 1

    def select(self, keep: Tensor, config: DecodeConfig) -> "BatchState":
        """The rows of ``keep`` ``(b,)`` with their block pointer on the first block that has a masked position."""
        state = self
        if not bool(keep.all()):
            state = BatchState(**{field.name: getattr(self, field.name)[keep] for field in fields(self)})
        block = state.masked.int().argmax(1) // config.block_length
        moved = block != state.block
        state.block = block
        state.step_in_block = state.step_in_block.masked_fill(moved, 0)
        state.last_confidence = state.last_confidence.masked_fill(moved[:, None], 0.0)
        return state


@dataclass(frozen=True)
class StepResult:
    """What one batched forward changed.

    Attributes:
        forward_call: Number of the forward, from 1.
        rows: ``(b,)`` int64, index of each row in the list of prompts.
        changed: ``(b, G)`` bool, positions decoded in this step, the fill after an EoT included.
        sequences: ``(b, G)`` int64, the generated region after the step; valid until the next one.
    """

    forward_call: int
    rows: Tensor
    changed: Tensor
    sequences: Tensor


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
        eot_probability: ``(b, G)`` float32, softmax probability of EoT at each position of the generated region that was
            masked before this step, 0 elsewhere; ``None`` unless the decode recorded it.
        eot_top: ``(b, G)`` bool, True where EoT was the argmax; ``None`` unless recorded.
    """

    rows: Tensor
    block: Tensor
    step: Tensor
    evidence: Evidence
    transfer: Tensor
    committed: Tensor
    eot_probability: Tensor | None = None
    eot_top: Tensor | None = None
