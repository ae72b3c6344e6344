"""How far a probability can be taken at its word: the figures and the picture of a filter's card."""

from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric

from models.checkpoint import writing

BINS = 15


class Reliability(Metric):
    """Expected calibration error in :data:`BINS` bins of equal width (Guo et al. 2017), kept as sums and counts.

    Its state takes the same room however many examples there are.
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.found = torch.zeros(3, 0)
        """What :meth:`compute` found: ``(3, n)`` number, mean probability and share of finals of the ``n`` bins in use."""
        self.sums: Tensor
        self.add_state("sums", torch.zeros(3, BINS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probability: Tensor, final: Tensor) -> None:
        """Adds examples: ``probability`` ``(N,)`` float from 0 to 1, and whether they were final, ``(N,)`` 0 or 1."""
        place = (probability * BINS).long().clamp(max=BINS - 1)
        values = torch.stack([torch.ones_like(probability), probability, final.to(probability.dtype)])
        self.sums.index_add_(1, place, values.to(self.sums.dtype))

    def compute(self) -> Tensor:
        """The error, a scalar from 0 to 1: how far probability and share lie apart, averaged over the examples."""
        count, probability, final = self.sums
        used = count > 0
        self.found = torch.stack([count, probability / count, final / count])[:, used].cpu()  # here ranks are joined
        return ((probability - final).abs().sum() / count.sum().clamp(min=1)).float()


def draw(curves: dict[str, Tensor], target: Path) -> None:
    """Draws the reliability diagram: share of final guesses over what was said, a larger dot for more guesses.

    Args:
        curves: By label, what :class:`Reliability` found.
        target: The picture, of a format that matplotlib knows by its suffix.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(4.5, 4.5), constrained_layout=True)
    axis.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    for label, (count, said, found) in curves.items():
        (line,) = axis.plot(said, found, linewidth=1, label=label)
        axis.scatter(said, found, s=6 + 120 * count / count.sum(), color=line.get_color())
    axis.set(xlabel="probability that the guess is final", ylabel="share that was", xlim=(0, 1), ylim=(0, 1))
    axis.grid(visible=True, alpha=0.25)
    axis.legend(frameon=False)
    with writing(target) as aside:
        figure.savefig(aside, dpi=120, format=target.suffix[1:])
    plt.close(figure)
