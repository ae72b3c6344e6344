"""Properties every strategy keeps, whatever the evidence."""

import copy
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.strategies import STRATEGIES as REGISTRY
from decoding.strategies import Step, make_strategy
from decoding.strategies.base import top_k
from models.errors import InputError
from models.features import Evidence
from models.filter import FilterConfig, build_filter


def learned(name):
    torch.manual_seed(0)
    config = FilterConfig(
        architecture="conv",
        block_length=8,
        gen_length=32,
        threshold=0.5,
        base_fingerprint="x",
        vocab_size=64,
        mask_id=63,
    )
    return make_strategy(name, network=build_filter(config).eval(), config=config)


STRATEGIES = {
    "full_step": make_strategy("full_step"),
    "threshold 0": make_strategy("threshold", threshold=0.0),
    "threshold .9": make_strategy("threshold", threshold=0.9),
    "threshold 2": make_strategy("threshold", threshold=2.0),
    "factor": make_strategy("factor"),
    "factor 100": make_strategy("factor", factor=100.0),
    "entropy_bound": make_strategy("entropy_bound"),
    "entropy_bound 0": make_strategy("entropy_bound", gamma=0.0),
    "entropy_bound 100": make_strategy("entropy_bound", gamma=100.0),
    "dream": make_strategy("dream"),
    "klass": make_strategy("klass"),
    "klass at once": make_strategy("klass", threshold=0.0, divergence=10.0, history=1),
    "dico": make_strategy("dico"),
    "dico with a filter": learned("dico"),
    "oracle": make_strategy("oracle"),
    "learn2pd": learned("learn2pd"),
}


@st.composite
def steps(draw):
    rows, size = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    masked = torch.rand(rows, size, generator=generator) < draw(st.floats(0.05, 1.0))
    masked[~masked.any(1), -1] = True
    confidence = torch.rand(rows, size, generator=generator) ** draw(st.sampled_from([0.01, 1.0, 8.0]))
    confidence = draw(st.sampled_from([confidence, torch.ones_like(confidence), torch.zeros_like(confidence)])) * masked
    token = torch.randint(0, 3, (rows, size), generator=generator)
    evidence = Evidence(
        masked, token, confidence, margin=confidence * 5, entropy=(1 - confidence) * masked,
        stable=token * masked, previous=confidence / 2,
    )  # fmt: skip
    quota = torch.randint(1, size + 2, (rows,), generator=generator)
    divergence = torch.rand(rows, size, generator=generator) ** draw(st.sampled_from([0.1, 8.0]))
    return Step(
        evidence, confidence.log().clamp(min=-1e9).where(masked, -torch.inf), quota,
        torch.randint(0, 3, (rows, size), generator=generator),
        decoded=torch.rand(rows, generator=generator), divergence=divergence, draw_entropy=(1 - confidence) * masked,
    )  # fmt: skip


def start(strategy, step):
    """The step as the first of a block."""
    return replace(step, memory=strategy.memory(*step.evidence.masked.shape))


def test_every_registered_strategy_has_a_row_here():
    # apd commits no positions of a block; test_apd.py is about it.
    assert {strategy.name for strategy in STRATEGIES.values()} == set(REGISTRY) - {"apd"}


@given(step=steps())
@settings(max_examples=150, deadline=None)
def test_every_strategy_commits_in_every_row_and_only_masked_positions(step):
    for name, strategy in STRATEGIES.items():
        begun = start(strategy, step)
        decision = strategy.decide(begun)
        assert decision.transfer.dtype is torch.bool
        assert not (decision.transfer & ~step.evidence.masked).any(), name
        assert decision.transfer.any(1).all(), name
        for count in decision.counts.values():
            assert count.shape == step.quota.shape
        assert {(key, value.shape, value.dtype) for key, value in decision.memory.items()} == {
            (key, value.shape, value.dtype) for key, value in begun.memory.items()
        }, name
        assert not strategy.component or strategy.component in decision.counts


