"""The faults that change a word, split into strata that a sampler draws from.

A fault that leaves its word as it is (stuck at the value it has) is known not to be critical, so
no stratum holds it; nor does one hold a fault that the caller knows to be harmless (`KNOWN`, from
a certified radius). Both stay in the population of every unit. A stratum lies in one (site, bit):
so every unit, a network, layer or bit, is a union of strata, whatever they are split by within.
Of a run-time value, whose leaf is None, no golden value is known: a (site, bit) is one stratum.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from jfi import bits as jbits
from jfi.errors import InputError
from jfi.faults import Faults, FaultSpace

KNOWN = 255  # the bin of a fault that is proven not to be critical

# Bins [words] uint8 of the faults of a (site number, bit): what a split is by.
Split = Callable[[int, int], np.ndarray]

OCTAVES = (-20, 12)  # |dw| or scores below and above share a bin, and so do NaNs and infinities


class Strata(NamedTuple):
    """H strata, ordered by site, bit and bin: int64 arrays [H].

    groups: coarser and coarser classes of strata thought to be alike, [H] each; nested.
    ids: `(stratum [n], k [n]) -> fault ids [n]`, the k-th fault of each stratum.
    """

    site: np.ndarray
    bit: np.ndarray
    size: np.ndarray
    groups: tuple[np.ndarray, ...]
    ids: Callable[[np.ndarray, np.ndarray], np.ndarray]


def by_cell(space: FaultSpace, leaves: Sequence[np.ndarray]) -> Split:
    """One stratum a (site, bit)."""
    return lambda site, bit: np.zeros(space.sites[site].words, np.uint8)


def by_distance(space: FaultSpace, leaves: Sequence[np.ndarray]) -> Split:
    """Strata by which way the flip moves the word, and by the octave of |dw|, how far.

    Which way matters: a channel whose weight falls far is dead behind its ReLU, one whose weight
    grows far outshouts the others (bit 30 of LeNet on MNIST: 5% and 96% critical).
    """
    return lambda s, b: 2 * octaves(distances(leaves[s], b)) + falls(leaves[s], b)


def by_score(leaves: Sequence[np.ndarray], sensitivity: Sequence[np.ndarray]) -> Split:
    """As `by_distance`, |dw| times the sensitivity of the word (`scores.sensitivity`).

    Two octaves a stratum. Good sensitivities make it the chance to be critical that is alike in a
    stratum; bad ones cost injections and nothing else.

    Args:
        sensitivity: float [2, words] of each site, to growth and to fall.
    """

    def split(site: int, bit: int) -> np.ndarray:
        way = falls(leaves[site], bit)
        with np.errstate(invalid="ignore", over="ignore"):
            score = distances(leaves[site], bit) * np.where(way, *sensitivity[site][::-1])
        return 2 * (octaves(score) // 2) + way

    return split


def without(split: Split, harmless: Callable[[int, int], np.ndarray]) -> Split:
    """``split`` with the faults left out that are proven not to be critical.

    Args:
        harmless: `(site number, bit) -> bool [words]`, such as `Engine.certified`. A proof that
            is wrong makes intervals wrong.
    """
    return lambda site, bit: np.where(harmless(site, bit), np.uint8(KNOWN), split(site, bit))


def by_array(scores: Sequence[np.ndarray]) -> Split:
    """Strata by the octave of a score [words, bits] of each site, any numbers from 0."""
    return lambda site, bit: octaves(scores[site][:, bit])


def distances(leaf: np.ndarray, bit: int) -> np.ndarray:
    """|dw| float64 [words] of the flip of one bit of every word; NaN and infinity where it is."""
    with np.errstate(invalid="ignore", over="ignore"):
        flipped = jbits.faulty(np.ravel(leaf), bit, jbits.FLIP).astype(np.float64)
        return np.abs(flipped - np.ravel(leaf).astype(np.float64))


def falls(leaf: np.ndarray, bit: int) -> np.ndarray:
    """uint8 [words]: 1 where the flip of one bit makes the word less; for NaN, where it is -NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        flipped = jbits.faulty(np.ravel(leaf), bit, jbits.FLIP).astype(np.float64)
        less = flipped < np.ravel(leaf).astype(np.float64)
    return np.where(np.isnan(flipped), np.signbit(flipped), less).astype(np.uint8)


