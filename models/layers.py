"""What the families of mask predictors share: normalisation, rotary embedding, attention over kept keys, and the forward.

A family adds its configuration, the names of its tensors and whatever it computes that others do not.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from models.errors import InputError
from models.generation import DiffusionGenerationMixin


def only(fields: dict[str, Any], accepted: Mapping[str, Any]) -> None:
    """Sets the fields of ``accepted`` that are not there, and refuses those that say otherwise.

    Args:
        fields: Fields of a ``config.json``.
        accepted: Those that change the computation, and the one value that is computed.

    Raises:
        InputError: A field has another value.
    """
    for name, value in accepted.items():
        if fields.setdefault(name, value) != value:
            raise InputError(name, repr(fields[name]), f"{value!r}; nothing else is implemented")


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
    def allocate(
        cls, layers: int, batch: int, heads: int, length: int, head_dim: int, *, dtype: torch.dtype, device: Any
    ) -> "KVCache":
        """Zero-filled storage for ``batch`` rows of ``length`` positions."""
        shape = (layers, batch, heads, length, head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def window(self, first_row: int, last_row: int, start: int, stop: int) -> "KVCache":
        """A view of the rows and columns between these bounds, the second of each excluded; writing to it writes here."""
        rows, columns = slice(first_row, last_row), slice(start, stop)
        return KVCache(self.keys[:, rows, :, columns], self.values[:, rows, :, columns])

    def clone(self) -> "KVCache":
        """A copy that shares no memory with this."""
        return KVCache(self.keys.clone(), self.values.clone())

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.keys.nbytes + self.values.nbytes

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
                found.append(fresh)
                _ = stored.copy_(fresh) if rows is None else stored.index_copy_(0, rows, fresh)
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


@dataclass
class Pass:
    """What the layers of one forward share.

    Attributes:
        ops: The model's elementwise operations.
        rotary: Cosines and sines of :func:`rotary_table`.
        mask: ``(B, 1, 1 or T, S)`` bool, True where a key may be attended; ``None`` attends everywhere.
        cache: Keys and values to attend to beside the forward's own; ``index`` and ``rows`` are those of :meth:`KVCache.update`.
        index: See there.
        rows: See there.
    """

    ops: Elementwise
    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None
    cache: KVCache | None = None
    index: Tensor | None = None
    rows: Tensor | None = None

    def attend(self, layer: int, shape: torch.Size, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Bidirectional attention of a layer.

        Args:
            layer: Number of the layer.
            shape: Of the forward, ``(B, T, ...)``.
            query: ``(B * T, H, D)``, not yet rotated.
            key: ``(B * T, H or fewer, D)``, likewise.
            value: Same shape as ``key``.

        Returns:
            ``(B, T, H * D)``.
        """
        query, key = self.ops.rotate(query, *self.rotary), self.ops.rotate(key, *self.rotary)
        query, key, value = (
            heads.view(shape[0], shape[1], *heads.shape[1:]).transpose(1, 2) for heads in (query, key, value)
        )
        if self.cache is not None:
            key, value = self.cache.update(layer, self.index, self.rows, key, value)
        return attend(query, key, value, self.mask).transpose(1, 2).flatten(2)


class MaskedLM(PreTrainedModel, DiffusionGenerationMixin):
    """A mask predictor; a family says how its tensors are called and what its blocks compute.

    Subclasses set ``self.model``, which gives hidden states before the final norm and holds the :class:`Elementwise` as ``ops``.

    Attributes:
        left_context: Columns left of a position that its prediction needs in the same forward: the output that predicts it is
            so many columns before it.
    """

    base_model_prefix = "model"
    _supports_sdpa = True
    left_context: ClassVar[int] = 0
    init_std: ClassVar[str] = "initializer_range"
    """Field of the configuration with the standard deviation of fresh weights."""

    @classmethod
    def check_names(cls, config: Any, names: Iterable[str]) -> None:
        """Refuses a checkpoint by the names of its tensors, where loading it would not say which one is the matter.

        Args:
            config: Its configuration.
            names: Of all tensors in its files.

        Raises:
            ValueError: A tensor is missing or unexpected.
        """

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm, ``(..., D)`` to the same."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``(..., vocab_size)`` of hidden states ``(..., D)`` as :meth:`forward` gives them."""
        raise NotImplementedError

    def allocate_cache(self, batch: int, length: int) -> KVCache:
        """Storage for ``batch`` rows of ``length`` positions, in the weights' dtype and on their device."""
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=getattr(self.config, self.init_std))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

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
        """Predicts the token at every position asked for, whichever output it is that predicts it.

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
            ``hidden_states`` holds one tensor, ``(B, T, D)`` or ``(N, D)``: what the head reads.
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
        if self.left_context:
            outputs = self._outputs(position_ids.expand_as(input_ids), logits_at)
            hidden = hidden.flatten(0, 1)[outputs].view(hidden.shape if logits_at is None else (-1, hidden.shape[-1]))
        elif logits_at is not None:
            hidden = hidden.flatten(0, 1)[logits_at]
        hidden = self.norm(hidden)
        return MaskedLMOutput(logits=self.head(hidden) if head else None, hidden_states=(hidden,))

    def _outputs(self, positions: Tensor, at: Tensor | None) -> Tensor:
        """Which outputs predict the positions ``at``, as ``(N,)`` int64 indices into the flattened ``(B * T)``.

        A text's first position has none left of it and keeps its own, and so has a row's first column, whatever comes before
        it: never an output of the row above.

        Args:
            positions: ``(B, T)`` int64, counted from each row's first real token.
            at: ``(N,)`` int64; ``None`` for all.
        """
        at = torch.arange(positions.numel(), device=positions.device) if at is None else at
        known = torch.minimum(positions.reshape(-1)[at], at % positions.shape[1])
        return at - self.left_context * (known >= self.left_context)
