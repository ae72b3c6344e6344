"""Adaptive parallel decoding: a small autoregressive helper says how much of the diffusion model's draft stands."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decoding.config import DecodeConfig
from decoding.strategies.base import Strategy, require_range
from models.errors import InputError
from models.helper import Helper, check_helper, load_helper
from models.predictor import MaskPredictor, fingerprint


@dataclass
class APD(Strategy):
    """Decodes left to right; accepts the draft's longest prefix that the mixture of both models would have drawn as well.

    The draft is ``x_j ~ p_D``, each position by itself; the target is ``p_T ~ p_D^R p_AR^(1-R)``, ``p_AR`` conditioned on the
    draft's own prefix. Both are drawn with the same Gumbel noise, and agree as often as the two distributions do. The first
    position is always accepted. Source: arXiv 2506.00413.

    Args:
        helper: Folder of an exported helper.
        mixture_weight: R: 1 accepts every draft, 0 only what the helper itself would say.
        kv_window: W: the predictor's keys and values are computed anew for the last so many committed tokens, beside those
            accepted since; older ones are kept. ``None`` keeps none, which is exact.
        max_lookahead: M: MASK positions that the predictor is given; ``None`` for all that are left.
        network: A helper to use instead of one loaded from ``helper``.
    """

    helper: str | Path | None = None
    mixture_weight: float = 0.7
    kv_window: int | None = None
    max_lookahead: int | None = None
    network: Helper | None = field(default=None, repr=False)
    name = "apd"
    component = "helper_commits"

    def __post_init__(self) -> None:
        weight = self.mixture_weight
        require_range(self.name, "mixture_weight", weight, "a number from 0 to 1", lambda value: 0 <= value <= 1)
        for name in ("kv_window", "max_lookahead"):
            if (value := getattr(self, name)) is not None:
                accepted = "a whole number of at least 1, or null"
                require_range(self.name, name, value, accepted, lambda value: value >= 1 and value == value // 1)
        if self.network is None:
            if self.helper is None:
                raise InputError("helper", None, "the folder of an exported helper")
            self.network = load_helper(self.helper)

    def fingerprints(self) -> dict[str, str]:
        return {"helper": fingerprint(Path(self.helper)) if self.helper else "unsaved"}

    def prepare(self, predictor: MaskPredictor, config: DecodeConfig) -> None:
        assert self.network is not None
        if config.eot == "published":
            raise InputError("eot", "'published' with apd, which decodes left to right", "off | filter")
        if config.cache != "none":
            raise InputError("cache", f"{config.cache!r} with apd, which has its own", "none, and apd.kv_window")
        differences = check_helper(
            self.network.config, vocab_size=predictor.vocab_size, mask_id=predictor.ids.mask, eot_id=predictor.ids.eot,
            fingerprint=predictor.fingerprint, gen_length=config.gen_length,
        )  # fmt: skip
        for difference in differences:
            warnings.warn(difference, stacklevel=2)
        self.network.to(predictor.device)

    def settings(self) -> dict[str, Any]:
        return {
            "strategy": self.name, "mixture_weight": self.mixture_weight, "kv_window": self.kv_window,
            "max_lookahead": self.max_lookahead, "helper": str(self.helper) if self.helper else None,
        }  # fmt: skip
