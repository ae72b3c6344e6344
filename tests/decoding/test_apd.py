"""APD: the coupling, the windows, and that a row does not depend on its batch."""

import itertools

import pytest
import torch

from decoding.config import DecodeConfig
from decoding.loop import decode, decode_steps
from decoding.output import empty_output
from decoding.run import Request
from decoding.strategies import make_strategy
from models.errors import InputError
from models.helper import HelperConfig

VOCAB, MASK, EOT = 64, 63, 62
CONFIG = DecodeConfig(24, 24, eot="off")


class ScriptedHelper:
    """Logits of the next token from a function of ``(token, column)``; keeps tokens instead of keys, as a cache would."""

    def __init__(self, script, vocab_size=VOCAB):
        self.script, self.vocab_size, self.calls = script, vocab_size, 0
        self.config = HelperConfig(
            base_fingerprint="unsaved", vocab_size=VOCAB, mask_id=MASK, eot_id=EOT, gen_length=24, eot_rule="commit"
        )

    def to(self, device):
        return self

    def allocate_cache(self, batch, length):
        return type("Cache", (), {"move": lambda *_: None, "shrink": lambda *_: None})()

    def logits(self, hidden):
        return hidden

    def hidden(self, ids, columns, cache, rows=None, stop=None):
        self.calls += 1
        return self.script(ids, columns)[..., : self.vocab_size]


def says(table):
    """A helper whose distribution depends on the column of the next token only."""
    return ScriptedHelper(lambda ids, columns: table[columns + 1])


def predictor_of(scripted, table):
    """A predictor whose distribution depends on the position only, and never on what is decoded."""
    return scripted(lambda ids, attention, positions: table[positions].clone())


def apd(helper, weight=0.5, **options):
    return make_strategy("apd", network=helper, mixture_weight=weight, **options)


@pytest.fixture
def tables():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 64, VOCAB, generator=generator) * 3


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
def test_a_helper_that_equals_the_predictor_accepts_everything(scripted, tables, weight, temperature):
    config = DecodeConfig(24, 24, eot="off", temperature=temperature)
    strategy = apd(says(tables[0]), weight, max_lookahead=8)
    out = decode(predictor_of(scripted, tables[0]), [[1, 2], [3] * 5], config, strategy)
    assert out.nfe.tolist() == [3, 3]
    assert out.counts["helper_commits"].tolist() == ([21, 21] if weight < 1 else [0, 0])
    assert out.counts["helper_refusals"].tolist() == [0, 0]  # a forward ends with the lookahead


def test_weight_1_accepts_everything_without_asking(scripted, tables):
    helper = says(tables[1])
    config = DecodeConfig(24, 24, eot="off", temperature=1.0)
    out = decode(predictor_of(scripted, tables[0]), [[1, 2]], config, apd(helper, 1.0))
    assert out.nfe.tolist() == [1]
    assert helper.calls == 0
    assert out.counts["helper_forwards"].tolist() == [0]
    assert out.counts["helper_commits"].tolist() == [0]


