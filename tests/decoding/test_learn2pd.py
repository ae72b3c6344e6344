"""The whole way of a filter: records, fit, export, load, decode."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data.labels import records_of
from decoding.config import DecodeConfig
from decoding.decoder import Decoder
from decoding.loop import decode
from decoding.step import Step
from decoding.strategies import make_strategy
from models.errors import InputError
from models.features import Evidence
from models.filter import FilterConfig, build_filter, import_official, save_filter

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
        block_length=8, gen_length=32, threshold=0.5, vocab_size=64, mask_id=MASK, base_fingerprint="unsaved",
        base_family="llada",
    )  # fmt: skip
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


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_filter_sees_the_hidden_states_in_a_decode_that_rollouts_record(random_base, prompts, cache):
    config = FilterConfig(
        block_length=8, gen_length=32, threshold=0.5, vocab_size=64, mask_id=MASK, base_fingerprint="unsaved",
        base_family=random_base.family, hidden=8, hidden_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    net = build_filter(config).eval()
    for weights in net.parameters():
        weights.data *= 3  # of two minds
    strategy = make_strategy("learn2pd", network=net, config=config)
    settings = DecodeConfig(32, 8, eot="off", cache=cache)
    out = decode(random_base, prompts, settings, strategy, record=True, record_hidden=True, batch_size=2)
    alone = decode(random_base, prompts, settings, strategy, batch_size=2)
    assert torch.equal(alone.sequences, out.sequences)
    decided, took = 0, set()
    for step in out.trace:
        blind = replace(step.evidence, hidden=torch.zeros_like(step.evidence.hidden))
        with torch.no_grad():
            seen, unseen = (net.probability(evidence) for evidence in (step.evidence, blind))
        sure = step.evidence.masked & ((seen - 0.5).abs() > 0.01)  # not decided by what fp16 rounds
        best = step.evidence.confidence.where(step.evidence.masked, -1).argmax(1, keepdim=True)
        sure &= ~torch.zeros_like(sure).scatter_(1, best, True)  # committed whatever the filter says
        assert torch.equal((seen > 0.5)[sure], step.transfer[sure])
        decided += int(((seen > 0.5) != (unseen > 0.5))[sure].sum())
        took |= set(step.transfer[sure].tolist())
    assert took == {False, True}
    assert decided  # without them it would have chosen otherwise


def official_decode(predictor, net, prompt, gen_length, threshold):
    """One row as the authors' code goes, which cuts the sequence itself; also the forwards, and those after a cut in a block."""
    size, ids, steps, short = net.linear1.in_features, prompt + [MASK] * gen_length, 0, 0
    for begin in range(len(prompt), len(prompt) + gen_length, size):
        while MASK in ids[begin : begin + size]:
            tokens = torch.tensor([ids])
            positions = torch.arange(len(ids))
            probability = predictor.logits(predictor(tokens, None, positions[None], positions)).double().softmax(-1)
            probability[:, MASK] = 0
            c, token = probability.max(-1)
            block = c[begin : begin + size]
            with torch.no_grad():
                hidden = net.linear1(F.pad(block, (0, size - len(block))).float()).relu()
                accepted = net.linear2(hidden)[: len(block)].sigmoid() > threshold
            masked = tokens[0] == MASK
            here = masked & (positions >= begin) & (positions < begin + size)
            commit = torch.zeros_like(masked)
            commit[begin : begin + len(block)] = accepted
            commit = (commit & here).index_fill(0, c.where(here, -1).argmax(), True)
            tokens[0, commit] = token[commit]
            ended, said = commit & (token == EOT), masked & ~commit & (token == EOT)
            last = len(ids)
            if ended.any():
                last = int(ended.byte().argmax())
            elif said.any():
                last = int(c.where(said, -1).argmax())
            ids, steps, short = tokens[0, : last + 1].tolist(), steps + 1, short + (len(block) < size)
    return ids[len(prompt) :], steps, short


def test_an_imported_filter_decodes_as_its_authors_code_also_in_a_block_that_was_cut(ending_base, prompts, tmp_path):
    torch.manual_seed(1)
    tensors = {"linear1.weight": torch.randn(8, 8), "linear1.bias": torch.randn(8)}
    tensors |= {"linear2.weight": torch.randn(8, 8), "linear2.bias": torch.randn(8)}
    torch.save(tensors, tmp_path / "official.pth")
    net, config = import_official(
        tmp_path / "official.pth",
        vocab_size=64,
        mask_id=MASK,
        fingerprint="unsaved",
        gen_length=32,
        threshold=0.6,
        family=ending_base.family,
    )
    strategy, cut = make_strategy("learn2pd", network=net, config=config), 0
    prompts = [[(token * factor) % 60 for token in prompt] for prompt in prompts for factor in (1, 7, 11, 13)]
    out = decode(ending_base, prompts, DecodeConfig(32, 8, eot="published"), strategy)
    for row, prompt in enumerate(prompts):
        text, steps, short = official_decode(ending_base, net, prompt, 32, 0.6)
        assert out.sequences[row].tolist() == text + [EOT] * (32 - len(text))
        assert out.nfe[row] == steps
        cut += short
    assert cut > 5  # otherwise the comparison would be hollow


