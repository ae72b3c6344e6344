"""LLaDA in plain PyTorch, reading and writing the official checkpoint format.

A bidirectional Transformer whose logits at position ``i`` predict position ``i`` (no shift); Nie et al., "Large Language
Diffusion Models", arXiv 2502.09992. Module names follow the official tensors (``model.transformer.blocks.N.q_proj.weight``),
so ``from_pretrained`` and ``save_pretrained`` exchange checkpoints with it without any renaming.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from models.generation import DiffusionGenerationMixin

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
        ValueError: A field asks for a computation this implementation does not do.
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
        for name, value in _ONLY.items():
            if kwargs.setdefault(name, value) != value:
                raise ValueError(f"LLaDA config.json: {name} is {kwargs[name]!r}; only {value!r} is implemented")
        kwargs.pop("tie_word_embeddings", None)  # transformers writes this copy of weight_tying beside it
        if d_model % n_heads:
            raise ValueError(f"LLaDA config.json: d_model {d_model} is not a multiple of n_heads {n_heads}")
        if n_heads % (n_kv_heads or n_heads):
            raise ValueError(f"LLaDA config.json: n_heads {n_heads} is not a multiple of n_kv_heads {n_kv_heads}")
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


@dataclass
class KVCache:
    """Rotated keys and values of every layer, allocated once and written in place.

    Attributes:
        keys: ``(n_layers, B, n_kv_heads, S, head_dim)``, after the rotary embedding.
        values: Same shape as ``keys``.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(cls, config: LLaDAConfig, batch: int, length: int, *, dtype: torch.dtype, device: Any) -> "KVCache":
        """Zero-filled storage for ``batch`` rows of ``length`` positions."""
        heads = config.n_kv_heads or config.n_heads
        shape = (config.n_layers, batch, heads, length, config.d_model // config.n_heads)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def window(self, first_row: int, last_row: int, start: int, stop: int) -> "KVCache":
        """A view of the rows and columns between these bounds, the second of each excluded; writing to it writes here."""
        rows, columns = slice(first_row, last_row), slice(start, stop)
        return KVCache(self.keys[:, rows, :, columns], self.values[:, rows, :, columns])

    def clone(self) -> "KVCache":
        """A copy that shares no memory with this."""
        return KVCache(self.keys.clone(), self.values.clone())

    def move(self, source: int, target: int) -> None:
        """Copies row ``source`` over row ``target``."""
        for stored in (self.keys, self.values):
            stored[:, target].copy_(stored[:, source])

    def update(
        self, layer: int, index: Tensor | None, rows: Tensor | None, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values in place and returns what to attend to.

        Args:
            layer: Number of the layer.
            index: ``(B, T)`` int64, columns that ``key`` and ``value`` belong to; ``None`` where they are all of them.
            rows: ``(B,)`` int64, cache rows they belong to; ``None`` where they are all of them.
            key: ``(B, H, T, D)``.
            value: Same shape as ``key``.

        Returns:
            Keys and values ``(B, H, S, D)`` of these rows.
        """
        found = []
        for stored, new in ((self.keys[layer], key), (self.values[layer], value)):
            fresh = new.to(stored.dtype)
            if index is None:
                found.append(stored.copy_(fresh) if rows is None else stored.index_copy_(0, rows, fresh)[rows])
            elif rows is None:
                found.append(stored.scatter_(2, index[:, None, :, None].expand_as(fresh), fresh))
            else:
                stored[rows[:, None], :, index] = fresh.transpose(1, 2)
                found.append(stored[rows])
        return found[0], found[1]


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS normalisation of ``(N, D)`` in fp32, cast to the input's dtype, then times the weight (the official order)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the half-split rotary embedding, fp32.

    Args:
        positions: ``(B, T)`` integer positions.
        head_dim: Width of one head.
        theta: Base of the geometric frequencies.

    Returns:
        Two tensors ``(B * T, 1, head_dim)``.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.reshape(-1, 1, 1).float() * theta**-exponent
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding to ``(N, H, D)`` in fp32 and casts back."""
    wide = x.float()
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def gate(a: Tensor, b: Tensor) -> Tensor:
    """The MLP's gated activation, ``(N, D)``."""
    return F.silu(a) * b


@dataclass
class Elementwise:
    """What a model computes position by position beside its matrices and attention; one object for a whole model.

    Everything comes flattened to ``(N, ...)``, so that compiled versions serve any batch and length with one graph each.
    """

    normalise: Callable[[Tensor, Tensor, float], Tensor] = normalise
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotate
    gate: Callable[[Tensor, Tensor], Tensor] = gate

    def compile(self, backend: str) -> None:
        """Fuses each into kernels of its own; without a graph there is an error, never a silent way around it."""
        for name, function in vars(Elementwise()).items():
            setattr(self, name, torch.compile(function, dynamic=True, fullgraph=True, backend=backend))

    def restore(self) -> None:
        """Undoes :meth:`compile`."""
        vars(self).update(vars(Elementwise()))


class RMSNorm(nn.Module):
    """Normalises the last dimension; see :func:`normalise`."""

    def __init__(self, size: int, eps: float, ops: Elementwise) -> None:
        super().__init__()
        self.eps, self.ops = eps, ops
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.normalise(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, ``(B, H, T, D)``; ``key`` and ``value`` may have fewer heads."""
    grouped = key.shape[1] != query.shape[1]
    if grouped and mask is not None and query.is_cuda:
        # Only the flash kernel groups heads by itself, and it takes no mask; the efficient one takes both once repeated.
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
    if query.device.type == "cpu" and query.requires_grad and query.dtype is torch.bfloat16:
        # The backward of PyTorch's CPU kernel takes twice as long in bf16 as in fp32 (measured with torch 2.13).
        with torch.autocast("cpu", enabled=False):
            wide = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), mask, enable_gqa=grouped)
        return wide.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)


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

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None, layer: int,
        index: Tensor | None, cache_rows: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """``(B, T, d_model)`` to the same; ``mask`` is ``(B, 1, 1 or T, S)`` bool, True where a key may be attended."""
        rows, length = x.shape[:2]
        flat = self.attn_norm(x).flatten(0, 1)
        query, key, value = (
            proj(flat).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.ops.rotate(query, *rotary), self.ops.rotate(key, *rotary)
        query, key, value = (
            heads.view(rows, length, *heads.shape[1:]).transpose(1, 2) for heads in (query, key, value)
        )
        if cache is not None:
            key, value = cache.update(layer, index, cache_rows, key, value)
        mixed = attend(query, key, value, mask)
        x = x + self.attn_out(mixed.transpose(1, 2).flatten(2))
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
        cache_index: Tensor | None = None,
        cache_rows: Tensor | None = None,
    ) -> Tensor:
        """Hidden states before the final norm, ``(B, T, d_model)``."""
        config = self.config
        x = self.transformer["wte"](input_ids)
        rotary = rotary_table(positions.expand_as(input_ids), config.d_model // config.n_heads, config.rope_theta)
        for layer, block in enumerate(cast(nn.ModuleList, self.transformer["blocks"])):
            x = block(x, rotary, mask, cache, layer, cache_index, cache_rows)
        return x

    def head(self, hidden: Tensor) -> Tensor:
        """Vocabulary projection of normed hidden states: ``(..., d_model)`` to ``(..., vocab_size)``."""
        if self.config.weight_tying:
            logits = F.linear(hidden, cast(Tensor, self.transformer["wte"].weight))
        else:
            logits = self.transformer["ff_out"](hidden)
        return logits[..., : self.config.vocab_size]


class LLaDAModelLM(PreTrainedModel, DiffusionGenerationMixin):
    """The mask predictor, named as in the official checkpoints' ``architectures``."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012 - the base class declares it so

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def allocate_cache(self, batch: int, length: int) -> KVCache:
        """Storage for ``batch`` rows of ``length`` positions, in the weights' dtype and on their device."""
        return KVCache.allocate(self.model.config, batch, length, dtype=self.dtype, device=self.device)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer["wte"]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_at: Tensor | None = None,
        cache: KVCache | None = None,
        cache_index: Tensor | None = None,
        cache_rows: Tensor | None = None,
        head: bool = True,
    ) -> MaskedLMOutput:
        """Predicts the token at every position asked for.

        Args:
            input_ids: ``(B, T)`` int64.
            attention_mask: ``(B, S)`` bool or 0/1, False on padding; ``S`` is ``T``, or the cache's length with a cache.
                ``(B, T, S)`` says for each position what it may attend to, and needs ``position_ids``. ``None`` attends
                everywhere.
            position_ids: ``(B, T)`` int64; by default counted from each row's first attended position.
            logits_at: ``(N,)`` int64 indices into the flattened ``(B * T)`` positions. The head is run on these only.
                ``None`` runs it everywhere.
            cache: Keys and values to attend to; those of ``input_ids`` are written into it first.
            cache_index: ``(B, T)`` int64, the cache columns that ``input_ids`` occupy; ``None``: all ``S``, in order.
            cache_rows: ``(B,)`` int64, the cache rows that they occupy; ``None``: all, in order.
            head: Run the head. Without it ``logits`` is ``None``, and who needs some calls :meth:`head` on the hidden states.

        Returns:
            ``logits`` ``(B, T, vocab_size)``, or ``(N, vocab_size)`` with ``logits_at``, in the weights' dtype;
            ``hidden_states`` holds one tensor, ``(B, T, d_model)`` or ``(N, d_model)``: what the head reads.
        """
        mask = None if attention_mask is None else attention_mask.bool()
        pairs = mask is not None and mask.ndim == 3
        if (cache is not None or pairs) and position_ids is None:
            raise ValueError(f"forward with {'cache' if cache else 'a mask of pairs'} needs position_ids (B, T)")
        if position_ids is None and mask is not None:
            position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)
        elif position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        keys_allowed = None if mask is None else mask[:, None] if pairs else mask[:, None, None, :]
        hidden = self.model(input_ids, keys_allowed, position_ids, cache, cache_index, cache_rows)
        if logits_at is not None:
            hidden = hidden.flatten(0, 1)[logits_at]
        hidden = self.model.transformer["ln_f"](hidden)
        return MaskedLMOutput(logits=self.head(hidden) if head else None, hidden_states=(hidden,))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``(..., vocab_size)`` of hidden states ``(..., d_model)`` as :meth:`forward` gives them."""
        return self.model.head(hidden)


AutoConfig.register(LLaDAConfig.model_type, LLaDAConfig)
AutoModel.register(LLaDAConfig, LLaDAModelLM)
