"""The training stream of the base model."""

import itertools

import pytest
import torch
import yaml

from data.base_data import BaseDataModule, MaskedBatches, mixture
from data.gym import GymTask, samples
from data.prompts import split_of
from data.stories import StoryTask
from eval.command import CONFIGS
from models.errors import InputError
from models.predictor import MaskPredictor

TASKS = [StoryTask("story", weight=2, max_events=4), StoryTask("short")]


@pytest.fixture
def stream(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("data.base_data._CHUNK", 64)

    def make(start=0, stride=1, counts=None, split="train", objective="mask", workers=0):
        return MaskedBatches(
            tiny_tokenizer, TASKS, split, 7, tokens=2048, length_step=32, max_length=512, more_blocks=[0.5, 0.5],
            start=start, stride=stride, counts=counts, objective=objective, workers=workers,
        )  # fmt: skip

    return make


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_stream_goes_on_where_it_stopped(stream, monkeypatch):
    first = stream()
    batches = list(itertools.islice(first, 12))
    assert all(map(equal, batches[9:], itertools.islice(stream(start=9), 3)))
    made = []
    shapes = MaskedBatches._shapes
    monkeypatch.setattr(MaskedBatches, "_shapes", lambda self, chunk: made.append(chunk) or shapes(self, chunk))
    assert all(map(equal, batches[9:], itertools.islice(stream(start=9, counts=first.counts), 3)))
    assert 0 not in made, "a chunk that lies behind was generated again"


def test_ranks_share_the_batches_out(stream):
    whole = list(itertools.islice(stream(), 10))
    ranks = [list(itertools.islice(stream(start=rank, stride=2), 5)) for rank in range(2)]
    assert all(equal(whole[n], ranks[n % 2][n // 2]) for n in range(10))


def test_processes_make_the_same_batches(stream):
    whole = list(itertools.islice(stream(), 12))
    ahead = stream(start=1, stride=2, workers=2)
    assert all(map(equal, whole[1::2], itertools.islice(ahead, 6)))
    assert len(ahead.counts) > 1


def test_only_responses_are_masked_and_weighted_by_one_over_t(stream):
    mask = stream().mask_id
    for batch in itertools.islice(stream(), 5):
        masked = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
        masked[batch["masked"]] = True
        masked = masked.view_as(batch["input_ids"])
        # Three rows in four are states of block-wise decoding: what lies right of the block is masked too, but not learned.
        hidden = batch["input_ids"] == mask
        assert torch.equal(masked[::4], hidden[::4])
        blockwise = torch.arange(len(masked)) % 4 > 0
        assert not (masked & ~hidden).any()
        for loss, unseen in zip(masked[blockwise], hidden[blockwise], strict=True):
            assert loss.nonzero().max() - loss.nonzero().min() < 32
            assert unseen[loss.nonzero().max() :].sum() >= loss[loss.nonzero().max() :].sum()
            assert not (unseen & ~loss)[: loss.nonzero().max()].any()
        assert masked.any(1).all(), "a row without a masked position teaches nothing"
        assert not masked[:, :5].any(), "the chat template's head is never masked"
        assert (batch["labels"] != mask).all()
        # Every row's weights sum to its share of the response tokens: 1/t times t.
        rows = masked.nonzero()[:, 0]
        sums = torch.zeros(len(masked)).index_add_(0, rows, batch["weight"])
        assert sums.sum().item() == pytest.approx(1.0, abs=1e-4)
        for row in range(len(masked)):
            assert batch["weight"][rows == row].unique().numel() == 1


def test_in_an_order_every_response_token_is_predicted_without_being_seen(stream, tiny_checkpoint):
    model = MaskPredictor.from_pretrained(tiny_checkpoint).model
    batch = next(iter(stream(objective="order")))
    ids, mask, positions = batch["input_ids"], batch["attention_mask"], batch["position_ids"]
    width, places = ids.shape[1], batch["masked"]
    rows, columns = places // width, positions.flatten()[places]
    assert torch.equal(ids[rows, columns], batch["labels"])  # a query stands where its token does
    before = model(ids, mask, positions, places).logits
    chosen = [int((rows == row).nonzero()[len((rows == row).nonzero()) // 2]) for row in rows.unique()]
    changed = ids.clone()
    changed[rows[chosen], columns[chosen]] = 5 + (changed[rows[chosen], columns[chosen]] == 5).long()
    after = model(changed, mask, positions, places).logits
    moved = (before != after).any(1)
    assert not moved[chosen].any()
    assert moved.any()  # those that come later in the order see it
    prompt = torch.ones(width, dtype=torch.bool)
    prompt[int(columns[rows == 0].min()) :] = False
    assert mask[0, places[rows == 0] % width][:, prompt].all()


def test_nothing_of_the_other_splits_is_trained_on(stream, tiny_tokenizer):
    eot = tiny_tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for batch in itertools.islice(stream(), 4):
        for row in batch["input_ids"].tolist():
            text = tiny_tokenizer.decode(row[: row.index(eot)], skip_special_tokens=True)
            assert split_of(text.split("\n\n", 1)[1]) == "train"


def test_a_reasoning_gym_task_is_part_of_the_mixture():
    pytest.importorskip("reasoning_gym")
    found = mixture([*TASKS, GymTask("chain_sum", options={"max_terms": 3})], 40, 3, "train")
    assert {prompt.task for prompt in found} == {"story", "short", "chain_sum"}


def test_a_tokenizer_of_another_size_is_refused_before_training(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    data = BaseDataModule(TASKS, tmp_path, len(tiny_tokenizer) + 1, 1, 2048, 32, 512, [1.0], 1)
    with pytest.raises(
        InputError, match=f"vocab_size: found {len(tiny_tokenizer) + 1}; accepted: {len(tiny_tokenizer)}"
    ):
        data.setup("fit")


def test_restrictions_hold():
    pytest.importorskip("reasoning_gym")
    for prompt in itertools.islice(samples(GymTask("gsm_symbolic", templates=[43], max_number=20), 3), 20):
        assert "Together, they have" in prompt.response
        assert int(prompt.answer) <= 20


@pytest.mark.parametrize("lengths", [{"tokens": 100}, {"length_step": 0}, {"length_step": 999}])
def test_lengths_that_cannot_be_batched_are_refused(tmp_path, lengths):
    settings = {
        "tasks": TASKS, "tokenizer": tmp_path, "vocab_size": 300, "seed": 1, "tokens": 2048, "length_step": 32,
        "max_length": 512, "more_blocks": [1.0], "validation_batches": 1,
    }  # fmt: skip
    with pytest.raises(InputError, match="tokens, max_length, length_step"):
        BaseDataModule(**{**settings, **lengths})


def test_the_shipped_settings_find_as_many_tokens_as_they_ask_for(tmp_path):
    # Otherwise `make bundle` ends before its first step.
    settings = yaml.safe_load((CONFIGS / "base" / "default.yaml").read_text())
    tasks = [StoryTask(**task) for task in settings["data"].pop("tasks")]
    data = BaseDataModule(**settings["data"] | {"tokenizer": tmp_path / "tokenizer", "tasks": tasks})
    data.prepare_data()
    data.setup("fit")
    assert len(data.tokenizer) == settings["data"]["vocab_size"]
    pieces = data.tokenizer([f" {number}" for number in range(100)], add_special_tokens=False)["input_ids"]
    assert all(len(ids) == 1 for ids in pieces)  # a number is one token
