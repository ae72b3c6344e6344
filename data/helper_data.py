"""Helper training data: the predictor's own text, prompt and response, in batches of similar length."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from data.manifest import open_rollouts
from data.rollout_data import plan
from data.rollouts import Sequences, load_sequences
from data.store import Folder, place
from data.typed import Count, Whole, checked
from models.errors import InputError


@dataclass
class TextBatch:
    """Texts of a batch, each a prompt and its response, padded on the right.

    Attributes:
        ids: ``(B, T)`` int64.
        start: ``(B,)`` int64, column of the first response token.
        end: ``(B,)`` int64, column after the last one, which is the first EoT where there is one.
    """

    ids: Tensor
    start: Tensor
    end: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> "TextBatch":
        """The same texts on a device."""
        return TextBatch(self.ids.to(device), self.start.to(device), self.end.to(device))


@dataclass
class Texts:
    """All texts of a split: token ids of each, and how many of them are the prompt's."""

    ids: list[Tensor]
    prompts: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: list[int], pad: int) -> TextBatch:
        """The texts at ``rows``, padded with ``pad``."""
        if not rows:
            none = torch.zeros(0, dtype=torch.int64)
            return TextBatch(none[:, None], none, none)
        ids = torch.nn.utils.rnn.pad_sequence([self.ids[row] for row in rows], batch_first=True, padding_value=pad)
        start = torch.tensor([self.prompts[row] for row in rows])
        return TextBatch(ids, start, torch.tensor([len(self.ids[row]) for row in rows]))


def split_texts(sequences: Sequences, split: str) -> Texts:
    """The texts of a split. A response ends with its first EoT: what follows is padding, which no helper has to learn."""
    rows = [row for row, name in enumerate(sequences.splits) if name == split]
    ids = [
        torch.cat([torch.tensor(sequences.tokens[row]), sequences.references[row, : int(sequences.first_eot[row]) + 1]])
        for row in rows
    ]
    return Texts(ids, [len(sequences.tokens[row]) for row in rows])


class TextBatches:
    """Batches of one rank, of texts of similar length; in training another order for each epoch.

    Every epoch has as many batches, and every rank trains on as many, so that none waits for the others' last step. In
    evaluation a rank for which nothing is left has one batch without a text: it still takes part in joining the metrics.

    Args:
        texts: All texts of a split.
        batch_size: Texts in a batch.
        pad: Id of the padding.
        rank: This rank.
        ranks: Number of ranks.
        seed: Epoch to seed of the order; ``None`` keeps the order and repeats no batch.
        epoch: Tells the current epoch.
    """

    def __init__(
        self, texts: Texts, batch_size: int, pad: int, rank: int = 0, ranks: int = 1,
        seed: Callable[[int], int] | None = None, epoch: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        self.texts, self.batch_size, self.pad, self.rank, self.ranks = texts, batch_size, pad, rank, ranks
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        batches = math.ceil(len(self.texts) / self.batch_size)
        return max(1, math.ceil((batches - (0 if self.seed else self.rank)) / self.ranks))

    def __iter__(self) -> Iterator[TextBatch]:
        order = list(range(len(self.texts)))
        generator = None
        if self.seed:
            generator = torch.Generator().manual_seed(self.seed(self.epoch()))
            order = torch.randperm(len(order), generator=generator).tolist()
        planned = plan([len(self.texts.ids[row]) for row in order], self.batch_size)
        if generator:
            planned = [planned[place] for place in torch.randperm(len(planned), generator=generator).tolist()]
        for number in range(len(self)):
            place = self.rank + number * self.ranks
            rows = planned[place % len(planned)] if self.seed or place < len(planned) else []
            yield self.texts.batch([order[row] for row in rows], self.pad)


class HelperDataModule(LightningDataModule):
    """Reference texts of a rollout folder for ``train/helper.py``, split by prompt.

    Args:
        rollouts: Folder of the shards, or its URL.
        batch_size: Texts in a training batch on one device.
        seed: Seed of the order of batches.
    """

    def __init__(self, rollouts: Folder, batch_size: Count = 16, seed: Whole = 0) -> None:
        super().__init__()
        checked(Count, batch_size, "batch_size")
        self.rollouts, self.batch_size, self.seed = place(rollouts), batch_size, seed
        self.parts: dict[str, Texts] = {}
        self.manifest: dict[str, Any] = {}
        self.digest: str | None = None

    @property
    def eot_id(self) -> int:
        """The predictor's EoT, which also pads."""
        return self.manifest["settings"]["eot_id"]

    def setup(self, stage: str) -> None:
        """Reads the references.

        Raises:
            InputError: The rollouts do not verify, or a split that is needed has no prompt.
        """
        if self.parts:
            return
        rollouts = open_rollouts(self.rollouts)
        self.manifest, self.digest = rollouts.manifest, rollouts.digest
        sequences = load_sequences(rollouts)
        for split in ("train", "validation", "test"):
            part = split_texts(sequences, split)
            if not len(part) and (split != "test" or stage == "test"):
                accepted = "rollouts of prompts of every split; roll out more prompts"
                raise InputError(f"{self.rollouts}: split", f"no {split} prompt", accepted)
            self.parts[split] = part

    def _batches(self, split: str) -> TextBatches:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if split != "train":
            return TextBatches(self.parts[split], self.batch_size, self.eot_id, rank, ranks)
        return TextBatches(self.parts[split], self.batch_size, self.eot_id, rank, ranks, self._seed, self._epoch)

    def _seed(self, epoch: int) -> int:
        return self.seed * 1_000_003 + epoch

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0

    def train_dataloader(self) -> TextBatches:
        """Batches in an order that the seed and the epoch give."""
        return self._batches("train")

    def val_dataloader(self) -> TextBatches:
        """Batches of the validation split."""
        return self._batches("validation")

    def test_dataloader(self) -> TextBatches:
        """Batches of the test split."""
        return self._batches("test")

    def transfer_batch_to_device(self, batch: TextBatch, device: torch.device, dataloader_idx: int) -> TextBatch:
        return batch.to(device)
