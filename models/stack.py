"""The fields and tensors that most families name as ``transformers`` does: ``embed_tokens``, ``layers``, ``lm_head``."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from models.errors import InputError
from models.layers import Elementwise, KVCache, MaskedLM, Pass, RMSNorm, rotary_table
from models.rules import COUNT, FLAG, NOT_NEGATIVE, POSITIVE, Rule, check, number, whole

_OURS = ("eos_token_id", "pad_token_id", "tie_word_embeddings")
"""Fields that transformers keeps itself."""


class StackConfig(PreTrainedConfig):
    """The official ``config.json`` fields; unknown ones are kept and written back unchanged.

    Args:
        **fields: Those of ``usual`` and any others: ``vocab_size``, ``hidden_size``, ``num_hidden_layers``,
            ``num_attention_heads``, ``num_key_value_heads`` (``None``: as many), ``max_position_embeddings`` in tokens,
            ``initializer_range``, ``rms_norm_eps``, ``rope_theta``, ``tie_word_embeddings`` (there is then no ``lm_head``),
            ``mask_token_id``, ``eos_token_id`` (which also pads), ``pad_token_id``, ``use_cache`` (kept as it is found), and
            the family's own.

    Attributes:
        usual: Every field that is read, with the value of the published model.
        rules: What the family's own of them accept.

    Raises:
        InputError: A field is of another type or range, or sizes do not fit.
    """

    usual: ClassVar[Mapping[str, Any]] = {}
    rules: ClassVar[Mapping[str, Rule]] = {}

    def __init__(self, **fields: Any) -> None:
        own = {name: fields.pop(name, value) for name, value in self.usual.items()}
        check(own, {**_RULES, **self.rules})
        width, heads = own["hidden_size"], own["num_attention_heads"]
        own["num_key_value_heads"] = own["num_key_value_heads"] or heads
        if width % (2 * heads):
            raise InputError("hidden_size", width, f"an even multiple of num_attention_heads {heads}")
        if heads % own["num_key_value_heads"]:
            accepted = f"a divisor of num_attention_heads {heads}"
            raise InputError("num_key_value_heads", own["num_key_value_heads"], accepted)
        for name, value in own.items():
            if name not in _OURS:
                setattr(self, name, value)
        super().__init__(**{name: own[name] for name in _OURS}, **fields)  # pyright: ignore[reportCallIssue]


_RULES = {
    **dict.fromkeys(("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings"), COUNT),
    **dict.fromkeys(("mask_token_id", "eos_token_id", "pad_token_id"), whole(0).or_null()),
    "num_key_value_heads": COUNT.or_null(), "num_hidden_layers": whole(1, 1024), "initializer_range": NOT_NEGATIVE,
    "rope_theta": POSITIVE, "tie_word_embeddings": FLAG,
    "rms_norm_eps": number("a number above 0 and at most 1", lambda value: 0 < value <= 1),
}  # fmt: skip


class Attention(nn.Module):
    """Grouped-query attention in both directions.

    Args:
        config: The family's.
        ops: The model's elementwise operations.
        bias: The query, key and value projections have one.
        qk_norm: Queries and keys are normalised, head by head, before they are rotated.
    """

    def __init__(self, config: Any, ops: Elementwise, *, bias: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
        kv_width = self.head_dim * config.num_key_value_heads
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, kv_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, ops) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, ops) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, layer: int, shared: Pass) -> Tensor:
        """``(B, T, D)`` to the same, as layer number ``layer``."""
        flat = x.flatten(0, 1)
        query, key, value = (
            proj(flat).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(shared.attend(layer, x.shape, self.q_norm(query), self.k_norm(key), value))


class MLP(nn.Module):
    """The gated MLP, ``(N, D)`` to the same."""

    def __init__(self, width: int, hidden: int, ops: Elementwise) -> None:
        super().__init__()
        self.ops = ops
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, flat: Tensor) -> Tensor:
        return self.down_proj(self.ops.gate(self.gate_proj(flat), self.up_proj(flat)))


class Layer(nn.Module):
    """One pre-norm block of attention and an MLP; a family gives both, the MLP on ``(N, D)``."""

    def __init__(self, config: Any, ops: Elementwise, attention: Attention, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.mlp = mlp

    def forward(self, x: Tensor, layer: int, shared: Pass) -> Tensor:
        """``(B, T, D)`` to the same, as layer number ``layer``."""
        x = x + self.self_attn(self.input_layernorm(x), layer, shared)
        return x + self.mlp(self.post_attention_layernorm(x).flatten(0, 1)).view(x.shape)


class Stack(nn.Module):
    """Embedding, layers and the final norm, which :class:`StackLM` applies."""

    def __init__(self, config: Any, ops: Elementwise, layers: list[Layer]) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        cache: KVCache | None = None,
        cache_index: Tensor | slice | None = None,
        cache_rows: Tensor | None = None,
    ) -> Tensor:
        """Hidden states before the final norm, ``(B, T, D)``."""
        config = self.config
        head_dim = config.hidden_size // config.num_attention_heads
        rotary = rotary_table(positions.expand_as(input_ids), head_dim, config.rope_theta)
        shared = Pass(self.ops, rotary, mask, cache, cache_index, cache_rows)
        x = self.embed_tokens(input_ids)
        for place, layer in enumerate(self.layers):
            x = layer(x, place, shared)
        return x


class StackLM(MaskedLM):
    """A family with these tensors: it says how a :meth:`layer` is made.

    ``lm_head`` is not there where the configuration ties it to the embedding, and neither is its tensor.
    """

    model: Stack

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.config: Any = config
        ops = Elementwise()
        self.model = Stack(config, ops, [self.layer(config, ops) for _ in range(self.config.num_hidden_layers)])
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def layer(config: Any, ops: Elementwise) -> Layer:
        """A fresh layer."""
        raise NotImplementedError

    def allocate_cache(self, batch: int, length: int) -> KVCache:
        layers, heads = self.config.num_hidden_layers, self.config.num_key_value_heads
        width = self.config.hidden_size // self.config.num_attention_heads
        return KVCache.allocate(layers, batch, heads, length, width, dtype=self.dtype, device=self.device)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def norm(self, hidden: Tensor) -> Tensor:
        return self.model.norm(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        if self.config.tie_word_embeddings:
            return F.linear(hidden, self.model.embed_tokens.weight)
        return self.lm_head(hidden)
