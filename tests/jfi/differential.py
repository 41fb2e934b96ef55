"""Random networks, every measure judged by a naive jitted re-run.

    python tests/jfi/differential.py --minutes 60 --seed 0

Of random words of random leaves every bit is flipped, and some are stuck. What is right is said by
writing the faulty word into the leaf and running the whole network on all images. Left out are
pairs whose answer float rounding can move: naive runs whose every operand is moved by an epsilon
(`jfi.engine.rounding.shaken`) tell which; few of these may differ. Nor is anything sure of which
the naive network says one thing compiled and another operation by operation. Networks run on one
and two devices in turn. Ends with status 1 at a wrong verdict or an error.
"""

import argparse
import itertools
import operator
import os
import sys
import time
import traceback
from functools import partial
from typing import NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")

import jax
import numpy as np
from random_networks import IMAGES, Net, draw

import jfi
from jfi import bits
from jfi.engine import rounding, routes, verify
from jfi.faults import Faults
from jfi.hardware.compiling import jit
from jfi.hardware.devices import hardware

MEASURES = ("full", "critical", "detect", "radii", "loop")
WORDS, MOST_SITES, SHAKES, VERIFIED, BOUNDARY = 8, 3, 3, 40, 24
FEW, EXCUSED = 1, 0.002  # verdicts on doubtful pairs that may differ, in all and of them
FAR, LEAST = 4, 1e-5  # a verdict is sure from so many spreads, and this share of the logits, on


class Naive:
    """The network run as it was drawn, and with every operand moved by an epsilon."""

    def __init__(self, net: Net, program):
        self.net, self._plain = net, jit(net.apply)

        def shaken(params, image, seed):
            return rounding.shaken(program, jax.tree.leaves(params), image[None], seed)[0]

        over_images = jax.vmap(shaken, (None, 0, None))
        self._shaken = jit(jax.vmap(over_images, (None, None, 0)))
        self.golden = self.logits({})
        self.certain = certain(self.golden[None], self.shakes({})[None])[0]

    def logits(self, faulty: dict[str, np.ndarray]) -> np.ndarray:
        """[B, C], some leaves replaced."""
        return np.asarray(self._plain({**self.net.params, **faulty}, self.net.images))

    def shakes(self, faulty: dict[str, np.ndarray]) -> np.ndarray:
        """[S, B, C], the same shaken."""
        seeds = np.arange(SHAKES, dtype=np.uint32)
        return np.asarray(self._shaken({**self.net.params, **faulty}, self.net.images, seeds))

    def judged(self, leaves) -> "Right":
        """What is right of F faulty leaves, each a dict of one."""
        logits = np.array([self.logits(leaf) for leaf in leaves])
        shakes = np.array([self.shakes(leaf) for leaf in leaves])
        critical = logits.argmax(-1) != self.golden.argmax(-1)
        with np.errstate(invalid="ignore"):
            off = np.abs(logits.astype(float) - self.golden)
            moved = (off > allowed(logits, shakes)[..., None]).any(-1)
        sure = certain(logits, shakes) & self.certain
        clear = is_clear(logits) & np.isfinite(shakes).all((1, 3)) & is_clear(self.golden)
        return Right(logits, critical, sure, clear & ~sure, moved)

    def apart(self, right: "Right", rows, leaves) -> "Right":
        """`right`, without what a run operation by operation contradicts; of the faults `rows`."""
        golden = np.asarray(self.net.apply(self.net.params, self.net.images)).argmax(-1)
        agree = np.ones(right.sure.shape, bool)
        for row in rows:
            logits = self.net.apply({**self.net.params, **leaves[row]}, self.net.images)
            agree[row] = (np.asarray(logits).argmax(-1) != golden) == right.critical[row]
        return right._replace(sure=right.sure & agree, doubtful=right.doubtful & agree)


class Right(NamedTuple):
    """What naive runs say of F faults on B images.

    logits [F, B, C]; critical, sure bool [F, B]: whether it is, and whether rounding can't move it;
    doubtful: only few bits on the way make it unsure; moved: the logits differ by more than that.
    """

    logits: np.ndarray
    critical: np.ndarray
    sure: np.ndarray
    doubtful: np.ndarray
    moved: np.ndarray


