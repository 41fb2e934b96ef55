"""Verification: random pairs of a campaign run again naively, by an independent path.

Naive means: bitcast the leaf, change the bit, run the whole network as the user wrote it, one
pair after another, in one compiled program for all sites. For faults in run-time values the
network is evaluated equation by equation, and the value broken where it is named. Nothing of the
splitting, the rank-one rules or neurons run alone is in it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jfi import bits
from jfi.engine.engine import Engine
from jfi.engine.golden import allowances
from jfi.engine.rounding import close, overflows, rounding
from jfi.faults import Faults, take
from jfi.hardware.chunks import chunks, filled_up
from jfi.hardware.compiling import jit
from jfi.networks import scans, taps
from jfi.networks.program import bind, run
from jfi.networks.sites import Network
from jfi.outcomes import CRITICAL, classify

_ON_RECORD = {-1: "", 0: "; on record as not critical", 1: "; on record as critical"}
BATCH = 32  # pairs with a run-time fault of one call, run one after another
IN_FLIGHT = 32  # runs under way before the first is read back
PATTERNS = 64  # of rounding, that a verdict is looked at under
SHAKEN = 1 << 18  # outputs that are moved at a time
AGAIN = 64  # disagreements that are run operation by operation at a time
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
    engine: Engine,
    faults: Faults,
    image: np.ndarray,
    *,
    harmless: bool = False,
    fused: bool = True,
) -> np.ndarray:
    """Logits [P, C] of the k-th fault on image `image[k]` by whole re-runs.

    Args:
      harmless: leave the faults out: golden, by the same program.
      fused: compiled as one program; otherwise operation by operation, for faults in parameters.
    """
    in_leaves = partial(_in_leaves, fused=fused)
    logits = np.empty((image.size, engine.golden.logits.shape[1]), engine.golden.logits.dtype)
    at_run_time = np.array([site.name not in engine.network.positions for site in engine.sites])
    in_values = at_run_time[faults.site]
    for some, of in ((~in_values, in_leaves), (in_values, _in_values)):
        rows = np.flatnonzero(some)
        if rows.size:
            logits[rows] = of(engine, take(faults, rows), image[rows], harmless)
    return logits


def _masks(engine: Engine, faults: Faults, harmless: bool) -> list[tuple[Any, Any]]:
    """The masks `(keep, change)` of each fault; those that change nothing if `harmless`."""
    found = []
    for number, bit, polarity in zip(faults.site, faults.bit, faults.polarity, strict=True):
        keep, change = bits.masks(engine.sites[number].dtype, bit, polarity)
        found.append((~np.zeros_like(keep), np.zeros_like(change)) if harmless else (keep, change))
    return found


def _broken(value, index, keep, change):
    """A copy with masks applied to one word, at a position in C order."""
    words = bits.to_bits(value).ravel()
    words = words.at[index].set(bits.mask(words[index], keep, change))
    return bits.from_bits(words, value.dtype).reshape(value.shape)


_broken_alone = jit(_broken)


def _in_leaves(
    engine: Engine, faults: Faults, image: np.ndarray, harmless: bool, fused: bool
) -> np.ndarray:
    """The network as the user wrote it, one program, with one word of a parameter broken."""
    network, leaves = engine.network, jax.device_put(engine.network.leaves)
    tree, apply = jax.tree.structure(network.params), network.apply
    if fused:
        apply = jit(apply)
    found = []
    masks = _masks(engine, faults, harmless)
    for number, index, own, k in zip(faults.site, faults.index, masks, image, strict=True):
        position = network.source(engine.sites[number])
        broken = _broken_alone(leaves[position], np.int32(index), *own)
        faulty = [*leaves[:position], broken, *leaves[position + 1 :]]
        found.append(apply(jax.tree.unflatten(tree, faulty), engine.images[k][None]))
        if len(found) > IN_FLIGHT:
            found[-IN_FLIGHT - 1] = np.asarray(found[-IN_FLIGHT - 1])
    return np.concatenate([np.asarray(row) for row in found])


def _in_values(engine: Engine, faults: Faults, image: np.ndarray, harmless: bool) -> np.ndarray:
    """The network, equation by equation, with one word of a named value broken as it is made."""
    network = engine.network
    names = list(network.taps)
    sites = [engine.sites[number] for number in faults.site]
    number = np.array([names.index(network.source(site).name) for site in sites], np.int32)
    at = [taps.moment(site, index) for site, index in zip(sites, faults.index, strict=True)]
    step, index = np.array(at, np.int32).T
    # Masks of all values as words of one width; each is cut to its own.
    widest = np.result_type(*(bits.word_dtype(tap.dtype) for tap in network.taps.values()))
    keep, change = np.array(_masks(engine, faults, harmless), widest).T
    one = partial(_in_value, network, names)
    run = jit(lambda leaves, pairs: jax.lax.map(lambda pair: one(leaves, pair), pairs))
    found, columns = [], (number, step, index, keep, change)
    for part in chunks(image.size, BATCH):
        own = (*(x[part] for x in columns), engine.images[image[part]])
        rows = [np.resize(x, (BATCH, *x.shape[1:])) for x in own]
        found.append(np.asarray(run(network.leaves, tuple(rows))))
    return np.concatenate(found)[: image.size]


def _in_value(network: Network, names: list[str], leaves, pair):
    """Logits [C] with the fault of one pair."""
    which, at, index, keep, change, x = pair
    made = dict.fromkeys(names, 0)

    def broken(start, name, value, later):
        if name not in made:
            return value
        due = (at == taps.EVERY_STEP) | (at == start[name] + later)
        own = bits.word_dtype(value.dtype)
        faulty = _broken(value, index, keep.astype(own), change.astype(own))
        return jnp.where(due & (which == names.index(name)), faulty, value)

    def evaluate(eqn, values):
        start = dict(made)
        for name in names:
            made[name] += taps.steps(eqn, name)
        if start == made:
            return bind(eqn, values)
        scan = scans.read(eqn)
        if scan is None:
            return [broken(start, eqn.params["name"], values[0], 0)]
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
    within float rounding, or neither are finite (`jfi.engine.rounding.close`). With `critical` and
    `detect`, critical or not is compared, and verdicts that differ are a near-tie where the two
    largest naive logits agree, or where neither the naive logits nor the engine's are finite.
    So are pairs of which the naive network, run operation by operation, says what the engine does:
    XLA contracts a product and a sum to one rounding, which large values can turn into an overflow.
    Everything else is a disagreement.

    Args:
      faults, image: P pairs, the k-th fault on image `image[k]`.
      recorded: int8 [P], what was recorded of them: critical 1, not critical 0, unsaid -1. It is
        compared as the engine's `critical` is.
    """
    faults, image = engine.check_pairs(faults, image)
    if not image.size:
        return Verification(0, 0, 0, 0)
    if recorded is None:
        recorded = np.full(image.size, -1)
    if measure == "full":
        told = _Told(*engine.pairs(faults, image), np.zeros(image.size, bool), recorded)
    else:
        codes, certified = engine.critical_pairs(faults, image)
        told = _Told(codes, None, certified, recorded)
    slow = naive(engine, faults, image)
    same, tied = _compared(engine, faults, image, told, slow)
    odd = np.flatnonzero(~same & ~tied)
    for part in chunks(odd.size, AGAIN):
        own = odd[part]
        again = take(faults, own), image[own], _Told(*(x if x is None else x[own] for x in told))
        right, near = _compared(engine, *again, naive(engine, *again[:2], fused=False))
        tied[own] = right | near
        if not tied[own].all():
            break  # one that stays is enough to fail
    bad = np.flatnonzero(~same & ~tied)
    agreements = int(same.sum())
    worst = ""
    if bad.size:
        first = take(faults, bad[:1]), image[bad[:1]]
        worst = _describe(engine, *first, slow[bad[0]], recorded[bad[0]])
    return Verification(
        image.size,
        agreements,
        image.size - agreements - bad.size,
        bad.size,
        int(told.certified.sum()),
        worst,
    )


