"""End-of-text rules."""

import torch

from decoding.config import DecodeConfig
from decoding.eot import EotStep, Published
from decoding.loop import decode, decode_steps
from decoding.output import empty_output
from decoding.strategies import make_strategy

EOT = 62


def test_an_accepted_eot_ends_the_row(table):
    # Position 3 says EoT with the highest confidence, so it is committed first; what follows says token 9.
    tokens = [1, 2, 3, EOT] + [9] * 28
    predictor = table(tokens, [4.0, 3.0, 2.0, 9.0] + [8.0] * 28, prompt=2)
    full = make_strategy("full_step")
    ended = decode(predictor, [[1, 2]], DecodeConfig(32, 8, eot="commit"), full)
    assert ended.sequences.tolist() == [[1, 2, 3] + [EOT] * 29]
    assert ended.nfe.tolist() == [4]
    whole = decode(predictor, [[1, 2]], DecodeConfig(32, 8, eot="off"), full)
    assert whole.sequences.tolist() == [tokens]
    assert whole.nfe.tolist() == [32]


def test_the_published_rule_cuts_at_an_unconfident_guess_and_leaves_it_masked(table):
    # Position 20 says EoT with a tiny margin; nothing accepted is EoT. The published rule cuts there all the same.
    tokens = [1] * 20 + [EOT] + [9] * 11
    predictor = table(tokens, [5.0] * 20 + [0.1] + [5.0] * 11, prompt=2)
    out = decode(predictor, [[1, 2]], DecodeConfig(32, 8, eot="published"), make_strategy("full_step"), record=True)
    assert out.sequences.tolist() == [[1] * 20 + [EOT] * 12]
    assert out.nfe.tolist() == [21]  # the 20 tokens before the cut and the cut position itself, which stayed masked


def test_published_cut_takes_the_most_confident_masked_guess():
    log_probability = torch.tensor([[0.1, 0.6, 0.5, 0.9], [0.1, 0.2, 0.3, 0.4]]).log()
    top = torch.tensor([[False, True, True, True], [False, False, False, False]])
    masked = torch.tensor([[True, True, True, False], [True, True, True, True]])
    step = EotStep(torch.tensor([4, 4]), masked, log_probability, top)
    assert Published().last(step).tolist() == [1, 4]


def test_the_published_rule_tells_guesses_apart_whose_probability_rounds_to_1(table):
    tokens = [1] * 10 + [EOT] * 10 + [9] * 12
    predictor = table(tokens, [5.0] * 10 + [30.0] * 6 + [40.0] + [30.0] * 3 + [5.0] * 12, prompt=2)
    config = DecodeConfig(32, 8, eot="published")
    first = next(decode_steps(predictor, [[1, 2]], config, make_strategy("full_step"), empty_output(1, config)))
    assert first.changed[0].nonzero()[:, 0].tolist() == [0, *range(17, 32)]


def test_recorded_eot_evidence_covers_the_masked_region(table):
    tokens = [1] * 20 + [EOT] + [9] * 11
    predictor = table(tokens, [5.0] * 32, prompt=2)
    out = decode(
        predictor, [[1, 2]], DecodeConfig(32, 8, eot="off"), make_strategy("full_step"), record=True, record_eot=True
    )
    first, last = out.trace[0], out.trace[-1]
    assert first.eot_top.nonzero()[:, 1].tolist() == [20]
    assert (first.eot_probability > 0).all()
    assert (last.eot_probability > 0).sum() == 1
