"""The order of an epoch: everything once, whatever the number, and another order each time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.order import Shuffle


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(1, 5))
def test_every_place_is_drawn_once_whatever_their_number_and_the_ranks(size: int, seed: int, ranks: int) -> None:
    # Each rank makes its own: what it asks for is not drawn by another.
    drawn = [Shuffle(size, (seed, 3))(np.arange(rank, size, ranks)) for rank in range(ranks)]
    assert sorted(np.concatenate(drawn).tolist()) == list(range(size))


def test_another_epoch_and_another_seed_have_another_order() -> None:
    orders = [Shuffle(1000, seed)(np.arange(1000)) for seed in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert np.array_equal(orders[0], orders[1])
    for other in orders[2:]:
        assert (orders[0] == other).mean() < 0.01


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, 10**6, 10**12])
def test_any_stretch_of_an_epoch_is_spread_over_all_records(size: int) -> None:
    drawn = Shuffle(size, 0)(np.arange(4096) + size // 3)
    counts = np.histogram(drawn, bins=16, range=(0, size))[0]
    assert ((counts - 256) ** 2 / 256).sum() < 40  # chi-squared of 15 degrees: above with probability .0005
    assert len(np.unique(np.diff(drawn))) > 3500  # neighbours do not stay neighbours
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.06
