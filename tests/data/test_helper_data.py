"""Texts a helper is trained on: what they hold, and how they are batched."""

from pathlib import Path

import pytest
import torch

from data.helper_data import HelperDataModule, TextBatches, Texts, split_texts
from data.rollouts import Sequences
from data.shards import ShardWriter
from models.errors import InputError

EOT = 62


def sequences() -> Sequences:
    """A response that ends, one that ends at once, one that never does; the last prompt is of another split."""
    references = torch.tensor([[5, 6, EOT, EOT], [EOT, 9, EOT, EOT], [5, 6, 7, 8], [1, EOT, EOT, EOT]])
    tokens = [[1, 2, 3], [4], [1, 2], [7]]
    first = torch.tensor([2, 0, 4, 1])
    return Sequences([], ["train", "train", "train", "validation"], tokens, references, first, {})


def test_a_text_ends_with_its_first_eot():
    texts = split_texts(sequences(), "train")
    assert [ids.tolist() for ids in texts.ids] == [[1, 2, 3, 5, 6, EOT], [4, EOT], [1, 2, 5, 6, 7, 8]]
    assert texts.prompts == [3, 1, 2]
    assert [ids.tolist() for ids in split_texts(sequences(), "validation").ids] == [[7, 1, EOT]]


def test_a_batch_says_where_each_response_lies():
    batch = split_texts(sequences(), "train").batch([0, 1], EOT)
    assert batch.ids.tolist() == [[1, 2, 3, 5, 6, EOT], [4, EOT, EOT, EOT, EOT, EOT]]
    assert (batch.start.tolist(), batch.end.tolist()) == ([3, 1], [6, 2])


def numbered(count: int) -> Texts:
    """Text ``n`` is made of the id ``n``; lengths differ widely."""
    return Texts([torch.full((1 + n * 7 % 90,), n) for n in range(count)], [0] * count)


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
    assert padded < 1.15 * sum(map(len, texts.ids))


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


def test_a_split_without_prompts_and_a_bad_batch_size_are_refused(tmp_path: Path, key, decoded):
    writer, batch = ShardWriter(tmp_path, key), decoded(1)
    writer.write(batch)
    writer.finish(batch.hashes)
    with pytest.raises(InputError, match=r"split: found no (train|validation) prompt"):
        HelperDataModule(tmp_path).setup("fit")
    with pytest.raises(InputError, match="batch_size"):
        HelperDataModule(tmp_path, batch_size=0)
