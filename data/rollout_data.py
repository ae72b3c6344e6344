"""Prompts in batches, for ``train/rollout.py``: which are decoded together, and which still have to be."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning import LightningDataModule

from data.prompt import Prompt
from data.prompts import PromptSource, Split, load_prompts, prompt_hash
from models.errors import InputError

_WINDOW = 16  # batches whose prompts are sorted by length together
_SHARD = 4  # batches of a shard: as a row of the first is finished, one of the others takes its place


@dataclass
class PromptBatch:
    """Prompts that are decoded in one call, and make one shard.

    Attributes:
        index: Place of each prompt in the run's list.
        prompts: The prompts.
        tokens: Token ids of each.
        batch_size: Rows decoded together.
    """

    index: list[int]
    prompts: list[Prompt]
    tokens: list[list[int]]
    batch_size: int


def plan(lengths: Sequence[int], size: int, window: int = _WINDOW) -> list[list[int]]:
    """Cuts prompts into groups of similar length.

    Only prompts that stand near each other are sorted together, so that every stretch of the run takes about as long
    and a longer list keeps the groups of a shorter one.

    Args:
        lengths: Tokens of each prompt.
        size: Prompts in a group.
        window: Groups that are sorted together.

    Returns:
        Indices into ``lengths``; nothing but the arguments decides them.
    """
    groups = []
    for start in range(0, len(lengths), window * size):
        near = range(start, min(start + window * size, len(lengths)))
        order = sorted(near, key=lambda index: lengths[index])
        groups += [order[at : at + size] for at in range(0, len(order), size)]
    return groups


class RolloutData(LightningDataModule):
    """Prompts to roll out, in batches of similar length.

    Args:
        sources: Where the prompts come from; by default the bundled training and validation prompts.
        split: Keep the prompts of one split; null keeps all.
        limit: Roll out the first prompts only, this many; a larger limit later adds the others.
        per_task: At most this many prompts of each task.
        batch_size: Prompts decoded together.
    """

    def __init__(
        self,
        sources: list[PromptSource] | None = None,
        split: Split | None = None,
        limit: int | None = None,
        per_task: int | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError("batch_size", batch_size, "a whole number of at least 1")
        self.sources = sources or [PromptSource(split="train"), PromptSource(split="validation")]
        self.split: Split | None = split
        self.limit, self.per_task, self.batch_size = limit, per_task, batch_size
        self.prompts: list[Prompt] = []
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer shards may be left than there are ranks

    def request(self) -> dict[str, Any]:
        """What was asked for, for the manifest."""
        sources = [asdict(source) for source in self.sources]
        return {"sources": sources, "split": self.split, "limit": self.limit, "per_task": self.per_task}

    def setup(self, stage: str) -> None:
        self.prompts = load_prompts(self.sources, self.split, self.limit, self.per_task)

    def predict_dataloader(self) -> "PromptBatches":
        """This rank's part of the batches that are not written yet."""
        trainer: Any = self.trainer
        module = trainer.lightning_module  # a train.rollout_module.RolloutModule
        tokens = module.encode(self.prompts)
        done = {prompt for record in module.shards.written() for prompt in record["prompts"]}
        batches = []
        for planned in plan([len(ids) for ids in tokens], self.batch_size * _SHARD, _WINDOW // _SHARD):
            index = [n for n in planned if prompt_hash(self.prompts[n].prompt) not in done]
            if index:
                batches.append(
                    PromptBatch(index, [self.prompts[n] for n in index], [tokens[n] for n in index], self.batch_size)
                )
        return PromptBatches(batches[trainer.global_rank :: trainer.world_size])

    def transfer_batch_to_device(self, batch: PromptBatch, device: torch.device, dataloader_idx: int) -> PromptBatch:
        """Returns the batch: the decode loop moves what it needs."""
        return batch


class PromptBatches:
    """An iterable of batches; Lightning would take a plain list for one of data loaders."""

    def __init__(self, batches: list[PromptBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[PromptBatch]:
        return iter(self.batches)
