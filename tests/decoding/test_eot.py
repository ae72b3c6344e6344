"""End-of-text rules."""

import pytest
import torch

from decoding.adapters.for_transformers import learned_decoding
from decoding.config import DecodeConfig
from decoding.decoder import Decoder
from decoding.eot import EotStep, Published
from decoding.loop import decode, decode_steps
from decoding.output import empty_output
from decoding.strategies import make_strategy
from models.eot import EotSaid, eot_columns
from models.errors import InputError
from models.predictor import MaskPredictor

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
    log_odds = torch.tensor([[0.1, 0.6, 0.5, 0.9], [0.1, 0.2, 0.3, 0.4]]).logit()
    top = torch.tensor([[False, True, True, True], [False, False, False, False]])
    masked = torch.tensor([[True, True, True, False], [True, True, True, True]])
    step = EotStep(torch.tensor([4, 4]), masked, torch.tensor([4, 4]), log_odds, top)
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
    assert (first.eot_log_odds != 0).all()
    assert (last.eot_log_odds != 0).sum() == 1


def test_the_learned_rule_ends_the_text_where_the_head_says_so(table, head):
    # Position 11 says EoT hesitantly, 20 and what follows surely.
    tokens = [1] * 11 + [EOT] + [1] * 8 + [EOT] * 12
    predictor = table(tokens, [9.0] * 11 + [2.0] + [9.0] * 20, prompt=2)
    config = DecodeConfig(32, 8, **head(predictor))
    strategy = make_strategy("full_step")
    first = next(decode_steps(predictor, [[1, 2]], config, strategy, empty_output(1, config)))
    assert first.changed[0].nonzero()[:, 0].tolist() == [0, *range(21, 32)]
    published = DecodeConfig(32, 8, eot="published")
    out = decode(predictor, [[1, 2]], config, make_strategy("threshold", threshold=0.9))
    assert out.sequences.tolist() == [[1] * 11 + [EOT] * 21]  # the text's own EoT, once it is committed
    assert config.settings()["eot_risk"] == 0.001
    assert "eot_risk" not in published.settings()


def test_no_text_that_is_already_decoded_is_ended(table, head):
    tokens = [EOT, 1, 1, 1] + [EOT] * 28
    predictor = table(tokens, [5.0] + [9.0] * 31, prompt=2)
    config = DecodeConfig(32, 8, **head(predictor))
    first = next(
        decode_steps(predictor, [[1, 2]], config, make_strategy("full_step"), empty_output(1, config))
    )  # commits 1, and ends the text at 4, not at 0
    assert first.changed[0].nonzero()[:, 0].tolist() in ([0, *range(1, 32)], [1, *range(5, 32)])


def test_a_partial_forward_keeps_what_a_whole_one_said(random_base, head, monkeypatch):
    # With a dual cache most forwards see a block alone: what is right of it would else count as certain EoT.
    seen = []
    monkeypatch.setattr(
        "decoding.eot.eot_columns",
        lambda said, *rest: seen.append(EotSaid(*(each.clone() for each in said))) or eot_columns(said, *rest),
    )
    settings = head(random_base) | {"eot_risk": 1e-9}
    config = DecodeConfig(32, 8, cache="dual", **settings)
    out = decode(random_base, [[1, 2, 3]], config, make_strategy("full_step"), record=True)
    places = [int(step.block[0]) for step in out.trace]
    assert places.count(0) > 2
    for before, after, block in zip(seen, seen[1:], places[1:], strict=False):
        right = slice((block + 1) * 8, None)
        if block == places[0]:
            assert torch.equal(before.log_odds[:, right], after.log_odds[:, right])
            assert torch.equal(before.stable[:, right], after.stable[:, right])
            inside = slice(block * 8, (block + 1) * 8)
            assert not torch.equal(before.log_odds[:, inside], after.log_odds[:, inside])
    assert (seen[0].log_odds != 0).all()


def test_after_a_cut_the_head_reads_the_region_as_if_nobody_had_cut_it(table, head, monkeypatch):
    # It has learned from whole regions: of a text cut at 20 the next look would say that it surely ends at 19, and so on.
    seen = []
    monkeypatch.setattr(
        "decoding.eot.eot_columns",
        lambda said, masked, end: seen.append(masked.clone()) or eot_columns(said, masked, end),
    )
    predictor = table([1] * 20 + [EOT] * 12, [9.0] * 32, prompt=2)
    config = DecodeConfig(32, 8, **head(predictor))
    steps = decode_steps(predictor, [[1, 2]], config, make_strategy("full_step"), empty_output(1, config))
    assert next(steps).changed[0].nonzero()[:, 0].tolist() == [0, *range(21, 32)]  # cut at 20
    assert next(steps).changed[0].nonzero()[:, 0].tolist() == [1]
    for masked, decoded in zip(seen, (1, 2), strict=True):
        assert masked[0].tolist() == [False] * decoded + [True] * (32 - decoded)


