"""Causal language models of ``transformers`` that a helper is made of: a new one, one that is read, and LoRA on top."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from models.checkpoint import check_files
from models.errors import InputError, first_line
from models.predictor import MaskPredictor, check_tensors, checkpoint_folder, quiet_loading
from models.rules import COUNT, POSITIVE, check

_MOST_WEIGHTS = 1 << 32
"""A helper from scratch of 16 GiB is a mistake in its sizes."""


def within(ids: Tensor, vocab_size: int, eot_id: int) -> Tensor:
    """Ids that an embedding of ``vocab_size`` rows can look up: others become EoT, or 0 where EoT is beyond too."""
    return ids.where(ids < vocab_size, eot_id if eot_id < vocab_size else 0)


def scratch_model(
    vocab_size: int, *, d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, mlp_hidden_size: int,
    max_length: int, tie_embeddings: bool, rope_theta: float, eot_id: int,
) -> LlamaForCausalLM:  # fmt: skip
    """A small Llama with fresh weights.

    Args:
        vocab_size: Token ids of the predictor.
        d_model: Width.
        n_layers: Blocks.
        n_heads: Attention heads.
        n_kv_heads: Heads of keys and values, shared by as many groups of ``n_heads``.
        mlp_hidden_size: Width of the gated MLP.
        max_length: Longest row, in tokens.
        tie_embeddings: Use the embedding as the head too.
        rope_theta: Base of the rotary embedding.
        eot_id: The predictor's EoT, for ``config.json``.

    Raises:
        InputError: Sizes that do not divide.
    """
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
    for name, size in (sizes | {"mlp_hidden_size": mlp_hidden_size, "max_length": max_length}).items():
        if size < 1:
            raise InputError(name, size, "a positive integer")
    for name, size, other in (("d_model", d_model, 2 * n_heads), ("n_heads", n_heads, n_kv_heads)):
        if size % other:
            accepted = "a multiple of n_kv_heads" if name == "n_heads" else "an even multiple of n_heads"
            raise InputError(name, size, f"{accepted}: of {other}")
    weights = 2 * vocab_size * d_model + n_layers * d_model * (4 * d_model + 3 * mlp_hidden_size)
    if n_layers > 1024 or weights > _MOST_WEIGHTS:
        found = f"{n_layers:,} blocks, {weights:,} weights"
        raise InputError(
            "n_layers, d_model, mlp_hidden_size", found, f"at most 1,024 blocks, {_MOST_WEIGHTS:,} weights"
        )
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=d_model, intermediate_size=mlp_hidden_size, num_hidden_layers=n_layers,
        num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, max_position_embeddings=max_length,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, tie_word_embeddings=tie_embeddings,
        rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=eot_id,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def copy_embeddings(net: PreTrainedModel, predictor: MaskPredictor) -> None:
    """Sets the input embeddings to the predictor's.

    Raises:
        InputError: They have another width.
    """
    rows: Tensor = predictor.model.get_input_embeddings().weight[: predictor.vocab_size]  # type: ignore[operator]
    _copy(net.get_input_embeddings(), rows, "d_model")


def copy_blocks(net: LlamaForCausalLM, predictor: MaskPredictor) -> None:
    """Sets everything to the predictor's: of its blocks, as many as there are, evenly spaced from the first to the last.

    LLaDA's blocks are Llama's but for the attention mask, so a helper that starts as them has to learn causality and
    the shift by one position, and not the language.

    Raises:
        InputError: The predictor has no such blocks, too few of them, or of other sizes.
    """
    model: Any = predictor.model
    if model.config.model_type != "llada":
        raise InputError("init", f"blocks, of a {type(model).__name__}", "none | embeddings; blocks of LLaDA only")
    parts = model.model.transformer
    ours, theirs = net.model.layers, parts["blocks"]
    if net.config.num_attention_heads != model.config.n_heads:  # the same matrices would be cut into other heads
        raise InputError(
            "n_heads", net.config.num_attention_heads, f"{model.config.n_heads}, the predictor's, for init: blocks"
        )
    if len(ours) > len(theirs):
        raise InputError("n_layers", len(ours), f"at most {len(theirs)}, the predictor's, for init: blocks")
    copy_embeddings(net, predictor)
    _copy(net.model.norm, parts["ln_f"].weight, "d_model")
    if not net.config.tie_word_embeddings and "ff_out" in parts:
        _copy(net.lm_head, parts["ff_out"].weight[: predictor.vocab_size], "d_model")
    places = torch.linspace(0, len(theirs) - 1, len(ours)).round().long().tolist()
    for layer, place in zip(ours, places, strict=True):
        for name, other, size in _LLAMA_TO_LLADA:
            _copy(layer.get_submodule(name), theirs[place].get_submodule(other).weight, size)


_LLAMA_TO_LLADA = (
    ("input_layernorm", "attn_norm", "d_model"),
    ("self_attn.q_proj", "q_proj", "d_model"),
    ("self_attn.k_proj", "k_proj", "n_kv_heads"),
    ("self_attn.v_proj", "v_proj", "n_kv_heads"),
    ("self_attn.o_proj", "attn_out", "d_model"),
    ("post_attention_layernorm", "ff_norm", "d_model"),
    ("mlp.gate_proj", "ff_proj", "mlp_hidden_size"),
    ("mlp.up_proj", "up_proj", "mlp_hidden_size"),
    ("mlp.down_proj", "ff_out", "mlp_hidden_size"),
)
"""Modules of a Llama block and of a LLaDA block, and the setting that decides their size."""


def _copy(module: Any, weight: Tensor, size: str) -> None:
    if module.weight.shape != weight.shape:
        raise InputError(
            size,
            f"one that makes {tuple(module.weight.shape)}",
            f"the predictor's, for {tuple(weight.shape)}; or init: none",
        )
    with torch.no_grad():
        module.weight.copy_(weight)


def pretrained_folder(path: str | Path) -> Path:
    """The folder of a causal language model, downloaded first if it is a hub id.

    Raises:
        InputError: Neither a folder nor a reachable hub id.
    """
    try:
        return checkpoint_folder(path)
    except InputError as error:
        raise InputError("pretrained", repr(str(path)), "a causal LM's folder, or a reachable hub id") from error


def check_same_ids(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuses a model whose tokenizer gives other ids to the predictor's tokens; says nothing where one has no tokenizer.

    Raises:
        InputError: Of the tokens that both know, more than a hundredth have different ids, or there are none.
    """
    if tokenizer is None or not (folder / "tokenizer.json").is_file():
        return
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_vocab()
    common = [(token, number) for token, number in tokenizer.get_vocab().items() if token in theirs]
    others = [(token, number) for token, number in common if theirs[token] != number]
    if len(others) > len(common) / 100 or not common:
        token, number = others[0] if others else ("any token", "no id")
        found = f"{theirs.get(token)} for {token!r}"
        raise InputError(f"{folder}: token ids", found, f"{number}, the predictor's; a model over the same ids")


def load_causal_lm(folder: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Reads a causal language model from safetensors; never runs code that comes with it.

    Raises:
        InputError: It cannot be read, is of an unknown architecture, or tensors are missing, unexpected or misshapen.
    """
    check_files(folder)
    try:
        with quiet_loading():
            model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                folder, dtype=dtype, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True,
                local_files_only=True, attn_implementation="sdpa", trust_remote_code=False,
            )  # fmt: skip
    except Exception as error:  # transformers has no error of its own
        raise InputError(str(folder), first_line(error), "a causal LM in config.json and safetensors") from error
    check_tensors(folder, info)
    return model


def add_lora(model: PreTrainedModel, rank: int, alpha: float) -> Any:
    """Wraps a model in a trainable LoRA of all its linear layers but the head; the model itself is frozen.

    Raises:
        InputError: A rank below 1, or an alpha that is not above 0.
    """
    from peft import LoraConfig, get_peft_model

    check({"lora_rank": rank, "lora_alpha": alpha}, {"lora_rank": COUNT, "lora_alpha": POSITIVE})
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads what transformers has renamed
        return get_peft_model(model, lora)
