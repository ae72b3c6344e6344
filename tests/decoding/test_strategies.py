"""Properties every strategy keeps, whatever the evidence."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.strategies import Step, make_strategy
from decoding.strategies.base import top_k
from models.features import Evidence
from models.filter import FilterConfig, build_filter


def learned():
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
    return make_strategy("learn2pd", network=build_filter(config).eval(), config=config)


STRATEGIES = {
    "full_step": make_strategy("full_step"),
    "threshold 0": make_strategy("threshold", threshold=0.0),
    "threshold .9": make_strategy("threshold", threshold=0.9),
    "threshold 2": make_strategy("threshold", threshold=2.0),
    "oracle": make_strategy("oracle"),
    "learn2pd": learned(),
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
    return Step(evidence, quota, torch.randint(0, 3, (rows, size), generator=generator))


@given(step=steps())
@settings(max_examples=150, deadline=None)
def test_every_strategy_commits_in_every_row_and_only_masked_positions(step):
    for name, strategy in STRATEGIES.items():
        decision = strategy.decide(step)
        assert decision.transfer.dtype is torch.bool
        assert not (decision.transfer & ~step.evidence.masked).any(), name
        assert decision.transfer.any(1).all(), name
        for count in decision.counts.values():
            assert count.shape == step.quota.shape


@given(step=steps(), low=st.floats(0, 1), high=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_a_lower_threshold_commits_no_less(step, low, high):
    low, high = min(low, high), max(low, high)
    lax = make_strategy("threshold", threshold=low).decide(step).transfer
    strict = make_strategy("threshold", threshold=high).decide(step).transfer
    assert not (strict & ~lax).any()


@given(step=steps())
@settings(max_examples=50, deadline=None)
def test_oracle_commits_only_reference_tokens(step):
    decision = make_strategy("oracle").decide(step)
    assert torch.equal(decision.token[decision.transfer], step.reference[decision.transfer])
    right = (step.evidence.token == step.reference) & step.evidence.masked
    assert torch.equal(decision.counts["stalls"], (~right.any(1)).long())


def test_top_k_takes_the_leftmost_of_equals_and_never_more_than_there_are():
    score, masked = torch.tensor([[0.5, 0.5, 0.5, 0.9]]), torch.tensor([[True, True, True, False]])
    assert top_k(score, masked, torch.tensor([2])).tolist() == [[True, True, False, False]]
    assert top_k(score, masked, torch.tensor([9])).tolist() == [[True, True, True, False]]