def test_weight_0_follows_the_helpers_greedy_choice(scripted, tables):
    # Every accepted position beyond the first of a forward is what the helper says, and the first refused one is not.
    first, second = tables
    second[:, ::2] = first[:, ::2] * 2  # agree now and then
    config = DecodeConfig(24, 24, eot="off")
    out = decode(predictor_of(scripted, first), [[1, 2]], config, apd(says(second), 0.0, max_lookahead=6), record=True)
    choice, draft = second[..., :MASK].argmax(-1), first[..., :MASK].argmax(-1)
    assert torch.equal(out.sequences[0], draft[2:26])
    done = refused = 0
    for step in out.trace:
        count = int(step.transfer.sum())
        assert step.transfer[0].nonzero()[:, 0].tolist() == list(range(done, done + count))
        agreed = (choice == draft)[2 + done + 1 : 2 + done + 6]
        expected = 1 + int(agreed[: 24 - done - 1].long().cumprod(0).sum())
        assert count == expected
        done += count
        refused += not agreed[: 24 - step.transfer[0].nonzero()[0, 0] - 1].all()
    assert done == 24
    assert 4 < len(out.trace) < 24
    assert out.counts["helper_refusals"].tolist() == [refused]


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_committed_tokens_have_the_distribution_of_the_coupling(scripted, weight):
    # Two positions, three tokens. Position 0 is drawn from the draft. Position 1 is accepted where draft and target agree
    # under one noise, else drawn anew from the draft: its law is computed by brute force over a fine grid of noise.
    draft = torch.full((8, VOCAB), -40.0)
    other = draft.clone()
    draft[:, :3], other[:, :3] = torch.tensor([0.2, 1.0, -0.5]), torch.tensor([1.2, -0.3, 0.1])
    config = DecodeConfig(2, 2, eot="off", temperature=1.0)
    count = 4000
    out = decode(predictor_of(scripted, draft), [[1]] * count, config, apd(says(other), weight))
    p = draft[0, :3].double().softmax(0)
    mixed = weight * draft[0, :3].double().log_softmax(0) + (1 - weight) * other[0, :3].double().log_softmax(0)
    uniform = torch.rand(400_000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    noise = -(-uniform.log()).log()
    x, y = (p.log() + noise).argmax(1), (mixed + noise).argmax(1)
    accepted = torch.bincount(x[x == y], minlength=3) / len(x)
    law = accepted + (x != y).double().mean() * p
    for column, expected in ((0, p), (1, law)):
        seen = torch.bincount(out.sequences[:, column], minlength=3).double()
        chi_square = ((seen - count * expected) ** 2 / (count * expected)).sum()
        assert chi_square < 13.8  # 2 degrees of freedom, one false alarm in a thousand
    assert (out.nfe == 1).double().mean().item() == pytest.approx((x == y).double().mean().item(), abs=0.03)
    # The noise is really shared: independent draws would agree far less often.
    assert (out.nfe == 1).double().mean() > (p * mixed.softmax(0)).sum() + 0.15


@pytest.mark.parametrize(("window", "lookahead"), [(None, None), (None, 5), (4, 5), (2, 3), (100, 7)])
@pytest.mark.parametrize(("eot", "temperature"), [("off", 0.0), ("commit", 0.7)])
def test_a_row_decodes_as_it_does_alone(random_base, random_helper, prompts, window, lookahead, eot, temperature):
    config = DecodeConfig(24, 24, eot=eot, temperature=temperature)
    strategy = apd(random_helper, 0.5, kv_window=window, max_lookahead=lookahead)
    together = decode(random_base, prompts, config, strategy, seeds=range(5), batch_size=3, record=True)
    assert torch.bincount(torch.cat([step.rows for step in together.trace])).tolist() == together.nfe.tolist()
    for row, prompt in enumerate(prompts):
        alone = decode(random_base, [prompt], config, strategy, seeds=[row])
        assert torch.equal(together.sequences[row], alone.sequences[0])
        assert together.nfe[row] == alone.nfe[0]
    assert (together.nfe < 24).any()


@pytest.mark.parametrize("lookahead", [None, 6])
def test_a_window_over_everything_is_exact(random_base, random_helper, prompts, lookahead):
    outs = [
        decode(
            random_base,
            prompts,
            CONFIG,
            apd(random_helper, 0.5, kv_window=window, max_lookahead=lookahead),
            record=True,
        )
        for window in (None, 500)
    ]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    for exact, cached in zip(outs[0].trace, outs[1].trace, strict=True):
        torch.testing.assert_close(exact.evidence.confidence, cached.evidence.confidence, atol=1e-5, rtol=1e-4)


def test_a_window_runs_on_its_own_columns_only(random_base, random_helper, monkeypatch):
    widths = []
    forward = type(random_base.model).forward

    def watched(self, input_ids, *args, **kwargs):
        widths.append(input_ids.shape[1])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(random_base.model), "forward", watched)
    strategy = apd(random_helper, 0.0, kv_window=3, max_lookahead=5)
    out = decode(random_base, [[1, 2, 3, 4]], CONFIG, strategy, record=True)
    counts = [int(step.transfer.sum()) for step in out.trace]
    done = [0, *itertools.accumulate(counts)]
    expected = [4 + 5]  # prompt and lookahead
    for before, now in itertools.pairwise(done[:-1]):
        expected.append(now - max(before - 3, -4) + min(5, 24 - now))
    assert widths == expected


def test_the_helper_sees_the_accepted_prefix_and_the_draft(scripted, tables):
    # The helper's answers depend on the token before: whatever it is fed must be the text as it stands.
    seen = {}

    def script(ids, columns):
        for row in range(len(ids)):
            for column, token in zip(columns[row].tolist(), ids[row].tolist(), strict=True):
                seen[column] = token
        return tables[1][(ids + columns) % 64]

    out = decode(
        predictor_of(scripted, tables[0]), [[1, 2, 3]], CONFIG, apd(ScriptedHelper(script), 0.3, max_lookahead=5)
    )
    text = [1, 2, 3, *out.sequences[0].tolist()]
    assert [seen[column] for column in range(len(text) - 1)] == text[:-1]


