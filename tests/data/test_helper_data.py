"""Texts a helper is trained on: what they hold, and how they are batched."""

import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data.helper_data import HelperDataModule, TextBatches, Texts, load_texts
from data.shards import ShardWriter
from models.errors import InputError

EOT = 62


def rollouts() -> Any:
    """A response that ends, one that ends at once, one that never does; the last prompt is of another split.

    Two shards, of which the first holds what comes last.
    """
    names = ["index", "split", "prompt_tokens", "reference", "first_eot"]
    reference = pa.list_(pa.int32(), 4)
    parts = [
        [[2, 3], ["train", "validation"], [[1, 2], [7]], [[5, 6, 7, 8], [1, EOT, EOT, EOT]], [4, 1]],
        [[0, 1], ["train", "train"], [[1, 2, 3], [4]], [[5, 6, EOT, EOT], [EOT, 9, EOT, EOT]], [2, 0]],
    ]
    types = [pa.int64(), pa.string(), pa.list_(pa.int32()), reference, pa.int32()]
    tables = [pa.table(list(map(pa.array, part, types)), names=names) for part in parts]
    return SimpleNamespace(tables=lambda kind, columns: (table.select(columns) for table in tables))


def test_a_text_ends_with_its_first_eot():
    parts = load_texts(rollouts())
    texts = parts["train"]
    assert [texts[row].tolist() for row in range(3)] == [[1, 2, 3, 5, 6, EOT], [4, EOT], [1, 2, 5, 6, 7, 8]]
    assert texts.prompt.tolist() == [3, 1, 2]
    assert [parts["validation"][row].tolist() for row in range(1)] == [[7, 1, EOT]]
    assert {name: len(part) for name, part in parts.items()} == {"train": 3, "validation": 1, "test": 0}


def test_a_batch_says_where_each_response_lies():
    batch = load_texts(rollouts())["train"].batch([0, 1], EOT)
    assert batch.ids.tolist() == [[1, 2, 3, 5, 6, EOT], [4, EOT, EOT, EOT, EOT, EOT]]
    assert (batch.start.tolist(), batch.end.tolist()) == ([3, 1], [6, 2])


def numbered(count: int) -> Texts:
    """Text ``n`` is made of the id ``n``; lengths differ widely."""
    length = 1 + np.arange(count) * 7 % 90
    return Texts(np.arange(count).repeat(length), length.cumsum() - length, length, np.zeros(count, np.int64))


def drawn(batches: TextBatches) -> list[list[int]]:
    return [batch.ids[:, 0].tolist() for batch in batches]


@pytest.mark.parametrize(("count", "ranks", "size"), [(10, 1, 4), (11, 2, 3), (5, 4, 2), (70, 3, 2)])
def test_an_epoch_holds_every_text_and_ranks_take_as_many_steps(count, ranks, size):
    train = [TextBatches(numbered(count), size, EOT, rank, ranks, lambda epoch: epoch) for rank in range(ranks)]
    seen = [drawn(rank) for rank in train]
    assert {len(rank) for rank in seen} == {len(train[0])}
    assert {n for rank in seen for batch in rank for n in batch} == set(range(count))
    # Validation repeats nothing: a text counted twice would bias the metrics.
    scored = [TextBatches(numbered(count), size, EOT, rank, ranks) for rank in range(ranks)]
    assert [len(drawn(rank)) for rank in scored] == [len(rank) for rank in scored]
    assert sorted(n for rank in scored for batch in drawn(rank) for n in batch) == list(range(count))


def test_texts_of_a_batch_are_of_similar_length():
    texts = numbered(256)
    batches = list(TextBatches(texts, 16, EOT, seed=lambda epoch: 0))
    padded = sum(batch.ids.numel() for batch in batches)
    assert padded < 1.15 * len(texts.ids)


def test_the_order_changes_with_the_epoch_and_repeats_with_the_seed():
    epoch = [0]
    batches = TextBatches(numbered(64), 4, EOT, seed=lambda number: 7 + number, epoch=lambda: epoch[0])
    first = drawn(batches)
    assert drawn(batches) == first
    epoch[0] = 1
    assert drawn(batches) != first
    assert len(drawn(batches)) == len(first)


def test_texts_come_from_the_rollout_folder(tmp_path: Path, key, decoded):
    writer, batch = ShardWriter(tmp_path, key), decoded(40)
    writer.write(batch)
    writer.finish(batch.hashes)
    module = HelperDataModule(tmp_path, batch_size=4)
    module.setup("fit")
    assert sum(map(len, module.parts.values())) == 40
    some = next(iter(module.val_dataloader()))
    assert (some.end > some.start).all()
    assert module.eot_id == EOT


def test_texts_of_a_large_set_are_not_in_memory(tmp_path: Path, key, decoded):
    # They were lists of Python's numbers, beside all the prompts, on every rank.
    writer, batch = ShardWriter(tmp_path, key), decoded(40)
    batch.tokens = [[60, *range(500)]] * 40
    writer.write(batch)
    writer.finish(batch.hashes)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["digest"]
    peaks = []
    for times in (5, 55):  # the same shard so many times over
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"shards": manifest["shards"] * times}))
        tracemalloc.start()
        module = HelperDataModule(tmp_path, batch_size=4)
        module.setup("fit")
        batches = module.train_dataloader()
        assert len(next(iter(batches))) == 4
        assert sum(map(len, module.parts.values())) == 40 * times
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 300 * 40 * 50  # bytes a prompt; its numbers alone are 500 of 8


def test_a_split_without_prompts_and_a_bad_batch_size_are_refused(tmp_path: Path, key, decoded):
    writer, batch = ShardWriter(tmp_path, key), decoded(1)
    writer.write(batch)
    writer.finish(batch.hashes)
    with pytest.raises(InputError, match=r"split: found no (train|validation) prompt"):
        HelperDataModule(tmp_path).setup("fit")
    with pytest.raises(InputError, match="batch_size"):
        HelperDataModule(tmp_path, batch_size=0)
