"""Semi-autoregressive decoding: blocks from left to right, each in as many forwards as the strategy takes."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from decoding.evidence import evidence_of, lay_out
from decoding.history import Distributions, History
from decoding.plan import CACHES, ForwardPlan, begin
from decoding.read import in_chunks, read_block, read_eot
from decoding.run import Request, Run
from decoding.step import Decision, Step
from models.features import EVIDENCE, Evidence

if TYPE_CHECKING:
    from decoding.strategies.base import BlockStrategy


class BlockRun(Run):
    """A request whose strategy commits positions of the active block.

    Args:
        request: What to decode.
        strategy: Its strategy.
    """

    def __init__(self, request: Request, strategy: "BlockStrategy") -> None:
        super().__init__(request, request.config)
        state, predictor = self.state, request.predictor
        self.strategy, self.policy = strategy, CACHES[request.config.cache]
        self.needs = strategy.needs | (EVIDENCE if request.record else frozenset())
        self.needs |= {"hidden"} if request.record_hidden else set()
        self.all_positions = strategy.all_positions or request.record
        self.reads_region = request.record_eot or self.rule.reads_region
        self.history = History(state) if "history" in self.needs else None
        self.distributions = Distributions(state, predictor.vocab_size) if "divergence" in self.needs else None
        self.memory = {
            name: state.register(value[0].to(state.device), per_block=True, told=strategy.told.get(name))
            for name, value in strategy.memory(1, request.config.block_length).items()
        }
        self.references = None if request.references is None else request.references.to(state.device)
        if self.policy.keeps_keys:
            self.keep_keys()

    def decide(self) -> tuple[Evidence, Decision]:
        state = self.state
        fields: dict[str, Tensor] = {}
        self.eot = {}
        self.noise.begin(self.scheduler.rows)
        for plan in self.policy.plans(state, self.predictor.left_context):
            self._look(plan, fields)
        evidence, log_confidence = self._evidence(fields), fields["log_confidence"]
        step = Step(
            evidence,
            log_confidence.where(evidence.masked, -torch.inf) if self.all_positions else log_confidence,
            state.quota,
            None if self.references is None else self.references[state.row].gather(1, state.columns),
            1 - state.masked.float().mean(1) if "decoded" in self.needs else None,
            fields.get("divergence"),
            fields.get("draw_entropy"),
            {name: tensor.value for name, tensor in self.memory.items()},
            {name: self.memory[name].known for name in self.strategy.told},
        )
        decision = self.strategy.decide(step)
        for name, tensor in self.memory.items():
            tensor.value = decision.memory[name]
        return evidence, decision

    def _look(self, plan: ForwardPlan, fields: dict[str, Tensor]) -> None:
        """Runs one forward of the step, and lays out what it says: of the active blocks in ``fields``, of EoT in ``eot``.

        Args:
            plan: The forward.
            fields: Fields of :func:`decoding.read.read_block`, ``(b, K)``; zero where the head was not run.
        """
        state, size, rows = self.state, self.config.block_length, plan.rows
        slots = [self.scheduler.slots[number] for number in plan.slots]
        masked, region = state.masked_block[rows], len(state.region)
        taking = None
        if len(slots) < len(masked):
            taking = state.upload([[number in plan.slots] for number in range(len(state.block))])[rows]
        # Each row's active block begins ``shift`` columns from where its forward begins, and that has ``length`` columns.
        shift, length = self.predictor.left_context, plan.length
        if plan.whole:
            low, high = state.window
            shift, length = begin(state, plan.slots, rows) - low, high - low

        # The masked positions first: only they draw noise, whatever else is looked at.
        counts = [slot.block_masked for slot in slots]
        sparse = sum(counts) < masked.numel()
        chosen = _where(masked, taking, sum(counts)) if sparse else state.cells[: masked.numel()]
        if sparse and self.all_positions:
            chosen = torch.cat((chosen, _where(~masked, taking, len(slots) * size - sum(counts))))
        cells, wanted = _in_batch(chosen, size, rows), [_placed(chosen, size, length, shift)]

        # Right of the block: what it says of EoT, and its next block's distributions.
        rest = ahead = None
        if self.reads_region and (plan.whole or self.policy.sees_ahead):
            done = state.block[rows, None] * size
            right = state.masked[rows] & (state.region >= done + size)
            rest = _where(right, taking, sum(slot.left - slot.block_masked for slot in slots))
            wanted.append(_placed(rest, region, length, shift - done))
        if self.distributions is not None and self.policy.sees_ahead:
            reached = state.offsets < state.end[rows, None] - (state.block[rows, None] + 1) * size
            ahead = _where(
                reached, taking, sum(min(max(slot.end - (slot.block + 1) * size, 0), size) for slot in slots)
            )
            wanted.append(_placed(ahead, size, length, shift + size))

        hidden = self.forward(plan, torch.cat(wanted) if len(wanted) > 1 else wanted[0])
        of_block, *others = hidden.split([len(part) for part in wanted]) if len(wanted) > 1 else [hidden]
        if ahead is not None:
            stored = _in_batch(ahead, size, rows)
            self._keep(others[-1], stored // size, stored % size)
        found = self._read(of_block, cells, [slot.row for slot in slots], counts)
        if self.reads_region:
            places = _placed(cells, size, region, state.block[:, None] * size)
            lay_out(self.eot, {name: found.pop(f"eot_{name}") for name in _EOT}, places, state.masked.shape)
        if rest is not None:
            said = in_chunks(
                others[0], self.logits, self.predictor.vocab_size,
                lambda logits, _: read_eot(logits, self.predictor.ids),
            )  # fmt: skip
            lay_out(self.eot, said, _in_batch(rest, region, rows), state.masked.shape)
        every = not sparse and len(masked) == len(state.block)
        lay_out(fields, found, None if every else cells, state.masked_block.shape)

    def _read(self, hidden: Tensor, cells: Tensor, rows: list[int], counts: list[int]) -> dict[str, Tensor]:
        """Fields of the active blocks' positions ``cells`` ``(N,)``, masked ones first; ``eot_*`` where asked for."""
        ids, needs, drawn = self.predictor.ids, self.needs, sum(counts)

        def read(logits: Tensor, part: slice) -> dict[str, Tensor]:
            def noisy(wide: Tensor) -> Tensor:
                count = min(max(drawn - part.start, 0), len(wide))
                return torch.cat((self.noise.add(wide[:count], rows, counts, part.start), wide[count:]))

            said = {f"eot_{name}": value for name, value in read_eot(logits, ids).items()} if self.reads_region else {}
            warmth = self.config.temperature
            said |= read_block(logits, ids, needs, noisy if warmth else None, warmth, self.strategy.top_p)
            if self.distributions is not None:
                said["divergence"] = self.distributions.diverge(said.pop("log_probability"), cells[part])
            return said

        found = in_chunks(hidden, self.logits, self.predictor.vocab_size, read)
        return found | {"hidden": hidden} if "hidden" in needs else found

    def _keep(self, hidden: Tensor, row: Tensor, offset: Tensor) -> None:
        """Remembers the distributions of the next block."""

        def read(logits: Tensor, part: slice) -> dict[str, Tensor]:
            assert self.distributions is not None
            self.distributions.keep(logits.float().log_softmax(-1), row[part], offset[part])
            return {}

        in_chunks(hidden, self.logits, self.predictor.vocab_size, read)

    def _evidence(self, fields: dict[str, Tensor]) -> Evidence:
        state = self.state
        ids = state.generated.gather(1, state.columns) if "text" in self.needs else None
        inside = state.columns < state.end[:, None] if self.all_positions else None
        compare = None if self.history is None else self.history.compare
        return evidence_of(fields, self.needs, state.masked_block, ids, inside, compare)