class _Told(NamedTuple):
    """What the engine says of P pairs: codes, logits [P, C] of the measure full, certified; and
    what is on record."""

    codes: np.ndarray
    logits: np.ndarray | None
    certified: np.ndarray
    recorded: np.ndarray


def _compared(
    engine: Engine, faults: Faults, image: np.ndarray, told: _Told, slow: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """bool [P]: what is told is what naive logits `slow` [P, C] say; it is a near-tie."""
    golden = naive(engine, faults, image, harmless=True)
    by = partial(classify, by=engine.by)
    codes = np.asarray(jit(by)(golden, slow, engine.labels[image]))
    known, own = np.unique(image, return_inverse=True)
    least = allowances(engine.network, engine.images[known])[own]
    critical = (codes & CRITICAL) != 0
    if told.logits is not None:
        same, tied = told.codes == codes, close(told.logits, slow, least)
    else:
        same = ((told.codes & CRITICAL) != 0) == critical
        # What a certificate decided can't be excused by logits that overflow.
        tied = _is_tied(engine, faults, image, (golden, slow), least, ~same, ~told.certified)
    known = (told.recorded < 0) | ((told.recorded > 0) == critical)
    pair = golden, slow
    tied = (same | tied) & (known | _is_tied(engine, faults, image, pair, least, ~known))
    return same & known, tied


def _is_tied(engine: Engine, faults, image, pair, least, odd, overflowing=True) -> np.ndarray:
    """bool [P]: rounding may decide of the naive outputs, or neither these nor the engine's are
    finite.

    Args:
      pair: golden and faulty outputs [P, N], naively.
      odd: bool [P], the pairs that are asked for.
      overflowing: bool [P], whether the second counts.
    """
    golden, slow = pair
    tied, asked = np.zeros(len(slow), bool), np.flatnonzero(odd)
    decides = jit(partial(_decides, engine.by.critical))
    size = max(1, min(BATCH, SHAKEN // slow.shape[1]))
    for part in chunks(asked.size, size):
        some = filled_up(asked[part], size)
        off = np.maximum(rounding(slow[some]), least[some]).astype(slow.dtype)
        tied[asked[part]] = np.asarray(decides(golden[some], slow[some], off))[
            : part.stop - part.start
        ]
    some = np.flatnonzero(odd & overflows(slow) & overflowing)
    tied[some] |= overflows(engine.pairs(take(faults, some), image[some]).logits)
    return tied


def _decides(critical, golden, slow, off):
    """bool [P]: moving outputs [P, N] by half of `off` [P], up or down at random, tells otherwise.

    Two that are nearer than `off` pass each other in one of four patterns.
    """
    signs = np.random.default_rng(0).choice([-1, 1], (PATTERNS, slow.shape[1]))

    def one(golden, slow, off):
        told = critical(golden, slow)
        moved = jax.vmap(lambda sign: critical(golden, slow + sign * (off / 2)))
        return (moved(jnp.asarray(signs, slow.dtype)) != told).any()

    return jax.vmap(one)(golden, slow, off)


def _describe(engine: Engine, fault: Faults, image: np.ndarray, slow: np.ndarray, told) -> str:
    site, index, bit, polarity = (column[0] for column in fault)
    return (
        f"{engine.sites[site].name} index {index} bit {bit} {bits.POLARITIES[polarity]} on image "
        f"{image[0]}: logits {engine.pairs(fault, image).logits[0]}, naively {slow}"
        f"{_ON_RECORD[int(told)]}"
    )
