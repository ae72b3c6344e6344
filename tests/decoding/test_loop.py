"""Invariants of the decode loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from decoding.config import DecodeConfig
from decoding.eot import RULES, Off
from decoding.loop import decode, decode_steps
from decoding.output import empty_output
from decoding.plan import CACHES, Dual
from decoding.strategies import make_strategy
from models.errors import InputError
from models.filter import FilterConfig, build_filter

MASK, EOT = 63, 62
CONFIG = DecodeConfig(gen_length=32, block_length=8, eot="off")


@pytest.fixture(
    scope="session", params=["llada", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Dream", "llada_moe"))]
)
def family(request: pytest.FixtureRequest) -> str:
    """The loop knows of a family by the columns of its partial forwards alone; ``test_cache.py`` takes both at once."""
    return request.param


def filter_strategy(architecture: str = "conv", name: str = "learn2pd"):
    torch.manual_seed(3)
    config = FilterConfig(
        architecture=architecture, block_length=8, gen_length=32, threshold=0.5, base_fingerprint="unsaved", vocab_size=64,
        mask_id=MASK,
    )  # fmt: skip
    return make_strategy(name, network=build_filter(config).eval(), config=config)


STRATEGIES = {
    "full_step": make_strategy("full_step"),
    "threshold": make_strategy("threshold", threshold=0.5),
    "factor": make_strategy("factor", factor=1.5),
    "entropy_bound": make_strategy("entropy_bound", gamma=1.0),
    "dream": make_strategy("dream", top_p=0.8),
    "klass": make_strategy("klass", threshold=0.2, divergence=0.5, history=1),
    "dico": make_strategy("dico"),
    "dico + filter": filter_strategy("conv", "dico"),
    "learn2pd": filter_strategy("conv"),
    "learn2pd block_mlp": filter_strategy("block_mlp"),
}


def test_threshold_above_one_is_full_step(random_base, prompts):
    full = decode(random_base, prompts, CONFIG, make_strategy("full_step"), record=True)
    never = decode(random_base, prompts, CONFIG, make_strategy("threshold", threshold=1.01), record=True)
    assert torch.equal(full.sequences, never.sequences)
    assert all(torch.equal(a.transfer, b.transfer) for a, b in zip(full.trace, never.trace, strict=True))
    assert (full.nfe == 32).all()


@pytest.mark.parametrize("eot", ["off", "commit", "published"])
def test_oracle_reproduces_the_reference_in_no_more_forwards(random_base, prompts, eot):
    config = DecodeConfig(gen_length=32, block_length=8, eot=eot)
    full = decode(
        random_base, prompts, DecodeConfig(gen_length=32, block_length=8, eot="commit"), make_strategy("full_step")
    )
    oracle = decode(random_base, prompts, config, make_strategy("oracle"), references=full.sequences)
    if eot != "published":  # the published rule may cut where the reference goes on
        assert torch.equal(oracle.sequences, full.sequences)
    assert (oracle.nfe <= 32).all()
    assert oracle.nfe.sum() < 32 * len(prompts)
    assert "stalls" in oracle.counts


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(
    ("cache", "refresh", "eot", "temperature"),
    [
        ("none", None, "off", 0.0), ("none", None, "commit", 0.7), ("none", None, "published", 0.7),
        ("prefix", None, "commit", 0.0), ("prefix", 3, "published", 0.0), ("dual", None, "off", 0.7),
        ("dual", None, "commit", 0.0), ("dual", 2, "published", 0.0),
    ],
)  # fmt: skip
def test_a_row_decodes_as_it_does_alone(random_base, prompts, name, cache, refresh, eot, temperature):
    config = DecodeConfig(32, 8, eot=eot, temperature=temperature, cache=cache, refresh=refresh)
    strategy = STRATEGIES[name]
    together = decode(random_base, prompts, config, strategy, seeds=range(5), batch_size=3)
    for row, prompt in enumerate(prompts):
        alone = decode(random_base, [prompt], config, strategy, seeds=[row])
        assert torch.equal(together.sequences[row], alone.sequences[0])
        assert together.nfe[row] == alone.nfe[0]


@given(
    seed=st.integers(0, 2**31), scale=st.sampled_from([0.0, 1.0, 8.0, 1e4, 1e38]), favourite=st.sampled_from([0.0, 1e4]),
    name=st.sampled_from(list(STRATEGIES)), eot=st.sampled_from(["off", "commit", "published"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_decode_ends_whatever_the_logits(scripted, seed, scale, favourite, name, eot):
    # Logits that depend on what is decoded, up to the largest numbers there are, and with MASK as the favourite.
    def script(ids, attention, positions):
        generator = torch.Generator().manual_seed(seed + int(ids.sum()))
        logits = (torch.rand(*ids.shape, 64, generator=generator) * 2 - 1) * scale
        logits[..., MASK] += favourite
        return logits

    config = DecodeConfig(32, 8, eot=eot)
    output = empty_output(3, config)
    known: dict[int, tuple[Tensor, Tensor]] = {}
    for step in decode_steps(scripted(script), [[1], [2, 3], [4]], config, STRATEGIES[name], output, batch_size=2):
        assert step.changed.any(1).all()
        for row, changed, sequence in zip(step.rows.tolist(), step.changed, step.sequences.clone(), strict=True):
            if row in known:  # what is committed stays, unless the text ends left of it
                before, done = known[row]
                assert ((sequence == before) | (eot != "off") & (sequence == EOT))[done].all()
                assert not (changed & done).any()
            known[row] = (sequence, known[row][1] | changed if row in known else changed.clone())
    assert all(done.all() for _, done in known.values())
    assert torch.equal(torch.stack([known[row][0] for row in range(3)]), output.sequences)
    assert (output.sequences != MASK).all()
    assert (output.nfe <= config.gen_length).all()


def test_a_new_rule_and_a_new_cache_are_one_class_and_one_entry_each(random_base, prompts, monkeypatch):
    class Short(Off):
        name = "short"

        def last(self, step):
            return torch.full_like(step.committed, 4)

    class Own(Dual):
        name = "own"

    monkeypatch.setitem(RULES, "short", Short)
    monkeypatch.setitem(CACHES, "own", Own())
    full_step = make_strategy("full_step")
    out = decode(random_base, prompts, DecodeConfig(32, 8, eot="short", cache="own", refresh=2), full_step)
    assert (out.nfe <= 6).all()  # the first commit may be right of the end
    assert (out.sequences[:, 5:] == EOT).all()
    plain, own = (DecodeConfig(32, 8, eot="off", cache=cache) for cache in ("dual", "own"))
    assert torch.equal(*(decode(random_base, prompts, config, full_step).sequences for config in (plain, own)))


def test_nfe_counts_predictor_calls(scripted, prompts):
    def script(ids, attention, positions):
        torch.manual_seed(int(ids.sum()))
        return torch.randn(*ids.shape, 64) * 3

    predictor = scripted(script)
    out = decode(predictor, prompts[:1], CONFIG, make_strategy("threshold", threshold=0.3))
    assert out.nfe.tolist() == [predictor.model.calls] == [out.forward_calls]
    assert out.forward_calls < 32


def test_rows_that_finished_cost_nothing(scripted):
    # Row 0's text ends at once, row 1 never sees EoT.
    def script(ids, attention, positions):
        out = torch.zeros(*ids.shape, 64)
        out[..., 5] = 1.0
        out[ids[:, -33] == 7, :, EOT] = 9.0
        return out

    predictor = scripted(script)
    out = decode(predictor, [[7], [8]], DecodeConfig(32, 8, eot="commit"), make_strategy("full_step"))
    assert out.nfe.tolist() == [1, 32]
    assert (out.sequences[0] == EOT).all()
    assert (out.sequences[1] == 5).all()
    assert len(predictor.model.asked[-1]) == 1  # the head ran on the one masked position of the one row left


def test_a_finished_rows_place_goes_to_the_next_prompt(random_base, prompts):
    # Rows finish at different steps, so they are refilled at different steps; the last ones close their slots.
    strategy = make_strategy("threshold", threshold=0.3)
    many = prompts + [prompt[::-1] for prompt in prompts]
    together = decode(random_base, many, CONFIG, strategy)
    for size in (1, 2, 3):
        out = decode(random_base, many, CONFIG, strategy, batch_size=size)
        assert torch.equal(out.sequences, together.sequences)
        assert torch.equal(out.nfe, together.nfe)
        busy = out.nfe.sum() / out.forward_calls / size
        assert busy > (0.8 if size > 1 else 0.99)  # slots do not wait for the slowest row of a batch


@pytest.mark.parametrize("name", [*STRATEGIES, "oracle"])
@pytest.mark.parametrize(("cache", "eot"), [("none", "commit"), ("prefix", "published"), ("dual", "commit")])
def test_a_recorded_decode_in_a_batch_that_is_refilled_and_shrinks_is_the_plain_one(
    ending_base, prompts, name, cache, eot
):
    # Whatever a strategy remembers of a row has to go where the row goes, also while its steps are kept.
    many = prompts + [prompt[::-1] for prompt in prompts]
    config = DecodeConfig(32, 8, eot=eot, cache=cache)
    strategy = make_strategy("oracle") if name == "oracle" else STRATEGIES[name]
    wanted = torch.randint(0, 60, (len(many), 32), generator=torch.Generator().manual_seed(0))
    references = wanted if name == "oracle" else None
    plain = decode(ending_base, many, config, strategy, references, batch_size=len(many))
    out = decode(ending_base, many, config, strategy, references, record=True, record_eot=True, batch_size=3)
    assert torch.equal(out.sequences, plain.sequences)
    assert torch.equal(out.nfe, plain.nfe)
    assert torch.bincount(torch.cat([step.rows for step in out.trace])).tolist() == out.nfe.tolist()
    references = None if references is None else references[-1:]
    alone = decode(ending_base, many[-1:], config, strategy, references, record=True, record_eot=True).trace
    kept = [(step, int((step.rows == len(many) - 1).nonzero())) for step in out.trace if len(many) - 1 in step.rows]
    for (step, place), single in zip(kept, alone, strict=True):
        assert torch.equal(step.transfer[place], single.transfer[0])
        for field, values in single.evidence.present().items():
            found = getattr(step.evidence, field)[place]
            torch.testing.assert_close(found, values[0], atol=1e-4, rtol=1e-4)


def test_a_step_shows_its_rows_before_their_places_are_taken(random_base, prompts):
    strategy = make_strategy("threshold", threshold=0.3)
    output, last = empty_output(5, CONFIG), {}
    for step in decode_steps(random_base, prompts, CONFIG, strategy, output, batch_size=2):
        assert len(step.rows) == len(step.changed) == len(step.sequences) <= 2
        last |= dict(zip(step.rows.tolist(), step.sequences.clone(), strict=True))
    assert torch.equal(torch.stack([last[row] for row in range(5)]), output.sequences)


def test_columns_that_no_row_needs_are_dropped(scripted):
    # Row 0 has the long prompt and ends at once; row 1's text ends in its second block.
    seen = []

    def script(ids, attention, positions):
        seen.append(ids.shape[1])
        out = torch.zeros(*ids.shape, 64)
        out[..., 5] = 1.0
        out[(positions >= 15) & (positions < 100), EOT] = 9.0
        return out

    out = decode(scripted(script), [[1] * 15, [2]], DecodeConfig(32, 8), make_strategy("full_step"))
    # 15 + 32 columns; then 1 + 32 without the first row; then 1 + 16 once EoT is committed in the second block.
    assert seen == [47] + [33] * 8 + [17] * 6
    assert out.nfe.tolist() == [1, 15]


def test_one_read_from_the_device_a_step(random_base, prompts, monkeypatch):
    # What these would cost on a GPU: a wait for everything launched so far.
    waits = []
    for name in ("tolist", "item", "__bool__", "nonzero", "__int__", "__float__", "masked_select", "numpy"):
        original = getattr(torch.Tensor, name)

        def watched(*args, original=original, name=name, **kwargs):
            waits.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, watched)
    config = DecodeConfig(32, 8, eot="published", cache="dual")
    steps = decode_steps(random_base, prompts, config, filter_strategy("conv"), empty_output(5, config))
    next(steps)
    waits.clear()
    with Forbidden():
        for taken, _ in enumerate(steps, 1):
            assert waits == ["tolist"] * taken


class Forbidden(TorchDispatchMode):
    """Refuses operators whose result's shape depends on the data, which wait for the device too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) else ()
        assert not any(index is not None and index.dtype is torch.bool for index in indices), func
        assert func.overloadpacket not in (torch.ops.aten.nonzero, torch.ops.aten._local_scalar_dense), func
        return func(*args, **(kwargs or {}))


