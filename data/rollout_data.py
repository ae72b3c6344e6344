"""What is rolled out, and in which batches; the same settings for every command that makes or reads rollouts."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule

from data.labels import PASSES
from data.prompt import Prompt, Split
from data.prompt_list import PromptList
from data.prompts import PromptSource, encode_prompts, read_prompts
from data.shards import ShardWriter
from data.store import Folder, place
from data.typed import Count, Length, Text, check_fields
from decoding.config import DecodeConfig
from models.errors import InputError
from models.predictor import MaskPredictor

WINDOW = 16
"""Batches whose prompts are sorted by length together."""
SHARD = 4  # batches of a shard: as a row of the first is finished, one of the others takes its place


@dataclass
class RolloutSettings:
    """What is rolled out: the group ``rollout`` of the commands ``rollout``, ``filter`` and ``helper``.

    Args:
        base: Folder or hub id of the base model.
        folder: Folder of the shards; or a URL that fsspec opens, such as s3://bucket/set or gs://bucket/set.
        sources: Where the prompts come from.
        split: Keep the prompts of one split; null keeps all.
        limit: Roll out the first prompts only, this many; a larger limit later adds the others.
        per_task: At most this many prompts of each task.
        batch_size: Prompts decoded together.
        gen_length: Generated positions, in tokens.
        block_length: Positions of one block.
        steps: Denoising steps of the reference; null for one token a step.
        eot: ``commit``: a committed EoT ends the row, as it does in use. ``off``: the padding is decoded too.
        passes: Decodes to record: full_step, oracle, filter. The reference is decoded in any case.
        filter: Folder of an exported filter, for the pass of that name.
        references: Folder of a finished set of the same model and settings, whose references are taken; what it lacks is decoded.
        states: States of a prompt's filter pass whose block full_step completes, which gives their labels; the others have none.
        eot_evidence: Also record what every step says of EoT, at every position that is left: the head then reads all of them.
        hidden_states: Also record the predictor's last hidden state of every guess in fp16, for a filter that reads them
            (``model.hidden``): a set then takes many times as much disk.
        chat_template: Wrap prompts in the chat template.
        too_long: What is done with prompts that leave no room for ``gen_length`` in the model: ``refuse`` ends the command before
            anything is decoded, ``skip`` leaves them out and lists them in the manifest.
        dtype: Dtype of the weights; null for the checkpoint's on a GPU and float32 on a CPU.

    Raises:
        InputError: A value that is not accepted.
    """

    base: Text = "models/bundled/llada-tiny"
    folder: Folder = Path("runs/rollout/shards")
    sources: list[PromptSource] = field(
        default_factory=lambda: [PromptSource(split="train"), PromptSource(split="validation")]
    )
    split: Split | None = None
    limit: Count | None = None
    per_task: Count | None = None
    batch_size: Length = 32
    gen_length: Length = 128
    block_length: Length = 32
    steps: Length | None = None
    # The published rule may cut a row in one decode where it does not in another: no reference for the others.
    eot: Literal["commit", "off"] = "commit"
    passes: list[str] = field(default_factory=lambda: ["full_step", "oracle"])
    filter: Path | None = None
    references: Folder | None = None
    states: Count = 4
    eot_evidence: bool = False
    hidden_states: bool = False
    chat_template: bool = True
    too_long: Literal["refuse", "skip"] = "refuse"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.passes:
            if name not in PASSES:
                raise InputError("passes", repr(name), " | ".join(PASSES))
        for name in ("passes", "sources"):
            if not getattr(self, name):
                raise InputError(name, "none", "at least one")
        if ("filter" in self.passes) != (self.filter is not None):
            accepted = "the folder of an exported filter if passes has filter, else null"
            raise InputError("filter", self.filter, accepted)
        self.passes = [name for name in PASSES if name in self.passes]
        self.folder = place(self.folder)
        self.decoding  # noqa: B018  # refuses lengths that do not go together

    @property
    def decoding(self) -> DecodeConfig:
        """Settings of the decodes. Temperature 0: a label says whether the guess was what greedy decoding ends up with."""
        return DecodeConfig(self.gen_length, self.block_length, self.steps, eot=self.eot)

    def request(self) -> dict[str, Any]:
        """Which prompts were asked for, for the manifest."""
        sources = [asdict(source) for source in self.sources]
        return {"sources": sources, "split": self.split, "limit": self.limit, "per_task": self.per_task}

    def prompts(self, split: Split | None = None, limit: Count | None = None) -> PromptList:
        """The prompts to roll out; or the first ``limit`` of a split, whatever is rolled out of it."""
        if split is not None:
            return read_prompts(self.sources, split, limit)
        return read_prompts(self.sources, self.split, self.limit, self.per_task)

    def encode(self, prompts: PromptList, predictor: MaskPredictor) -> tuple[PromptList, np.ndarray, dict[str, int]]:
        """Lengths of the prompts that leave room for ``gen_length``.

        Args:
            prompts: The prompts.
            predictor: The base model; its weights are not needed.

        Returns:
            These prompts, tokens of each ``(P,)`` int32, and the number of tokens of those left out, by the hash of their text.

        Raises:
            InputError: A prompt leaves no room and is not to be skipped, or none does.
        """
        lengths = np.fromiter((len(self.tokens(prompt, predictor)) for prompt in prompts), np.int32, len(prompts))
        room = predictor.max_length - self.gen_length
        if room < 1:
            raise InputError("gen_length", self.gen_length, f"below {predictor.max_length}, the model's longest text")
        accepted = f"at most {room}: the model's {predictor.max_length} less gen_length"
        long = np.flatnonzero(lengths > room)
        if len(long) and (self.too_long == "refuse" or len(long) == len(prompts)):
            more = "; or too_long skip" if self.too_long == "refuse" else "; no prompt is left"
            first = int(long[0])
            raise InputError(f"prompt {prompts[first].id}", f"{lengths[first]} tokens", accepted + more)
        skipped = {prompts.hash(index): int(lengths[index]) for index in long.tolist()}
        keep = np.flatnonzero(lengths <= room)
        return prompts.take(keep), lengths[keep], skipped

    def tokens(self, prompt: Prompt, predictor: MaskPredictor) -> list[int]:
        """Token ids of a prompt."""
        assert predictor.tokenizer is not None
        return encode_prompts([prompt], predictor.tokenizer, self.chat_template)[0]

    def batch(self, prompts: PromptList, index: list[int], predictor: MaskPredictor) -> "PromptBatch":
        """The prompts at ``index``, ready to be decoded."""
        chosen = [prompts[n] for n in index]
        return PromptBatch(index, chosen, [self.tokens(prompt, predictor) for prompt in chosen], self.batch_size)


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


def plan(lengths: Sequence[int], size: int, window: int = WINDOW) -> list[list[int]]:
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


def waiting(
    settings: RolloutSettings, prompts: PromptList, lengths: np.ndarray, shards: ShardWriter, verify: bool = True
) -> list[list[int]]:
    """The batches that are not written yet, as indices of their prompts.

    Args:
        settings: What is rolled out.
        prompts: All prompts.
        lengths: ``(P,)`` tokens of each.
        shards: What is written.
        verify: Read every byte of it, so that a damaged shard is among them.
    """
    done = {prompt for record in shards.written(verify) for prompt in record["prompts"]}
    planned = plan(lengths.tolist(), settings.batch_size * SHARD, WINDOW // SHARD)
    left = ([n for n in index if prompts.hash(n) not in done] for index in planned)
    return [index for index in left if index]


class RolloutData(LightningDataModule):
    """Prompts to roll out, in batches of similar length.

    Args:
        settings: What is rolled out.
    """

    def __init__(self, settings: RolloutSettings) -> None:
        super().__init__()
        self.settings = settings
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer shards may be left than there are ranks

    def setup(self, stage: str) -> None:
        self.prompts = self.settings.prompts()

    def predict_dataloader(self) -> "PromptBatches":
        """The batches that are not written yet."""
        trainer: Any = self.trainer
        module = trainer.lightning_module  # a train.rollout_module.RolloutModule
        predictor, shards = module.roller.predictor, module.shards
        self.prompts, lengths, skipped = self.settings.encode(self.prompts, predictor)
        if trainer.is_global_zero:
            shards.skip(skipped)
        # The others of the run need not read a set that the first one reads.
        batches = waiting(self.settings, self.prompts, lengths, shards, verify=trainer.is_global_zero)

        def make(index: list[int]) -> PromptBatch:
            return self.settings.batch(self.prompts, index, predictor)

        names = [shards.name(index[0], map(self.prompts.hash, index)) for index in batches]
        return PromptBatches(batches, names, make, trainer.global_rank, trainer.world_size, shards)

    def transfer_batch_to_device(self, batch: PromptBatch, device: torch.device, dataloader_idx: int) -> PromptBatch:
        """Returns the batch: the decode loop moves what it needs."""
        return batch


class PromptBatches:
    """The batches that no other process has taken: a rank's own share first, then what is left of the others'.

    Nothing is handed out beforehand, so no rank waits for a slower one, a process that dies costs its current batch, and
    further ones may join: any number of runs on one folder share its work. Where nothing says what others are at, as in an
    object store, each takes what is not written in an order of its own, so that they seldom meet before the end.

    Args:
        batches: Their prompts' indices.
        names: Names of their shards.
        make: Makes a batch of indices when it is this process's.
        rank: This process's rank.
        ranks: Number of ranks.
        shards: What is written, and who is at what.

    Attributes:
        share: About how many of them one rank decodes.
    """

    def __init__(
        self, batches: list[list[int]], names: list[str], make: Callable[[list[int]], PromptBatch], rank: int, ranks: int,
        shards: ShardWriter,
    ) -> None:  # fmt: skip
        named = list(zip(batches, names, strict=True))
        own, others = named[rank::ranks], [batch for n, batch in enumerate(named) if n % ranks != rank]
        if shards.remote:
            for part in (own, others):
                random.SystemRandom().shuffle(part)  # whatever seeds the run
        self.batches = own + others
        self.share, self.make, self.shards = len(own), make, shards

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[PromptBatch]:
        left, took = self.batches, True
        while took:  # once more over what others had taken: one of them may have died
            took, before = False, left
            left = []
            for index, name in before:
                with self.shards.claim(name) as mine:
                    if mine:
                        took = True
                        yield self.make(index)  # until the next one is asked for, when this one is written
                    elif not self.shards.has(name):
                        left.append((index, name))