def test_a_text_that_has_its_eot_is_still_closed_left_of_it(table, head):
    # The most confident EoT is often the last of the block; without a look left of it each EoT before it costs a forward.
    predictor = table([1] * 20 + [EOT] * 12, [2.0] * 20 + [6.0 + n / 4 for n in range(12)], prompt=2)
    config = DecodeConfig(32, 32, **head(predictor))
    closed = decode(predictor, [[1, 2]], config, make_strategy("full_step"))
    plain = decode(predictor, [[1, 2]], DecodeConfig(32, 32, eot="commit"), make_strategy("full_step"))
    assert closed.sequences.tolist() == plain.sequences.tolist() == [[1] * 20 + [EOT] * 12]
    assert (plain.nfe.tolist(), closed.nfe.tolist()) == ([32], [1 + 21])


def test_what_is_closed_stays_mask_for_the_model_and_is_eot_in_the_text(table, head, monkeypatch):
    # A region that ends sooner tells the model how long the text is to be: it wrote shorter ones, and wrong ones.
    predictor, given = table([1] * 20 + [EOT] * 12, [9.0] * 32, prompt=2), []
    forward = predictor.forward
    monkeypatch.setattr(
        predictor, "forward", lambda ids, *rest, **more: given.append(ids.clone()) or forward(ids, *rest, **more)
    )
    config, output = DecodeConfig(32, 32, **head(predictor)), empty_output(1, DecodeConfig(32, 32))
    steps = decode_steps(predictor, [[1, 2]], config, make_strategy("full_step"), output)
    assert next(steps).sequences[0].tolist() == [1] + [predictor.ids.mask] * 20 + [EOT] * 11
    assert next(steps).sequences[0, 21:].tolist() == [EOT] * 11
    assert given[1][0].tolist() == [1, 2, 1] + [predictor.ids.mask] * 31
    assert sum(1 for _ in steps) == 21 - 2  # what is closed takes no forward
    assert output.sequences[0].tolist() == [1] * 20 + [EOT] * 12


def test_what_the_learned_rule_remembers_follows_the_rows(ending_base, head):
    # Rows move between slots as others finish: a row that inherits another's evidence is cut where that one ends.
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    config = DecodeConfig(16, 8, cache="dual", **head(ending_base))
    strategy = make_strategy("threshold", threshold=0.5)
    whole = decode(ending_base, prompts, config, strategy, batch_size=2)
    assert not (whole.sequences == ending_base.ids.mask).any()
    for row, prompt in enumerate(prompts):
        alone = decode(ending_base, [prompt], config, strategy)
        assert alone.sequences[0].tolist() == whole.sequences[row].tolist()
        assert alone.nfe[0] == whole.nfe[row]


def test_a_head_is_asked_for_and_must_be_of_the_base(table, random_base, head):
    with pytest.raises(InputError, match="eot_head: found None; accepted: the folder of an exported EoT head"):
        DecodeConfig(32, 8, eot="learned")
    settings = head(table([1] * 32, [1.0] * 32, prompt=1))
    with pytest.raises(InputError, match="eot_head: found .*; accepted: null, or eot learned"):
        DecodeConfig(32, 8, eot_head=settings["eot_head"])
    file = settings["eot_head"] / "config.json"
    file.write_text(file.read_text().replace('"base_fingerprint": "', '"base_fingerprint": "another'))
    with pytest.raises(InputError, match="eot: base_.*, that of the loaded model"):
        decode(random_base, [[1]], DecodeConfig(32, 8, **settings), make_strategy("full_step"))
    settings = head(random_base)
    with pytest.warns(
        UserWarning, match="eot_head: trained at gen_length 32, used at 16: its risk holds for the first"
    ):
        decode(random_base, [[1]], DecodeConfig(16, 8, **settings), make_strategy("full_step"))
    for risk in (0, 1, True, "x"):
        with pytest.raises(InputError, match="eot_risk: found"):
            DecodeConfig(32, 8, **settings, eot_risk=risk)


def test_transformers_ends_a_row_where_the_head_says_so(tiny_checkpoint, head):
    predictor = MaskPredictor.from_pretrained(tiny_checkpoint, device="cpu")
    prompt, shown = [4, 5, 6], []
    config, rule = {"gen_length": 32, "block_length": 8}, make_strategy("full_step")
    settings = config | head(predictor, slope=0.0) | {"eot_risk": 0.9}  # ends at the first position that can
    found = predictor.model.generate(
        torch.tensor([prompt]), custom_generate=learned_decoding, on_step=shown.append, **settings
    )[0, 3:].tolist()
    expected = Decoder(predictor, rule).generate([prompt], **settings)
    assert found == expected.sequences[0, : len(found)].tolist()
    assert len(shown) == expected.nfe[0] < Decoder(predictor, rule).generate([prompt], **config).nfe[0]
    file = settings["eot_head"] / "config.json"
    file.write_text(file.read_text().replace('"base_fingerprint": "', '"base_fingerprint": "another'))
    with pytest.raises(InputError, match="eot: base_"):
        predictor.model.generate(torch.tensor([prompt]), custom_generate=learned_decoding, **settings)
