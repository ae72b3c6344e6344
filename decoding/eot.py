"""Rules for where the text ends, behind one registry."""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from models.eot import EotSaid, can_end, check_eot, eot_columns, first_end, load_eot

if TYPE_CHECKING:
    from decoding.config import DecodeConfig
    from decoding.state import BatchState
    from models.predictor import MaskPredictor


@dataclass(frozen=True)
class EotStep:
    """What a rule is shown after a step's commits; ``b`` rows, ``G`` generated positions.

    Attributes:
        committed: ``(b,)`` int64, the first position that this step committed as EoT; ``G`` where it committed none.
        masked: ``(b, G)`` bool.
        end: ``(b,)`` int64, generated positions that are left.
        log_odds: ``(b, G)`` float32, nats, of EoT, 0 where the step's forwards did not look; ``None`` unless the rule asks for
            it.
        top: ``(b, G)`` bool, EoT is the argmax there; likewise.
    """

    committed: Tensor
    masked: Tensor
    end: Tensor
    log_odds: Tensor | None = None
    top: Tensor | None = None


class EotRule(ABC):
    """Decides where rows end.

    Attributes:
        name: Its name in settings.
        reads_region: True if it reads what the predictor says of EoT over the whole generated region.
    """

    name: ClassVar[str]
    reads_region: ClassVar[bool] = False

    def prepare(self, config: "DecodeConfig", predictor: "MaskPredictor") -> None:  # noqa: B027
        """Loads what it needs; most need nothing.

        Raises:
            InputError: What it needs does not load, or was made for another base model.
        """

    def begin(self, state: "BatchState") -> None:  # noqa: B027
        """Before a decode: registers what it remembers of each row; most remember nothing."""

    @abstractmethod
    def last(self, step: EotStep) -> Tensor:
        """Last position of each row's text, ``(b,)`` int64, ``G`` while it has no end; what follows becomes EoT."""

    def closed(self, step: EotStep) -> Tensor | None:
        """Last position of each row that is still decoded, likewise; what follows stays MASK for the model. Most close none."""
        return None


class Off(EotRule):
    """Every position is decoded."""

    name = "off"

    def last(self, step: EotStep) -> Tensor:
        return torch.full_like(step.committed, step.masked.shape[1])


class Commit(EotRule):
    """A committed EoT ends the row."""

    name = "commit"

    def last(self, step: EotStep) -> Tensor:
        return step.committed


class Published(EotRule):
    """Learn2PD's rule (arXiv 2509.25188): a committed EoT, or else the most confident EoT guess anywhere, ends the row.

    The second half has no threshold. The position itself stays masked; what follows is cut. A partial forward shows it only the
    positions that it runs on.
    """

    name = "published"
    reads_region = True

    def last(self, step: EotStep) -> Tensor:
        assert step.log_odds is not None
        assert step.top is not None
        said = step.top & step.masked
        best = step.log_odds.masked_fill(~said, -torch.inf).argmax(1)
        region = step.masked.shape[1]
        cut = torch.where(said.any(1), best, region)
        return torch.where(step.committed < region, step.committed, cut)


class Learned(EotRule):
    """A committed EoT ends the row; what follows a position where a trained head says that no text is lost is not decoded.

    That is the leftmost position where text is lost with less than the accepted risk, as the head says. It stays masked itself,
    and what follows it stays MASK for the model, too, until the text has its own EoT: dropped from the region it would tell the
    model how long the text is to be. A forward on a part of the region leaves what an earlier one said of the rest.
    """

    name = "learned"
    reads_region = True

    def prepare(self, config: "DecodeConfig", predictor: "MaskPredictor") -> None:
        assert config.eot_head is not None
        self.risk = config.eot_risk
        self.head, described = load_eot(config.eot_head)
        check_eot(
            described, family=predictor.family, vocab_size=predictor.vocab_size, mask_id=predictor.ids.mask,
            fingerprint=predictor.fingerprint,
        )  # fmt: skip
        self.head.to(predictor.device)
        self.length = config.gen_length
        if described.gen_length != self.length:
            warnings.warn(
                f"eot_head: trained at gen_length {described.gen_length}, used at {self.length}: its risk holds for the first",
                stacklevel=2,
            )

    def begin(self, state: "BatchState") -> None:
        zero = torch.zeros(self.length, device=state.device)
        self.said = [state.register(value) for value in (zero, zero.bool(), zero.long())]
        nowhere = torch.full((), self.length, device=state.device)
        self.end, self.cut = state.register(nowhere), state.register(nowhere)

    def last(self, step: EotStep) -> Tensor:
        return step.committed

    @torch.inference_mode()
    def closed(self, step: EotStep) -> Tensor:
        assert step.log_odds is not None
        assert step.top is not None
        said = EotSaid(*(known.value for known in self.said)).follow(step.log_odds, step.top)
        for known, value in zip(self.said, said, strict=True):
            known.value = value
        self.end.value = torch.minimum(self.end.value, step.committed)
        # What is closed counts as open, as in the regions that the head has learned from: nobody had closed them.
        still_open = step.masked | (torch.arange(self.length, device=step.masked.device) > self.cut.value[:, None])
        lost = self.head(eot_columns(said, still_open, self.end.value)).sigmoid()
        found = first_end(lost, can_end(still_open, self.end.value), self.risk)
        self.cut.value = torch.minimum(self.cut.value, found)
        return self.cut.value


RULES: dict[str, type[EotRule]] = {cls.name: cls for cls in (Off, Commit, Published, Learned)}
"""Name to class. A new rule is one entry here."""


def first_true(flags: Tensor) -> Tensor:
    """Index of the first True of each row, or the row's length; ``(b, G)`` bool to ``(b,)`` int64."""
    return torch.where(flags.any(1), flags.int().argmax(1), flags.shape[1])