def octaves(score: np.ndarray) -> np.ndarray:
    """Bins uint8 of scores: floor(log2), the ends of `OCTAVES` open; non-finite in the last."""
    low, high = OCTAVES
    finite = np.isfinite(score)
    _, exponent = np.frexp(np.where(finite & (score > 0), score, 2.0**low))
    octave = np.where(finite, np.clip(exponent - 1, low, high - 1), high)
    return (octave - low).astype(np.uint8)


def strata(space: FaultSpace, leaves: Sequence[np.ndarray | None], split: Split) -> Strata:
    """The strata that ``split`` makes of a space; ``leaves`` are the golden values of its sites.

    Takes one pass over the words a (site, bit), and keeps 4 bytes a fault of those it drew from.

    Raises:
        InputError: a fault model with two faults of a bit that both change the word, or bins of
            another shape or dtype than uint8 [words].
    """
    if jbits.FLIP in space.polarities and len(space.polarities) > 1:
        raise InputError("stuck-at faults beside flips count one change twice; take one model")

    @cache
    def cell(site: int, bit: int) -> tuple[np.ndarray, np.ndarray]:
        """Words int32 in order of their bins, and how many there are of each bin [256].

        Of a run-time value, faults in place of words: its polarities follow each other.
        """
        bins = _bins(space, leaves[site], split, site, bit)
        order = np.argsort(bins, kind="stable").astype(np.int32)
        return order, np.bincount(bins, minlength=KNOWN + 1)

    cells = [(int(s), int(b)) for s, b in np.argwhere(space.cells)]
    counts = np.array([cell(*c)[1][:KNOWN] for c in cells])
    rows, bins = np.nonzero(counts)
    site, bit = np.array(cells)[rows].T
    starts = np.cumsum(counts, axis=1) - counts
    size, start = counts[rows, bins], starts[rows, bins]

    def ids(stratum: np.ndarray, k: np.ndarray) -> np.ndarray:
        index = np.empty(len(stratum), np.int64)
        polarity = np.empty(len(stratum), np.int8)
        row = rows[stratum]
        for number in np.unique(row):
            at = np.flatnonzero(row == number)
            s, b = cells[number]
            place = cell(s, b)[0][start[stratum[at]] + k[at]]
            index[at], polarity[at] = _changing(space, leaves[s], b, place)
        return space.encode(
            Faults(site[stratum].astype(np.int32), index, bit[stratum].astype(np.int16), polarity)
        )

    return Strata(site, bit, size, _groups(bit, bins), ids)


def _bins(space: FaultSpace, leaf, split: Split, site: int, bit: int) -> np.ndarray:
    if leaf is None:
        return np.zeros(space.sites[site].words * len(space.polarities), np.uint8)
    bins = split(site, bit)
    if bins.shape != (space.sites[site].words,) or bins.dtype != np.uint8:
        raise InputError(
            f"the bins of {space.sites[site].name} bit {bit} are {bins.dtype}{list(bins.shape)}, "
            f"not uint8[{space.sites[site].words}]"
        )
    if len(space.polarities) == 1 and space.polarities[0] != jbits.FLIP:
        held = _bit_of(leaf, bit) == space.polarities[0]
        return np.where(held, np.uint8(KNOWN), bins)
    return bins


def _changing(space: FaultSpace, leaf, bit: int, place: np.ndarray) -> tuple[Any, Any]:
    """Word and polarity of the faults at places of a (site, bit): those that change the word."""
    known = np.array(space.polarities, np.int8)
    if leaf is None:
        index, rank = np.divmod(place, known.size)
        return index, known[rank]
    if known.size == 1:
        return place, known[0]
    return place, (1 - _bit_of(np.ravel(leaf)[place], bit)).astype(np.int8)


def _bit_of(values: np.ndarray, bit: int) -> np.ndarray:
    words = jbits.to_bits(np.ravel(values))
    return (words >> words.dtype.type(bit) & 1).astype(np.int8)


def _groups(bit: np.ndarray, bins: np.ndarray) -> tuple[np.ndarray, ...]:
    """Classes thought to be alike: a bin anywhere, an octave both ways; a bit, where bins are one.

    Not a bin in its layer: a few draws say more of all layers than of one.
    """
    if not bins.any():
        return (bit, np.zeros_like(bit))
    return tuple(
        np.unique(group, return_inverse=True)[1] for group in (bins, bins // 2, np.zeros_like(bins))
    )
