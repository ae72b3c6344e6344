"""Cached decodes against a plain one that recomputes everything and swaps frozen keys and values in."""

import copy
import itertools

import pytest
import torch
from torch._dynamo.utils import counters

from decoding.config import DecodeConfig
from decoding.loop import decode
from decoding.output import empty_output
from decoding.run import Request
from decoding.strategies import make_strategy
from models.errors import InputError
from models.predictor import MaskPredictor

MASK, EOT = 63, 62


def plain_decode(plain_forward, model, prompt, config, threshold):
    """Decodes one prompt block by block with the threshold rule; returns the text and the confidences of every step."""
    start, size = len(prompt), config.block_length
    ids = torch.tensor(prompt + [MASK] * config.gen_length)
    masked = torch.arange(len(ids)) >= start
    seen, frozen, seen_confidence = torch.ones_like(masked), None, []
    for block in range(config.blocks):
        inside = torch.zeros_like(masked)
        inside[start + block * size : start + (block + 1) * size] = True
        step = 0
        while (masked & inside).any():
            whole = config.cache == "none" or step == 0 or (config.refresh and step % config.refresh == 0)
            fresh = torch.ones_like(masked) if whole else inside.clone()
            if config.cache == "prefix" and not whole:
                fresh[start + block * size :] = True
            if model.left_context:  # the output that predicts the block's first position
                fresh[start + block * size - 1] = True
            logits, kept = plain_forward(model, ids, seen, None if whole else frozen, fresh)
            frozen = kept if whole else frozen
            probability = logits.softmax(-1)
            probability[:, MASK] = 0
            confidence, token = probability.max(-1)
            here = masked & inside
            seen_confidence.append(torch.where(here, confidence, 0)[inside])
            commit = here & (confidence >= threshold)
            commit[confidence.masked_fill(~here, -1).argmax()] = True
            ids[commit], masked = token[commit], masked & ~commit
            ended = (commit & (ids == EOT)).nonzero()
            cut = None
            if config.eot != "off" and len(ended):
                cut = int(ended[0])
            elif config.eot == "published":
                said = masked & fresh & (token == EOT)
                if said.any():
                    cut = int(probability[:, EOT].masked_fill(~said, -1).argmax())
            if cut is not None:
                ids[cut + 1 :] = EOT
                masked[cut + 1 :] = False
                seen[cut + 1 :] = False
            step += 1
    return ids[start:], seen_confidence


@pytest.mark.parametrize("eot", ["off", "commit", "published"])
@pytest.mark.parametrize(
    ("cache", "refresh"), [("none", None), ("prefix", None), ("dual", None), ("prefix", 3), ("dual", 2)]
)
@pytest.mark.parametrize("ends", [False, True])
def test_every_row_equals_the_plain_decode(plain_forward, random_base, ending_base, prompts, cache, refresh, eot, ends):
    config = DecodeConfig(32, 8, eot=eot, cache=cache, refresh=refresh)
    random_base = ending_base if ends else random_base
    left = 0  # steps after a row's end was accepted, with positions left of it still masked
    for threshold in (0.5, 2.0):
        strategy = make_strategy("threshold", threshold=threshold)
        out = decode(random_base, prompts, config, strategy, record=True, batch_size=3)
        for row, prompt in enumerate(prompts):
            text, confidences = plain_decode(plain_forward, random_base.model, prompt, config, threshold)
            assert torch.equal(out.sequences[row], text)
            steps = [s.evidence.confidence * s.evidence.masked for s in out.trace if (s.rows == row).any()]
            which = [(s.rows == row).nonzero().item() for s in out.trace if (s.rows == row).any()]
            assert len(steps) == out.nfe[row] == len(confidences)  # a block of n decisions costs n forwards
            ours = torch.stack([step[n] for step, n in zip(steps, which, strict=True)])
            torch.testing.assert_close(ours.double(), torch.stack(confidences), atol=1e-5, rtol=1e-4)
            ended = (text == EOT).long().argmax().item() if (text == EOT).any() else 32
            committed = [s.transfer[n] & (s.committed[n] == EOT) for s, n in zip(
                [s for s in out.trace if (s.rows == row).any()], which, strict=True)]  # fmt: skip
            first = next((n for n, flags in enumerate(committed) if flags.any()), len(committed))
            left += max(0, len(committed) - 1 - first) if ended < 32 else 0
    assert not ends or eot == "off" or left  # otherwise the comparison would be hollow


@pytest.mark.parametrize("family", ["llada_moe"], indirect=True)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_model_of_experts_decodes_as_plainly(plain_forward, random_base, prompts, cache):
    config = DecodeConfig(16, 8, eot="off", cache=cache)
    out = decode(random_base, prompts[:3], config, make_strategy("threshold", threshold=0.5))
    for row, prompt in enumerate(prompts[:3]):
        text, confidences = plain_decode(plain_forward, random_base.model, prompt, config, 0.5)
        assert torch.equal(out.sequences[row], text)
        assert out.nfe[row] == len(confidences)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_refreshing_every_step_is_no_cache(random_base, prompts, cache):
    strategy = make_strategy("threshold", threshold=0.5)
    exact = decode(random_base, prompts, DecodeConfig(32, 8), strategy)
    fresh = decode(random_base, prompts, DecodeConfig(32, 8, cache=cache, refresh=1), strategy)
    assert torch.equal(exact.sequences, fresh.sequences)
    assert torch.equal(exact.nfe, fresh.nfe)


