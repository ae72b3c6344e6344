"""The EoT head: from what the predictor says of EoT over a whole region, how likely text is lost by ending it at a position."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint import CONFIG, TENSORS, load_component, load_tensors, save_component
from models.errors import InputError
from models.rules import COUNT, FIGURES, LENGTH, TEXT, Rule, check, whole

KIND = "eot"
SCHEMA_VERSION = 1
COLUMNS = ("here", "best_before", "least_after", "mean_after", "share_after", "stable", "masked_before", "decoded")
"""What the head reads of a position: EoT's log-odds here, their maximum up to here, their minimum and mean right of here, the
share of positions right of here whose guess is EoT, for how many steps the guess here has been EoT, how many positions left of
here are masked, and the decoded share of the region."""


@dataclass(frozen=True)
class EotConfig:
    """Everything an exported EoT head says about itself.

    Attributes:
        hidden: Width of its one hidden layer.
        gen_length: Tokens generated in the training rollouts.
        block_length: Positions of their blocks.
        vocab_size: Token ids of the base model.
        mask_id: Its MASK id.
        base_fingerprint: Its fingerprint.
        base_family: Its ``model_type``.
        metrics: Figures measured before the export, by name; ``None`` where one is undefined.
        schema_version: Version of these fields.
    """

    hidden: int
    gen_length: int
    block_length: int
    vocab_size: int
    mask_id: int
    base_fingerprint: str
    base_family: str
    metrics: dict[str, float | None] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


_RULES = {
    "hidden": whole(1, 4096), "gen_length": LENGTH, "block_length": LENGTH, "vocab_size": COUNT, "mask_id": whole(0),
    "base_fingerprint": TEXT, "base_family": TEXT, "metrics": FIGURES,
    "schema_version": Rule(str(SCHEMA_VERSION), lambda value: value == SCHEMA_VERSION),
}  # fmt: skip


class EotHead(nn.Module):
    """Two linear layers over :data:`COLUMNS` of each position for itself, so that any region can be read.

    Args:
        hidden: Width of the hidden layer.
    """

    mean: Tensor
    std: Tensor
    scale: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(COLUMNS)))
        self.register_buffer("std", torch.ones(len(COLUMNS)))
        self.register_buffer("scale", torch.tensor([1.0, 0.0]))  # slope and offset of the calibration
        self.linear1, self.linear2 = nn.Linear(len(COLUMNS), hidden), nn.Linear(hidden, 1)

    def forward(self, columns: Tensor) -> Tensor:
        """Calibrated logits of "text right of here would be lost", ``(...)`` float32, of columns ``(..., F)`` float32."""
        hidden = self.linear1((columns - self.mean) / self.std).relu()
        return self.linear2(hidden)[..., 0] * self.scale[0] + self.scale[1]


def eot_columns(probability: Tensor, top: Tensor, stable: Tensor, masked: Tensor) -> Tensor:
    """:data:`COLUMNS` of every position of ``R`` regions, ``(R, G, F)`` float32; of use at masked positions.

    Args:
        probability: ``(R, G)`` float32, of EoT; read as fp16, which is what records hold.
        top: ``(R, G)`` bool, EoT is the guess.
        stable: ``(R, G)`` int64, for how many steps before in a row it has been.
        masked: ``(R, G)`` bool, positions that are still to be decoded.
    """
    sure = probability.half().float().clamp(1e-4, 1 - 1e-3)
    odds = sure.logit()
    before = odds.masked_fill(~masked, odds.new_tensor(1e-4).logit()).cummax(1).values
    high = odds.new_tensor(1 - 1e-3).logit()
    after = _right(odds.masked_fill(~masked, high).flip(1).cummin(1).values.flip(1), high)
    count = _right(masked.flip(1).cumsum(1).flip(1).float(), odds.new_zeros(()))
    total = _right((odds * masked).flip(1).cumsum(1).flip(1), odds.new_zeros(()))
    said = _right((top & masked).flip(1).cumsum(1).flip(1).float(), odds.new_zeros(()))
    some = count.clamp(min=1)
    left = (masked.cumsum(1) - masked.long()).float().log1p()
    decoded = (1 - masked.float().mean(1, keepdim=True)).expand_as(odds)
    mean, share = torch.where(count > 0, total / some, high), torch.where(count > 0, said / some, 1.0)
    return torch.stack((odds, before, after, mean, share, stable.float().log1p(), left, decoded), -1)


def _right(values: Tensor, last: Tensor) -> Tensor:
    """What each position's right neighbour has, ``(R, G)``; the last position has ``last``."""
    return torch.cat((values[:, 1:], last.expand_as(values[:, :1])), 1)


def can_end(masked: Tensor, end: Tensor) -> Tensor:
    """Positions that a text may end at, ``(R, G)`` bool: masked, with nothing right of them but masked positions.

    Args:
        masked: ``(R, G)`` bool.
        end: ``(R,)`` int64, positions that are left of the region.
    """
    outside = torch.arange(masked.shape[1], device=masked.device) >= end[:, None]
    return (masked | outside).flip(1).int().cummin(1).values.flip(1).bool() & masked


def first_end(probability: Tensor, able: Tensor, risk: float) -> Tensor:
    """The leftmost position where text is lost with less than ``risk``; ``(R,)`` int64, ``G`` where there is none.

    Args:
        probability: ``(R, G)`` float32, that text right of a position would be lost.
        able: ``(R, G)`` bool, of :func:`can_end`.
        risk: From 0 to 1.
    """
    good = able & (probability < risk)
    return torch.where(good.any(1), good.int().argmax(1), good.shape[1])


def save_eot(folder: str | Path, head: EotHead, config: EotConfig, card: str) -> None:
    """Exports a head; an earlier export in the folder is replaced.

    Raises:
        InputError: A field is impossible, ``folder`` holds something else, or weights are not finite.
    """
    values = asdict(config)
    check(values, _RULES, f"{KIND}: ")
    save_component(folder, {"kind": KIND} | values, dict(head.state_dict()), card)


def load_eot(folder: str | Path) -> tuple[EotHead, EotConfig]:
    """Reads an exported head.

    Returns:
        The head in evaluation mode on the CPU, and its description.

    Raises:
        InputError: Anything is missing, unknown or impossible; names the file and the field.
    """
    folder = Path(folder)
    values, tensors = load_component(folder, KIND, SCHEMA_VERSION, [each.name for each in fields(EotConfig)])
    check(values, _RULES, f"{folder / CONFIG}: ")
    config = EotConfig(**values)
    head = EotHead(config.hidden)
    load_tensors(head, tensors, folder / TENSORS)
    if not (head.std > 0).all():
        raise InputError(f"{folder / TENSORS}: std", head.std.tolist(), "standard deviations above 0")
    return head.eval(), config


def check_eot(config: EotConfig, *, family: str, vocab_size: int, mask_id: int, fingerprint: str) -> None:
    """Refuses a head that was made for another base model; call it before decoding.

    Raises:
        InputError: Another family, vocabulary, MASK id or base model.
    """
    ours: dict[str, Any] = {
        "base_family": family, "vocab_size": vocab_size, "mask_id": mask_id, "base_fingerprint": fingerprint,
    }  # fmt: skip
    for name, value in ours.items():
        if getattr(config, name) != value:
            raise InputError(f"{KIND}: {name}", repr(getattr(config, name)), f"{value!r}, that of the loaded model")
