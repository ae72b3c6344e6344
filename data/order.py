"""The order of an epoch, computed for the places that are asked for: it takes no memory, however many records there are."""

from collections.abc import Sequence

import numpy as np

_ROUNDS = 6
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio


class Shuffle:
    """A permutation of ``range(size)``.

    A Feistel network on the fewest bits, of an even number, that hold ``size``. What it sends beyond ``size`` goes through it
    again until it is inside, less than four times in the mean (Black and Rogaway 2002, cycle walking).

    Args:
        size: Number of places.
        seed: Equal seeds give equal permutations.
    """

    def __init__(self, size: int, seed: int | Sequence[int]) -> None:
        self.size = size
        self.half = np.uint64(max(1, (max(size - 1, 0).bit_length() + 1) // 2))
        self.keys = np.random.default_rng(seed).integers(0, 2**64, _ROUNDS, dtype=np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at ``places`` ``(n,)``, whole numbers below ``size``; ``(n,)`` int64."""
        found = self._once(places.astype(np.uint64))
        while (beyond := found >= self.size).any():
            found[beyond] = self._once(found[beyond])
        return found.astype(np.int64)

    def _once(self, value: np.ndarray) -> np.ndarray:
        left, right = value >> self.half, value & ((np.uint64(1) << self.half) - np.uint64(1))
        for key in self.keys:
            mixed = (right ^ key) * _ODD  # modulo 2**64
            mixed = (mixed ^ (mixed >> np.uint64(32))) * _ODD
            left, right = right, left ^ (mixed >> (np.uint64(64) - self.half))
        return (left << self.half) | right