@pytest.mark.parametrize(
    ("cache", "columns"), [("prefix", [43, 32, 32, 43, 24, 24, 43, 16, 16, 43, 8, 8]), ("dual", [43, 8, 8] * 4)]
)
def test_a_cached_forward_runs_on_no_more_than_it_must(random_base, prompts, cache, columns, monkeypatch):
    widths = []
    forward = type(random_base.model).forward

    def watched(self, input_ids, *args, **kwargs):
        widths.append(input_ids.shape[1])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(random_base.model), "forward", watched)
    config = DecodeConfig(32, 8, steps=12, cache=cache, eot="off")
    decode(random_base, [prompts[1]], config, make_strategy("full_step"))
    context = random_base.left_context
    assert widths == [width if width == 43 else width + context for width in columns]


def test_cache_storage_is_allocated_once_a_call(random_base, prompts, monkeypatch):
    made = []
    allocate = random_base.allocate_cache
    monkeypatch.setattr(random_base, "allocate_cache", lambda *shape: made.append(shape) or allocate(*shape))
    decode(random_base, prompts, DecodeConfig(32, 8, cache="dual"), make_strategy("full_step"), batch_size=2)
    assert made == [(2, 11 + 32)]
    made.clear()
    decode(random_base, prompts, DecodeConfig(32, 8), make_strategy("full_step"))
    assert made == []


def test_keys_are_given_back_once_the_long_prompts_are_done(random_base, prompts):
    # Sized by the longest prompt of the call, they would take three times the memory until the last row ends.
    prompts = [[5] * 64, [6] * 9, [7] * 5]
    config, strategy = DecodeConfig(32, 8, cache="dual"), make_strategy("full_step")
    output, sizes = empty_output(3, config), []
    with torch.inference_mode():
        run = strategy.start(Request(random_base, prompts, config, strategy, output, batch_size=2))
        assert run.cache is not None
        while run.scheduler.slots:
            sizes.append(run.cache.keys.shape[1] * run.cache.keys.shape[3])
            run.step()
            run.retire()
        run.close()
    assert (sizes[0], sizes[-1]) == (2 * (64 + 32), 5 + 32)
    alone = decode(random_base, prompts[2:], config, strategy)
    assert torch.equal(output.sequences[2], alone.sequences[0])


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", ["threshold", "dico"])
def test_no_mask_is_made_where_no_row_is_padded(random_base, cache, name, monkeypatch):
    # With a mask, however empty, attention does without its fastest kernel.
    masks, forward = [], random_base.forward

    def watched(input_ids, attention_mask, *arguments, **options):
        masks.append(attention_mask)
        return forward(input_ids, attention_mask, *arguments, **options)

    monkeypatch.setattr(random_base, "forward", watched)
    config = DecodeConfig(32, 8, cache=cache, eot="off")
    decode(random_base, [[1, 2, 3], [4, 5, 6], [7, 8, 9]], config, make_strategy(name), batch_size=2)
    assert masks
    assert all(mask is None for mask in masks)
    masks.clear()
    decode(random_base, [[1, 2, 3], [4, 5]], config, make_strategy(name))
    assert any(mask is not None for mask in masks)


def test_a_model_that_keeps_no_keys_is_refused_by_name(table):
    with pytest.raises(InputError, match="cache: found a ScriptedModel, which keeps no keys; accepted: none"):
        decode(table([1] * 32, [1.0] * 32, 1), [[1]], DecodeConfig(32, 8, cache="dual"), make_strategy("full_step"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "both"}, r"^cache: found 'both'; accepted: none \| prefix \| dual"),
        ({"refresh": 4}, r"^refresh: found 4 with cache none; accepted: null, or cache prefix \| dual"),
        ({"cache": "dual", "refresh": 0}, "^refresh: found 0; accepted: a whole number of at least 1, or null"),
    ],
)
def test_settings_are_refused_by_name(settings, message):
    with pytest.raises(InputError, match=message):
        DecodeConfig(**settings)


@pytest.mark.parametrize("family", ["llada"], indirect=True)  # what is compiled is the same for all
def test_a_compiled_model_serves_any_batch_length_and_cache_with_few_graphs(random_base, prompts, monkeypatch):
    # With one graph for each shape, compiling takes longer than decoding, and past a limit PyTorch gives up in silence.
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    compiled = MaskPredictor(copy.deepcopy(random_base.model), random_base.ids, 64, 512)
    torch._dynamo.reset()
    counters.clear()
    compiled.compile(backend="eager")  # traced as by any backend, run by the usual kernels
    strategy = make_strategy("threshold", threshold=0.5)
    for cache, eot in itertools.product(("none", "prefix", "dual"), ("off", "commit")):
        for length, size, rows in ((32, 8, 3), (64, 16, 1), (32, 32, 5)):
            config = DecodeConfig(length, size, cache=cache, eot=eot)
            eager, ours = (decode(p, prompts, config, strategy, batch_size=rows) for p in (random_base, compiled))
            assert torch.equal(eager.sequences, ours.sequences)
            assert torch.equal(eager.nfe, ours.nfe)
    assert 0 < counters["stats"]["unique_graphs"] <= 8
    assert not counters["graph_break"]
