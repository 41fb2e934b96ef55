"""Verification: random pairs of a campaign run again naively, by an independent path.

Naive means: bitcast the leaf, change the bit, run the whole network as the user wrote it, one
pair after another, in one compiled program. For a fault in a run-time value the network is
evaluated equation by equation, and the value broken where it is named. Nothing of the splitting,
the rank-one rules or neurons run alone is in it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jfi import bits, scans, taps
from jfi.compiling import jit
from jfi.engine import Engine, by_site, take
from jfi.faults import Faults, Site
from jfi.golden import allowances
from jfi.outcomes import CRITICAL, classify
from jfi.program import bind, run
from jfi.rounding import close, overflows, rounding
from jfi.sites import Network
from jfi.taps import Tap

_ON_RECORD = {-1: "", 0: "; on record as not critical", 1: "; on record as critical"}
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


def naive(
    engine: Engine, faults: Faults, image: np.ndarray, *, harmless: bool = False
) -> np.ndarray:
    """Logits [P, C] of the k-th fault on image `image[k]` by whole re-runs.

    Args:
      harmless: put masks in the faults' places that change nothing: golden, by the same program.
    """
    logits = np.empty((image.size, engine.golden.logits.shape[1]), engine.golden.logits.dtype)
    for number, rows in by_site(faults, np.arange(image.size)):
        site = engine.sites[number]
        program = _program(engine, site)
        for start in range(0, rows.size, BATCH):
            part = rows[start : start + BATCH]
            full = np.resize(part, BATCH)
            keep, change = bits.masks(site.dtype, faults.bit[full], faults.polarity[full])
            if harmless:
                keep, change = np.full_like(keep, ~keep.dtype.type(0)), np.zeros_like(change)
            step, index = taps.moment(site, faults.index[full])
            where = step.astype(np.int32), index.astype(np.int32)
            pairs = (*where, keep, change, engine.images[image[full]])
            logits[part] = np.asarray(program(engine.network.leaves, pairs))[: part.size]
    return logits


def _program(engine: Engine, site: Site):
    """Compiled: (leaves, pairs) -> logits [BATCH, C] for faults in one site."""
    source = engine.network.source(site)
    one = _in_value if isinstance(source, Tap) else _in_leaf
    run = partial(one, engine.network, source)
    return jit(lambda leaves, pairs: jax.lax.map(lambda pair: run(leaves, pair), pairs))


def _broken(value, index, keep, change):
    """A copy with masks applied to one word, at a position in C order."""
    words = bits.to_bits(value).ravel()
    words = words.at[index].set(bits.mask(words[index], keep, change))
    return bits.from_bits(words, value.dtype).reshape(value.shape)


def _in_leaf(network: Network, position: int, leaves, pair):
    """The network as the user wrote it, with one word of a parameter broken."""
    _, index, keep, change, x = pair
    leaves = list(leaves)
    leaves[position] = _broken(leaves[position], index, keep, change)
    tree = jax.tree.structure(network.params)
    return network.apply(jax.tree.unflatten(tree, leaves), x[None])[0]


def _in_value(network: Network, tap: Tap, leaves, pair):
    """The network, equation by equation, with one word of a named value broken as it is made."""
    at, index, keep, change, x = pair
    now = 0

    def broken(start, name, value, later):
        if name != tap.name:
            return value
        due = (at == taps.EVERY_STEP) | (at == start + later)
        return jnp.where(due, _broken(value, index, keep, change), value)

    def evaluate(eqn, values):
        nonlocal now
        start, now = now, now + taps.steps(eqn, tap.name)
        if start == now:
            return bind(eqn, values)
        scan = scans.read(eqn)
        if scan is None:
            return [broken(start, tap.name, values[0], 0)]
        return scans.run(scan, values, {}, partial(broken, start))

    return run(network.program, leaves, x[None], evaluate)[network.program.out][0]


def verify(
    engine: Engine,
    faults: Faults,
    image: np.ndarray,
    measure: str = "full",
    recorded: np.ndarray | None = None,
) -> Verification:
    """Compare the engine, and what is on record, with naive re-runs.

    With the measure `full`, outcome classes that differ are a near-tie where both logits agree
    within float rounding, or neither are finite (`jfi.rounding.close`). With `critical` and
    `detect`, critical or not is compared, and verdicts that differ are a near-tie where the two
    largest naive logits agree, or where neither the naive logits nor the engine's are finite.
    Everything else is a disagreement.

    Args:
      faults, image: P pairs, the k-th fault on image `image[k]`.
      recorded: int8 [P], what was recorded of them: critical 1, not critical 0, unsaid -1. It is
        compared as the engine's `critical` is.
    """
    faults, image = engine.check_pairs(faults, image)
    if not image.size:
        return Verification(0, 0, 0, 0)
    slow = naive(engine, faults, image)
    golden = naive(engine, faults, image, harmless=True)
    codes = np.asarray(jit(classify)(golden, slow, engine.labels[image]))
    known, own = np.unique(image, return_inverse=True)
    least = allowances(engine.network, engine.images[known])[own]
    critical = (codes & CRITICAL) != 0
    if measure == "full":
        fast = engine.pairs(faults, image)
        same, tied, certified = fast.codes == codes, close(fast.logits, slow, least), np.zeros(1)
    else:
        flags, certified = engine.critical_pairs(faults, image)
        same = ((flags & CRITICAL) != 0) == critical
        # What a certificate decided can't be excused by logits that overflow.
        tied = _is_tied(engine, faults, image, slow, least, ~same, ~certified)
    if recorded is not None:
        known = (recorded < 0) | ((recorded > 0) == critical)
        tied = (same | tied) & (known | _is_tied(engine, faults, image, slow, least, ~known))
        same &= known
    bad = np.flatnonzero(~same & ~tied)
    agreements = int(same.sum())
    worst = ""
    if bad.size:
        told = -1 if recorded is None else recorded[bad[0]]
        worst = _describe(engine, take(faults, bad[:1]), image[bad[:1]], slow[bad[0]], told)
    return Verification(
        image.size,
        agreements,
        image.size - agreements - bad.size,
        bad.size,
        int(certified.sum()),
        worst,
    )


def _is_tied(engine: Engine, faults, image, slow, least, odd, overflowing=True) -> np.ndarray:
    """bool [P]: the largest naive logits agree, or neither these nor the engine's are finite.

    Args:
      odd: bool [P], the pairs that are asked for.
      overflowing: bool [P], whether the second counts.
    """
    second, first = np.sort(slow, axis=1)[:, -2:].T
    with np.errstate(invalid="ignore"):
        tied = first - second <= np.maximum(rounding(slow), least)
    some = np.flatnonzero(odd & overflows(slow) & overflowing)
    tied[some] |= overflows(engine.pairs(take(faults, some), image[some]).logits)
    return tied


def _describe(engine: Engine, fault: Faults, image: np.ndarray, slow: np.ndarray, told) -> str:
    site, index, bit, polarity = (column[0] for column in fault)
    return (
        f"{engine.sites[site].name} index {index} bit {bit} {bits.POLARITIES[polarity]} on image "
        f"{image[0]}: logits {engine.pairs(fault, image).logits[0]}, naively {slow}"
        f"{_ON_RECORD[int(told)]}"
    )
