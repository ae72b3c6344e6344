"""The EoT head: from what the predictor says of EoT over a whole region, how likely text is lost by ending it at a position."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoint import CONFIG, TENSORS, load_component, load_tensors, save_component
from models.errors import InputError
from models.rules import COUNT, FIGURES, LENGTH, TEXT, Rule, check, whole

KIND = "eot"
SCHEMA_VERSION = 2
COLUMNS = (
    "here", "best_before", "least_after", "mean_after", "share_after", "stable", "open_before", "decoded",
    "surprise_after", "stable_after", "next", "ended", "to_end",
)  # fmt: skip
"""What the head reads of a position. EoT's log-odds: here, their maximum up to here, their minimum and mean right of here, and
those of the next position. Right of here: the share of positions whose guess is EoT, and the logarithm of what it would take
for all of them to be EoT, in nats. For how many steps the guess has been EoT, here and least of all right of here. How many
positions left of here are open; the decoded share of the region; whether an EoT is committed, and how far it is."""
_LOW, _HIGH = -12.0, 12.0  # log-odds that a head is shown


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


class EotSaid(NamedTuple):
    """What is known of EoT at each position: what the last forward that looked there said.

    Attributes:
        log_odds: ``(..., G)`` float32, nats.
        top: ``(..., G)`` bool, EoT was the guess.
        stable: ``(..., G)`` int64, for how many steps before in a row it had been.
    """

    log_odds: Tensor
    top: Tensor
    stable: Tensor

    def follow(self, log_odds: Tensor, top: Tensor) -> "EotSaid":
        """What is known after a step, whose forwards said this; zeros and False where they did not look.

        Args:
            log_odds: ``(..., G)`` float32; read as fp16, which is what records hold.
            top: ``(..., G)`` bool.
        """
        looked = (log_odds != 0) | top
        again = torch.where(self.top & top, self.stable + 1, 0)
        return EotSaid(
            torch.where(looked, log_odds.half().float(), self.log_odds), torch.where(looked, top, self.top),
            torch.where(looked, again, self.stable),
        )  # fmt: skip


def eot_columns(said: EotSaid, masked: Tensor, end: Tensor) -> Tensor:
    """:data:`COLUMNS` of every position of ``R`` regions, ``(R, G, F)`` float32; of use where a text may end.

    Args:
        said: ``(R, G)`` each.
        masked: ``(R, G)`` bool, positions that are still to be decoded.
        end: ``(R,)`` int64, the first EoT of the text so far, ``G`` where it has none. It and what follows count as open, with
            what was last said of them.
    """
    region = masked.shape[1]
    place = torch.arange(region, device=masked.device)
    is_open = masked | (place >= end[:, None])
    odds = said.log_odds.clamp(_LOW, _HIGH)
    low, high = odds.new_tensor(_LOW), odds.new_tensor(_HIGH)
    of_open = odds.where(is_open, low)
    count = _right(_from(is_open.float()), odds.new_zeros(()))
    total = _right(_from(odds * is_open), odds.new_zeros(()))
    guessed = _right(_from((said.top & is_open).float()), odds.new_zeros(()))
    surprise = _right(_from(F.softplus(-odds) * is_open), odds.new_zeros(()))
    least = _right(odds.where(is_open, high).flip(1).cummin(1).values.flip(1), high)
    stable = said.stable.float().log1p()
    steady = _right(stable.where(is_open, high).flip(1).cummin(1).values.flip(1), high)
    some = count.clamp(min=1)
    ended = (end < region).float()[:, None].expand_as(odds)
    return torch.stack(
        (
            odds, of_open.cummax(1).values, least,
            torch.where(count > 0, total / some, high), torch.where(count > 0, guessed / some, 1.0),
            stable, (is_open.cumsum(1) - is_open.long()).float().log1p(),
            (1 - is_open.float().mean(1, keepdim=True)).expand_as(odds),
            surprise.clamp(min=1e-6).log(), steady, _right(of_open, high), ended,
            (end[:, None] - place).clamp(min=0).float().log1p(),
        ),
        -1,
    )  # fmt: skip


def _right(values: Tensor, last: Tensor) -> Tensor:
    """What each position's right neighbour has, ``(R, G)``; the last position has ``last``."""
    return torch.cat((values[:, 1:], last.expand_as(values[:, :1])), 1)


def _from(values: Tensor) -> Tensor:
    """The sum from each position to the last, ``(R, G)``."""
    return values.flip(1).cumsum(1).flip(1)


def can_end(masked: Tensor, end: Tensor) -> Tensor:
    """Positions that a text may end at, ``(R, G)`` bool: masked, with nothing but masked positions between them and its end.

    Args:
        masked: ``(R, G)`` bool.
        end: ``(R,)`` int64, the first EoT of the text so far, ``G`` where it has none.
    """
    beyond = torch.arange(masked.shape[1], device=masked.device) >= end[:, None]
    return (masked | beyond).flip(1).int().cummin(1).values.flip(1).bool() & masked & ~beyond


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