def allowed(logits, shakes) -> np.ndarray:
    """[F, B]: how far rounding may move logits [F, B, C], of which `shakes` [F, S, B, C] tell."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(shakes.astype(float) - logits[:, None]).max((1, 3))
        return FAR * apart + LEAST * np.maximum(1, np.abs(logits).max(-1))


def is_clear(logits) -> np.ndarray:
    """bool: logits [..., C] are finite, and no tie within what the rounding of their type does."""
    with np.errstate(invalid="ignore"):
        second, first = np.moveaxis(np.sort(logits.astype(float), -1)[..., -2:], -1, 0)
        return np.isfinite(logits).all(-1) & (first - second > rounding.rounding(logits))


def certain(logits, shakes) -> np.ndarray:
    """bool [F, B]: the answer is clear, or not finite in the same way in all runs."""
    with np.errstate(invalid="ignore"):
        second, first = np.sort(logits.astype(float), -1)[..., -2:].transpose(2, 0, 1)
        clear = first - second > allowed(logits, shakes)
    finite = np.isfinite(logits).all(-1) & np.isfinite(shakes).all((1, 3))
    alike = (_kind(logits)[:, None] == _kind(shakes)).all((1, 3)) & ~np.isfinite(logits).all(-1)
    return np.where(finite, clear, alike)


def _kind(values) -> np.ndarray:
    """0 of finite numbers, 1 and -1 of infinities, 7 of NaN."""
    return np.where(np.isfinite(values), 0, np.nan_to_num(values, nan=7, posinf=1, neginf=-1))


def faults_of(rng: np.random.Generator, sites) -> Faults:
    """Every bit of random words, flipped and (some) stuck."""
    rows = []
    for _ in range(WORDS):
        number = int(rng.integers(len(sites)))
        index = int(rng.integers(sites[number].words))
        rows += [(number, index, bit, bits.FLIP) for bit in range(sites[number].width)]
        rows += [(number, index, bit, bit % 2) for bit in range(sites[number].width)[::5]]
    types = (np.int32, np.int64, np.int16, np.int8)
    columns = zip(zip(*rows, strict=True), types, strict=True)
    return Faults(*(np.array(column, kind) for column, kind in columns))


def broken(params: dict, site, index: int, bit: int, polarity: int) -> dict[str, np.ndarray]:
    """The leaf of a site with one bit broken, by name."""
    leaf = np.array(params[site.name])
    word = leaf.reshape(-1).view(f"u{leaf.itemsize}")
    one = word.dtype.type(1 << int(bit))
    low, high = word[index] & ~one, word[index] | one
    word[index] = {bits.FLIP: word[index] ^ one, bits.STUCK_AT_0: low, bits.STUCK_AT_1: high}[
        int(polarity)
    ]
    return {site.name: leaf}


def at_the_boundary(rng, engine, naive: Naive) -> str:
    """The first word that is moved by just less than its radius and changes the answer; or ""."""
    top = naive.golden.argmax(-1)
    for number, site in enumerate(engine.sites):
        codes = engine._cut_to_cut.pruner.starts[number].radii.codes(engine.images)
        if codes is None:
            continue
        radii = (codes.astype(np.uint32) << 16).view(np.float32)  # rounded down
        golden = engine.network.values(site)
        for index in rng.permutation(site.words)[:BOUNDARY]:
            for image, sign in itertools.product(range(0, IMAGES, 5), (-1, 1)):
                leaf = golden.copy()
                leaf.flat[index] += sign * np.float32(0.999) * radii[index, image]
                faulty = {site.name: leaf}
                if naive.logits(faulty)[image].argmax() == top[image]:
                    continue
                if naive.judged([faulty]).sure[0, image]:
                    return f"{site.name} index {index}, {sign} x 0.999 x {radii[index, image]}"
    return ""


class Verdict(NamedTuple):
    """Of one network: pairs judged by each measure, and what is wrong.

    unsure: pairs that rounding may decide. apart: verdicts that are not the naive one, on those of
    them that only few bits on the way excuse.
    """

    pairs: int
    unsure: int
    apart: int
    wrong: list[str]


# Loops of one leaf too, which so small networks don't pay for.
@mock.patch.multiple(routes, PROGRAM=0, LINE=0)
def judge(seed: int, focus: tuple[str, ...] = (), devices: int = 1) -> Verdict:
    """Run the network of a seed by every measure."""
    net = draw(seed, focus)
    rng = np.random.default_rng([seed, 1])
    network = jfi.network(net.apply, net.params, net.images[0])
    known = network.parameters
    sites = tuple(known[k] for k in sorted(rng.permutation(len(known))[:MOST_SITES]))
    faults = faults_of(rng, sites)
    naive = Naive(net, network.program)
    leaves = [
        broken(net.params, sites[number], *rest) for number, *rest in zip(*faults, strict=True)
    ]
    right = naive.judged(leaves)
    own = hardware(jax.local_devices()[:devices])
    labels = np.zeros(IMAGES, int)
    engine, loop = (
        jfi.Engine(network, net.images, labels, sites, hardware=own, loop=way)
        for way in (False, True)
    )
    wrong, apart = [], 0
    for measure in MEASURES:
        judged = partial(_judged, loop if measure == "loop" else engine, faults)
        bad, other = judged(right, measure)
        odd = np.flatnonzero(bad.any(1) | other.any(1))
        if odd.size:
            right = naive.apart(right, odd, leaves)
            bad, other = judged(right, measure)
        apart += int(other.sum())
        if bad.any():
            row, *image = np.argwhere(bad)[0]
            wrong.append(
                f"{measure}: {bad.sum()} of {bad.size} wrong, first "
                f"{[int(column[row]) for column in faults]} on {image}: naively {right.logits[row]}"
            )
    if apart > FEW + EXCUSED * right.doubtful.sum():
        wrong.append(f"{apart} verdicts differ on {right.doubtful.sum()} doubtful pairs")
    if found := at_the_boundary(rng, engine, naive):
        wrong.append(f"radius of {found}")
    checked = rng.permutation(faults.site.size)[:VERIFIED]
    some = Faults(*(column[checked] for column in faults))
    done = verify.verify(engine, some, rng.integers(0, IMAGES, checked.size), "critical")
    if done.disagreements:
        wrong.append(f"verification: {done.worst}")
    where = f"seed {seed}, {devices} devices, {net.words}: "
    return Verdict(
        right.sure.size, int((~right.sure).sum()), apart, [where + line for line in wrong]
    )


def _judged(engine, faults: Faults, right: Right, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """bool: which verdicts of a measure are wrong, and which differ where rounding may decide."""
    if measure == "radii":
        engine.make_radii()
    detect, own = measure == "detect", {"radii": "critical", "loop": "full"}
    done = engine.run(faults, own.get(measure, measure), keep_bits=not detect)
    if detect:
        surely = (right.critical & right.sure).any(1)
        never = (~right.critical & right.sure).all(1)
        wrong = np.where(done.critical > 0, never, surely)[:, None]
        return wrong, np.zeros_like(wrong)

    def unpacked(packed):
        return np.unpackbits(packed, axis=1)[:, :IMAGES].astype(bool)

    differ = unpacked(done.critical_bits) != right.critical
    bad = differ & right.sure
    if own.get(measure, measure) == "full":
        bad |= unpacked(done.masked_bits) & right.moved & right.sure
    return bad, differ & right.doubtful


class Total(NamedTuple):
    """Of many networks, as of `Verdict`; refused: networks that the project says it can't take."""

    programs: int
    refused: int
    pairs: int
    unsure: int
    apart: int
    wrong: list[str]


