"""Certified radii of all words of a site, made where they pay, and kept.

A word that changes by less than its radius on an image keeps top-1 there
(`jfi.engine.certify.radii`), so that pair is not run at all. A leaf has radii if it enters one
product, as it is or laid out anew (the x @ w.T of a PyTorch Linear). Biases, scales and what is
used twice have none, and are run.

Radii cost a pass forth and back through the rest of the network for every scale: they are made
once the pairs that came by would have paid for them, the rule that is never more than twice as
dear as knowing the future (ski rental: Karlin et al., 1988).
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jfi import bits
from jfi.criteria.criterion import Constraints
from jfi.engine import certify
from jfi.hardware.chunks import chunks, filled_up
from jfi.hardware.devices import SPREAD, Hardware
from jfi.networks.program import Program, flops, nbytes, run, section

GROUP = 8  # images that radii are made of at a time, where there is room
RADII = 4  # arrays like the leaf that one image and scale take
COMPILE = 1 << 37  # operations in the time that compiling takes
WORDS = 256  # words on which it is seen what share of flips radii certify
HOPED = 0.5  # that share before it is seen


class Shelf:
    """Arrays by key, of at most so many bytes: what has not been used for longest goes."""

    def __init__(self, most: int):
        self._most, self._arrays = most, OrderedDict()

    def get(self, key: Hashable) -> np.ndarray | None:
        """The array kept under a key, or None."""
        if key in self._arrays:
            self._arrays.move_to_end(key)
        return self._arrays.get(key)

    def put(self, key: Hashable, array: np.ndarray) -> None:
        """Keep an array, if it fits at all."""
        self._arrays[key] = array
        while sum(kept.nbytes for kept in self._arrays.values()) > self._most:
            self._arrays.popitem(last=False)


class Radii:
    """Certified radii of one site, as codes that compare like them (`code`).

    Args:
      program, leaves: the network, up to its scores.
      constraints: of the scores, that are to be kept.
      leaf: the parameter leaf of the site.
      pair_flops: operations that a pair takes that is not certified.
      hardware: what to make them on.
      shelf: where codes are kept, shared by all sites.
      allowances: `rounding.allowances` of the program, compiled.
      memory: bytes that making them may take, about; at least what one image and scale take.
    """

    def __init__(
        self,
        program: Program,
        constraints: Callable[[Any], Constraints],
        leaves: Sequence[Any],
        leaf: int,
        pair_flops: int,
        hardware: Hardware,
        shelf: Shelf,
        allowances: Callable[[Any, Any], Any],
        memory: int,
    ):
        self._leaves, self._leaf, self._shelf = leaves, leaf, shelf
        self._allowances = allowances
        self._product, self._constraints = certify.product(program, leaf), constraints
        self._pair_flops, self._owed = pair_flops, defaultdict(float)
        self._share: float | None = None
        if self._product is not None and not self._can_be_made(program):
            self._product = None
        if self._product is not None:
            rest = section(program, self._product.outvars[0])
            self._flops = 2 * len(certify.SCALES) * flops(rest.eqns)
            one = certify.footprint(rest) + RADII * nbytes(program.leaves[leaf].aval)
            group, scales = shared_out(memory // one, GROUP, hardware.count)
            self._group = group
            made = partial(_radii, program, constraints, self._product, leaf, scales)
            self._make = hardware.jit_golden(made, SPREAD)

    def _can_be_made(self, program: Program) -> bool:
        """Whether JAX can map the gradients; of grouped, strided convolutions it can't."""
        rest = section(program, self._product.outvars[0])
        groups = (e.params.get("feature_group_count", 1) for e in (self._product, *rest.eqns))
        if max(groups) == 1:
            return True
        images = jax.ShapeDtypeStruct((1, *program.x.aval.shape[1:]), program.x.aval.dtype)
        try:
            allowance = jax.ShapeDtypeStruct((1,), program.out.aval.dtype)
            made = partial(_radii, program, self._constraints, self._product, self._leaf, 1)
            jax.eval_shape(made, self._leaves, (images, allowance))
        except NotImplementedError:
            return False
        return True

    def where_worth(self, key: Hashable, images: np.ndarray, faults: int) -> np.ndarray | None:
        """Codes [words, b] for images [b, ...]; None while they would cost more than they save.

        Args:
          key: names the images.
          faults: how many faults come by.
        """
        found = self._shelf.get((self._leaf, key))
        if found is None and self._is_worth(key, len(images), faults):
            return self.keep(key, images)
        return found

    def keep(self, key: Hashable, images: np.ndarray) -> np.ndarray | None:
        """`codes` of the images named `key`, made now and kept."""
        found = self.codes(images)
        if found is not None:
            self._shelf.put((self._leaf, key), found)
        return found

    def _is_worth(self, key: Hashable, images: int, faults: int) -> bool:
        if self._product is None:
            return False
        self._owed[key] += images * faults * self._pair_flops
        share, compiling = (HOPED, COMPILE) if self._share is None else (self._share, 0)
        return self._owed[key] * share > images * self._flops + compiling

    def codes(self, images: np.ndarray) -> np.ndarray | None:
        """Codes [words, b] for images [b, ...]; None where the site has no radii."""
        if self._product is None:
            return None
        made = []
        for part in chunks(len(images), self._group):
            group = filled_up(images[part], self._group)
            rows = group, np.asarray(self._allowances(self._leaves, group))
            made.append(code(np.asarray(self._make(self._leaves, rows))))
        found = np.concatenate(made)[: len(images)].reshape(len(images), -1).T
        if self._share is None:
            self._share = self._certified(found)
        return np.ascontiguousarray(found)

    def _certified(self, codes: np.ndarray) -> float:
        """Share of all single-bit flips of some of the words that are certified."""
        words = np.asarray(self._leaves[self._leaf]).ravel()
        some = np.linspace(0, words.size - 1, min(WORDS, words.size)).astype(int)
        golden = words[some][:, None]
        flipped = bits.faulty(golden, np.arange(bits.width(words.dtype)), bits.FLIP)
        return float((code(distance(flipped, golden))[..., None] < codes[some, None]).mean())


def distance(faulty: np.ndarray, golden: np.ndarray) -> np.ndarray:
    """float64: how far words are from golden; infinite or NaN where they are not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.abs(faulty.astype(np.float64) - golden.astype(np.float64))


def code(x: np.ndarray) -> np.ndarray:
    """uint16 that order as non-negative numbers do: the upper half of their float32.

    code(a) < code(b) means a < b (what rounding to float32 takes is within `certify.LIMIT`); NaN
    comes last.
    """
    with np.errstate(over="ignore"):
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def shared_out(room: int, images: int, devices: int) -> tuple[int, int]:
    """How many images and scales to take at a time, on all devices.

    Args:
      room: how many images times scales there is room for.
      images: the most that are of use, rounded up to one a device.
    """
    scales = len(certify.SCALES)
    most = -(-images // devices) * devices
    group = min(most, max(devices, room // scales // devices * devices))
    return group, min(scales, max(1, room // group))


def _radii(program: Program, constraints, product, leaf: int, scales: int, leaves, rows):
    """Certified radii [b, *leaf.shape] (`certify.radii`); rows: images and their allowances."""

    def one(image, allowance):
        env = run(program, leaves, image[None])
        leaf_var = program.leaves[leaf]
        return certify.radii(program, env, product, leaf_var, allowance, constraints, scales)

    return jax.vmap(one)(*rows)
