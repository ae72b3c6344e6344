"""Helper training data: the predictor's own text, prompt and response, in batches of similar length."""

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from data.manifest import Rollouts
from data.order import Shuffle
from data.prompt_list import SPLITS
from data.rollout_data import WINDOW, plan
from data.rollouts import open_on_ranks
from data.tables import fixed
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
    """The texts of a split: token ids in a file without a name, mapped, of which what is asked for is read.

    In memory are 24 bytes a text.

    Attributes:
        ids: ``(N,)`` int32, of all texts, one after the other.
        start: ``(P,)`` int64, where each text begins in them.
        length: ``(P,)`` int64, its number of tokens.
        prompt: ``(P,)`` int64, how many of these are the prompt's.
    """

    ids: np.ndarray
    start: np.ndarray
    length: np.ndarray
    prompt: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, row: int) -> Tensor:
        """Token ids of a text, ``(T,)`` int64."""
        return torch.from_numpy(self.ids[self.start[row] :][: self.length[row]].astype(np.int64))

    def batch(self, rows: Sequence[int], pad: int) -> TextBatch:
        """The texts at ``rows``, padded with ``pad``."""
        if not rows:
            none = torch.zeros(0, dtype=torch.int64)
            return TextBatch(none[:, None], none, none)
        ids = torch.nn.utils.rnn.pad_sequence([self[row] for row in rows], batch_first=True, padding_value=pad)
        start, end = (torch.from_numpy(column[list(rows)]) for column in (self.prompt, self.length))
        return TextBatch(ids, start, end)


def load_texts(rollouts: Rollouts) -> dict[str, Texts]:
    """The texts of each split of a rollout set, which is read shard by shard.

    A response ends with its first EoT: what follows is padding, which no helper has to learn.
    """
    known = array("q")  # index, split, start, length and prompt of each
    with TemporaryFile() as stream:
        for table in rollouts.tables("sequences", ["index", "split", "prompt_tokens", "reference", "first_eot"]):
            ends, references = table["first_eot"].to_numpy() + 1, fixed(table, "reference")
            rows = zip(table["index"].to_pylist(), table["split"].to_pylist(), table["prompt_tokens"], strict=True)
            for row, (index, split, tokens) in enumerate(rows):
                prompt = tokens.values.to_numpy()
                text = np.concatenate((prompt, references[row, : ends[row]])).astype(np.int32)
                known.extend((index, SPLITS.index(split), stream.tell() // text.itemsize, len(text), len(prompt)))
                stream.write(text.tobytes())
        stream.flush()
        ids = np.memmap(stream, np.int32, "r")
    texts = np.array(known).reshape(-1, 5)
    texts = texts[texts[:, 0].argsort(kind="stable")]  # whatever the shards are
    return {
        name: Texts(ids, *np.ascontiguousarray(texts[texts[:, 1] == n, 2:].T)) for n, name in enumerate(SPLITS)
    }  # fmt: skip


class TextBatches:
    """Batches of one rank, of texts of similar length; in training another order for each epoch.

    Every epoch has as many batches, and every rank trains on as many, so that none waits for the others' last step. In
    evaluation a rank for which nothing is left has one batch without a text: it still takes part in joining the metrics.
    What is in a batch is found when it is asked for.

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
        batches = math.ceil(len(self.texts) / self.batch_size)
        order: Callable[[np.ndarray], np.ndarray] = np.asarray  # as they are
        places = order
        if self.seed:
            seed = self.seed(self.epoch())
            order, places = Shuffle(len(self.texts), (seed, 0)), Shuffle(batches, (seed, 1))
        for number in range(len(self)):
            place = self.rank + number * self.ranks
            if not self.seed and place >= batches:
                yield self.texts.batch([], self.pad)
                continue
            # As plan() cuts all of them: sixteen batches that stand near each other are sorted together.
            window, part = divmod(int(places(np.array([place % batches]))[0]), WINDOW)
            first = window * WINDOW * self.batch_size
            near = order(np.arange(first, min(first + WINDOW * self.batch_size, len(self.texts))))
            rows = near[plan(self.texts.length[near].tolist(), self.batch_size)[part]]
            yield self.texts.batch(rows.tolist(), self.pad)


class HelperDataModule(LightningDataModule):
    """Reference texts of a rollout folder for ``train/helper.py``, split by prompt.

    Args:
        rollouts: Folder of the shards.
        batch_size: Texts in a training batch on one device.
        seed: Seed of the order of batches.
    """

    def __init__(self, rollouts: Path, batch_size: Count = 16, seed: Whole = 0) -> None:
        super().__init__()
        checked(Count, batch_size, "batch_size")
        self.rollouts, self.batch_size, self.seed = Path(rollouts), batch_size, seed
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
        rollouts = open_on_ranks(self.rollouts, self.trainer)
        self.manifest, self.digest = rollouts.manifest, rollouts.digest
        for split, part in load_texts(rollouts).items():
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