def search(seeds, *, until: float = np.inf, focus: tuple[str, ...] = (), devices=(1,)) -> Total:
    """Judge the networks of `seeds` until the clock (`time.monotonic`) says `until`."""
    total = Total(0, 0, 0, 0, 0, [])
    for seed in seeds:
        if time.monotonic() > until:
            break
        try:
            found = judge(seed, focus, devices[seed % len(devices)])
        except jfi.InputError as error:
            print(f"seed {seed} refused: {error}", flush=True)
            total = total._replace(refused=total.refused + 1)
            continue
        except Exception:
            found = Verdict(0, 0, 0, [f"seed {seed}: {traceback.format_exc()}"])
        for line in found.wrong:
            print(line, flush=True)
        total = Total(total.programs + 1, total.refused, *map(operator.add, total[2:], found))
        jax.clear_caches()
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first network")
    parser.add_argument("--programs", type=int, default=10**9)
    parser.add_argument("--minutes", type=float, default=np.inf)
    args = parser.parse_args()
    seeds = range(args.seed, args.seed + args.programs)
    total = search(seeds, until=time.monotonic() + 60 * args.minutes, devices=(1, 2))
    print(
        f"{total.programs} programs, {total.refused} refused, {len(MEASURES)} measures of "
        f"{total.pairs} pairs; rounding may decide {total.unsure}, {total.apart} doubtful verdicts "
        f"differ; {len(total.wrong)} wrong"
    )
    return 1 if total.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