def test_mask_id_inside_a_prompt_is_no_masked_position(random_base):
    out = decode(random_base, [[MASK, 1, MASK]], CONFIG, make_strategy("full_step"))
    assert out.nfe.tolist() == [32]


def test_quota_spreads_the_remainder_over_the_first_steps(random_base, prompts):
    config = DecodeConfig(gen_length=32, block_length=8, steps=12, eot="off")  # 3 steps a block of 8: 3, 3, 2
    out = decode(random_base, prompts[:1], config, make_strategy("full_step"), record=True)
    assert [int(step.transfer.sum()) for step in out.trace] == [3, 3, 2] * 4
    assert out.nfe.tolist() == [12]


def test_blocks_are_decoded_left_to_right(random_base, prompts):
    out = decode(random_base, prompts, CONFIG, make_strategy("threshold", threshold=0.4), record=True)
    for row in range(len(prompts)):
        blocks = [int(s.block[s.rows == row]) for s in out.trace if (s.rows == row).any()]
        assert blocks == sorted(blocks)
        assert set(blocks) == {0, 1, 2, 3}


def test_evidence_is_fp32_and_matches_the_logits(scripted):
    logits = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 4
    predictor = scripted(lambda ids, attention, positions: logits.expand(*ids.shape, 64).bfloat16())
    out = decode(predictor, [[1, 2]], CONFIG, make_strategy("full_step"), record=True)
    seen = out.trace[0].evidence
    exact = logits.bfloat16().double()
    probability = exact.softmax(-1)
    assert seen.confidence.dtype is torch.float32
    assert seen.confidence[0, 0].item() == pytest.approx(probability[:MASK].max().item(), abs=1e-6)
    best = exact[:MASK].sort(descending=True).values
    assert seen.margin[0, 0].item() == pytest.approx((best[0] - best[1]).item(), abs=1e-5)
    assert seen.entropy[0, 0].item() == pytest.approx(-(probability * probability.log()).sum().item(), abs=1e-5)


