"""LLaDA in plain PyTorch, reading and writing the official checkpoint format.

A bidirectional Transformer whose logits at position ``i`` predict position ``i`` (no shift); Nie et al., "Large Language
Diffusion Models", arXiv 2502.09992. Module names follow the official tensors (``model.transformer.blocks.N.q_proj.weight``),
so ``from_pretrained`` and ``save_pretrained`` exchange checkpoints with it without any renaming.
"""

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from models.errors import InputError
from models.layers import Elementwise, KVCache, MaskedLM, Pass, RMSNorm, only, rotary_table
from models.rules import COUNT, FLAG, NOT_NEGATIVE, POSITIVE, check, number, whole

# Fields that change the computation and the one value this implementation computes. Anything else is refused by name.
_ONLY = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "attention_layer_norm": False,
    "scale_logits": False,
    "input_emb_norm": False,
    "clip_qkv": None,
}

_RULES = {
    **dict.fromkeys(("d_model", "n_heads", "mlp_ratio", "vocab_size", "max_sequence_length"), COUNT),
    **dict.fromkeys(("n_kv_heads", "mlp_hidden_size", "embedding_size"), COUNT.or_null()),
    **dict.fromkeys(("include_bias", "include_qkv_bias", "weight_tying"), FLAG),
    **dict.fromkeys(("mask_token_id", "eos_token_id", "pad_token_id"), whole(0).or_null()),
    "n_layers": whole(1, 1024), "rope_theta": POSITIVE, "init_std": NOT_NEGATIVE,
    "rms_norm_eps": number("a number above 0 and at most 1", lambda value: 0 < value <= 1),
}  # fmt: skip


class LLaDAConfig(PreTrainedConfig):
    """The official ``config.json`` fields; unknown ones are kept and written back unchanged.

    Args:
        d_model: Width of the residual stream.
        n_layers: Number of Transformer blocks.
        n_heads: Number of query heads; ``d_model`` must be a multiple.
        n_kv_heads: Number of key/value heads (grouped-query when below ``n_heads``); ``None`` means ``n_heads``.
        mlp_ratio: Width of the MLP as a multiple of ``d_model`` where ``mlp_hidden_size`` is ``None``.
        mlp_hidden_size: Width of the MLP's gated hidden layer.
        rope_theta: Base of the rotary embedding.
        rms_norm_eps: Epsilon of the RMS normalisation.
        include_bias: Biases in the output and MLP projections.
        include_qkv_bias: Biases in the query, key and value projections.
        weight_tying: Use the embedding as the LM head; the checkpoint then has no ``ff_out`` tensor at the top.
        vocab_size: Number of token ids.
        embedding_size: Rows of the embedding and the head (``vocab_size`` rounded up; ``None`` means equal).
        max_sequence_length: Longest sequence the model was trained for, in tokens.
        mask_token_id: Id of ``<|mdm_mask|>``.
        eos_token_id: Id of ``<|endoftext|>``, which also pads.
        **kwargs: Further fields; see ``_ONLY`` for those whose value is checked.

    Raises:
        InputError: A field asks for a computation this implementation does not do, or for one that has no result.
    """

    model_type = "llada"

    def __init__(
        self,
        d_model: int = 4096,
        n_layers: int = 32,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        mlp_ratio: int = 4,
        mlp_hidden_size: int | None = 12288,
        rope_theta: float = 500000.0,
        rms_norm_eps: float = 1e-5,
        include_bias: bool = False,
        include_qkv_bias: bool = False,
        weight_tying: bool = False,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        max_sequence_length: int = 4096,
        mask_token_id: int | None = 126336,
        eos_token_id: int | None = 126081,
        pad_token_id: int | None = 126081,
        use_cache: bool = False,
        init_std: float = 0.02,
        **kwargs: Any,
    ) -> None:
        given = locals()
        check(given, _RULES)
        only(kwargs, _ONLY)
        kwargs.pop("tie_word_embeddings", None)  # transformers writes this copy of weight_tying beside it
        if d_model % (2 * n_heads):
            raise InputError("d_model", d_model, f"an even multiple of n_heads {n_heads}")
        if n_heads % (n_kv_heads or n_heads):
            raise InputError("n_heads", n_heads, f"a multiple of n_kv_heads {n_kv_heads}")
        if (embedding_size or vocab_size) < vocab_size:
            raise InputError("embedding_size", embedding_size, f"at least vocab_size {vocab_size}, or null")
        self.d_model = d_model
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.mlp_ratio = mlp_ratio
        self.mlp_hidden_size = mlp_hidden_size
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.include_bias = include_bias
        self.include_qkv_bias = include_qkv_bias
        self.weight_tying = weight_tying
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.max_sequence_length = max_sequence_length
        self.mask_token_id = mask_token_id
        self.use_cache = use_cache
        self.init_std = init_std
        ours: dict[str, Any] = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(**ours, tie_word_embeddings=weight_tying, **kwargs)  # pyright: ignore[reportCallIssue]