@given(step=steps())
@settings(max_examples=50, deadline=None)
def test_rows_do_not_see_each_other(step):
    def row(value, at):
        return value[at : at + 1]

    for name, strategy in STRATEGIES.items():
        if "filter" in name or name == "learn2pd":
            continue  # the kernels of a network round by batch size
        begun = start(strategy, step)
        decision = strategy.decide(begun)
        for at in range(len(step.quota)):
            evidence = step.evidence.each(lambda value, at=at: row(value, at))
            rest = {
                f.name: row(getattr(step, f.name), at)
                for f in fields(Step)
                if f.name not in ("evidence", "memory", "told")
            }
            single = Step(evidence, memory={key: row(value, at) for key, value in begun.memory.items()}, **rest)
            assert torch.equal(strategy.decide(single).transfer, row(decision.transfer, at)), name


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_decision_never_waits_for_the_device(name):
    # Tensors without data: whatever asks for a value, or makes a shape depend on one, raises.
    strategy = copy.deepcopy(STRATEGIES[name])
    if getattr(strategy, "network", None) is not None:
        strategy.network.to("meta")

    def empty(dtype=torch.float32, shape=(3, 8)):
        return torch.empty(shape, dtype=dtype, device="meta")

    evidence = Evidence(
        empty(torch.bool), empty(torch.long), empty(), margin=empty(), entropy=empty(), stable=empty(torch.long),
        previous=empty(),
    )  # fmt: skip
    memory = {key: value.to("meta") for key, value in strategy.memory(3, 8).items()}
    step = Step(evidence, empty(), empty(torch.long, 3), empty(torch.long), empty(shape=3), empty(), empty(), memory)
    assert strategy.decide(step).transfer.shape == (3, 8)


