"""Dream: its official format, and logits against two implementations that are not ours."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, Qwen2Config, Qwen2ForCausalLM

from models import DreamConfig, DreamModel
from models.errors import InputError
from models.predictor import MaskPredictor


@pytest.fixture
def model(make_model):
    return make_model("Dream", 300, 299, 298, scale=4)


def test_logits_are_qwen2s_with_a_full_mask_and_shifted(model):
    c = model.config
    theirs = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict(model.state_dict())
    ids = torch.randint(0, 298, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = theirs(input_ids=ids, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool), use_cache=False).logits
        shifted = torch.cat((outputs[:, :1], outputs[:, :-1]), 1)
        torch.testing.assert_close(model(ids).logits, shifted, atol=1e-4, rtol=1e-4)


def test_official_names_and_roundtrip(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    (index,) = tmp_path.glob("*.index.json")
    names = set(json.loads(index.read_text())["weight_map"])
    layer = [f"self_attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")]
    layer += ["self_attn.o_proj.weight", *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down"))]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    expected = {f"model.layers.{n}.{part}" for n in range(2) for part in layer}
    assert names == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    ids = torch.randint(0, 298, (1, 5))
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_a_tied_head_has_no_tensor(tmp_path, make_model, plain_forward):
    model = make_model("Dream", 64, 63, 62, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    ids = torch.randint(0, 62, (7,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = AutoModel.from_pretrained(tmp_path)(ids[None]).logits[0]
    torch.testing.assert_close(ours.double(), plain_forward(model, ids)[0], atol=1e-5, rtol=1e-5)


def test_the_7b_description_parses(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"architectures": ["DreamModel"], "attention_dropout": 0.0, "auto_map": {"AutoConfig":'
        '"configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}, "bos_token_id": 151643,'
        '"eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,'
        '"intermediate_size": 18944, "mask_token_id": 151666, "max_position_embeddings": 131072, "max_window_layers": 28,'
        '"model_type": "Dream", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,'
        '"pad_token_id": 151643, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0,'
        '"sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,'
        '"use_sliding_window": false, "vocab_size": 152064}'
    )
    with torch.device("meta"):
        model = DreamModel(DreamConfig.from_pretrained(tmp_path))
    assert len(model.state_dict()) == 28 * 12 + 3
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_615_616_512  # Qwen2.5-7B's


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("use_sliding_window", True),
        ("num_key_value_heads", 3),
    ],
)
def test_what_is_not_computed_is_refused(dream_checkpoint, tmp_path, field, value):
    config = json.loads((dream_checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(InputError, match=f"config.json: {field}"):
        MaskPredictor.from_pretrained(tmp_path)


def test_the_published_tokenizer_is_read_without_its_code(dream_checkpoint):
    predictor = MaskPredictor.from_pretrained(dream_checkpoint)
    words = predictor.tokenizer
    assert (predictor.ids.mask, predictor.ids.eot) == (words.mask_token_id, words.eos_token_id)
    assert predictor.ids.end_of_turn == words.convert_tokens_to_ids("<|im_end|>")
    text = "Tom has 12 apples"
    assert words.decode(words(text).input_ids) == text
    assert words("a<|im_end|>b").input_ids.count(predictor.ids.end_of_turn) == 1
