"""A cache of keys and values for causal language models whose rows stand at different depths."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class Place:
    """Where the tokens of the current forward go.

    Attributes:
        rows: ``(n,)`` int64; ``None`` for the first ``n`` in order, which are attended to without a copy.
        columns: ``(n, T)`` int64.
        stop: Column past the last one that is attended to.
    """

    rows: Tensor | None
    columns: Tensor
    stop: int


class _RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer, ``(B, H, S, D)``, written in place at each row's own columns."""

    keys: Tensor | None
    values: Tensor | None
    place: Place

    def __init__(self, batch: int, length: int) -> None:
        super().__init__()
        self.batch_size, self.length = batch, length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def storage(like: Tensor) -> Tensor:
            return like.new_zeros(self.batch_size, like.shape[1], self.length, like.shape[3])

        self.keys, self.values, self.is_initialized = storage(key_states), storage(value_states), True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, columns, stop = self.place.rows, self.place.columns, self.place.stop
        found = []
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            assert stored is not None
            if rows is None:
                seen = stored[: len(new), :, :stop]
                found.append(seen.scatter_(2, columns[:, None, :, None].expand_as(new), new))
            else:
                stored[rows[:, None], :, columns] = new.transpose(1, 2)
                found.append(stored[rows, :, :stop])
        return found[0], found[1]

    def keep(self, rows: int, columns: int) -> None:
        """Drops all but the first rows and columns."""
        self.batch_size, self.length = rows, columns
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            self.keys = self.keys[:rows, :, :columns].clone()
            self.values = self.values[:rows, :, :columns].clone()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.stop, 0

    def get_seq_length(self) -> int:
        return 0  # rows differ: the caller gives positions and mask

    def get_max_length(self) -> int:
        return self.length


class HelperCache(Cache):
    """Keys and values of rows at different depths; storage is allocated at the first forward and written in place.

    Nothing is ever cropped: what lies right of a query is invisible to it, and is overwritten before a query gets there.

    Args:
        layers: Number of layers.
        batch: Rows.
        length: Columns: the longest row, in tokens.
    """

    def __init__(self, layers: int, batch: int, length: int) -> None:
        self.batch, self.length = batch, length
        self.ragged = [_RaggedLayer(batch, length) for _ in range(layers)]
        super().__init__(layers=list(self.ragged))

    def put(self, place: Place) -> None:
        """Says where the next forward's tokens go."""
        for layer in self.ragged:
            layer.place = place

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored; 0 before the first forward."""
        kept = (stored for layer in self.ragged for stored in (layer.keys, layer.values))
        return sum(stored.nbytes for stored in kept if stored is not None)

    @torch.inference_mode()  # the storage is made in it
    def shrink(self, rows: int, length: int) -> None:
        """Gives memory back where the first ``rows`` rows and ``length`` columns are no more than half of it."""
        if 2 * rows * length > self.batch * self.length:
            return
        self.batch, self.length = rows, length
        for layer in self.ragged:
            layer.keep(rows, length)

    @torch.inference_mode()  # the storage is made in it
    def move(self, source: int, target: int) -> None:
        """Copies row ``source`` over row ``target``."""
        for layer in self.ragged:
            for stored in (layer.keys, layer.values):
                if stored is not None:
                    stored[target] = stored[source]