@pytest.mark.parametrize(
    "strategy",
    [
        make_strategy("full_step"), make_strategy("threshold", threshold=2.0),
        make_strategy("klass", threshold=1.0), make_strategy("learn2pd", network=filter_strategy().network,
        config=filter_strategy().config, threshold=1.0), make_strategy("oracle"),
    ], ids=lambda strategy: strategy.name,
)  # fmt: skip
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_confidences_that_round_to_1_still_have_an_order(table, strategy, noise):
    # 1 - c is 6e-12 and less: as float32 all are 1, and whoever ranks those decodes from left to right.
    logits = [30.0, 34.0, 32.0, 40.0, 31.0, 36.0, 38.0, 33.0]
    predictor, config = table(list(range(8)), logits, prompt=2), DecodeConfig(8, 8, eot="off", temperature=noise)
    other = torch.full((1, 8), 50) if strategy.name == "oracle" else None  # the oracle stalls at every step
    out = decode(predictor, [[1, 2]], config, strategy, references=other, record=True)
    assert (out.trace[0].evidence.confidence == 1).all()
    committed = [int(step.transfer[0].nonzero()) for step in out.trace]
    assert committed == sorted(range(8), key=lambda place: -logits[place])


def test_positions_as_sure_as_each_other_are_committed_from_the_left(table):
    out = decode(table([5] * 8, [200.0] * 8, prompt=2), [[1, 2]], DecodeConfig(8, 8, eot="off"), make_strategy("full_step"),
                 record=True)  # fmt: skip
    assert [int(step.transfer[0].nonzero()) for step in out.trace] == list(range(8))


