"""Small tensors that are the same at every step, made once."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

_MOST = 16


def constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keeps the tensors that ``make`` returns, one for each set of arguments, for decoding and training alike.

    What :func:`decoding.memory_plan.plan_memory` makes of them has a shape and no contents: that is not kept, since a decode
    that comes after would be given it.
    """
    kept: dict[tuple[Hashable, ...], Tensor] = {}

    @functools.wraps(make)
    def get(*key: Any) -> Tensor:
        if (found := kept.get(key)) is not None:
            return found
        with torch.inference_mode(False):
            made = make(*key)
        if type(made) is Tensor:
            if len(kept) == _MOST:
                kept.clear()
            kept[key] = made
        return made

    return get
