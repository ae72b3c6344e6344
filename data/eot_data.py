"""What the EoT head learns from: every step of a decode that no rule has cut, and where its text ended."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.manifest import Rollouts, open_rollouts
from data.rollouts import load_sequences
from data.tables import fixed, ragged
from models.eot import can_end, eot_columns
from models.errors import InputError

_KEYS = ("prompt_id", "pass", "block", "step")


@dataclass
class EotStates:
    """The generated regions after ``R`` steps that committed no EoT, as a rule for the end of the text is shown them.

    Attributes:
        probability: ``(R, G)`` float32, of EoT, as the step's forward had it.
        top: ``(R, G)`` bool, EoT was the guess.
        stable: ``(R, G)`` int64, for how many steps before in a row it had been.
        masked: ``(R, G)`` bool, what the step left.
        first_eot: ``(R,)`` int64, index of the first EoT of the finished text, ``G`` where there is none.
        decode: ``(R,)`` int64, a number for each decode; its steps stand together, in order.
        splits: Split of each row's prompt.
    """

    probability: Tensor
    top: Tensor
    stable: Tensor
    masked: Tensor
    first_eot: Tensor
    decode: Tensor
    splits: np.ndarray

    def columns(self) -> Tensor:
        """What the head reads, ``(R, G, F)`` float32."""
        return eot_columns(self.probability, self.top, self.stable, self.masked)

    def able(self) -> Tensor:
        """Where a text may end, ``(R, G)`` bool."""
        return can_end(self.masked, torch.full_like(self.first_eot, self.masked.shape[1]))

    def lost(self) -> Tensor:
        """Where ending the text would lose some: a token right of the position comes before the first EoT; ``(R, G)`` bool."""
        return self.first_eot[:, None] > torch.arange(self.masked.shape[1]) + 1

    def of(self, split: str) -> "EotStates":
        """The states of a split's prompts."""
        rows = torch.from_numpy(np.flatnonzero(self.splits == split))
        tensors = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors, splits=self.splits[rows.numpy()])


def load_eot_states(rollouts: Rollouts | str | Path) -> EotStates:
    """Reads the EoT evidence of a rollout set, of passes that follow the reference.

    Args:
        rollouts: An opened set, or the folder of one, which is then verified.

    Raises:
        InputError: The set does not verify, its rows were cut at an EoT, or it holds no EoT evidence.
    """
    rollouts = rollouts if isinstance(rollouts, Rollouts) else open_rollouts(rollouts)
    settings = rollouts.manifest["settings"]
    if settings["eot"] != "off":
        accepted = "off: a rule cannot be learned from states that it has cut"
        raise InputError(f"{rollouts.folder}: eot", repr(settings["eot"]), accepted)
    sequences = load_sequences(rollouts)
    number = {prompt.id: place for place, prompt in enumerate(sequences.prompts)}
    said = (sequences.references == settings["eot_id"]).numpy()
    parts = []
    for table in rollouts.tables("steps"):
        if "open" not in table.column_names:
            raise InputError(f"{rollouts.folder}: eot_evidence", False, "a set rolled out with rollout.eot_evidence")
        keys = {name: table[name].to_numpy() for name in _KEYS}
        still_open, masked = fixed(table, "open"), fixed(table, "masked")
        probability, top = (ragged(table, f"eot_{name}", still_open) for name in ("probability", "top"))
        decodes = _steps(keys, masked, probability, top)
        for (prompt, _), (probability_of, top_of, stable, left) in decodes.items():
            place = number[prompt]
            # These passes commit the reference's tokens; from its first EoT on a row has ended in use.
            rows = np.flatnonzero(left.any(1) & (left | ~said[place]).all(1))
            first, split = int(sequences.first_eot[place]), sequences.splits[place]
            parts.append((probability_of[rows], top_of[rows], stable[rows], left[rows], first, split))
    counts = [len(part[0]) for part in parts]
    probability, top, stable, left = (np.concatenate([part[n] for part in parts]) for n in range(4))
    return EotStates(
        torch.from_numpy(probability).float(), torch.from_numpy(top), torch.from_numpy(stable), torch.from_numpy(left),
        torch.from_numpy(np.repeat([part[4] for part in parts], counts)).long(),
        torch.from_numpy(np.repeat(np.arange(len(parts)), counts)), np.repeat([part[5] for part in parts], counts),
    )  # fmt: skip


def _steps(
    keys: dict[str, np.ndarray], masked: np.ndarray, probability: np.ndarray, top: np.ndarray
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Evidence of each decode's steps, how long EoT had been the guess, and what each step left masked, ``(S, G)`` each."""
    region, size = probability.shape[1], masked.shape[1]
    place = np.arange(region)
    order = np.lexsort((keys["step"], keys["pass"], keys["prompt_id"]))
    groups: dict[tuple[str, str], list[int]] = {}
    for row in order:
        if keys["pass"][row] != "filter":  # which leaves the reference, and with it the end of its text
            groups.setdefault((str(keys["prompt_id"][row]), str(keys["pass"][row])), []).append(row)
    found = {}
    for name, rows in groups.items():
        block = keys["block"][rows].astype(np.int64)
        whole = place >= (block[:, None] + 1) * size
        for n, row in enumerate(rows):
            whole[n, block[n] * size : (block[n] + 1) * size] = masked[row]
        left = np.concatenate((whole[1:], np.zeros_like(whole[:1])))
        stable = np.zeros((len(rows), region), dtype=np.int64)
        for n in range(1, len(rows)):
            stable[n] = np.where(top[rows[n]] & top[rows[n - 1]], stable[n - 1] + 1, 0)
        found[name] = (probability[rows], top[rows], stable, left)
    return found
