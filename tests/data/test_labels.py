"""Labels are what the reference says, on masked positions only; the history that is not stored comes back exactly."""

from dataclasses import replace

import pytest
import torch

from data.labels import PASSES, Records, after_eot, collect, first_eot, history, labels, of_block, records_of
from data.rollouts import load_records
from data.shards import ShardWriter
from decoding.config import DecodeConfig
from decoding.loop import decode
from decoding.strategies import make_strategy
from models.features import FEATURES, feature_columns, needs_of

EOT = 62


def test_first_eot_is_its_index_or_the_length() -> None:
    sequences = torch.tensor([[1, 2, EOT, EOT], [EOT, 1, EOT, 1], [1, 2, 3, 4]])
    assert first_eot(sequences, EOT).tolist() == [2, 0, 4]
    assert first_eot(sequences[2], EOT).item() == 4
    block = torch.zeros(3, dtype=torch.int64)
    after = after_eot(first_eot(sequences, EOT), block, 4)
    assert after.int().tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]]


def test_columns_of_the_active_block() -> None:
    region = torch.arange(12).reshape(2, 6)
    assert of_block(region, torch.tensor([2, 0]), 2).tolist() == [[4, 5], [6, 7]]


@pytest.mark.parametrize("eot", ["off", "commit"])
def test_final_is_the_match_with_the_reference_on_masked_positions(decoded, eot: str) -> None:
    batch = decoded(5, eot=eot)
    for trace in batch.traces.values():
        for step in trace:
            final = labels(step, batch.references)
            tail = after_eot(first_eot(batch.references, EOT)[step.rows], step.block, 4)
            for n, row in enumerate(step.rows.tolist()):
                start = int(step.block[n]) * 4
                reference = batch.references[row, start : start + 4]
                assert torch.equal(final[n], (step.evidence.token[n] == reference) & step.evidence.masked[n])
                e = first_eot(batch.references[row], EOT)
                assert torch.equal(tail[n], torch.arange(start, start + 4) > e)


def test_a_decoded_position_is_never_a_positive_example(decoded) -> None:
    batch = decoded(5)
    steps = collect(batch.traces["full_step"])
    final = labels(steps, batch.references)
    assert final.any()
    assert not (final & ~steps.evidence.masked).any()


def test_what_full_step_commits_is_labelled_final(decoded) -> None:
    """The reference's own commits are right by construction; a block or row mixed up shows here."""
    batch = decoded(5)
    steps = collect(batch.traces["full_step"])
    final = labels(steps, batch.references)
    assert final[steps.transfer].all()


def test_collect_orders_rows_that_finish_at_different_times(decoded) -> None:
    batch = decoded(5)
    steps = collect(batch.traces["oracle"])
    assert torch.bincount(steps.rows).tolist() == batch.nfe["oracle"].tolist()
    for row in range(5):
        assert steps.step[steps.rows == row].tolist() == list(range(int(batch.nfe["oracle"][row])))


@pytest.mark.parametrize("name", ["full_step", "oracle"])
@pytest.mark.parametrize("eot", ["off", "commit"])
def test_history_equals_what_the_decoder_saw(decoded, name: str, eot: str) -> None:
    """A filter trained on another history than it is served decides differently without any error."""
    steps = collect(decoded(6, gen_length=32, block_length=8, eot=eot).traces[name])
    evidence = steps.evidence
    stable, previous = history(evidence.masked, evidence.token, evidence.confidence, steps.rows, steps.block)
    assert evidence.stable.max() > (0 if name == "oracle" else 1)
    assert torch.equal(stable, evidence.stable)
    assert torch.equal(previous, evidence.previous)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_live_decode_computes_the_column_that_its_records_hold(decoded, predictor, key, tmp_path, feature) -> None:
    # A feature that does not say what it needs would learn from records and be served nothing.
    class Watching(type(make_strategy("full_step"))):
        needs = needs_of([feature])

        def decide(self, step):
            columns.append(feature_columns(step.evidence, [feature]))
            return super().decide(step)

    batch, columns = decoded(6), []
    writer = ShardWriter(tmp_path, key)
    writer.write(batch)
    writer.finish(batch.hashes)
    records = load_records(tmp_path, ["full_step"])
    stored = feature_columns(records.evidence, [feature])
    for row, tokens in enumerate(batch.tokens):
        columns.clear()
        decode(predictor, [tokens], DecodeConfig(16, 4, eot="off"), Watching())
        torch.testing.assert_close(torch.cat(columns), stored[records.prompt == row], atol=1e-4, rtol=1e-4)


def test_a_live_decode_reads_the_text_that_its_records_hold(decoded, predictor, key, tmp_path) -> None:
    class Watching(type(make_strategy("full_step"))):
        needs = frozenset({"text"})

        def decide(self, step):
            texts.append(step.evidence.text)
            masked.append(step.evidence.masked)
            return super().decide(step)

    batch, texts, masked = decoded(6, gen_length=32, block_length=8, eot="commit"), [], []
    key = replace(key, settings=key.settings | {"gen_length": 32, "block_length": 8})
    writer = ShardWriter(tmp_path, key)
    writer.write(batch)
    writer.finish(batch.hashes)
    records = load_records(tmp_path, ["full_step"])
    for row, tokens in enumerate(batch.tokens):
        texts.clear()
        masked.clear()
        found = decode(predictor, [tokens], DecodeConfig(32, 8, eot="commit"), Watching())
        text = torch.cat(texts)
        assert torch.equal(text, records.evidence.text[records.prompt == row])
        assert not (text == predictor.ids.mask).any()
        result = of_block(found.sequences.expand(len(text), -1), records.block[records.prompt == row], 8)
        decoded_already = ~torch.cat(masked)
        assert torch.equal(text[decoded_already], result[decoded_already])


def test_history_of_nothing() -> None:
    empty = torch.zeros(0, 4)
    none = torch.zeros(0, dtype=torch.long)
    stable, previous = history(empty.bool(), empty.long(), empty, none, none)
    assert stable.shape == previous.shape == (0, 4)


def test_records_straight_from_traces(decoded) -> None:
    batch = decoded(3)
    records = records_of(batch.traces, batch.references, ["a", "b", "c"], batch.splits, EOT)
    total = sum(int(nfe.sum()) for nfe in batch.nfe.values())
    assert records.final.shape == records.evidence.token.shape == (total, 4)
    assert records.passes.unique().tolist() == [PASSES.index("full_step"), PASSES.index("oracle")]
    assert records.prompt.unique().tolist() == [0, 1, 2]


def test_records_of_two_sets_keep_their_prompts_and_splits(decoded) -> None:
    first, second = (
        records_of(batch.traces, batch.references, [prompt.id for prompt in batch.prompts], splits, EOT)
        for batch, splits in ((decoded(2), ["train", "test"]), (decoded(3, 2), ["validation", "train", "test"]))
    )
    both = Records.cat([first, second])
    assert both.prompt_ids == ["p0", "p1", "p2", "p3", "p4"]
    for part, where in ((first, slice(0, len(first.prompt))), (second, slice(len(first.prompt), None))):
        found = both.take(torch.arange(len(both.prompt))[where])
        assert [both.prompt_ids[n] for n in found.prompt.tolist()] == [part.prompt_ids[n] for n in part.prompt.tolist()]
        assert [both.splits[n] for n in found.prompt.tolist()] == [part.splits[n] for n in part.prompt.tolist()]
        for name in ("final", "tail", "passes", "block", "step"):
            assert torch.equal(getattr(found, name), getattr(part, name))
        assert torch.equal(found.evidence.token, part.evidence.token)
