"""A published causal language model as the helper: Qwen2.5 0.5B for Dream, here a random Qwen2 with fewer ids."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from decoding import Decoder, make_strategy
from models.errors import InputError
from models.predictor import MaskPredictor

SETTINGS = {"gen_length": 16, "block_length": 16, "temperature": 0.2}
PROMPTS = ["What is 3 + 4?", "Tom has 12 apples"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory, dream_checkpoint) -> Path:
    """Without MASK and the token before it, as Qwen2.5 has no ids for Dream's own tokens."""
    folder = tmp_path_factory.mktemp("stock")
    predictor = MaskPredictor.from_pretrained(dream_checkpoint)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=predictor.vocab_size - 2, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    predictor.tokenizer.save_pretrained(folder)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described.pop("auto_map")
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
def test_it_judges_dreams_drafts_with_nothing_trained(dream_checkpoint, stock, weight):
    decoder = Decoder.from_pretrained(
        dream_checkpoint, "apd", helper=stock, mixture_weight=weight, kv_window=4, max_lookahead=8
    )
    out = decoder.generate(PROMPTS, **SETTINGS)
    assert (out.sequences != decoder.predictor.ids.mask).all()
    assert (out.nfe == 2).all() if weight == 1 else (out.nfe > 2).any()
    assert out.counts["helper_forwards"].tolist() == ([0, 0] if weight == 1 else out.nfe.tolist())
    alone = [decoder.generate([prompt], seeds=[row], **SETTINGS).sequences[0] for row, prompt in enumerate(PROMPTS)]
    together = decoder.generate(PROMPTS, seeds=[0, 1], **SETTINGS).sequences
    assert torch.equal(together, torch.stack(alone))


def test_a_model_of_other_ids_is_refused_by_name(dream_checkpoint, stock, tiny_tokenizer, tmp_path):
    shutil.copytree(stock, tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    strategy = make_strategy("apd", helper=tmp_path / "other")
    with pytest.raises(InputError, match="token ids: found .*the predictor's; a model over the same ids"):
        Decoder(MaskPredictor.from_pretrained(dream_checkpoint), strategy).generate(PROMPTS, **SETTINGS)
    (tmp_path / "other/tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer.json: found no such file"):
        Decoder(MaskPredictor.from_pretrained(dream_checkpoint), strategy).generate(PROMPTS, **SETTINGS)


def test_a_folder_that_is_neither_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="helper folder: found .* without helper.json or config.json"):
        make_strategy("apd", helper=tmp_path)
    with pytest.raises(InputError, match=re.escape(f"helper folder: found '{tmp_path / 'nowhere'}'")):
        make_strategy("apd", helper=tmp_path / "nowhere")