def test_a_budget_is_spent_on_the_surest_positions_of_each_row():
    config = FilterConfig(block_length=4, gen_length=4, vocab_size=64, mask_id=MASK, base_fingerprint="unsaved")
    probability = torch.tensor([[0.99, 0.95, 0.9, 0.2], [0.6, 0.97, 0.5, 0.5], [0.9, 0.99, 0.99, 0.99]])

    class Network(torch.nn.Module):
        needs_all_positions = False

        def forward(self, evidence):
            return probability.logit()

    strategy = make_strategy("learn2pd", network=Network(), config=config, budget=0.1)
    masked = torch.tensor([[True] * 4, [True] * 4, [True, False, True, True]])
    confidence = torch.tensor([[0.5, 0.4, 0.3, 0.2]] * 3)  # the first position is full_step's own choice
    evidence = Evidence(masked, torch.zeros(3, 4).long(), confidence)
    decision = strategy.decide(Step(evidence, confidence.log().where(masked, -torch.inf), 1))
    # .05 leaves room for no .1; .03 for no .5; two of .01 fit, and the decoded one costs nothing.
    assert decision.transfer.tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [True, False, True, True],
    ]
    assert decision.counts["filter_commits"].tolist() == [1, 1, 2]
    assert strategy.settings()["budget"] == 0.1
    with pytest.raises(InputError, match=r"learn2pd\.budget: found 0\.1 and threshold 0\.9"):
        make_strategy("learn2pd", network=Network(), config=config, budget=0.1, threshold=0.9)


def test_no_larger_set_would_fit_a_budget():
    torch.manual_seed(0)
    probability, masked = torch.rand(300, 8) ** 0.2, torch.rand(300, 8) < 0.7
    masked[:, 3] = True
    config = FilterConfig(block_length=8, gen_length=8, vocab_size=64, mask_id=MASK, base_fingerprint="unsaved")

    class Network(torch.nn.Module):
        needs_all_positions = False

        def forward(self, evidence):
            return probability.logit()

    confidence = torch.rand(300, 8)
    evidence = Evidence(masked, torch.zeros(300, 8).long(), confidence)
    step = Step(evidence, confidence.log().where(masked, -torch.inf), 1)
    best = confidence.masked_fill(~masked, -1).argmax(1)
    sizes = []
    for budget in (0.01, 0.1, 0.5, 3.0):
        chosen = make_strategy("learn2pd", network=Network(), config=config, budget=budget).decide(step).transfer
        assert not (chosen & ~masked).any()
        for row in range(300):
            assert chosen[row, best[row]]
            risks = {n: 1 - probability[row, n].item() for n in range(8) if masked[row, n] and n != best[row]}
            taken = [risk for n, risk in risks.items() if chosen[row, n]]
            left = [risk for n, risk in risks.items() if not chosen[row, n]]
            assert sum(taken) <= budget + 1e-5
            assert not left or sum(taken) + min(left) > budget - 1e-5
            assert not left or not taken or max(taken) <= min(left)
        sizes.append(int(chosen.sum()))
    assert sizes == sorted(set(sizes))


def test_a_filter_that_never_fires_is_reported(random_base, prompts):
    config = FilterConfig(
        block_length=8, gen_length=32, threshold=1.0, vocab_size=64, mask_id=MASK, base_fingerprint="unsaved"
    )
    strategy = make_strategy("learn2pd", network=build_filter(config).eval(), config=config)
    with pytest.warns(UserWarning, match="learn2pd: its component never fired"):
        Decoder(random_base, strategy).generate(prompts, gen_length=32, block_length=8)


def test_another_block_length_than_the_filter_was_made_for_is_reported(random_base, prompts):
    config = FilterConfig(
        block_length=16, gen_length=32, threshold=0.0, vocab_size=64, mask_id=MASK, base_fingerprint="unsaved"
    )
    strategy = make_strategy("learn2pd", network=build_filter(config).eval(), config=config)
    with pytest.warns(UserWarning, match="trained with block_length 16, used with 8"):
        decode(random_base, prompts, DecodeConfig(32, 8), strategy)
