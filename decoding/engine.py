"""What engines run that own the loop and hand over logits: one step of a block, without a predictor and without a batch.

It is the decode loop's own reading of logits and the strategy's own ``decide``; only what the loop knows beyond the block is
missing. An engine's block is its own: attention to the right of an end of the text goes on, and a block's first step is
compared with nothing, as with a dual cache.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoding.config import DecodeConfig
from decoding.evidence import compare_guesses, divergence, evidence_of, lay_out
from decoding.read import in_chunks, read_block
from decoding.step import Step, check_finite
from decoding.strategies import BlockStrategy, Strategy
from models.errors import InputError
from models.features import Evidence
from models.filter import FilterConfig, check_compatible
from models.predictor import TokenIds, fingerprint
from models.rules import FOLDER, LENGTH, check, instance, whole

_RULES = {
    "strategy": instance(Strategy), "mask_id": whole(0), "block_length": LENGTH, "eot_id": whole(0).or_null(),
    "base": FOLDER.or_null(),
}  # fmt: skip
State = dict[str, Tensor]
"""What a block carries from step to step, ``(b, ...)`` each; how far it is, and what its strategy and filter remember."""


@dataclass
class Engine:
    """Commits positions of blocks, given their logits.

    Args:
        strategy: A strategy that needs nothing but the block.
        mask_id: Id of an undecoded position.
        block_length: Positions of a block, ``K``.
        eot_id: Id that ends the text: what is right of the first in a block becomes EoT with it. ``None``: nothing ends.
        steps: Steps of a block, for strategies with a quota; by default one token each.
        base: Folder of the base model whose logits will come, to check that the strategy's component was made for it.

    Raises:
        InputError: A setting out of range, a strategy that needs more than the block, or one whose component was made for
            another model or block.
    """

    strategy: Strategy
    mask_id: int
    block_length: int
    eot_id: int | None = None
    steps: int | None = None
    base: str | Path | None = None

    def __post_init__(self) -> None:
        check(vars(self), _RULES)
        if self.eot_id == self.mask_id:
            raise InputError(
                "eot_id", f"{self.eot_id}, which is mask_id", "another id, or null where nothing ends the text"
            )
        self.rule = block_rule(self.strategy)
        quota = DecodeConfig(self.block_length, self.block_length, self.steps)
        self.whole, self.rest = divmod(self.block_length, quota.steps_per_block)
        self.ids = TokenIds(self.mask_id, *[-1 if self.eot_id is None else self.eot_id] * 3, bos=-1)
        self.described: FilterConfig | None = getattr(self.strategy, "config", None)
        if (known := self.described) is not None:
            differences = check_compatible(
                known,
                family=known.base_family,
                vocab_size=known.vocab_size,  # compared with the logits when they come
                mask_id=self.mask_id,
                fingerprint=known.base_fingerprint if self.base is None else fingerprint(Path(self.base)),
                gen_length=known.gen_length,
                block_length=self.block_length,
            )
            for difference in differences:
                warnings.warn(difference, stacklevel=3)

    def begin(self, logits: Tensor) -> State:
        """The state of blocks before their first step.

        Args:
            logits: ``(b, K, V)``, for their sizes and device; ``K`` may be below the block length.

        Raises:
            InputError: Something else than logits, longer blocks, or logits over another vocabulary.
        """
        (rows, length, size), device = self._sizes(logits), logits.device
        if self.described is not None:
            self.strategy.network.to(device)  # type: ignore[attr-defined] - whatever is described has one
        shape = rows, length
        state = {f"memory.{name}": value for name, value in self.rule.memory(*shape).items()}
        state["step"] = torch.zeros(rows, dtype=torch.long)
        if "history" in self.rule.needs:
            state |= {"token": torch.full(shape, -1), "confidence": torch.zeros(shape)}
            state["stable"] = torch.zeros(shape, dtype=torch.long)
        if "divergence" in self.rule.needs:
            state["log_probability"] = torch.zeros(*shape, size)
        return {name: value.to(device) for name, value in state.items()}

    @torch.inference_mode()
    def commit(
        self, logits: Tensor, block_ids: Tensor, state: State | None = None, prompt: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """One step of ``b`` blocks; changes none of its arguments.

        Args:
            logits: ``(b, K, V)``, of the positions as they stand in ``block_ids``; any float dtype.
            block_ids: ``(b, K)`` int64, MASK where nothing is decoded yet.
            state: What the last step of the same blocks returned; ``None`` for their first.
            prompt: ``(b, K)`` bool, positions of the prompt, which stay as they are, whatever their id; ``None``: there are none.

        Returns:
            ``transfer`` ``(b, K)`` bool, what to write; ``tokens`` ``(b, K)`` int64, what to write there; and the state for
            the next step. A block with nothing masked transfers nothing.

        Raises:
            InputError: A tensor of another shape or dtype, or or a confidence or a filter's probability that is not finite.
        """
        sizes = self._sizes(logits)
        _check_tensor("block_ids", block_ids, torch.long, sizes[:2])
        prompt = torch.zeros_like(block_ids, dtype=torch.bool) if prompt is None else prompt
        _check_tensor("prompt", prompt, torch.bool, sizes[:2])
        before = self.begin(logits) if state is None else self._known(state, *sizes)
        after = dict(before, step=before["step"] + 1)
        masked = (block_ids == self.mask_id) & ~prompt
        fields = self._read(logits, masked, before, after)
        step = Step(
            self._evidence(fields, masked, block_ids, prompt, before, after),
            fields["log_confidence"].where(masked, -torch.inf),
            quota=self.whole + (before["step"] < self.rest).long(),
            decoded=1 - masked.float().mean(1),  # who weighs it by more than 0 is refused
            divergence=fields.get("divergence"),
            draw_entropy=fields.get("draw_entropy"),
            memory={name: before[f"memory.{name}"] for name in self.rule.memory(1, 1)},
        )  # fmt: skip
        decision = self.rule.decide(step)
        known = (step.evidence.confidence, decision.component)
        check_finite(*(values is not None and not values.isfinite().all() for values in known))
        after |= {f"memory.{name}": value for name, value in decision.memory.items()}
        transfer, tokens = decision.transfer & masked, step.evidence.token
        if self.eot_id is not None:
            found = transfer & (tokens == self.eot_id)
            beyond = (found.cumsum(1) > 0) & ~found & ~prompt
            transfer, tokens = transfer | beyond, tokens.masked_fill(beyond, self.eot_id)
        return transfer, tokens, after

    def _sizes(self, logits: Tensor) -> tuple[int, int, int]:
        """``b``, ``K`` and ``V`` of logits that fit."""
        if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
            raise InputError("logits", _described(logits), "floating point of shape (b, K, V)")
        rows, length, size = logits.shape
        if not 0 < length <= self.block_length:
            raise InputError("logits", f"blocks of {length} positions", f"1 to {self.block_length}, the block length")
        if self.described is not None and size != self.described.vocab_size:
            raise InputError("logits", f"{size} token ids", f"{self.described.vocab_size}, as the filter was trained")
        if size <= (last := max(self.mask_id, self.ids.eot)):
            raise InputError("logits", f"{size} token ids", f"more than {last}, the largest of mask_id and eot_id")
        return rows, length, size

    def _known(self, state: State, rows: int, length: int, size: int) -> State:
        """A state that fits, as it was given."""
        shapes = {f"memory.{name}": tuple(value.shape) for name, value in self.rule.memory(rows, length).items()}
        shapes["step"] = (rows,)
        if "history" in self.rule.needs:
            shapes |= dict.fromkeys(("token", "confidence", "stable"), (rows, length))
        if "divergence" in self.rule.needs:
            shapes["log_probability"] = rows, length, size
        tensors = isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
        found = {name: tuple(value.shape) for name, value in state.items()} if tensors else _described(state)
        if found != shapes:
            raise InputError("state", str(found)[:200], f"what the last commit of these blocks returned: {shapes}")
        return state

    def _evidence(
        self, fields: dict[str, Tensor], masked: Tensor, ids: Tensor, prompt: Tensor, before: State, after: State
    ) -> Evidence:
        """What the strategy is shown; remembers this step's guesses in ``after`` where it compares them."""
        needs, inside = self.rule.needs, None
        if self.rule.all_positions:
            ended = (ids == self.ids.eot) & ~prompt  # -1 where nothing ends, which is no id
            inside = ended.cumsum(1) - ended.long() == 0

        def compare(token: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
            known = before["token"], before["confidence"], before["stable"]
            stable, previous = compare_guesses(masked, (token, confidence), known)
            after.update(token=token, confidence=confidence, stable=stable)
            return stable, previous

        text, history = ids if "text" in needs else None, compare if "history" in needs else None
        return evidence_of(fields, needs, masked, text, inside, history)

    def _read(self, logits: Tensor, masked: Tensor, before: State, after: State) -> dict[str, Tensor]:
        """Fields ``(b, K)`` of the masked positions, or of all for a strategy that reads all; zero elsewhere."""
        flat = logits.flatten(0, 1)
        cells = torch.arange(len(flat), device=flat.device)
        if not self.rule.all_positions:
            cells = cells[masked.flatten()]
        stored = None
        if "divergence" in self.rule.needs:
            after["log_probability"] = before["log_probability"].clone()
            stored = after["log_probability"].flatten(0, 1)

        def read(part: Tensor, place: slice) -> dict[str, Tensor]:
            said, read_now = read_block(part, self.ids, self.rule.needs, top_p=self.rule.top_p), cells[place]
            if stored is not None:
                now = said.pop("log_probability")
                first = before["step"][read_now // masked.shape[1]] == 0
                said["divergence"] = divergence(now, stored[read_now]).masked_fill_(first, torch.inf)
                stored[read_now] = now
            return said

        fields: dict[str, Tensor] = {}
        # Picking positions copies them: reading overwrites fp32 logits, and these are the engine's.
        found = in_chunks(cells, lambda chosen: flat[chosen], flat.shape[1], read)
        lay_out(fields, found, cells, masked.shape)
        return fields


def _check_tensor(name: str, value: object, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or value.dtype is not dtype or value.shape != shape:
        raise InputError(name, _described(value), f"{dtype} of shape {shape}, as the logits")


def _described(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]


def block_rule(strategy: Strategy) -> BlockStrategy:
    """The strategy as one that needs only its block.

    Raises:
        InputError: It needs more.
    """
    if beyond := strategy.beyond_block:
        raise InputError(
            "strategy", f"{strategy.name}, which reads {beyond}", "one that reads a block's logits and ids only"
        )
    assert isinstance(strategy, BlockStrategy)
    return strategy


def split(state: State) -> list[State]:
    """The state of each block, ``(1, ...)`` tensors, for engines that keep it by request."""
    return [{name: value[row : row + 1] for name, value in state.items()} for row in range(len(state["step"]))]


def join(states: Sequence[State | Any]) -> State:
    """Undoes :func:`split`, in any order and of blocks at any step."""
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}