def test_history_counts_steady_guesses_within_a_block(table):
    predictor = table(list(range(32)), [float(n) for n in range(32, 0, -1)], prompt=2)
    out = decode(predictor, [[1, 2]], CONFIG, make_strategy("full_step"), record=True)
    for number, step in enumerate(out.trace):
        seen = step.evidence
        assert (seen.stable[seen.masked] == number % 8).all()
        assert ((seen.previous[seen.masked] > 0) == bool(number % 8)).all()
        assert (seen.stable[~seen.masked] == 0).all()


def plain_klass(predictor, prompt, config, threshold, divergence, history):
    """One row by KLASS as its authors' code goes: the last step's distributions of the whole sequence, in float64."""
    start, size = len(prompt), config.block_length
    ids = torch.tensor([prompt + [MASK] * config.gen_length])
    positions, last, steps = torch.arange(ids.shape[1])[None], None, 0
    for begin in range(start, ids.shape[1], size):
        block, small = torch.arange(begin, begin + size), []
        while (ids[0, block] == MASK).any():
            now = predictor.logits(predictor(ids, None, positions, positions[0])).double().log_softmax(-1)
            kl = torch.full((ids.shape[1],), torch.inf) if last is None else (now.exp() * (now - last)).sum(-1)
            last, steps = now, steps + 1
            small.append(kl[block] < divergence)
            log_c, token = now[block].index_fill(1, torch.tensor([MASK]), -torch.inf).max(-1)
            masked = ids[0, block] == MASK
            commit = masked & (log_c.exp() > threshold)
            commit &= torch.stack(small[-history:]).all(0) & (len(small) >= history)
            if not commit.any():
                commit[log_c.masked_fill(~masked, -torch.inf).argmax()] = True
            ids[0, block[commit]] = token[commit]
    return ids[0, start:], steps


