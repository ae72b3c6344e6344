"""Makes a tiny Dream of the bundled LLaDA, with nothing trained: ``python data/make_dream.py``.

A Dream's output at ``i - 1`` predicts position ``i``. One more layer makes a Dream of a LLaDA: it takes to every position what
the next one holds. Its queries and keys are biases, the same everywhere, so the rotary embedding alone decides what a position
attends to, and the biases are turned to favour the distance of one. The Dream predicts what the LLaDA predicts.

The bundled helper is put beside it as any published causal language model would be, without a description of ours.
"""

import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from models import DreamConfig, DreamModel, LLaDAModelLM
from models.checkpoint import replacing
from models.errors import InputError
from models.predictor import MaskPredictor

BUNDLED = Path(__file__).resolve().parent.parent / "models/bundled"
TOKENS = {"<|mdm_mask|>": "<|mask|>", "<|eot_id|>": "<|im_end|>", "<|startoftext|>": "<|beginoftext|>"}
"""What LLaDA's special tokens are called in Dream."""
_WORDS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_NAMES = {
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj",
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
}  # fmt: skip
_CERTAINTY = 40.0  # in nats, by which the next position is preferred to any other
_LOUDNESS = 1e6  # of what is taken over, beside what a position held itself


def shifted(model: LLaDAModelLM) -> DreamModel:
    """A Dream that predicts at every position but the first what ``model`` predicts there.

    Args:
        model: The LLaDA, with weights of float32.

    Raises:
        InputError: Its keys have fewer heads than its queries: a head has no room then for its part of a position.
    """
    old = model.config
    if old.n_kv_heads not in (None, old.n_heads):
        raise InputError("n_kv_heads", old.n_kv_heads, f"{old.n_heads}, as many as n_heads")
    new = DreamModel(
        DreamConfig(
            vocab_size=old.vocab_size, hidden_size=old.d_model, intermediate_size=old.mlp_hidden_size,
            num_hidden_layers=old.n_layers + 1, num_attention_heads=old.n_heads, num_key_value_heads=old.n_heads,
            max_position_embeddings=old.max_sequence_length, rms_norm_eps=old.rms_norm_eps, rope_theta=old.rope_theta,
            mask_token_id=old.mask_token_id, eos_token_id=old.eos_token_id, pad_token_id=old.pad_token_id,
        )
    )  # fmt: skip
    there = model.state_dict()
    weights = {name: torch.zeros_like(tensor) for name, tensor in new.state_dict().items()}
    weights["model.embed_tokens.weight"] = there["model.transformer.wte.weight"]
    weights["model.norm.weight"] = there["model.transformer.ln_f.weight"]
    weights["lm_head.weight"] = there["model.transformer.ff_out.weight"]
    for layer in range(old.n_layers):
        for theirs, ours in _NAMES.items():
            name = f"model.layers.{layer}.{ours}.weight"
            weights[name] = there[f"model.transformer.blocks.{layer}.{theirs}.weight"]
    last, one = f"model.layers.{old.n_layers}.", torch.eye(old.d_model)
    query, key = _next_position(old.d_model // old.n_heads, old.rope_theta, old.max_sequence_length)
    weights[last + "input_layernorm.weight"] = torch.ones(old.d_model)
    weights[last + "self_attn.q_proj.bias"] = query.repeat(old.n_heads)
    weights[last + "self_attn.k_proj.bias"] = key.repeat(old.n_heads)
    weights[last + "self_attn.v_proj.weight"] = one * _LOUDNESS
    weights[last + "self_attn.o_proj.weight"] = one
    new.load_state_dict(weights)
    return new.eval()


def _next_position(width: int, theta: float, length: int) -> tuple[Tensor, Tensor]:
    """A query and a key ``(width,)`` that, rotated, prefer the next position to every other one within ``length``."""
    rate = theta ** -(torch.arange(0, width, 2).double() / width)
    off = torch.arange(1, length)[:, None] * rate  # by how much each pair of columns is turned away, at other distances
    margin = (1 - off.cos()).sum(1).min()
    size = (_CERTAINTY * width**0.5 / margin).sqrt()
    return torch.cat((rate.cos(), rate.sin())).mul(size).float(), torch.cat((rate**0, rate * 0)).mul(size).float()


def make(base: Path, out: Path) -> None:
    """Writes the Dream of a LLaDA, with its tokenizer under Dream's names of the special tokens.

    Args:
        base: Folder of the LLaDA.
        out: Folder to write; replaced where it is.
    """
    model = MaskPredictor.from_pretrained(base, device="cpu", dtype=torch.float32).model
    if not isinstance(model, LLaDAModelLM):
        raise InputError("base", f"{base}, a {type(model).__name__}", "a LLaDA")
    with replacing(out.absolute()) as aside:
        shifted(model).save_pretrained(aside)
        _write_words(base, aside)


def make_helper(helper: Path, words: Path, out: Path) -> None:
    """Writes an exported helper as a causal language model that knows nothing of us.

    Args:
        helper: Folder of the export.
        words: Folder with the files of the tokenizer.
        out: Folder to write; replaced where it is.
    """
    with replacing(out.absolute()) as aside:
        aside.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(helper / name, aside)
        _write_words(words, aside)


def _write_words(source: Path, target: Path) -> None:
    for name in _WORDS:
        text = (source / name).read_text(encoding="utf-8")
        for theirs, ours in TOKENS.items():
            text = text.replace(theirs, ours)
        (target / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    make(BUNDLED / "llada-tiny", Path("runs/dream-tiny"))
    make_helper(BUNDLED / "helper-llada-tiny", BUNDLED / "llada-tiny", Path("runs/dream-helper"))
    sys.stdout.write("runs/dream-tiny is a Dream, runs/dream-helper its helper\n")
