"""Semi-autoregressive decoding: blocks from left to right, each in as many forwards as the strategy takes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from decoding.cache import inputs, looks
from decoding.eot import published_cut
from decoding.read import read_block, read_eot
from decoding.run import Request, Run
from decoding.state import Slot
from decoding.strategies.base import BlockStrategy, Decision, Step
from models.features import Evidence


class BlockRun(Run):
    """A request whose strategy commits positions of the active block.

    Args:
        request: What to decode.
        strategy: Its strategy.
    """

    def __init__(self, request: Request, strategy: BlockStrategy) -> None:
        self.strategy = strategy
        record, predictor, config = request.record, request.predictor, request.config
        self.needs = strategy.needs | ({"margin", "entropy", "history"} if record else frozenset())
        self.all_positions = strategy.all_positions or record
        self.see_region = request.record_eot or config.eot == "published"
        memory = strategy.memory(1, config.block_length)
        super().__init__(request, config, memory, predictor.vocab_size if "divergence" in self.needs else 0)
        self.references = None if request.references is None else request.references.to(predictor.device)
        if config.cache != "none":
            self.keep_keys()

    def decide(self) -> tuple[Evidence, Decision]:
        state = self.state
        block = self._see()
        evidence = self._evidence(block)
        local = None
        if self.references is not None:
            local = self.references[state.rows.to(self.references.device)].gather(1, state.columns)
        decoded = 1 - state.masked.float().mean(1)
        divergence = block.get("divergence")
        decision = self.strategy.decide(Step(evidence, state.quota, local, decoded, divergence, state.memory))
        state.last_token, state.last_confidence, state.stable = evidence.token, evidence.confidence, evidence.stable
        return evidence, decision

    def last(self, ended: Tensor) -> Tensor:
        last = super().last(ended)
        if self.config.eot == "published":
            cut = published_cut(self.eot["probability"], self.eot["top"], self.state.masked)
            last = torch.where(last < self.config.gen_length, last, cut)
        return last

    def _see(self) -> dict[str, Tensor]:
        """Runs the step's forwards; leaves the EoT evidence in ``eot``.

        Returns:
            Fields of :func:`decoding.read.read_block` over the active blocks, ``(b, K)``; zero where the head was not run.
        """
        state, size = self.state, self.config.block_length
        block: dict[str, Tensor] = {}
        self.eot = {}
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
            logits = self.forward(given, at)
            if self.see_region:
                self._lay_out_eot(read_eot(logits, self.predictor.ids), cells, rest, numbers)
            noise = self._draw(slots, masked, logits)
            found = read_block(logits[: len(cells)], self.predictor.ids, self.needs, noise)
            if "divergence" in self.needs:
                found["divergence"] = self._diverge(found.pop("log_probability"), cells)
            for name, values in found.items():
                if len(values) == state.masked_block.numel():
                    block[name] = values
                else:
                    block.setdefault(name, values.new_zeros(state.masked_block.numel())).index_copy_(0, cells, values)
        return {name: values.view(-1, size) for name, values in block.items()}

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

    def _lay_out_eot(self, fields: dict[str, Tensor], cells: Tensor, rest: Tensor | None, numbers: Tensor) -> None:
        """Writes EoT fields, first of the block's ``cells`` and then of the ``rest`` right of them, into ``(b, G)``."""
        state, size, region = self.state, self.config.block_length, self.config.gen_length
        slot = cells // size
        where = slot * region + state.block[slot] * size + cells % size
        if rest is not None:
            where = torch.cat((where, numbers[rest // region] * region + rest % region))
        for name, values in fields.items():
            laid = self.eot.setdefault(name, values.new_zeros(state.masked.shape))
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