@pytest.mark.parametrize(("cache", "refresh"), [("none", None), ("prefix", 1)])
@pytest.mark.parametrize("history", [1, 2, 3])
def test_klass_goes_through_blocks_as_its_authors_code(random_base, prompts, history, cache, refresh):
    config = DecodeConfig(32, 8, eot="off", cache=cache, refresh=refresh)
    strategy = make_strategy("klass", threshold=0.2, divergence=0.5, history=history)
    out = decode(random_base, prompts, config, strategy, batch_size=3)
    for row, prompt in enumerate(prompts):
        text, steps = plain_klass(random_base, prompt, config, 0.2, 0.5, history)
        assert torch.equal(out.sequences[row], text)
        assert out.nfe[row] == steps
    assert (out.nfe < 32).sum() >= 4


@pytest.mark.parametrize("eot", ["off", "published"])
@pytest.mark.parametrize(
    ("cache", "history", "forwards"), [("none", 1, 5), ("prefix", 1, 5), ("dual", 1, 8), ("prefix", 2, 9)]
)
def test_klass_compares_a_blocks_first_step_with_the_last_of_the_block_before(
    random_base, prompts, cache, history, forwards, eot
):
    # Everything is stable: a block takes as many forwards as the history is long, the first one more for want of a step
    # before it. A dual cache's forwards do not see the next block, so there every block is like the first.
    strategy = make_strategy("klass", threshold=0.0, divergence=1e9, history=history)
    out = decode(random_base, prompts, DecodeConfig(32, 8, eot=eot, cache=cache), strategy, batch_size=2)
    assert (out.nfe == forwards).all() if eot == "off" else (out.nfe <= forwards).all()


@pytest.mark.parametrize(("cache", "forwards"), [("none", 4), ("prefix", 4), ("dual", 6)])
def test_klass_has_nothing_to_compare_a_rows_first_step_with_wherever_it_begins(random_base, prompts, cache, forwards):
    # The first block is given, and everything is stable: the second takes a forward more for want of a step before it.
    regions = torch.full((len(prompts), 32), MASK)
    regions[:, :8] = 7
    strategy = make_strategy("klass", threshold=0.0, divergence=1e9, history=1)
    config = DecodeConfig(32, 8, eot="off", cache=cache)
    out = decode(random_base, prompts, config, strategy, regions=regions, batch_size=2)
    assert (out.nfe == forwards).all()


def plain_dream(predictor, prompt, config, top_p):
    """One row by Dream's "entropy", greedy: each position's distribution sorted and cut in float64, in plain Python."""
    start, size = len(prompt), config.block_length
    ids = prompt + [MASK] * config.gen_length
    for begin in range(start, len(ids), size):
        for step in range(config.steps_per_block):
            row, at = torch.tensor([ids]), torch.arange(len(ids))
            said = predictor.logits(predictor(row, None, at[None], at)).double()
            said[:, MASK] = -torch.inf
            entropy, token = {}, {}
            for place in (place for place in range(begin, begin + size) if ids[place] == MASK):
                share, kept = sorted(said[place].softmax(-1).tolist(), reverse=True), []
                while not kept or sum(kept) <= top_p:
                    kept.append(share[len(kept)])
                entropy[place] = -sum(p / sum(kept) * math.log(p / sum(kept)) for p in kept)
                token[place] = int(said[place].argmax())
            count = size // config.steps_per_block + (step < size % config.steps_per_block)
            for place in sorted(entropy, key=lambda place: (round(entropy[place], 9), place))[:count]:
                ids[place] = token[place]
    return ids[start:]


