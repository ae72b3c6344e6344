"""What is done with a batch of prompts to roll it out, whichever engine hands the batches out."""

import random

import torch
from torch import Tensor

from data.labels import Completions, collect, regions
from data.manifest import find_rollouts
from data.prompts import prompt_hash, tokenizer_hash
from data.rollout_data import PromptBatch, RolloutSettings
from data.rollouts import References
from data.shards import RolloutBatch, RolloutKey
from decoding.loop import decode
from decoding.output import DecodeOutput
from decoding.strategies import Strategy, make_strategy
from models.predictor import MaskPredictor, fingerprint


class Roller:
    """Decodes prompts full-step and with the oracle (Learn2PD, arXiv 2509.25188), on one device.

    Args:
        settings: What is rolled out.
        predictor: The base model; :meth:`MaskPredictor.outline` is enough for everything but :meth:`roll`.

    Raises:
        InputError: The filter or the earlier references of the settings cannot be read, or are of another model or settings.
    """

    def __init__(self, settings: RolloutSettings, predictor: MaskPredictor) -> None:
        self.settings, self.predictor = settings, predictor
        self.strategies: dict[str, Strategy] = {
            name: make_strategy("learn2pd", filter=settings.filter) if name == "filter" else make_strategy(name)
            for name in settings.passes
        }
        self.key = self._key()
        self.references: References | None = None
        if settings.references is not None:
            names = (*settings.decoding.settings(), "chat_template", "dtype", "eot_id")
            same = {name: self.key.settings[name] for name in names}
            self.references = References(find_rollouts(settings.references, self.key.fingerprint, same))

    def _key(self) -> RolloutKey:
        """What makes rollouts reusable."""
        assert self.predictor.tokenizer is not None
        given = self.settings
        settings = given.decoding.settings() | {
            "passes": given.passes,
            "filter": fingerprint(given.filter) if given.filter else None,
            "filter_threshold": self.strategies["filter"].settings()["threshold"] if given.filter else None,
            "states": given.states if given.filter else None,
            "eot_evidence": given.eot_evidence or None,
            "hidden_states": given.hidden_states or None,
            "chat_template": given.chat_template,
            "dtype": str(self.predictor.dtype).removeprefix("torch."),
            "eot_id": self.predictor.ids.eot,
        }
        return RolloutKey(self.predictor.fingerprint, tokenizer_hash(self.predictor.tokenizer), settings)

    def roll(self, batch: PromptBatch) -> RolloutBatch:
        """The references of a batch, and the trace of each of the passes."""
        full, references = None, None
        if self.references is not None:
            references = self.references.get([prompt_hash(prompt.prompt) for prompt in batch.prompts])
        if references is None or "full_step" in self.strategies:
            full = self._decode(batch, make_strategy("full_step"), None)
            references = full.sequences
        runs = {
            name: full if name == "full_step" and full else self._decode(batch, strategy, references)
            for name, strategy in self.strategies.items()
        }
        if "oracle" in runs and not torch.equal(runs["oracle"].sequences, references):
            raise RuntimeError("the oracle did not reproduce its reference")
        nfe, traces = {name: run.nfe for name, run in runs.items()}, {name: run.trace for name, run in runs.items()}
        completions = {name: self._complete(batch, run) for name, run in runs.items() if name == "filter"}
        return RolloutBatch(batch.index, batch.prompts, batch.tokens, references, nfe, traces, completions)

    def _complete(self, batch: PromptBatch, run: DecodeOutput) -> Completions:
        """Decodes the active block of some states of a recorded decode to its end, full-step: labels speak of no other.

        Which states depends on the prompt alone.
        """
        decoding, steps = self.settings.decoding, collect(run.trace)
        starts = (run.nfe.cumsum(0) - run.nfe).tolist()
        chosen = []
        for prompt, start, nfe in zip(batch.prompts, starts, run.nfe.tolist(), strict=True):
            rng = random.Random(prompt_hash(prompt.prompt))
            chosen += sorted(start + step for step in rng.sample(range(nfe), min(self.settings.states, nfe)))
        rows = steps.rows[chosen]
        begun = regions(steps, decoding.gen_length, self.predictor.ids.mask)[chosen]
        before = (steps.block[chosen] * decoding.block_length).tolist()
        found = decode(
            self.predictor, [batch.tokens[row] for row in rows.tolist()], decoding, make_strategy("full_step"),
            regions=begun, batch_size=batch.batch_size, stop=lambda state, text: len(text) > before[state],
        )  # fmt: skip
        return Completions(rows, steps.step[chosen], found.sequences)

    def _decode(self, batch: PromptBatch, strategy: Strategy, references: Tensor | None) -> DecodeOutput:
        return decode(
            self.predictor, batch.tokens, self.settings.decoding, strategy, references, record=True,
            record_eot=self.settings.eot_evidence, record_hidden=self.settings.hidden_states, batch_size=batch.batch_size,
        )  # fmt: skip
