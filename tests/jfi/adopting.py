"""What tests of adopted networks share: a small campaign, every verdict against a naive re-run."""

import numpy as np

import jfi
from jfi import bits
from jfi.faults import Faults
from jfi.hardware.compiling import jit

NEAR = 1e-4  # of the largest logit: summed in another order, the answer may be another


def flips(sites, most=150):
    """About so many flips in words of every site, half of them of the sign or the exponent."""
    rng, rows = np.random.default_rng(0), []
    for number, site in enumerate(sites):
        some = max(2, most // len(sites))
        bit = rng.integers(site.width, size=some)
        bit[::2] = site.width - 1 - rng.integers(min(9, site.width), size=len(bit[::2]))
        rows.append(np.stack([np.full(some, number), rng.integers(site.words, size=some), bit]))
    site, index, bit = np.concatenate(rows, axis=1)
    flip = np.full(site.size, bits.FLIP)
    return Faults(
        site.astype(np.int32), index.astype(np.int64), bit.astype(np.int16), flip.astype(np.int8)
    )


def broken(values, index, bit):
    """A copy with one bit of one word flipped."""
    words = np.array(values)
    flat = words.reshape(-1).view(f"u{words.itemsize}")
    flat[index] ^= flat.dtype.type(1 << int(bit))
    return words


def in_jax(network):
    """Naive: `(name, words) -> images -> logits`, the adopted function as a whole."""
    import jax

    run, tree = jit(network.apply), jax.tree.structure(network.params)

    def rerun(name, words, images):
        leaves = list(network.leaves)
        leaves[network.positions[name]] = words
        return run(jax.tree.unflatten(tree, leaves), images)

    return rerun


def check_campaign(network, images, rerun=None, *, most=150, floor=5, loop=True):
    """Every verdict of a campaign on all sites is that of a naive re-run.

    Args:
      rerun: `(site's name, its words, images) -> logits`; by the adopted function if None.
      loop: run faults one by one through the whole network, which takes little compiling.
      floor: least number of clear critical pairs, so that the check could fail.
    """
    images, rerun = np.asarray(images), rerun or in_jax(network)
    sites = network.parameters
    faults = flips(sites, most)
    engine = jfi.Engine(network, images, np.zeros(len(images), int), sites, loop=loop)
    golden = engine.golden.logits
    found = np.unpackbits(engine.run(faults, "critical", keep_bits=True).critical_bits, axis=1)
    found = found[:, : len(images)].astype(bool)
    logits = []
    for site, index, bit in zip(faults.site, faults.index, faults.bit, strict=True):
        words = broken(network.values(sites[site]), index, bit)
        logits.append(np.asarray(rerun(sites[site].name, words, images)))
    logits = np.array(logits).astype(np.float64)
    right = logits.argmax(axis=-1) != golden.argmax(axis=-1)
    assert np.ptp(golden, axis=0).max() > 0
    clear = ~near_ties(logits) & ~near_ties(golden[None])
    assert floor <= right[clear].sum() < 0.9 * right.size
    wrong = np.argwhere((found != right) & clear)
    assert not wrong.size, f"{len(wrong)} of {right.size} wrong, first {wrong[0]}"


def near_ties(logits):
    """bool [F, B]: the answer hangs on how sums are rounded."""
    with np.errstate(invalid="ignore", over="ignore"):
        second, first = np.sort(logits, axis=-1)[..., -2:].transpose(2, 0, 1)
        size = np.abs(logits).max(axis=-1)
        return (first - second <= NEAR * size) | ~np.isfinite(logits).all(axis=-1)