@pytest.mark.parametrize(("steps", "block_length", "top_p"), [(None, 32, 0.95), (12, 32, 0.5), (12, 8, 0.95)])
def test_dream_commits_by_the_entropy_of_the_nucleus(random_base, prompts, steps, block_length, top_p):
    config = DecodeConfig(32, block_length, steps=steps, eot="off")
    out = decode(random_base, prompts[:3], config, make_strategy("dream", top_p=top_p))
    for row, prompt in enumerate(prompts[:3]):
        assert out.sequences[row].tolist() == plain_dream(random_base, prompt, config, top_p)
    assert (out.nfe == (steps or 32)).all()
    by_confidence = decode(random_base, prompts[:3], config, make_strategy("full_step"))
    assert not torch.equal(out.sequences, by_confidence.sequences)


def test_tokens_are_drawn_at_the_temperature_from_the_nucleus_only(scripted):
    # At temperature .5 the first three of these tokens have 95 % of all: were the nucleus taken first, it would have four.
    share = torch.tensor([0.35, 0.3, 0.2, 0.1, 0.05])
    logits = torch.full((64,), -1e9)
    logits[:5] = share.log()
    predictor = scripted(lambda ids, attention, positions: logits.expand(*ids.shape, 64).clone())
    config = DecodeConfig(256, 256, steps=2, temperature=0.5, eot="off")
    drawn = decode(predictor, [[1]] * 8, config, make_strategy("dream", top_p=0.9), seeds=range(8)).sequences
    expected = share.double() ** 2
    expected[3:] = 0
    counts = torch.bincount(drawn.flatten(), minlength=5)[:5].double()
    assert counts.sum() == drawn.numel()
    assert counts[3:].sum() == 0
    deviation = (expected / expected.sum() * (1 - expected / expected.sum()) / drawn.numel()).sqrt()
    assert ((counts / drawn.numel() - expected / expected.sum()).abs() <= 4 * deviation).all()
    everything = decode(predictor, [[1]] * 8, config, make_strategy("dream", top_p=1.0), seeds=range(8)).sequences
    assert (everything >= 3).any()


def test_greedy_limit_of_temperature(random_base, prompts):
    cold = DecodeConfig(32, 8, temperature=1e-4, eot="off")
    greedy = decode(random_base, prompts, CONFIG, make_strategy("full_step"))
    assert torch.equal(decode(random_base, prompts, cold, make_strategy("full_step")).sequences, greedy.sequences)
    warm = DecodeConfig(32, 8, temperature=2.0, eot="off")
    assert not torch.equal(decode(random_base, prompts, warm, make_strategy("full_step")).sequences, greedy.sequences)


def test_looking_does_not_change_a_sampled_decode(random_base, prompts):
    config = DecodeConfig(32, 8, temperature=0.8, eot="commit")
    plain = decode(random_base, prompts, config, make_strategy("threshold", threshold=0.5))
    watched = decode(
        random_base, prompts, config, make_strategy("threshold", threshold=0.5), record=True, record_eot=True
    )
    assert torch.equal(plain.sequences, watched.sequences)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"gen_length": 32, "block_length": 5}, "block_length"),
        ({"gen_length": 32, "block_length": 8, "steps": 30}, "steps"),
        ({"gen_length": 32, "block_length": 8, "steps": 64}, "steps"),
        ({"gen_length": 0}, "gen_length"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"eot": "never"}, "eot"),
    ],
)
def test_settings_are_refused_by_name(settings, field):
    with pytest.raises(InputError, match=f"^{field}: found .*accepted"):
        DecodeConfig(**settings)


@pytest.mark.parametrize(("prompt", "found"), [([], "no tokens"), ([1] * 481, "481 tokens")])
def test_prompts_are_refused_by_name(random_base, prompt, found):
    with pytest.raises(InputError, match=f"prompt 1: found {found}"):
        decode(random_base, [[1], prompt], CONFIG, make_strategy("full_step"))


