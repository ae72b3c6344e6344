"""Filter training data: every record in device memory, batches by index."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from data.labels import PASSES, Records
from data.manifest import MANIFEST, check_key, open_rollouts
from data.typed import Count, NotNegative, Whole, checked
from models.errors import InputError
from models.features import Evidence


@dataclass
class FilterBatch:
    """Some records; ``(B, K)`` fields.

    Attributes:
        evidence: What the predictor said.
        final: bool, True where the guess was already the reference's token.
        tail: bool, True after the reference's first EoT.
        example: bool, True where a filter has something to say: masked, and not full_step's own choice in that state.
        weight: float32, share of each position in the loss; 0 where it is no example.
    """

    evidence: Evidence
    final: Tensor
    tail: Tensor
    example: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.final)

    def take(self, rows: Tensor) -> "FilterBatch":
        """The rows at ``rows`` ``(b,)`` int64."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "FilterBatch":
        """The same records on a device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "FilterBatch":
        rest = (self.final, self.tail, self.example, self.weight)
        return FilterBatch(self.evidence.each(change), *map(change, rest))


class Batches:
    """Batches of one rank, drawn anew for each epoch; the same whatever the number of ranks drew before.

    A plain iterable rather than a ``DataLoader``: there is nothing to load, workers or collation would only copy.

    Args:
        data: All records of a split.
        batch_size: Records in a batch; ``None`` for all of the rank's records.
        rank: This rank.
        ranks: Number of ranks.
        order: ``epoch -> (n,)`` permutation of the records, the same on every rank; ``None`` keeps their order.
        epoch: Tells the current epoch.
    """

    def __init__(
        self, data: FilterBatch, batch_size: int | None, rank: int, ranks: int,
        order: Callable[[int], Tensor] | None = None, epoch: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        self.data, self.rank, self.ranks, self.order, self.epoch = data, rank, ranks, order, epoch
        # In training every rank takes as many records, so that none waits for the others' last step.
        self.count = max(0, math.ceil((len(data) - (0 if order else rank)) / ranks))
        self.batch_size = batch_size or max(1, self.count)

    def __len__(self) -> int:
        return max(1, math.ceil(self.count / self.batch_size))  # without a record it still joins the metrics

    def __iter__(self) -> Iterator[FilterBatch]:
        if len(self) == 1 and self.ranks == 1:
            yield self.data
            return
        device = self.data.final.device
        mine = self.rank + self.ranks * torch.arange(self.count, device=device)
        if self.order:
            mine = self.order(self.epoch()).to(device)[mine % len(self.data)]
        for start in range(0, max(1, self.count), self.batch_size):
            yield self.data.take(mine[start : start + self.batch_size])


class FilterDataModule(LightningDataModule):
    """Records of a rollout folder for ``train/filter.py``, split by prompt.

    Args:
        rollouts: Folder of the shards; or several, of one model and one block length.
        batch_size: Records in a training batch on one device; null for all of them (the published recipe).
        passes: Decodes whose records are used, of :data:`data.labels.PASSES`, where a set has them; null for all.
        tail_weight: Weight in the loss of positions after the reference's first EoT, which are up to nine tenths of all
            positions and nearly all easy.
        seed: Seed of the order of batches.
    """

    def __init__(
        self,
        rollouts: Path | list[Path],
        batch_size: Count | None = 2048,
        passes: list[str] | None = None,
        tail_weight: NotNegative = 0.1,
        seed: Whole = 0,
    ) -> None:
        super().__init__()
        checked(Count | None, batch_size, "batch_size")
        checked(NotNegative, tail_weight, "tail_weight")
        for name in passes or []:
            if name not in PASSES:
                raise InputError("passes", name, ", ".join(PASSES))
        self.rollouts = [Path(folder) for folder in (rollouts if isinstance(rollouts, list) else [rollouts])]
        self.batch_size, self.passes, self.tail_weight = batch_size, passes, tail_weight
        self.seed = seed
        self.records: Records | None = None
        self.parts: dict[str, FilterBatch] = {}
        self.digest: str | None = None

    def setup(self, stage: str) -> None:
        """Reads the rollouts, or takes ``records`` where they are set, and puts each split on the device.

        Raises:
            InputError: The rollouts do not verify or lack a state, or a split that is needed has no record.
        """
        if self.parts:
            return
        if self.records is None:
            from data.shards import load_records

            sets = [open_rollouts(folder) for folder in self.rollouts]
            for one in sets[1:]:
                check_key(one.folder / MANIFEST, one.manifest, sets[0].manifest["model_fingerprint"])
            passes = {one.folder: self._passes(one.manifest["settings"]["passes"]) for one in sets}
            holding = [one for one in sets if passes[one.folder]] or sets[:1]
            self.records = Records.cat([load_records(one, passes[one.folder] or self.passes) for one in holding])
            self.digest = "+".join(one.digest for one in sets)
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        for split in ("train", "validation", "test"):
            part = self._part(self.records, split, device)
            # A rollout of few prompts may well hold none of the test split, which only `test` reads.
            if not len(part) and (split != "test" or stage == "test"):
                raise InputError(
                    f"{self.rollouts[0]}: split", f"no {split} record in the passes {', '.join(self.passes or PASSES)}",
                    "rollouts of prompts of every split; roll out more prompts",
                )  # fmt: skip
            self.parts[split] = part
        self.records = None  # the parts are copies

    def _passes(self, recorded: Sequence[str]) -> list[str]:
        return [name for name in recorded if self.passes is None or name in self.passes]

    def _part(self, records: Records, split: str, device: torch.device) -> FilterBatch:
        """All records of one split, on the device.

        What full_step would commit is committed whatever a filter says, and final by construction where the labels come from
        that state on (all passes but the oracle's): no example. The passes count alike in the loss, however many steps each
        takes: full_step has some ten states for each of the oracle's.
        """
        wanted = torch.tensor([PASSES.index(name) for name in self.passes or PASSES])
        in_split = torch.tensor([name == split for name in records.splits], dtype=torch.bool)
        rows = (in_split[records.prompt] & torch.isin(records.passes, wanted)).nonzero()[:, 0]
        evidence = records.evidence.each(lambda values: values[rows])
        passes, tail, example = records.passes[rows], records.tail[rows], evidence.masked.clone()
        own = (passes != PASSES.index("oracle")).nonzero()[:, 0]
        example[own, evidence.confidence[own].masked_fill(~evidence.masked[own], -1).argmax(1)] = False
        count = passes.bincount(minlength=len(PASSES))
        share = len(passes) / (count.clamp(min=1) * (count > 0).sum().clamp(min=1))
        weight = example * torch.where(tail, self.tail_weight, 1.0) * share[passes, None]
        return FilterBatch(evidence, records.final[rows], tail, example, weight).to(device)

    def _batches(self, split: str) -> Batches:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if split != "train":
            return Batches(self.parts[split], 4 * self.batch_size if self.batch_size else None, rank, ranks)
        return Batches(self.parts[split], self.batch_size, rank, ranks, self._order, self._epoch)

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.parts["train"]), generator=generator)

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
