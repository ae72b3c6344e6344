"""Rules for where the text ends, behind one registry."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class EotStep:
    """What a rule is shown after a step's commits; ``b`` rows, ``G`` generated positions.

    Attributes:
        committed: ``(b,)`` int64, the first position that this step committed as EoT; ``G`` where it committed none.
        masked: ``(b, G)`` bool.
        log_probability: ``(b, G)`` float32, of EoT, where the step's forwards looked; ``None`` unless the rule asks for it.
        top: ``(b, G)`` bool, EoT is the argmax there; likewise.
    """

    committed: Tensor
    masked: Tensor
    log_probability: Tensor | None = None
    top: Tensor | None = None


class EotRule(ABC):
    """Decides where rows end.

    Attributes:
        name: Its name in settings.
        reads_region: True if it reads what the predictor says of EoT over the whole generated region.
    """

    name: ClassVar[str]
    reads_region: ClassVar[bool] = False

    @abstractmethod
    def last(self, step: EotStep) -> Tensor:
        """Last position of each row's text, ``(b,)`` int64, ``G`` while it has no end; what follows becomes EoT."""


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
        assert step.log_probability is not None
        assert step.top is not None
        said = step.top & step.masked
        best = step.log_probability.masked_fill(~said, -torch.inf).argmax(1)
        region = step.masked.shape[1]
        cut = torch.where(said.any(1), best, region)
        return torch.where(step.committed < region, step.committed, cut)


RULES: dict[str, type[EotRule]] = {cls.name: cls for cls in (Off, Commit, Published)}
"""Name to class. A new rule is one entry here."""


def first_true(flags: Tensor) -> Tensor:
    """Index of the first True of each row, or the row's length; ``(b, G)`` bool to ``(b,)`` int64."""
    return torch.where(flags.any(1), flags.int().argmax(1), flags.shape[1])
