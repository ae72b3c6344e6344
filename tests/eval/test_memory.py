"""Peak memory of a piece of work."""

import sys

import pytest
import torch

from eval.memory import PeakMemory


@pytest.mark.skipif(sys.platform != "linux", reason="the resident memory is read from /proc")
def test_what_is_freed_before_the_end_counts_and_what_was_before_does_not():
    size = 50_000_000
    with PeakMemory(torch.device("cpu")) as large:
        torch.ones(size)
    with PeakMemory(torch.device("cpu")) as small:
        torch.ones(10)
    assert large.result is not None
    assert small.result is not None
    assert large.result["peak"] - large.result["before"] > 0.9 * 4 * size
    assert small.result["peak"] - small.result["before"] < 0.5 * 4 * size
