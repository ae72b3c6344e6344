"""A cache of keys and values for causal language models whose rows stand at different depths."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class _Place:
    """Where the tokens of the current forward go: ``rows`` ``(n, 1)`` and ``columns`` ``(n, T)``, int64."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    every_row: bool = True


class _RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer, ``(B, H, S, D)``, written in place at each row's own columns."""

    def __init__(self, batch: int, length: int, place: _Place) -> None:
        super().__init__()
        self.batch_size, self.length, self.place = batch, length, place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def storage(like: Tensor) -> Tensor:
            return like.new_zeros(self.batch_size, like.shape[1], self.length, like.shape[3])

        self.keys, self.values, self.is_initialized = storage(key_states), storage(value_states), True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, columns = self.place.rows, self.place.columns
        assert rows is not None
        found = []
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            assert stored is not None
            stored[rows, :, columns] = new.transpose(1, 2)
            found.append(stored if self.place.every_row else stored[rows[:, 0]])
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

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
        self.place, self.length = _Place(), length
        self.ragged = [_RaggedLayer(batch, length, self.place) for _ in range(layers)]
        super().__init__(layers=list(self.ragged))

    @torch.inference_mode()  # the storage is made in it
    def move(self, source: int, target: int) -> None:
        """Copies row ``source`` over row ``target``."""
        for layer in self.ragged:
            for stored in (layer.keys, layer.values):
                if stored is not None:
                    stored[target] = stored[source]
