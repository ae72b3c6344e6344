"""Cached decodes against a plain one that recomputes everything and swaps frozen keys and values in."""

import copy
import itertools

import pytest
import torch
from torch._dynamo.utils import counters

from decoding.config import DecodeConfig
from decoding.loop import decode
from decoding.strategies import make_strategy
from models.errors import InputError
from models.predictor import MaskPredictor

MASK, EOT = 63, 62


def plain_forward(model, ids, seen, frozen, fresh):
    """One row in float64; keys and values of positions that are not ``fresh`` are taken from ``frozen``.

    Returns the logits of all positions (those that are not fresh mean nothing) and each layer's keys and values.
    """
    w = {name.removeprefix("model.transformer."): value.double() for name, value in model.state_dict().items()}
    c = model.config
    width, repeat = c.d_model // c.n_heads, c.n_heads // c.n_kv_heads
    exponent = torch.arange(0, width, 2).double() / width
    angle = torch.arange(len(ids)).double()[:, None] / c.rope_theta**exponent

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    def heads(x):
        return x.view(len(ids), -1, width)

    def rope(x):
        a, b = x[..., : width // 2], x[..., width // 2 :]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    x, kept = w["wte.weight"][ids], []
    for layer in range(c.n_layers):
        name = f"blocks.{layer}."
        n = norm(x, w[name + "attn_norm.weight"])
        q = rope(heads(n @ w[name + "q_proj.weight"].T))
        k = rope(heads(n @ w[name + "k_proj.weight"].T))
        v = heads(n @ w[name + "v_proj.weight"].T)
        if frozen is not None:
            k = torch.where(fresh[:, None, None], k, frozen[layer][0])
            v = torch.where(fresh[:, None, None], v, frozen[layer][1])
        kept.append((k, v))
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        score = torch.einsum("qhd,khd->hqk", q, k) / width**0.5
        mixed = score.masked_fill(~seen, -torch.inf).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", mixed, v).flatten(1) @ w[name + "attn_out.weight"].T
        n = norm(x, w[name + "ff_norm.weight"])
        gate = n @ w[name + "ff_proj.weight"].T
        x = x + (gate * gate.sigmoid() * (n @ w[name + "up_proj.weight"].T)) @ w[name + "ff_out.weight"].T
    return norm(x, w["ln_f.weight"]) @ w["ff_out.weight"].T, kept


def plain_decode(model, prompt, config, threshold):
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
def test_every_row_equals_the_plain_decode(random_llada, ending_llada, prompts, cache, refresh, eot, ends):
    config = DecodeConfig(32, 8, eot=eot, cache=cache, refresh=refresh)
    random_llada = ending_llada if ends else random_llada
    left = 0  # steps after a row's end was accepted, with positions left of it still masked
    for threshold in (0.5, 2.0):
        strategy = make_strategy("threshold", threshold=threshold)
        out = decode(random_llada, prompts, config, strategy, record=True, batch_size=3)
        for row, prompt in enumerate(prompts):
            text, confidences = plain_decode(random_llada.model, prompt, config, threshold)
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


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_refreshing_every_step_is_no_cache(random_llada, prompts, cache):
    strategy = make_strategy("threshold", threshold=0.5)
    exact = decode(random_llada, prompts, DecodeConfig(32, 8), strategy)
    fresh = decode(random_llada, prompts, DecodeConfig(32, 8, cache=cache, refresh=1), strategy)
    assert torch.equal(exact.sequences, fresh.sequences)
    assert torch.equal(exact.nfe, fresh.nfe)


@pytest.mark.parametrize(
    ("cache", "columns"), [("prefix", [43, 32, 32, 43, 24, 24, 43, 16, 16, 43, 8, 8]), ("dual", [43, 8, 8] * 4)]
)
def test_a_cached_forward_runs_on_no_more_than_it_must(random_llada, prompts, cache, columns, monkeypatch):
    widths = []
    forward = type(random_llada.model).forward

    def watched(self, input_ids, *args, **kwargs):
        widths.append(input_ids.shape[1])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(random_llada.model), "forward", watched)
    config = DecodeConfig(32, 8, steps=12, cache=cache, eot="off")
    decode(random_llada, [prompts[1]], config, make_strategy("full_step"))
    assert widths == columns


def test_cache_storage_is_allocated_once_a_call(random_llada, prompts, monkeypatch):
    made = []
    allocate = random_llada.allocate_cache
    monkeypatch.setattr(random_llada, "allocate_cache", lambda *shape: made.append(shape) or allocate(*shape))
    decode(random_llada, prompts, DecodeConfig(32, 8, cache="dual"), make_strategy("full_step"), batch_size=2)
    assert made == [(2, 11 + 32)]
    made.clear()
    decode(random_llada, prompts, DecodeConfig(32, 8), make_strategy("full_step"))
    assert made == []


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


def test_a_compiled_model_serves_any_batch_length_and_cache_with_few_graphs(random_llada, prompts, monkeypatch):
    # With one graph for each shape, compiling takes longer than decoding, and past a limit PyTorch gives up in silence.
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    compiled = MaskPredictor(copy.deepcopy(random_llada.model), random_llada.ids, 64, 512)
    torch._dynamo.reset()
    counters.clear()
    compiled.compile(backend="eager")  # traced as by any backend, run by the usual kernels
    strategy = make_strategy("threshold", threshold=0.5)
    for cache, eot in itertools.product(("none", "prefix", "dual"), ("off", "commit")):
        for length, size, rows in ((32, 8, 3), (64, 16, 1), (32, 32, 5)):
            config = DecodeConfig(length, size, cache=cache, eot=eot)
            eager, ours = (decode(p, prompts, config, strategy, batch_size=rows) for p in (random_llada, compiled))
            assert torch.equal(eager.sequences, ours.sequences)
            assert torch.equal(eager.nfe, ours.nfe)
    assert 0 < counters["stats"]["unique_graphs"] <= 8
    assert not counters["graph_break"]
