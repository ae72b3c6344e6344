"""Confidence intervals."""

import math

import pytest

from eval.intervals import Z, paired, paired_error, wilson


def test_wilson_interval():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson(0, 20)[0] == 0.0
    assert wilson(0, 20)[1] == pytest.approx(Z**2 / (20 + Z**2))
    assert wilson(20, 20)[1] == 1.0


def test_two_decodes_that_never_differ_are_not_known_to_be_equal():
    low, high = paired(0, 0, 512)
    assert high == pytest.approx(Z**2 / (512 + Z**2))
    assert low == pytest.approx(-high)


@pytest.mark.parametrize(("won", "lost", "trials"), [(2, 5, 64), (0, 3, 40), (9, 1, 30), (1, 1, 8), (4, 0, 4)])
def test_the_ends_are_where_the_score_test_stops_rejecting(won, lost, trials):
    def statistic(difference):
        # Likelihood of (won, lost, neither) maximised over the loss rate by search: an independent way to the same score.
        def likelihood(q):
            p = q + difference
            rest = trials - won - lost
            terms = [(won, p), (lost, q), (rest, 1 - p - q)]
            if any(share < 0 or (count and share <= 0) for count, share in terms):
                return -math.inf
            return sum(count * math.log(share) for count, share in terms if count)

        low, high = max(0.0, -difference), (1 - difference) / 2
        for _ in range(200):
            a, b = low + (high - low) / 3, high - (high - low) / 3
            low, high = (a, high) if likelihood(a) < likelihood(b) else (low, b)
        share = (low + high) / 2
        return (won - lost - trials * difference) / math.sqrt(trials * (2 * share + difference - difference**2))

    for end, level in zip(paired(won, lost, trials), (Z, -Z), strict=True):
        if abs(end) < 1 - 1e-9:
            assert statistic(end) == pytest.approx(level, abs=1e-3)
    low, high = paired(won, lost, trials)
    assert low <= (won - lost) / trials <= high
    mirrored = paired(lost, won, trials)
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)


def test_the_standard_error_of_pairs_is_that_of_their_differences():
    differences = [1.0] * 3 + [-1.0] * 8 + [0.0] * 89
    mean = sum(differences) / 100
    assert paired_error(3, 8, 100) == pytest.approx(math.sqrt(sum((d - mean) ** 2 for d in differences) / 100) / 10)
    assert paired_error(0, 0, 100) == 0.0
