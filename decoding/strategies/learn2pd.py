"""Learn2PD: a small trained filter says which guesses are already final."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decoding.config import DecodeConfig
from decoding.strategies.base import BlockStrategy, Decision, Step, Strategy, top_1
from models.errors import InputError
from models.filter import FilterConfig, check_compatible, load_filter
from models.predictor import MaskPredictor, fingerprint, fingerprint_in_memory
from models.rules import FOLDER, POSITIVE, SHARE, check, instance


class FilterStrategy(BlockStrategy):
    """A strategy that asks a trained filter: loads it and checks that it fits. Subclasses are dataclasses.

    Attributes:
        filter: Folder of an exported filter.
        network: The filter's network, given or loaded from ``filter``; ``None`` where a subclass works without one.
        config: Configuration of ``network``.
    """

    filter: str | Path | None
    network: nn.Module | None
    config: FilterConfig | None

    @property
    def beyond_block(self) -> str:
        return "" if self.config is None or self.config.logits_only else "hidden states"

    def take_filter(self) -> FilterConfig:
        """Loads ``filter`` where no ``network`` was given, and asks for the evidence that the network reads.

        Raises:
            InputError: There is no filter, or nothing that describes it.
        """
        rules = {"network": instance(nn.Module).or_null(), "config": instance(FilterConfig).or_null()}
        check(vars(self), rules | {"filter": FOLDER.or_null()}, f"{self.name}.")
        if self.network is None:
            if self.filter is None:
                raise InputError("filter", None, "the folder of an exported filter")
            self.network, self.config = load_filter(self.filter)
        if self.config is None:
            raise InputError(f"{self.name}.config", None, "the FilterConfig of the network")
        self.needs = self.config.needs
        self.all_positions = bool(self.network.needs_all_positions)
        return self.config

    def outlined(self, predictor: MaskPredictor, config: DecodeConfig) -> Strategy:
        if self.config is not None and self.config.vocab_size != predictor.vocab_size:
            raise InputError("filter: vocab_size", self.config.vocab_size, f"{predictor.vocab_size}, that of the model")
        if self.config is not None and self.config.hidden_size not in (0, predictor.hidden_size):
            raise InputError("filter: hidden_size", self.config.hidden_size, f"{predictor.hidden_size}, the model's")
        return self

    @property
    def networks(self) -> list[nn.Module]:
        return [] if self.network is None else [self.network]

    def fingerprints(self) -> dict[str, str]:
        if self.network is None:
            return {}
        return {"filter": fingerprint(Path(self.filter)) if self.filter else fingerprint_in_memory(self.network)}

    def prepare(self, predictor: MaskPredictor, config: DecodeConfig) -> None:
        assert self.network is not None
        assert self.config is not None
        differences = check_compatible(
            self.config,
            family=predictor.family,
            vocab_size=predictor.vocab_size,
            mask_id=predictor.ids.mask,
            fingerprint=predictor.fingerprint,
            gen_length=config.gen_length,
            block_length=config.block_length,
        )
        for difference in differences:
            warnings.warn(difference, stacklevel=2)
        self.network.to(predictor.device)


@dataclass
class Learn2PD(FilterStrategy):
    """Commits the positions whose filter probability exceeds the threshold, and always the most confident one.

    Source: arXiv 2509.25188, section 3. With a ``budget`` it commits instead as many positions, the most probable first, as
    keep the expected number of wrong ones among them, the sum of ``1 - p``, within the budget: many where all are sure, few
    where none is. The most confident one is full_step's own choice and costs nothing.

    Args:
        filter: Folder of an exported filter.
        threshold: Probability above which a guess counts as final; the export's own by default.
        budget: Wrong commits that a row may expect of a step, in place of the threshold.
        network: A filter network to use instead of one loaded from ``filter``, with its ``config``.
        config: Configuration of ``network``.
    """

    filter: str | Path | None = None
    threshold: float | None = None
    budget: float | None = None
    network: nn.Module | None = field(default=None, repr=False)
    config: FilterConfig | None = field(default=None, repr=False)
    name = "learn2pd"
    component = "filter_commits"

    def __post_init__(self) -> None:
        check(vars(self), {"threshold": SHARE.or_null(), "budget": POSITIVE.or_null()}, f"{self.name}.")
        if self.budget is not None and self.threshold is not None:
            raise InputError("learn2pd.budget", f"{self.budget} and threshold {self.threshold}", "one of them")
        config = self.take_filter()
        if self.budget is None and self.threshold is None:
            self.threshold = config.threshold

    def decide(self, step: Step) -> Decision:
        assert self.network is not None
        evidence = step.evidence
        logits = self.network(evidence)
        probability = logits.sigmoid()
        best = top_1(step.log_confidence)
        if self.budget is None:
            final = (probability > self.threshold) & evidence.masked
        else:
            risk = torch.where(evidence.masked & ~best, 1 - probability, torch.inf)
            ascending, order = risk.sort(dim=1, stable=True)
            final = torch.empty_like(best).scatter_(1, order, ascending.cumsum(1) <= self.budget)
        # An infinite logit would commit everything, or nothing; so does NaN.
        return Decision(final | best, counts={"filter_commits": (final > best).sum(1)}, component=logits)

    def settings(self) -> dict[str, Any]:
        limit = {"threshold": self.threshold} if self.budget is None else {"budget": self.budget}
        return {"strategy": self.name} | limit | {"filter": str(self.filter) if self.filter else None}