def test_strategies_are_refused_by_name():
    with pytest.raises(InputError, match="strategy: found 'thresholds'; accepted: .*threshold"):
        make_strategy("thresholds")
    with pytest.raises(InputError, match="threshold.tau: found an unknown setting; accepted: threshold"):
        make_strategy("threshold", tau=0.9)
    with pytest.raises(InputError, match="threshold.threshold: found -1"):
        make_strategy("threshold", threshold=-1)


def test_oracle_without_references_says_so(random_base, prompts):
    with pytest.raises(InputError, match="references: found none"):
        decode(random_base, prompts, CONFIG, make_strategy("oracle"))


def states(output, config, mask=MASK):
    """Each row's region before each of its forwards, from its trace: row to a list of ``(G,)``."""
    found = {row: [] for row in range(len(output.nfe))}
    regions = torch.full_like(output.sequences, mask)
    for step in output.trace:
        for number, row in enumerate(step.rows.tolist()):
            found[row].append(regions[row].clone())
            block = regions[row].view(-1, config.block_length)[step.block[number]]
            block[step.transfer[number]] = step.committed[number][step.transfer[number]]
    return found


@pytest.mark.parametrize("eot", ["off", "commit", "published"])
def test_a_decode_goes_on_from_any_of_its_states(random_base, prompts, eot):
    config = DecodeConfig(32, 8, eot=eot)
    strategy = make_strategy("threshold", threshold=0.2)
    whole = decode(random_base, prompts, config, strategy, record=True)
    begun = states(whole, config)
    assert len({len(steps) for steps in begun.values()}) > 1
    for share in (0.0, 0.4, 0.8, 1.0):  # row by row elsewhere, and more prompts than rows
        step = [round(share * (len(begun[row]) - 1)) for row in range(len(prompts))]
        regions = torch.stack([begun[row][at] for row, at in enumerate(step)])
        rest = decode(random_base, prompts, config, strategy, regions=regions, batch_size=2)
        assert torch.equal(rest.sequences, whole.sequences)
        assert torch.equal(rest.nfe, whole.nfe - torch.tensor(step))


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_begun_region_is_decoded_with_a_cache(random_base, prompts, cache):
    # With a refresh at every step a cache is exact, so the states of a decode without one are its own.
    plain, cached = DecodeConfig(32, 8, eot="off"), DecodeConfig(32, 8, eot="off", cache=cache, refresh=1)
    whole = decode(random_base, prompts, plain, make_strategy("full_step"), record=True)
    regions = torch.stack([steps[11] for steps in states(whole, plain).values()])
    rest = decode(random_base, prompts, cached, make_strategy("full_step"), regions=regions, batch_size=2)
    assert torch.equal(rest.sequences, whole.sequences)


def test_a_begun_region_keeps_what_it_holds_and_ends_at_its_eot(random_base, prompts):
    regions = torch.full((len(prompts), 32), MASK)
    regions[:, [0, 5, 9]] = torch.tensor([7, 8, 9])
    regions[1, 12], regions[1, 20] = EOT, 11  # what stands right of the end is not kept
    out = decode(random_base, prompts, DecodeConfig(32, 8, eot="commit"), make_strategy("full_step"), regions=regions)
    text = out.sequences[1]
    assert text[[0, 5, 9]].tolist() == [7, 8, 9]
    assert (text[12:] == EOT).all()
    assert out.nfe[1] <= 9
    off = decode(random_base, prompts, CONFIG, make_strategy("full_step"), regions=regions)
    assert off.sequences[1, [12, 20]].tolist() == [EOT, 11]
    assert off.nfe.tolist() == [29, 27, *[29] * (len(prompts) - 2)]


def test_regions_that_cannot_be_decoded_are_named(random_base, prompts):
    regions = torch.full((len(prompts), 32), MASK)
    full_step = make_strategy("full_step")
    with pytest.raises(InputError, match=r"regions: found \(5, 31\); accepted: shape \(5, 32\)"):
        decode(random_base, prompts, CONFIG, full_step, regions=regions[:, 1:])
    regions[3, 0] = EOT
    with pytest.raises(InputError, match=r"regions: row 3: found nothing to decode; accepted: MASK \(63\) before"):
        decode(random_base, prompts, DecodeConfig(32, 8, eot="commit"), full_step, regions=regions)
