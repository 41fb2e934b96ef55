"""Verification: random pairs of a campaign run again naively, by an independent path.

Naive means: bitcast the leaf, change the bit, run the whole network as the user wrote it, one
pair after another, in one compiled program. Nothing of the splitting or the rank-one rules is
in it.
"""

from typing import NamedTuple

import jax
import numpy as np
from scipy import stats

from jfi import bits
from jfi.compiling import jit
from jfi.engine import Engine, by_site, take
from jfi.faults import Faults
from jfi.golden import close, rounding
from jfi.outcomes import CRITICAL, classify

BATCH = 32  # pairs of one call, run one after another
BOUND = 0.95  # confidence of `Verification.bound`


class Verification(NamedTuple):
    """Pairs run again: how many agree, differ within float rounding, and disagree.

    certified: how many of the pairs a certificate had decided.
    worst: the first disagreement in words, empty if there is none.
    """

    pairs: int
    agreements: int
    near_ties: int
    disagreements: int
    certified: int = 0
    worst: str = ""

    @property
    def bound(self) -> float:
        """Share of wrong verdicts that the campaign stays below, with 95% confidence.

        One-sided, by Clopper and Pearson (1934); 3 / pairs where none disagrees.
        """
        if self.disagreements == self.pairs:
            return 1.0
        return float(stats.beta.ppf(BOUND, self.disagreements + 1, self.pairs - self.disagreements))


def naive(engine: Engine, faults: Faults, image: np.ndarray) -> np.ndarray:
    """Logits [P, C] of the k-th fault on image `image[k]` by whole re-runs."""
    logits = np.empty((image.size, engine.golden.logits.shape[1]), engine.golden.logits.dtype)
    for site, rows in by_site(faults, np.arange(image.size)):
        program = _program(engine, site)
        for start in range(0, rows.size, BATCH):
            part = rows[start : start + BATCH]
            full = np.resize(part, BATCH)
            chosen = take(faults, full)
            pairs = (
                chosen.index.astype(np.int32), chosen.bit.astype(np.int32),
                chosen.polarity.astype(np.int32), engine.images[image[full]],
            )  # fmt: skip
            logits[part] = np.asarray(program(engine.network.leaves, pairs))[: part.size]
    return logits


def _program(engine: Engine, site: int):
    """Compiled: (leaves, pairs) -> logits [BATCH, C] for faults in one site."""
    network = engine.network
    position = network.positions[engine.sites[site].name]
    tree = jax.tree.structure(network.params)

    def one(leaves, pair):
        index, bit, polarity, x = pair
        leaves = list(leaves)
        leaves[position] = bits.inject(leaves[position], index, bit, polarity)
        return network.apply(jax.tree.unflatten(tree, leaves), x[None])[0]

    return jit(lambda leaves, pairs: jax.lax.map(lambda pair: one(leaves, pair), pairs))


def verify(
    engine: Engine, faults: Faults, image: np.ndarray, measure: str = "full"
) -> Verification:
    """Compare the engine with naive re-runs, the k-th fault on image `image[k]`.

    With the measure `full`, outcome classes that differ are a near-tie where both logits agree
    within float rounding (`jfi.engine.close`). With `critical` and `detect`, critical or not is
    compared, and verdicts that differ are a near-tie where the two largest naive logits agree, or
    where naive logits are not finite.
    Everything else is a disagreement.
    """
    if not image.size:
        return Verification(0, 0, 0, 0)
    slow = naive(engine, faults, image)
    golden = naive(engine, _identities(engine, faults), image)
    codes = np.asarray(jit(classify)(golden, slow, engine.labels[image]))
    if measure == "full":
        fast = engine.pairs(faults, image)
        same, tied, certified = fast.codes == codes, close(fast.logits, slow), np.zeros(1)
    else:
        flags, certified = engine.critical_pairs(faults, image)
        same = (flags & CRITICAL) == (codes & CRITICAL)
        second, first = np.sort(slow, axis=1)[:, -2:].T
        with np.errstate(invalid="ignore"):
            # Of logits that overflow, the order of summation says which come out infinite or NaN.
            tied = (first - second <= rounding(slow)) | ~np.isfinite(slow).all(axis=1)
    bad = np.flatnonzero(~same & ~tied)
    agreements = int(same.sum())
    return Verification(
        image.size,
        agreements,
        image.size - agreements - bad.size,
        bad.size,
        int(certified.sum()),
        _describe(engine, take(faults, bad[:1]), image[bad[:1]], slow[bad[0]]) if bad.size else "",
    )


def _identities(engine: Engine, faults: Faults) -> Faults:
    """The same words and bits, stuck at the value they have: golden by the naive path."""
    polarity = np.empty_like(faults.polarity)
    for site, rows in by_site(faults, np.arange(faults.site.size)):
        words = bits.to_bits(engine.network.values(engine.sites[site])).ravel()
        words = words[faults.index[rows]]
        polarity[rows] = (words >> faults.bit[rows].astype(words.dtype)) & words.dtype.type(1)
    return faults._replace(polarity=polarity)


def _describe(engine: Engine, fault: Faults, image: np.ndarray, slow: np.ndarray) -> str:
    site, index, bit, polarity = (column[0] for column in fault)
    return (
        f"{engine.sites[site].name} index {index} bit {bit} {bits.POLARITIES[polarity]} on image "
        f"{image[0]}: logits {engine.pairs(fault, image).logits[0]}, naively {slow}"
    )
