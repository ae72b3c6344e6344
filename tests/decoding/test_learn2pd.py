"""The whole way of a filter: records, fit, export, load, decode."""

import pytest
import torch
import torch.nn.functional as F

from data.labels import records_of
from decoding.config import DecodeConfig
from decoding.decoder import Decoder
from decoding.loop import decode
from decoding.strategies import make_strategy
from models.filter import FilterConfig, build_filter, save_filter

MASK, EOT, PROMPT = 63, 62, 2


def three_at_a_time(ids, attention, positions):
    """Right about the three leftmost masked positions, a little less sure and wrong about all others."""
    logits = torch.zeros(*ids.shape, 64)
    for row in range(len(ids)):
        masked = (ids[row] == MASK).nonzero()[:, 0]
        for place, column in enumerate(masked.tolist()):
            right = place < 3
            logits[row, column, column - PROMPT if right else 50] = 6.0 if right else 5.8
    return logits


def test_a_filter_that_knows_one_decode_by_heart_repeats_it_in_the_oracles_forwards(scripted, tmp_path):
    settings, prompt = DecodeConfig(32, 8, eot="off"), [[1, 2]]
    predictor = scripted(three_at_a_time)
    full = decode(predictor, prompt, settings, make_strategy("full_step"))
    assert full.sequences.tolist() == [list(range(32))]
    oracle = decode(predictor, prompt, settings, make_strategy("oracle"), full.sequences, record=True)
    assert oracle.nfe.tolist() == [12]  # 3 + 3 + 2 in each of the four blocks

    records = records_of({"oracle": oracle.trace}, full.sequences, ["a"], ["train"], EOT)
    config = FilterConfig(
        block_length=8, gen_length=32, threshold=0.5, vocab_size=64, mask_id=MASK, base_fingerprint="unsaved"
    )
    torch.manual_seed(0)
    net = build_filter(config)
    net.fit_normalisation(records.evidence)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    masked = records.evidence.masked
    for _ in range(300):
        loss = F.binary_cross_entropy_with_logits(net(records.evidence)[masked], records.final[masked].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_filter(tmp_path / "filter", net, config, "# by heart\n")

    learned = decode(predictor, prompt, settings, make_strategy("learn2pd", filter=tmp_path / "filter"))
    assert torch.equal(learned.sequences, full.sequences)
    assert learned.nfe.tolist() == [12]
    assert learned.counts["filter_commits"].tolist() == [20]


def test_a_filter_that_never_fires_is_reported(random_llada, prompts):
    config = FilterConfig(
        block_length=8, gen_length=32, threshold=1.0, vocab_size=64, mask_id=MASK, base_fingerprint="unsaved"
    )
    strategy = make_strategy("learn2pd", network=build_filter(config).eval(), config=config)
    with pytest.warns(UserWarning, match="learn2pd: its component never fired"):
        Decoder(random_llada, strategy).generate(prompts, gen_length=32, block_length=8)


def test_another_block_length_than_the_filter_was_made_for_is_reported(random_llada, prompts):
    config = FilterConfig(
        block_length=16, gen_length=32, threshold=0.0, vocab_size=64, mask_id=MASK, base_fingerprint="unsaved"
    )
    strategy = make_strategy("learn2pd", network=build_filter(config).eval(), config=config)
    with pytest.warns(UserWarning, match="trained with block_length 16, used with 8"):
        decode(random_llada, prompts, DecodeConfig(32, 8), strategy)
