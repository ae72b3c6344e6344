"""Masked-diffusion training batches for the bundled base model, generated as they are needed."""

import itertools
import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data import gym, stories
from data.disk import check_writable
from data.gym import GymTask
from data.prompt import Prompt
from data.prompts import split_of
from data.stories import StoryTask
from data.typed import Count, Length, NotNegative, Processes, Whole
from models.errors import InputError
from models.tokenizer import train_tokenizer

_BLOCK = 32  # EoT tokens in one further block after the answer
_CHUNK = 2048  # samples that are generated, sorted into lengths and shuffled together
_SEED_STRIDE = 1_000_000  # between the seeds of two chunks

Task = StoryTask | GymTask
Objective = Literal["mask", "order"]
_Row = tuple[list[int], int, int]  # token ids, length of the prompt, padded length


def samples(task: Task, seed: int) -> Iterator[Prompt]:
    """Endless prompts of a task, of our own generator or of reasoning-gym."""
    return stories.samples(task, seed) if isinstance(task, StoryTask) else gym.samples(task, seed)


def mixture(tasks: Sequence[Task], count: int, seed: int, split: str) -> list[Prompt]:
    """About ``count`` prompts of one split, the tasks in proportion to their weights; no prompt text twice."""
    total = sum(task.weight for task in tasks)
    prompts: list[Prompt] = []
    for task in tasks:
        unique: dict[str, Prompt] = {}
        wanted = max(1, round(count * task.weight / total))
        # A task may have fewer different prompts than are wanted (1-digit sums have some 4,000 in all).
        for prompt in itertools.islice(samples(task, seed), 40 * wanted):
            if split_of(prompt.prompt) == split:
                unique.setdefault(prompt.prompt, prompt)
            if len(unique) == wanted:
                break
        prompts.extend(unique.values())
    return prompts


