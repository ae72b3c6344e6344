import torch
from torchmetrics.classification import BinaryAUROC, BinaryCalibrationError

from train.filter_module import _CUTS
from train.reliability import Reliability, draw


def test_the_error_is_that_of_an_implementation_which_keeps_every_example():
    rng = torch.Generator().manual_seed(1)
    probability = torch.rand(1000, generator=rng) ** 0.3
    final = (torch.rand(1000, generator=rng) < probability**2).long()
    ours, theirs = Reliability(), BinaryCalibrationError(n_bins=15)
    for part in range(0, 1000, 250):
        ours.update(probability[part : part + 250], final[part : part + 250])
        theirs.update(probability[part : part + 250], final[part : part + 250])
    torch.testing.assert_close(ours.compute(), theirs.compute())
    count, said, found = ours.found
    assert count.sum() == 1000
    assert (found[said > 0.3] < said[said > 0.3]).all(), "p squared lies below the diagonal"


def test_probabilities_of_exactly_0_and_1_and_bins_without_examples_are_no_trouble(tmp_path):
    metric = Reliability()
    metric.update(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0, 1, 0]))
    torch.testing.assert_close(metric.compute(), torch.tensor(1 / 3))
    assert metric.found.shape == (3, 2)
    draw({"one": metric.found, "none": Reliability().found}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_ranks_of_confidences_next_to_1_are_still_told_apart():
    # Most confidences of a trained base lie there; equal cuts from 0 to 1 would call them all alike.
    rng = torch.Generator().manual_seed(2)
    logit = 8 + 2 * torch.randn(4000, generator=rng)
    final = (torch.rand(4000, generator=rng) < (logit - 8).sigmoid()).long()
    binned, exact = BinaryAUROC(thresholds=_CUTS), BinaryAUROC()
    assert exact(logit.sigmoid(), final) > 0.7
    torch.testing.assert_close(binned(logit.sigmoid(), final), exact(logit.sigmoid(), final), atol=0.005, rtol=0)
