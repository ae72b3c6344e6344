"""Confidence intervals of proportions and of the difference of two paired ones."""

import math

from scipy.stats import binomtest

Z = 1.959963984540054  # two-sided 95 %


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927), which stays sensible at 0 and at 1.

    Args:
        successes: Number of successes.
        trials: Number of trials, at least 1.
    """
    found = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def paired(won: int, lost: int, trials: int) -> tuple[float, float]:
    """95 % score interval of the difference of two proportions measured on the same trials (Tango 1998).

    Unlike one from a standard error it does not shrink to nothing where the two never differ.

    Args:
        won: Trials in which only the first succeeded.
        lost: Trials in which only the second succeeded.
        trials: All trials, at least 1.

    Returns:
        Lower and upper end of (first minus second).
    """

    def score(difference: float) -> float:
        """Standardised distance of the data from ``difference``; falls as it grows."""
        linear = (2 * trials - won + lost) * difference - won - lost
        constant = -lost * difference * (1 - difference)
        share = (math.sqrt(max(linear**2 - 8 * trials * constant, 0.0)) - linear) / (4 * trials)
        variance = trials * (2 * share + difference * (1 - difference))
        distance = won - lost - trials * difference
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    def where(level: float) -> float:
        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > level else (low, middle)
        return (low + high) / 2

    return where(Z), where(-Z)


def paired_error(won: int, lost: int, trials: int) -> float:
    """Standard error of the difference of two proportions measured on the same trials.

    Args:
        won: Trials in which only the first succeeded.
        lost: Trials in which only the second succeeded.
        trials: All trials, at least 1.
    """
    return math.sqrt(won + lost - (won - lost) ** 2 / trials) / trials
