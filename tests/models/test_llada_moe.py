"""LLaDA-MoE: its official format, and that grouping tokens by expert changes nothing."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from models import LLaDAMoEConfig, LLaDAMoEModelLM
from models.errors import InputError
from models.llada_moe import grouped
from models.predictor import MaskPredictor


def test_official_names_and_roundtrip(tmp_path, make_model):
    model = make_model("llada_moe", 300, 299, 298, scale=4)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    (index,) = tmp_path.glob("*.index.json")
    names = set(json.loads(index.read_text())["weight_map"])
    layer = [f"self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate.weight"]
    layer += [f"mlp.experts.{n}.{part}_proj.weight" for n in range(8) for part in ("gate", "up", "down")]
    expected = {f"model.layers.{n}.{part}" for n in range(2) for part in layer}
    assert names == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    ids = torch.randint(0, 298, (1, 5))
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_a_published_folder_is_told_from_llada_by_its_architecture(moe_checkpoint):
    assert json.loads((moe_checkpoint / "config.json").read_text())["model_type"] == "llada"
    predictor = MaskPredictor.from_pretrained(moe_checkpoint)
    assert isinstance(predictor.model, LLaDAMoEModelLM)
    assert predictor.family == "llada_moe"
    assert predictor.ids.mask == predictor.tokenizer.convert_tokens_to_ids("<|mask|>")


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_an_experts_tensor_that_does_not_fit_is_named(moe_checkpoint, tmp_path, change):
    folder = shutil.copytree(moe_checkpoint, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    if change == "missing":
        del tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
    else:
        tensors["model.layers.0.mlp.experts.8.up_proj.weight"] = tensors[
            "model.layers.0.mlp.experts.7.up_proj.weight"
        ].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{change} tensors model\.layers\.0\.mlp\.experts\.[38]\.up_proj\.weight"):
        MaskPredictor.from_pretrained(folder)


@pytest.mark.parametrize("runs", [[3, 0, 4, 1], [8, 0, 0, 0], [0, 0, 0, 8]])
def test_rows_by_runs_equal_rows_one_by_one(monkeypatch, runs):
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(8, 16, generator=generator), torch.randn(4, 24, 16, generator=generator)
    expert = torch.arange(4).repeat_interleave(torch.tensor(runs))
    ends = torch.tensor(runs).cumsum(0).int()
    expected = torch.einsum("nd,nod->no", x, weights[expert])
    torch.testing.assert_close(grouped(x, weights, ends), expected)
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    torch.testing.assert_close(grouped(x, weights, ends), expected)


def test_the_7b_description_parses():
    with torch.device("meta"):
        model = LLaDAMoEModelLM(LLaDAMoEConfig(num_key_value_heads=16, moe_layer_freq=[1] * 16))
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_356_880_896  # "7B-A1B"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("qk_layernorm", False),
        ("norm_topk_prob", True),
        ("shared_expert_intermediate_size", 64),
        ("moe_layer_freq", [0, 1]),
        ("moe_router_enable_expert_bias", True),
        ("num_experts_per_tok", 65),
    ],
)
def test_what_is_not_computed_is_refused(field, value):
    with pytest.raises(InputError, match=f"^{field}: found"):
        LLaDAMoEConfig(**{field: value})