_EOT = ("log_odds", "top")


def _where(flags: Tensor, taking: Tensor | None, count: int) -> Tensor:
    """Places of the ``count`` True entries of the flattened ``flags``, ``(count,)`` int64, without asking the device.

    Args:
        flags: ``(n, width)`` bool.
        taking: ``(n, 1)`` bool, the rows that count; ``None``: all.
        count: How many there are.
    """
    flags = flags if taking is None else flags & taking
    return flags.reshape(-1).nonzero_static(size=count)[:, 0]


def _placed(places: Tensor, width: int, length: int, shift: Tensor | int) -> Tensor:
    """Places of a flattened ``(n, width)``, ``(N,)`` int64, in a flattened ``(n, length)``.

    Args:
        places: ``(N,)`` int64.
        width: Columns of what they are places in.
        length: Columns of what they are to be places in.
        shift: Column there of a row's first column here, ``(n, 1)`` int64 or the same number for all.
    """
    if isinstance(shift, int):
        if width == length:
            return places + shift if shift else places
        return places + (places // width * (length - width) + shift)
    row = places // width
    return places + row * (length - width) + shift[row, 0]


def _in_batch(places: Tensor, width: int, rows: slice | Tensor) -> Tensor:
    """Places of the flattened ``(n, width)`` of some ``rows``, ``(N,)`` int64, in the flattened ``(b, width)`` of all."""
    if isinstance(rows, slice):
        return places + rows.start * width if rows.start else places
    return places + (rows - torch.arange(len(rows), device=rows.device))[places // width] * width
