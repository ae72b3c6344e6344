"""The LLaDA implementation against an independent, loop-free-of-tricks computation, and its checkpoint format."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from models import LLaDAConfig, LLaDAModelLM


def config(**changes):
    fields = {
        "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 48, "vocab_size": 50,
        "mask_token_id": 49, "eos_token_id": 48, "pad_token_id": 48, "rope_theta": 100.0, "init_std": 0.2,
    }  # fmt: skip
    return LLaDAConfig(**{**fields, **changes})


def build(**changes):
    torch.manual_seed(0)
    return LLaDAModelLM(config(**changes)).eval()


def plain_forward(model, ids):
    """One unpadded row, head by head and position by position, in float64."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    c = model.config
    size, groups = c.d_model // c.n_heads, c.n_heads // (c.n_kv_heads or c.n_heads)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    def rope(x):
        out = x.clone()
        for position in range(len(x)):
            for pair in range(size // 2):
                angle = position / c.rope_theta ** (2 * pair / size)
                a, b = x[position, pair], x[position, pair + size // 2]
                out[position, pair] = a * math.cos(angle) - b * math.sin(angle)
                out[position, pair + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = weights["model.transformer.wte.weight"][ids]
    for layer in range(c.n_layers):
        w = {name: weights[f"model.transformer.blocks.{layer}.{name}.weight"] for name in
             ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")}  # fmt: skip
        n = norm(x, w["attn_norm"])
        q, k, v = n @ w["q_proj"].T, n @ w["k_proj"].T, n @ w["v_proj"].T
        heads = []
        for head in range(c.n_heads):
            kv = head // groups
            qh = rope(q[:, head * size : (head + 1) * size])
            kh, vh = rope(k[:, kv * size : (kv + 1) * size]), v[:, kv * size : (kv + 1) * size]
            heads.append((qh @ kh.T / math.sqrt(size)).softmax(-1) @ vh)
        x = x + torch.cat(heads, -1) @ w["attn_out"].T
        n = norm(x, w["ff_norm"])
        gate = n @ w["ff_proj"].T
        x = x + (gate * gate.sigmoid() * (n @ w["up_proj"].T)) @ w["ff_out"].T
    head = weights.get("model.transformer.ff_out.weight", weights["model.transformer.wte.weight"])
    return norm(x, weights["model.transformer.ln_f.weight"]) @ head.T


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": None}, {"weight_tying": True}, {"mlp_hidden_size": None}])
def test_logits_equal_a_plain_computation(changes):
    model = build(**changes)
    ids = torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
    torch.testing.assert_close(ours.double(), plain_forward(model, ids), atol=1e-5, rtol=1e-5)


def test_attention_is_bidirectional_and_unshifted():
    model = build()
    ids = torch.randint(0, 50, (1, 6))
    with torch.no_grad():
        first = model(ids).logits
        ids[0, 5] = (ids[0, 5] + 1) % 50
        assert not torch.allclose(first[0, 0], model(ids).logits[0, 0])


def test_left_padding_changes_nothing():
    model = build()
    ids = torch.randint(0, 50, (1, 6))
    padded = torch.cat((torch.full((1, 3), 48), ids), 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        torch.testing.assert_close(model(padded, mask).logits[:, 3:], model(ids).logits)


def test_logits_only_where_asked():
    model = build()
    ids, at = torch.randint(0, 50, (2, 6)), torch.tensor([1, 7, 11])
    with torch.no_grad():
        torch.testing.assert_close(model(ids, logits_at=at).logits, model(ids).logits.flatten(0, 1)[at])
        ran = []
        model.model.transformer["ff_out"].register_forward_hook(lambda module, args, out: ran.append(out.shape[0]))
        model(ids, logits_at=at)
    assert ran == [3]


def test_a_block_over_cached_keys_equals_the_whole_forward():
    model = build()
    ids = torch.randint(0, 50, (2, 8))
    positions = torch.arange(8).expand(2, 8)
    cache = model.allocate_cache(2, 8)
    with torch.no_grad():
        whole = model(ids, position_ids=positions, cache=cache, cache_index=positions).logits
        torch.testing.assert_close(whole, model(ids).logits)
        # Rows at different places: the recomputed columns are written in place, the others are read from the cache.
        columns = torch.tensor([[2, 3, 4], [5, 6, 7]])
        part = model(ids.gather(1, columns), position_ids=columns, cache=cache, cache_index=columns).logits
        torch.testing.assert_close(part, whole.gather(1, columns[..., None].expand(-1, -1, 50)))
        # At the same place in all, or in some, a range says as much.
        part = model(ids[:, 2:5], position_ids=positions[:, 2:5], cache=cache, cache_index=slice(2, 5)).logits
        torch.testing.assert_close(part, whole[:, 2:5])
        some = torch.tensor([1])
        part = model(
            ids[some, 2:5], position_ids=positions[some, 2:5], cache=cache, cache_index=slice(2, 5), cache_rows=some
        ).logits
        torch.testing.assert_close(part, whole[some, 2:5])


def test_some_rows_of_a_cache_window_are_written_and_no_others():
    model = build()
    ids = torch.randint(0, 50, (3, 8))
    positions = torch.arange(8).expand(3, 8)
    store = model.allocate_cache(4, 10)
    cache, rows = store.window(0, 3, 1, 9), torch.tensor([2, 0])
    with torch.no_grad():
        whole = model(ids[rows], position_ids=positions[rows], cache=cache, cache_rows=rows).logits
        torch.testing.assert_close(whole, model(ids[rows]).logits)
        columns = torch.tensor([[2, 3, 4], [5, 6, 7]])
        part = model(
            ids[rows].gather(1, columns), position_ids=columns, cache=cache, cache_index=columns, cache_rows=rows
        ).logits
    torch.testing.assert_close(part, whole.gather(1, columns[..., None].expand(-1, -1, 50)))
    written = store.keys.abs().sum((0, 2, 4)) > 0
    assert written[[0, 2], 1:9].all()
    assert written.sum() == 16
    store.move(2, 1)
    assert torch.equal(store.values[:, 1], store.values[:, 2])


def test_cache_arguments_go_together():
    model = build()
    cache = model.allocate_cache(1, 4)
    with pytest.raises(ValueError, match="position_ids"):
        model(torch.zeros(1, 4, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("changes", [{}, {"weight_tying": True}])
def test_official_names_and_roundtrip(tmp_path, changes):
    model = build(**changes, flash_attention=True)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    block = ["attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out"]
    expected = {f"model.transformer.blocks.{n}.{part}.weight" for n in range(2) for part in block}
    expected |= {"model.transformer.wte.weight", "model.transformer.ln_f.weight"}
    assert names == expected | (set() if changes else {"model.transformer.ff_out.weight"})
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, LLaDAModelLM)
    assert again.config.flash_attention is True  # fields we do not use are kept
    ids = torch.randint(0, 50, (1, 5))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_sharded_checkpoint(tmp_path):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    ids = torch.randint(0, 50, (1, 5))
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_the_8b_description_parses(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_ratio": 4,'
        '"mlp_hidden_size": 12288, "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms",'
        '"rms_norm_eps": 1e-05, "rope": true, "rope_theta": 500000.0, "rope_full_precision": true, "include_bias": false,'
        '"include_qkv_bias": false, "weight_tying": false, "scale_logits": false, "vocab_size": 126464,'
        '"embedding_size": 126464, "max_sequence_length": 4096, "use_cache": false, "init_device": "meta",'
        '"mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081}'
    )
    with torch.device("meta"):
        model = LLaDAModelLM(AutoConfig.from_pretrained(tmp_path))
    assert len(model.state_dict()) == 291
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_015_581_184


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_type", "sequential"),
        ("activation_type", "gelu"),
        ("rope", False),
        ("scale_logits", True),
        ("alibi", True),
    ],
)
def test_what_is_not_computed_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        config(**{field: value})
