"""Filter training data: records in device memory, or in a file where they are too many for it; batches by index."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from lightning import LightningDataModule, Trainer

from data.examples import BYTES, FilterBatch, StoredExamples, by_shard, examples, open_stored, shares, store
from data.labels import PASSES, Records
from data.manifest import MANIFEST, Rollouts, check_key
from data.order import Shuffle
from data.prompts import Split
from data.store import Folder, place
from data.typed import Count, NotNegative, Whole, checked
from models.errors import InputError

__all__ = ["Batches", "FilterBatch", "FilterDataModule"]


class Batches:
    """Batches of one rank, drawn anew for each epoch; the same whatever the number of ranks drew before.

    A plain iterable rather than a ``DataLoader``: there is nothing to load, workers or collation would only copy. It holds
    the indices of one batch.

    Args:
        data: All records of a split, wherever they are.
        batch_size: Records in a batch; ``None`` for all of the rank's records.
        rank: This rank.
        ranks: Number of ranks.
        order: Epoch to permutation of the records, the same on every rank; ``None`` keeps their order.
        epoch: Tells the current epoch.
    """

    def __init__(
        self, data: FilterBatch | StoredExamples, batch_size: int | None, rank: int, ranks: int,
        order: Callable[[int], Shuffle] | None = None, epoch: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        self.data, self.rank, self.ranks, self.order, self.epoch = data, rank, ranks, order, epoch
        # In training every rank takes as many records, so that none waits for the others' last step.
        self.count = max(0, math.ceil((len(data) - (0 if order else rank)) / ranks))
        self.batch_size = batch_size or max(1, self.count)

    def __len__(self) -> int:
        return max(1, math.ceil(self.count / self.batch_size))  # without a record it still joins the metrics

    def __iter__(self) -> Iterator[FilterBatch]:
        if len(self) == 1 and self.ranks == 1:
            yield self.data.take(torch.arange(self.count)) if isinstance(self.data, StoredExamples) else self.data
            return
        device = self.data.device if isinstance(self.data, FilterBatch) else None
        order = self.order(self.epoch()) if self.order else None
        for start in range(0, max(1, self.count), self.batch_size):
            rows = self.rank + self.ranks * np.arange(start, min(start + self.batch_size, self.count))
            rows = rows if order is None else order(rows % len(self.data))
            yield self.data.take(torch.from_numpy(rows).to(device))


class FilterDataModule(LightningDataModule):
    """Records of a rollout folder for ``train/filter.py``, split by prompt.

    Args:
        rollouts: Folder of the shards, or its URL; or several, of one model and one block length.
        batch_size: Records in a training batch on one device; null for all of them (the published recipe).
        passes: Decodes whose records are used, of :data:`data.labels.PASSES`, where a set has them; null for all.
        tail_weight: Weight in the loss of positions after the reference's first EoT, which are up to nine tenths of all
            positions and nearly all easy.
        seed: Seed of the order of batches.
        memory: MiB of records that are held on the device; those of larger sets are laid down once, in files in the folder
            ``records`` beside the shards, and read batch by batch; batches are drawn from all records either way.
        limit: Training prompts whose records are used, the first ones in the order of their hashes; null for all. One set of
            rollouts serves a learning curve: the prompts of a lower limit are among those of a higher one.
        hidden: Width at which the filter reads hidden states; 0: they are not loaded.
    """

    def __init__(
        self,
        rollouts: Folder | list[Folder],
        batch_size: Count | None = 2048,
        passes: list[str] | None = None,
        tail_weight: NotNegative = 0.1,
        seed: Whole = 0,
        memory: Whole = 8192,
        limit: Count | None = None,
        hidden: Whole = 0,
    ) -> None:
        super().__init__()
        checked(Whole, memory, "memory")
        checked(Count | None, limit, "limit")
        checked(Count | None, batch_size, "batch_size")
        checked(NotNegative, tail_weight, "tail_weight")
        if passes == []:
            raise InputError("passes", "none", f"null, or some of {', '.join(PASSES)}")
        for name in passes or []:
            if name not in PASSES:
                raise InputError("passes", name, ", ".join(PASSES))
        self.rollouts = [place(folder) for folder in (rollouts if isinstance(rollouts, list) else [rollouts])]
        self.batch_size, self.passes, self.tail_weight = batch_size, passes, tail_weight
        self.seed, self.memory, self.limit, self.hidden = seed, memory, limit, bool(hidden)
        self.sets: dict[str | Path, Rollouts] = {}
        self.records: Records | None = None
        self.parts: dict[str, FilterBatch | StoredExamples] = {}
        self.digest: str | None = None

    def setup(self, stage: str) -> None:
        """Reads the rollouts, or takes ``records`` where they are set, and puts each split on the device.

        Raises:
            InputError: The rollouts do not verify or lack a state, or a split that is needed has no record.
        """
        if self.parts:
            return
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        parts = self._read(device) if self.records is None else self._split(self.records, device)
        for split, part in parts.items():
            # A rollout of few prompts may well hold none of the test split, which only `test` reads.
            if not len(part) and (split != "test" or stage == "test"):
                raise InputError(
                    f"{self.rollouts[0]}: split", f"no {split} record in the passes {', '.join(self.passes or PASSES)}",
                    "rollouts of prompts of every split; roll out more prompts",
                )  # fmt: skip
        self.parts = dict(parts)
        self.records = None  # the parts are copies

    def open(self, trainer: Trainer | None) -> list[Rollouts]:
        """The sets, each verified once however often they are asked for.

        Args:
            trainer: Whose ranks ask.

        Raises:
            InputError: One does not verify.
        """
        from data.rollouts import open_on_ranks

        for folder in self.rollouts:
            if folder not in self.sets:
                self.sets[folder] = open_on_ranks(folder, trainer)
        return [self.sets[folder] for folder in self.rollouts]

    def _read(self, device: torch.device) -> Mapping[str, FilterBatch | StoredExamples]:
        from data.rollouts import last_of_first, load_records

        sets = self.open(self.trainer)
        last = None if self.limit is None else last_of_first(sets[0], self.limit)
        for one in sets[1:]:
            check_key(one.folder / MANIFEST, one.manifest, sets[0].manifest["model_fingerprint"])
        passes = {one.folder: self._passes(one.manifest["settings"]["passes"]) for one in sets}
        holding = [one for one in sets if passes[one.folder]] or sets[:1]
        self.digest = "+".join(one.digest for one in sets)
        size = 0
        for one in holding:
            rows = sum(one.manifest["counts"]["steps"].get(name, 0) for name in passes[one.folder])
            each = BYTES + 2 * one.hidden_size if self.hidden else BYTES
            size += rows * one.manifest["settings"]["block_length"] * each
        if size <= self.memory << 20:
            records = [
                load_records(one, passes[one.folder] or self.passes, last=last, hidden=self.hidden) for one in holding
            ]
            return self._split(Records.cat(records), device)
        return self._stored([(one, passes[one.folder]) for one in holding], last, device)

    def _stored(
        self, sets: Sequence[tuple[Rollouts, list[str]]], last: str | None, device: torch.device
    ) -> dict[str, StoredExamples]:
        """The records in files, laid down by the first rank where they are not there."""
        if self.batch_size is None:
            raise InputError(
                "batch_size", None, f"a number, for records of more than {self.memory} MiB; or more memory"
            )
        key = json.dumps([self.digest, [passes for _, passes in sets], self.tail_weight, last, self.hidden])
        folder = sets[0][0].folder / "records" / hashlib.sha256(key.encode()).hexdigest()[:16]
        if not (self.trainer and self.trainer.global_rank) and open_stored(folder, device) is None:
            parts = (part for one, passes in sets for part in by_shard(one, passes, last, self.hidden))
            store(folder, parts, self.passes or PASSES, self.tail_weight)
        if self.trainer:
            self.trainer.strategy.barrier("records")
        found = open_stored(folder, device)
        assert found is not None
        return found

    def _split(self, records: Records, device: torch.device) -> dict[str, FilterBatch]:
        """All records of each split, on the device."""
        parts = {}
        for split in get_args(Split):
            part, which = examples(records, split, self.passes or PASSES, self.tail_weight)
            part.weight *= shares(which.bincount(minlength=len(PASSES)))[which, None]
            parts[split] = part.to(device)
        return parts

    def _passes(self, recorded: Sequence[str]) -> list[str]:
        return [name for name in recorded if self.passes is None or name in self.passes]

    def _batches(self, split: str) -> Batches:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if split != "train":
            return Batches(self.parts[split], 4 * self.batch_size if self.batch_size else None, rank, ranks)
        return Batches(self.parts[split], self.batch_size, rank, ranks, self._order, self._epoch)

    def _order(self, epoch: int) -> Shuffle:
        return Shuffle(len(self.parts["train"]), (self.seed, epoch))

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0

    def train_dataloader(self) -> Batches:
        """Batches in an order that the seed and the epoch give."""
        return self._batches("train")

    def val_dataloader(self) -> Batches:
        """Batches of the validation split, larger since there is no backward."""
        return self._batches("validation")

    def test_dataloader(self) -> Batches:
        """Batches of the test split."""
        return self._batches("test")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Returns the batch: everything has been on the device since ``setup``."""
        return batch