@given(step=steps(), low=st.floats(0, 1), high=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_a_lower_threshold_commits_no_less(step, low, high):
    low, high = min(low, high), max(low, high)
    lax = make_strategy("threshold", threshold=low).decide(step).transfer
    strict = make_strategy("threshold", threshold=high).decide(step).transfer
    assert not (strict & ~lax).any()


@given(step=steps(), low=st.floats(0.01, 20), high=st.floats(0.01, 20))
@settings(max_examples=50, deadline=None)
def test_a_larger_factor_or_bound_commits_no_less(step, low, high):
    low, high = min(low, high), max(low, high)
    for name, setting in (("factor", "factor"), ("entropy_bound", "gamma")):
        strict = make_strategy(name, **{setting: low}).decide(step).transfer
        lax = make_strategy(name, **{setting: high}).decide(step).transfer
        assert not (strict & ~lax).any(), name


@given(step=steps(), bound=st.floats(0.01, 20))
@settings(max_examples=100, deadline=None)
def test_factor_and_entropy_bound_commit_as_many_as_their_rules_say_and_the_best_ones(step, bound):
    seen = step.evidence
    wide = replace(step, evidence=replace(seen, confidence=seen.confidence.double(), entropy=seen.entropy.double()))
    by_factor = make_strategy("factor", factor=bound).decide(wide).transfer
    by_entropy = make_strategy("entropy_bound", gamma=bound).decide(wide).transfer
    for row in range(len(seen.masked)):
        masked = seen.masked[row]
        c = sorted(wide.evidence.confidence[row, masked].tolist(), reverse=True)
        n = max((n for n in range(1, len(c) + 1) if (n + 1) * (1 - c[n - 1]) < bound), default=1)
        assert sorted(wide.evidence.confidence[row, by_factor[row]].tolist(), reverse=True) == c[:n]
        entropy = sorted(wide.evidence.entropy[row, masked].tolist())
        n = max(n for n in range(1, len(entropy) + 1) if sum(entropy[: n - 1]) <= bound)
        assert sorted(wide.evidence.entropy[row, by_entropy[row]].tolist()) == entropy[:n]


def one_row(masked, quota=1, divergence=None, memory=None, **columns):
    zero = torch.zeros(1, len(masked))
    given = {name: torch.tensor([values]) for name, values in columns.items()}
    known = {"confidence": zero, "margin": zero, "entropy": zero, "previous": zero} | given
    evidence = Evidence(torch.tensor([masked]), zero.long(), stable=zero.long(), **known)
    divergence = None if divergence is None else torch.tensor([divergence])
    log_confidence = known["confidence"].log().clamp(min=-1e9).where(evidence.masked, -torch.inf)
    return Step(evidence, log_confidence, torch.tensor([quota]), divergence=divergence, memory=memory or {})


def test_factor_rejects_the_last_remaining_position_that_fails():
    # Public code accepts all three: (3 + 1)(1 - .5) = 2.
    step = one_row([True] * 3, confidence=[0.9, 0.5, 0.9])
    assert make_strategy("factor").decide(step).transfer.tolist() == [[True, False, True]]


def test_entropy_just_below_zero_does_not_widen_the_bound():
    # The two certain positions would pay for the last two: -.2 + .11 + .15 < .1.
    step = one_row([True] * 5, entropy=[-0.1, -0.1, 0.11, 0.15, 0.15])
    assert make_strategy("entropy_bound").decide(step).transfer.tolist() == [[True, True, True, False, False]]


def test_klass_commits_what_has_been_stable_long_enough_and_the_quota_until_then():
    strategy, rows = make_strategy("klass"), []
    masked, confidence = [True] * 5, [0.7, 0.95, 0.9, 0.5, 0.9]
    memory = strategy.memory(1, 5)
    still, moving = 0.01, 0.02
    for divergence in (
        [float("inf")] * 5,
        [still, still, still, still, still],
        [moving, still, moving, still, still],
        [still, still, still, still, moving],
    ):
        decision = strategy.decide(
            one_row(masked, quota=2, confidence=confidence, divergence=divergence, memory=memory)
        )
        memory = decision.memory
        rows.append(decision.transfer[0].tolist())
    assert rows[0] == rows[1] == [False, True, True, False, False]  # nothing stable twice: the quota's two best
    assert rows[2] == [False, True, False, False, True]  # the fourth is as stable but not confident
    assert rows[3] == [False, True, False, False, False]  # one break and the counting starts again


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("factor", "factor", 0.0), ("factor", "factor", float("nan")), ("entropy_bound", "gamma", -0.1),
        ("klass", "threshold", -0.1), ("klass", "divergence", 0.0), ("klass", "history", 0), ("klass", "history", 1.5),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(name, setting, value):
    with pytest.raises(InputError, match=f"{name}.{setting}"):
        make_strategy(name, **{setting: value})


@pytest.mark.parametrize("name", ["factor", "entropy_bound", "dream", "klass", "dico"])
def test_settings_rebuild_the_strategy(name):
    found = make_strategy(name).settings()
    assert found.pop("strategy") == name
    assert make_strategy(name, **found) == make_strategy(name)


@given(step=steps())
@settings(max_examples=50, deadline=None)
def test_oracle_commits_only_reference_tokens(step):
    decision = make_strategy("oracle").decide(step)
    assert torch.equal(decision.token[decision.transfer], step.reference[decision.transfer])
    right = (step.evidence.token == step.reference) & step.evidence.masked
    assert torch.equal(decision.counts["stalls"], (~right.any(1)).long())


def test_top_k_takes_the_leftmost_of_equals_and_never_more_than_there_are():
    score, masked = torch.tensor([[0.5, 0.5, 0.5, -torch.inf]]), torch.tensor([[True, True, True, False]])
    for one, two, nine in ((torch.tensor([1]), torch.tensor([2]), torch.tensor([9])), (1, 2, 9)):
        assert top_k(score, masked, one).tolist() == [[True, False, False, False]]
        assert top_k(score, masked, two).tolist() == [[True, True, False, False]]
        assert top_k(score, masked, nine).tolist() == [[True, True, True, False]]