class MaskedBatches(IterableDataset):
    """An endless, addressable stream of batches: batch ``n`` is the same whoever asks for it and whenever.

    Args:
        tokenizer: Tokenizer with a chat template.
        tasks: The mixture.
        split: Split the prompts must belong to.
        seed: Seed of the stream.
        tokens: Tokens in a batch, padding included.
        length_step: Sequence lengths are multiples of this, in tokens.
        max_length: Longer samples are dropped, in tokens.
        more_blocks: Probability of 0, 1, 2, ... further blocks of 32 EoT after the answer.
        start: First batch.
        stride: Every how many batches to yield one (the number of ranks).
        counts: Batches of each chunk that was generated so far, which spares generating them again; grows in use.
        objective: ``mask``: masked at a ratio, as LLaDA is trained. ``order``: see :meth:`_order`.
        workers: Processes that make the chunks ahead; 0 makes them when they are needed. The batches are the same.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], split: str, seed: int, tokens: int,
        length_step: int, max_length: int, more_blocks: list[float], start: int = 0, stride: int = 1,
        counts: list[int] | None = None, objective: Objective = "mask", workers: int = 0,
    ) -> None:  # fmt: skip
        self.workers = workers
        self.tokenizer, self.tasks, self.split, self.seed, self.tokens = tokenizer, tasks, split, seed, tokens
        self.length_step, self.max_length, self.more_blocks = length_step, max_length, more_blocks
        self.start, self.stride, self.counts = start, stride, [] if counts is None else counts
        self.make = {"mask": self._noise, "order": self._order}[objective]
        self.mask_id: int = tokenizer.convert_tokens_to_ids("<|mdm_mask|>")  # type: ignore[assignment]
        self.eot_id: int = tokenizer.convert_tokens_to_ids("<|endoftext|>")  # type: ignore[assignment]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        skip, first = self.start, 0
        while first < len(self.counts) and skip >= self.counts[first]:  # a resumed run passes over what it has seen
            skip -= self.counts[first]
            first += 1
        chunks = self._ahead(first) if self.workers else map(self._chunk, itertools.count(first))
        for chunk, batches in enumerate(chunks, first):
            if chunk == len(self.counts):
                self.counts.append(len(batches))
            for batch in batches[skip :: self.stride]:
                yield {name: torch.from_numpy(values) for name, values in batch.items()}
            skip = skip - len(batches) if skip >= len(batches) else (skip - len(batches)) % self.stride

    def _ahead(self, first: int) -> Iterator[list[dict[str, np.ndarray]]]:
        """The chunks from ``first`` on, made by the processes some time before they are asked for."""
        with ProcessPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                waiting = deque(pool.submit(self._chunk, first + i) for i in range(2 * self.workers))
                for chunk in itertools.count(first + len(waiting)):
                    yield waiting.popleft().result()
                    waiting.append(pool.submit(self._chunk, chunk))
            finally:
                pool.shutdown(cancel_futures=True)

    def _chunk(self, chunk: int) -> list[dict[str, np.ndarray]]:
        """The batches of one chunk; as arrays, since a tensor that another process hands over keeps a file open."""
        return [
            {name: tensor.numpy() for name, tensor in self.make(rows, chunk * _CHUNK + number).items()}
            for number, rows in enumerate(self._shapes(chunk))
        ]

    def _shapes(self, chunk: int) -> list[list[_Row]]:
        """The batches of one chunk."""
        rng = random.Random(f"{self.seed}-{chunk}")
        prompts = mixture(self.tasks, _CHUNK, self.seed + chunk * _SEED_STRIDE, self.split)
        heads = self.tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompt.prompt}] for prompt in prompts],
            add_generation_prompt=True, tokenize=False,
        )  # fmt: skip
        head_ids = self.tokenizer(cast(list[str], heads), add_special_tokens=False)["input_ids"]
        tails = self.tokenizer([f"{prompt.response}<|eot_id|><|endoftext|>" for prompt in prompts],
                               add_special_tokens=False)["input_ids"]  # fmt: skip
        buckets: dict[int, list[_Row]] = {}
        for head, tail in zip(head_ids, tails, strict=True):
            (more,) = rng.choices(range(len(self.more_blocks)), self.more_blocks)
            length = -(-(len(head) + len(tail)) // self.length_step) * self.length_step
            length = min(length + more * _BLOCK, self.max_length)
            if len(head) + len(tail) <= length:
                buckets.setdefault(length, []).append((head + tail, len(head), length))
        batches = []
        for length in range(self.length_step, self.max_length + 1, self.length_step):
            rows = buckets.pop(length, [])
            rng.shuffle(rows)
            size = self.tokens // length
            whole = len(rows) // size * size
            batches += [rows[i : i + size] for i in range(0, whole, size)]
            # What does not fill a batch is padded into the next length, so every batch holds as many tokens.
            longer = [(ids, prompt, length + self.length_step) for ids, prompt, _ in rows[whole:]]
            buckets.setdefault(length + self.length_step, []).extend(longer)
        rng.shuffle(batches)
        return batches

    def _noise(self, rows: list[_Row], number: int) -> dict[str, Tensor]:
        """Masks each region at its own ratio t; the ratios of a batch are spread evenly over (0, 1].

        One row in four is masked over its whole region, as LLaDA is trained. The others are states that block-wise decoding
        passes through: one block masked at ratio t, what is left of it visible, what is right of it masked and not learned.
        """
        generator = torch.Generator().manual_seed(hash((self.seed, number)) % 2**63)
        batch, length = len(rows), rows[0][2]
        ids = torch.full((batch, length), self.eot_id)
        for row, (tokens, _, _) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        prompt = torch.tensor([row[1] for row in rows])[:, None]
        place = torch.arange(length)[None] - prompt
        region = place >= 0
        answer = torch.tensor([len(row[0]) for row in rows])[:, None] - prompt
        block = (torch.rand(batch, 1, generator=generator) * answer).long() // _BLOCK
        blockwise = torch.arange(batch)[:, None] % 4 > 0
        active = region & (~blockwise | (place // _BLOCK == block))
        count = active.sum(1)
        ratio = (torch.randperm(batch, generator=generator) + torch.rand(1, generator=generator)) / batch
        masked_count = (ratio * count).round().clamp(min=1)
        noise = torch.rand(batch, length, generator=generator).masked_fill(~active, 2)
        masked = noise.argsort(1).argsort(1) < masked_count[:, None]
        hidden = masked | (blockwise & (place // _BLOCK > block))
        weight = (count / masked_count)[:, None].expand(-1, length)[masked] / count.sum()
        return {
            "input_ids": ids.masked_fill(hidden, self.mask_id),
            "masked": masked.flatten().nonzero()[:, 0],
            "labels": ids[masked],
            "weight": weight,
        }

    def _order(self, rows: list[_Row], number: int) -> dict[str, Tensor]:
        """Predicts every response token once, each from what stands before it in an order drawn for its row.

        Predicting masked tokens at a uniform ratio is, in expectation, predicting all of them in a random order (arXiv
        2110.02037). Here one forward predicts all: after the clean text, in which a token
        sees the prompt and what comes before it in the order, stands a MASK for each response token, which sees the same but
        not its own token. Orders are left to right (3 in 10), random in each block (6), or random (1); padding is left out.
        """
        generator = torch.Generator().manual_seed(hash((self.seed, number)) % 2**63)
        length, most = max(len(ids) for ids, _, _ in rows), max(len(ids) - prompt for ids, prompt, _ in rows)
        ids = torch.full((len(rows), length + most), self.eot_id)
        rank = torch.full_like(ids, length + 1)  # padding comes after everything
        positions = torch.arange(length + most).repeat(len(rows), 1)
        labels = []
        for row, (tokens, prompt, _) in enumerate(rows):
            count, kind = len(tokens) - prompt, float(torch.rand(1, generator=generator))
            place = torch.arange(count)
            major = place if kind < 0.3 else place // _BLOCK if kind < 0.9 else 0 * place
            order = (major + torch.rand(count, generator=generator)).argsort().argsort() + 1
            ids[row, : len(tokens)] = torch.tensor(tokens)
            ids[row, length : length + count] = self.mask_id
            rank[row, :prompt] = 0
            rank[row, prompt : len(tokens)] = rank[row, length : length + count] = order
            positions[row, length : length + count] = prompt + place
            labels.append(ids[row, prompt : len(tokens)])
        clean = torch.arange(length + most) < length
        before = rank[:, None, :] < (rank + clean)[:, :, None]
        found = torch.cat(labels)
        return {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": before & clean | torch.eye(length + most, dtype=torch.bool),
            "masked": (ids == self.mask_id).flatten().nonzero()[:, 0],
            "labels": found,
            "weight": torch.full(found.shape, 1 / len(found)),
        }


class BaseDataModule(LightningDataModule):
    """Streams for ``train/base.py``; trains the tokenizer first where the folder does not hold one.

    Args:
        tasks: Tasks of our own generator.
        gym: Further tasks of reasoning-gym (the ``gym`` extra).
        tokenizer: Folder of the tokenizer.
        vocab_size: Size of a newly trained tokenizer.
        seed: Seed of the training stream; validation uses ``seed - 1``.
        tokens: Tokens in a batch on one device, padding included.
        length_step: Sequence lengths are multiples of this, in tokens.
        max_length: Longer samples are dropped, in tokens.
        more_blocks: Probability of 0, 1, 2, ... further blocks of 32 EoT after the answer.
        validation_batches: Batches in one validation pass.
        objective: What is learned, see :class:`MaskedBatches`.
        workers: Processes that make batches ahead, for a GPU that would wait for them; the batches are the same.
        longest: Longest sequence of the model that is trained, in tokens.

    Raises:
        InputError: Lengths that cannot be batched; or, in ``setup``, a tokenizer of another size than ``vocab_size``.
    """

    def __init__(
        self, tasks: list[StoryTask], tokenizer: Path, vocab_size: Count, seed: Whole, tokens: Count, length_step: Count,
        max_length: Count, more_blocks: list[NotNegative], validation_batches: Length, gym: list[GymTask] | None = None,
        objective: Objective = "mask", workers: Processes = 0, longest: Count | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.objective: Objective = objective
        self.workers = workers
        self.tasks: list[Task] = [*tasks, *(gym or [])]
        self.folder, self.vocab_size, self.seed, self.tokens = tokenizer, vocab_size, seed, tokens
        self.length_step, self.max_length, self.more_blocks = length_step, max_length, more_blocks
        self.validation_batches = validation_batches
        self.batches_done = 0
        self.counts: list[int] = []
        if not any(more_blocks):
            raise InputError("more_blocks", more_blocks, "weights, at least one of them above 0")
        if not (tokenizer / "tokenizer.json").is_file():
            check_writable("tokenizer", tokenizer)
            if tokenizer.is_dir() and any(tokenizer.iterdir()):
                accepted = "a tokenizer's, or a new or empty folder for the one that is trained"
                raise InputError("tokenizer", f"{tokenizer}, a folder of something else", accepted)
        if longest is not None and max_length > longest:
            raise InputError("max_length", max_length, f"at most model.max_sequence_length {longest}")
        if not 0 < length_step <= max_length <= tokens:
            raise InputError(
                "tokens, max_length, length_step", (tokens, max_length, length_step), "falling, from above 0"
            )

    def prepare_data(self) -> None:
        if not (self.folder / "tokenizer.json").is_file():
            prompts = mixture(self.tasks, 20_000, self.seed, "train")
            texts = [f"{prompt.prompt}\n\n{prompt.response}" for prompt in prompts]
            numbers = [
                f"{number} {number}\n" for number in range(100)
            ] * 200  # each is one token, whatever the tasks hold
            train_tokenizer(texts + numbers + ["user\n\n", "assistant\n\n"] * 2000, self.vocab_size).save_pretrained(
                self.folder
            )

    def setup(self, stage: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        if len(self.tokenizer) != self.vocab_size:
            raise InputError(
                "vocab_size", self.vocab_size, f"{len(self.tokenizer)}, the size of the tokenizer {self.folder}"
            )

    def probes(self, count: int) -> list[Prompt]:
        """Validation prompts that the training decodes now and then, about ``count``, the tasks by weight."""
        return mixture(self.tasks, count, self.seed - 1, "validation")

    def _stream(self, split: str, seed: int, start: int, stride: int) -> MaskedBatches:
        return MaskedBatches(
            self.tokenizer, self.tasks, split, seed, self.tokens, self.length_step, self.max_length, self.more_blocks,
            start, stride, self.counts if split == "train" else None, self.objective,
            self.workers if split == "train" else 0,
        )  # fmt: skip

    def train_dataloader(self) -> DataLoader:
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return DataLoader(self._stream("train", self.seed, self.batches_done + rank, ranks), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        stream = self._stream("validation", self.seed - 1, 0, 1)
        return DataLoader(list(itertools.islice(stream, self.validation_batches)), batch_size=None)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        trainer = self.trainer
        done = trainer.global_step * trainer.world_size if trainer else self.batches_done
        return {"batches_done": done, "counts": self.counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches_done, self.counts = state_dict["batches_done"], state_dict["counts"]