class LLaDABlock(nn.Module):
    """One pre-norm block: bidirectional attention, then a gated MLP."""

    def __init__(self, config: LLaDAConfig, ops: Elementwise) -> None:
        super().__init__()
        width, heads, self.ops = config.d_model, config.n_heads, ops
        self.head_dim = width // heads
        kv_width = self.head_dim * (config.n_kv_heads or heads)
        hidden = config.mlp_hidden_size or config.mlp_ratio * width
        self.attn_norm = RMSNorm(width, config.rms_norm_eps, ops)
        self.q_proj = nn.Linear(width, width, bias=config.include_bias or config.include_qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=config.include_bias or config.include_qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=config.include_bias or config.include_qkv_bias)
        self.attn_out = nn.Linear(width, width, bias=config.include_bias)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps, ops)
        self.ff_proj = nn.Linear(width, hidden, bias=config.include_bias)
        self.up_proj = nn.Linear(width, hidden, bias=config.include_bias)
        self.ff_out = nn.Linear(hidden, width, bias=config.include_bias)

    def forward(self, x: Tensor, layer: int, shared: Pass) -> Tensor:
        """``(B, T, d_model)`` to the same, as layer number ``layer``."""
        flat = self.attn_norm(x).flatten(0, 1)
        query, key, value = (
            proj(flat).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = x + self.attn_out(shared.attend(layer, x.shape, query, key, value))
        flat = self.ff_norm(x).flatten(0, 1)
        return x + self.ff_out(self.ops.gate(self.ff_proj(flat), self.up_proj(flat))).view(x.shape)


class LLaDAModel(nn.Module):
    """Embedding, blocks, final norm and head under the official names."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        rows, self.ops = config.embedding_size or config.vocab_size, Elementwise()
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(rows, config.d_model),
            "blocks": nn.ModuleList(LLaDABlock(config, self.ops) for _ in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps, self.ops),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, rows, bias=config.include_bias)
        self.config = config
        self.transformer = nn.ModuleDict(parts)

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        cache: KVCache | None = None,
        cache_index: Tensor | slice | None = None,
        cache_rows: Tensor | None = None,
    ) -> Tensor:
        """Hidden states before the final norm, ``(B, T, d_model)``."""
        config = self.config
        x = self.transformer["wte"](input_ids)
        rotary = rotary_table(positions.expand_as(input_ids), config.d_model // config.n_heads, config.rope_theta)
        shared = Pass(self.ops, rotary, mask, cache, cache_index, cache_rows)
        for layer, block in enumerate(cast(nn.ModuleList, self.transformer["blocks"])):
            x = block(x, layer, shared)
        return x

    def head(self, hidden: Tensor) -> Tensor:
        """Vocabulary projection of normed hidden states: ``(..., d_model)`` to ``(..., vocab_size)``."""
        if self.config.weight_tying:
            logits = F.linear(hidden, cast(Tensor, self.transformer["wte"].weight))
        else:
            logits = self.transformer["ff_out"](hidden)
        return logits[..., : self.config.vocab_size]


class LLaDAModelLM(MaskedLM):
    """The mask predictor, named as in the official checkpoints' ``architectures``."""

    config_class = LLaDAConfig
    init_std = "init_std"
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012 - the base class declares it so

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def allocate_cache(self, batch: int, length: int) -> KVCache:
        config = self.model.config
        heads, width = config.n_kv_heads or config.n_heads, config.d_model // config.n_heads
        return KVCache.allocate(config.n_layers, batch, heads, length, width, dtype=self.dtype, device=self.device)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer["wte"]

    def norm(self, hidden: Tensor) -> Tensor:
        return self.model.transformer["ln_f"](hidden)

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden)


AutoConfig.register(LLaDAConfig.model_type, LLaDAConfig)
AutoModel.register(LLaDAConfig, LLaDAModelLM)
