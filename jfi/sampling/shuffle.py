"""Random orders that are computed, not stored: the k-th of M elements, for any k, at once.

The swap-or-not shuffle of Hoang, Morris and Rogaway ("An enciphering scheme based on a card
shuffle", CRYPTO 2012): a keyed permutation of [0, M) for any M. Each round pairs every element
with one partner, and a pseudo-random bit of the pair says whether the two change places. So a
sample without replacement can grow by any number of draws and needs no memory of the earlier ones.
"""

import numpy as np

from jfi.errors import InputError

ROUNDS = 48


def shuffled(k, size, key) -> np.ndarray:
    """The elements int64 [n] at positions ``k`` of a random order of [0, ``size``).

    Args:
        k: int64 [n], in [0, size).
        size: int64, below 2^62, broadcasts against ``k``.
        key: uint64, broadcasts against ``k``; orders of different keys are unrelated.

    Raises:
        InputError: a position beyond its order.
    """
    k, size, key = np.broadcast_arrays(
        np.asarray(k, np.int64), np.asarray(size, np.int64), np.asarray(key, np.uint64)
    )
    bad = np.flatnonzero((k < 0) | (k >= size))
    if bad.size:
        at = bad[0]
        raise InputError(f"position {k.flat[at]} is not in an order of {size.flat[at]} elements")
    element, size = k.astype(np.uint64), size.astype(np.uint64)
    for number in range(ROUNDS):
        turn = mix(key + np.uint64(number * _GOLDEN % 2**64))
        partner = (turn % size + size - element) % size
        swap = mix(turn ^ np.maximum(element, partner)) >> np.uint64(63)
        element = np.where(swap, partner, element)
    return element.astype(np.int64)


def keys(seed: int, count: int) -> np.ndarray:
    """``count`` unrelated keys uint64 [count] of a seed that is not negative."""
    return np.random.SeedSequence(seed).generate_state(count, np.uint64)


_GOLDEN = 0x9E3779B97F4A7C15


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), uint64 to uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
