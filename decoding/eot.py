"""Where the text ends."""

import torch
from torch import Tensor


def first_true(flags: Tensor) -> Tensor:
    """Index of the first True of each row, or the row's length; ``(b, G)`` bool to ``(b,)`` int64."""
    return torch.where(flags.any(1), flags.int().argmax(1), flags.shape[1])


def published_cut(eot_probability: Tensor, eot_top: Tensor, masked: Tensor) -> Tensor:
    """The second half of Learn2PD's rule: the most confident masked position whose argmax is EoT (arXiv 2509.25188).

    It has no threshold. The position itself stays masked; what follows is cut.

    Args:
        eot_probability: ``(b, G)`` float32.
        eot_top: ``(b, G)`` bool, EoT is the argmax.
        masked: ``(b, G)`` bool, masked after this step's commits.

    Returns:
        ``(b,)`` int64, ``G`` where no masked position says EoT.
    """
    said = eot_top & masked
    best = eot_probability.masked_fill(~said, -1.0).argmax(1)
    return torch.where(said.any(1), best, masked.shape[1])
