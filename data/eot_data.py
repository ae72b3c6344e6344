"""What the EoT head learns from: every step of recorded decodes, and where their texts ended."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.manifest import Rollouts, open_rollouts
from data.rollouts import load_sequences
from data.tables import fixed, ragged
from models.eot import EotSaid, can_end, eot_columns
from models.errors import InputError


@dataclass
class EotStates:
    """The generated regions after each of ``R`` steps, as a rule for the end of the text is shown them.

    Attributes:
        said: ``(R, G)`` each, what is known of EoT.
        masked: ``(R, G)`` bool, what the step left to be decoded.
        end: ``(R,)`` int64, the first EoT that is committed, ``G`` where there is none.
        first_eot: ``(R,)`` int64, that of the finished text, likewise.
        decode: ``(R,)`` int64, a number for each decode; its steps stand together, in order.
        splits: Split of each row's prompt.
    """

    said: EotSaid
    masked: Tensor
    end: Tensor
    first_eot: Tensor
    decode: Tensor
    splits: np.ndarray

    def columns(self) -> Tensor:
        """What the head reads, ``(R, G, F)`` float32."""
        return eot_columns(self.said, self.masked, self.end)

    def able(self) -> Tensor:
        """Where a text may end, ``(R, G)`` bool."""
        return can_end(self.masked, self.end)

    def lost(self) -> Tensor:
        """Where ending the text would lose some: a token right of the position comes before the first EoT; ``(R, G)`` bool."""
        return self.first_eot[:, None] > torch.arange(self.masked.shape[1]) + 1

    def at(self, rows: slice | np.ndarray) -> "EotStates":
        """Some of the rows."""
        index = rows if isinstance(rows, slice) else torch.from_numpy(rows)
        tensors = {name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors, said=EotSaid(*(each[index] for each in self.said)), splits=self.splits[rows])

    def of(self, split: str) -> "EotStates":
        """The states of a split's prompts."""
        return self.at(np.flatnonzero(self.splits == split))


def load_eot_states(rollouts: Rollouts | str | Path) -> EotStates:
    """Reads the EoT evidence of a rollout set, of passes that follow the reference.

    Args:
        rollouts: An opened set, or the folder of one, which is then verified.

    Raises:
        InputError: The set does not verify, holds no EoT evidence, or has no pass that follows the reference.
    """
    rollouts = rollouts if isinstance(rollouts, Rollouts) else open_rollouts(rollouts)
    settings = rollouts.manifest["settings"]
    sequences = load_sequences(rollouts)
    number = {prompt.id: place for place, prompt in enumerate(sequences.prompts)}
    parts: list[EotStates] = []
    for table in rollouts.tables("steps"):
        if "eot_log_odds" not in table.column_names:
            raise InputError(f"{rollouts.folder}: eot_evidence", False, "a set rolled out with rollout.eot_evidence")
        prompts, passes = table["prompt_id"].to_pylist(), table["pass"].to_pylist()
        is_open = fixed(table, "open")
        odds, top = (torch.from_numpy(ragged(table, f"eot_{name}", is_open)) for name in ("log_odds", "top"))
        seen, token = torch.from_numpy(is_open), torch.tensor(fixed(table, "token"))
        columns = torch.from_numpy(table["block"].to_numpy().astype(np.int64))[:, None] * token.shape[1]
        guessed = torch.zeros_like(seen).scatter_(
            1, columns + torch.arange(token.shape[1]), token == settings["eot_id"]
        )
        for rows in _decodes(prompts, passes, table["step"].to_numpy()):
            place, count = number[prompts[rows[0]]], len(rows)
            states = _follow(odds[rows].float(), top[rows], seen[rows], guessed[rows])
            first = torch.full((count,), int(sequences.first_eot[place]))
            decode = torch.full((count,), len(parts))
            parts.append(EotStates(*states, first, decode, np.repeat(sequences.splits[place], count)))
    if not parts:
        raise InputError(f"{rollouts.folder}: passes", settings["passes"], "full_step or oracle among them")
    said = EotSaid(*(torch.cat(values) for values in zip(*(part.said for part in parts), strict=True)))
    masked, end, first_eot, decode = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("masked", "end", "first_eot", "decode")
    )
    return EotStates(said, masked, end, first_eot, decode, np.concatenate([part.splits for part in parts]))


def _decodes(prompts: list[str], passes: list[str], steps: np.ndarray) -> Iterator[list[int]]:
    """The rows of each decode that follows its reference, in the order of their steps."""
    groups: dict[tuple[str, str], list[int]] = {}
    for row in np.argsort(steps, kind="stable").tolist():
        if passes[row] != "filter":  # which leaves the reference, and with it the end of its text
            groups.setdefault((prompts[row], passes[row]), []).append(row)
    yield from groups.values()


def _follow(log_odds: Tensor, top: Tensor, seen: Tensor, guessed: Tensor) -> tuple[EotSaid, Tensor, Tensor]:
    """What is known after each step of a decode, what is left, and the first EoT that is committed.

    Args:
        log_odds: ``(S, G)`` float32, zeros where the step did not look.
        top: ``(S, G)`` bool, likewise.
        seen: ``(S, G)`` bool, what was to be decoded before the step.
        guessed: ``(S, G)`` bool, where the step's guess for its block is EoT.
    """
    region = seen.shape[1]
    left = torch.cat((seen[1:], torch.zeros_like(seen[:1])))
    said = [EotSaid(torch.zeros_like(log_odds[0]), torch.zeros_like(top[0]), torch.zeros_like(top[0]).long())]
    for odds_of, top_of in zip(log_odds, top, strict=True):
        said.append(said[-1].follow(odds_of, top_of))
    # What follows a committed EoT is decoded with it, so the leftmost is the one that was committed.
    ends = seen & ~left & guessed
    first = torch.where(ends.any(1), ends.int().argmax(1), region)
    return EotSaid(*map(torch.stack, zip(*said[1:], strict=True))), left, first.cummin(0).values