def test_an_accepted_eot_ends_the_row(scripted, tables):
    table = tables[0].clone()
    table[:, EOT] = -50.0
    table[10, EOT] = 50.0  # position 8 of the text after a prompt of two
    for weight in (0.0, 0.5, 1.0):
        out = decode(predictor_of(scripted, table), [[1, 2]], DecodeConfig(24, 24), apd(says(table), weight))
        assert out.nfe.tolist() == [1]
        assert (out.sequences[0, 8:] == EOT).all()
        assert (out.sequences[0, :8] != EOT).all()
        # The draft's first position is nobody's merit, and what is right of the EoT is dropped.
        assert out.counts["helper_commits"].tolist() == [8 if weight < 1 else 0]
        assert out.counts["helper_refusals"].tolist() == [0]


def test_ids_beyond_the_helpers_vocabulary_are_never_accepted_from_it(scripted, tables):
    table = tables[0].clone()
    table[:, 50] = 30.0  # the draft is 50 everywhere
    helper = ScriptedHelper(lambda ids, columns: table[columns + 1], vocab_size=40)
    out = decode(predictor_of(scripted, table), [[1, 2]], CONFIG, apd(helper, 0.9))
    assert (out.sequences == 50).all()
    assert out.nfe.tolist() == [24]  # the first position of each forward, which is not the helper's
    assert out.counts["helper_commits"].tolist() == [0]
    assert out.counts["helper_refusals"].tolist() == [23]  # of the last forward's one position it is not asked


def test_the_helpers_keys_are_given_back_once_the_long_prompts_are_done(random_base, random_helper):
    # Sized by the longest prompt of the call, they would take several times the memory until the last row ends.
    prompts, strategy = [[5] * 64, [6] * 9, [7] * 5], apd(random_helper, 0.5, max_lookahead=4)
    output, sizes = empty_output(3, CONFIG), []
    with torch.inference_mode():
        run = strategy.start(Request(random_base, prompts, CONFIG, strategy, output, batch_size=2))
        while run.scheduler.slots:
            run.step()
            sizes.append(run.key_bytes)
            run.retire()
        run.close()
    column = 2 * 2 * 2 * 8 * 4  # keys and values of two layers and two heads of 8 numbers, in fp32
    assert sizes[0] == 2 * (64 + 24) * column
    assert sizes[-1] <= 2 * (9 + 24) * column
    for row, prompt in enumerate(prompts):
        assert torch.equal(output.sequences[row], decode(random_base, [prompt], CONFIG, strategy).sequences[0])


def test_the_helper_looks_at_no_more_keys_than_there_is_text(random_base, random_helper, monkeypatch):
    # A mask as wide as the cache has every layer read all of it, at each step.
    seen, hidden = [], type(random_helper).hidden

    def watched(self, ids, columns, cache, rows=None, stop=None):
        seen.append((rows, stop))
        return hidden(self, ids, columns, cache, rows, stop)

    monkeypatch.setattr(type(random_helper), "hidden", watched)
    decode(random_base, [[1, 2, 3], [4, 5]], CONFIG, apd(random_helper, 0.5, max_lookahead=4))
    assert seen[0] == (None, 3 + 4 - 1)  # all rows take part: their keys are not copied
    assert seen[-1][1] == max(stop for _, stop in seen) <= 3 + 24 - 1


def test_steps_stream_and_mask_never_leaves(scripted, tables):
    table = tables[0].clone()
    table[:, MASK] = 90.0
    output, total = empty_output(2, CONFIG), torch.zeros(2, 24, dtype=torch.long)
    for step in decode_steps(predictor_of(scripted, table), [[1], [2]], CONFIG, apd(says(tables[1]), 0.5), output):
        total[step.rows] += step.changed
    assert (total == 1).all()
    assert (output.sequences != MASK).all()
    assert output.helper_seconds > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture_weight": 1.5}, "apd.mixture_weight: found 1.5; accepted: a number from 0 to 1"),
        ({"kv_window": 0}, "apd.kv_window: found 0; accepted: a whole number from 1 to 1048576, or null"),
        ({"max_lookahead": -1}, "apd.max_lookahead: found -1"),
        ({"network": None}, "helper: found None; accepted: the folder of an exported helper"),
    ],
)
def test_settings_are_refused_by_name(tables, options, message):
    with pytest.raises(InputError, match=message):
        make_strategy("apd", **{"network": says(tables[0]), **options})


def test_what_does_not_go_together_is_refused_by_name(scripted, tables):
    predictor, strategy = predictor_of(scripted, tables[0]), apd(says(tables[0]))
    with pytest.raises(InputError, match="cache: found 'dual' with apd"):
        decode(predictor, [[1]], DecodeConfig(24, 24, cache="dual"), strategy)
    with pytest.raises(InputError, match="regions: found given; accepted: none with apd"):
        decode(predictor, [[1]], DecodeConfig(24, 24, eot="off"), strategy, regions=torch.zeros(1, 24).long())
    with pytest.raises(InputError, match="eot: found 'published' with apd"):
        decode(predictor, [[1]], DecodeConfig(24, 24, eot="published"), strategy)
