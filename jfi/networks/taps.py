"""Run-time values as sites: named in the network, broken as they are computed.

A network names a value with JAX's own `jax.ad_checkpoint.checkpoint_name(value, "lif1/spike")`,
which changes nothing. A value named in a loop over time (`lax.scan`), or several times under one
name, is one place that holds a new value at each step.

Steps are counted as computed, those that the logits depend on; of a loop in reverse, by their
place in time. Names within a loop in a loop, a `while` or a `cond` are not seen.

A permanent fault breaks it at every step, right after it is computed; a transient one at one step.
The name of the site tells which: `lif1/spike` is permanent; `lif1/spike@step` transient, and its
words are those of all steps, time first; `lif1/spike@37` transient at step 37.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jfi import bits
from jfi.errors import InputError
from jfi.faults import Faults, Site
from jfi.networks import scans
from jfi.networks.program import Program

EVERY_STEP = -1
DRAWN = "step"  # after the @ of a site whose faults strike at a step that is drawn


class Tap(NamedTuple):
    """A named value: shape and dtype for one image at one step, and how many steps there are."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    steps: int


class Injection(NamedTuple):
    """One fault in a named value.

    at: index on every axis, None on those of size 1; keep, change: masks (`jfi.bits.masks`);
    step: when, or `EVERY_STEP`.
    """

    name: str
    at: tuple[Any, ...]
    keep: Any
    change: Any
    step: Any

    def broken(self, value, now):
        """`value`, every word of it broken, where it is time."""
        words = bits.mask(bits.to_bits(value), self.keep, self.change)
        due = (self.step == EVERY_STEP) | (self.step == now)
        return jnp.where(due, bits.from_bits(words, value.dtype), value)


def steps(eqn, name: str) -> int:
    """How many times an equation computes the value of a name."""
    return sum(times for found, _, times in _named(eqn) if found == name)


def find(program: Program) -> dict[str, Tap]:
    """The named values of a program, in the order they are computed.

    A name given to values that differ in shape or dtype names no place, and is left out; so is a
    value whose words can't be broken, and a name within a loop in a loop, a `while` or a `cond`.

    Raises:
      InputError: a name with an @.
    """
    found: dict[str, list[Tap]] = {}
    for eqn in program.eqns:
        for name, aval, times in _named(eqn):
            found.setdefault(name, []).append(Tap(name, tuple(aval.shape), aval.dtype, times))
    odd = [name for name in found if "@" in name]
    if odd:
        raise InputError(f"value name {odd[0]!r} has an @, which stands before a step: rename it")
    buried = set(_buried(program))
    return {
        name: taps[0]._replace(dtype=np.dtype(taps[0].dtype), steps=sum(tap.steps for tap in taps))
        for name, taps in found.items()
        if len({tap[1:3] for tap in taps}) == 1
        and bits.has_words(taps[0].dtype)
        and name not in buried
    }


def _named(eqn) -> list[tuple[str, Any, int]]:
    """Name, shape and dtype of the values an equation names, and how many times it makes them."""
    if eqn.primitive.name == "name":
        return [(eqn.params["name"], eqn.outvars[0].aval, 1)]
    scan = scans.read(eqn)
    return [(name, aval, scan.length) for name, aval in scans.names(scan)] if scan else []


def _buried(program: Program) -> Iterator[str]:
    """Names where no fault can be put: within equations other than loops over time."""
    for eqn in program.eqns:
        scan = scans.read(eqn)
        yield from _within(scan.body.jaxpr.eqns if scan else [eqn])


def _within(eqns) -> Iterator[str]:
    """Names in the inner programs of equations."""
    for param in (leaf for eqn in eqns for leaf in jax.tree.leaves(eqn.params)):
        inner = getattr(param, "jaxpr", param)
        if isinstance(inner, core.Jaxpr):
            yield from (e.params["name"] for e in inner.eqns if e.primitive.name == "name")
            yield from _within(inner.eqns)


def site(tap: Tap, when: str | None = None) -> Site:
    """The site of a named value; `when` is what comes after the @ of its name, if there is one.

    Raises:
      InputError: a step that is none of the value's.
    """
    # Of one image: a first axis of size 1 is that of the batch.
    shape = tap.shape[1:] if tap.shape[:1] == (1,) else tap.shape
    if when is None:
        return Site(tap.name, shape, tap.dtype)
    if when == DRAWN:
        return Site(f"{tap.name}@{DRAWN}", (tap.steps, *shape), tap.dtype)
    if not when.isdecimal() or int(when) >= tap.steps:
        known = f"0 to {tap.steps - 1}" if tap.steps > 1 else "0"
        raise InputError(
            f"step {when!r} of {tap.name} is none of its {tap.steps}: give {known}, "
            f"or {tap.name}@{DRAWN} for one that is drawn"
        )
    return Site(f"{tap.name}@{int(when)}", shape, tap.dtype)


def parse(name: str) -> tuple[str, str | None]:
    """The name of the value that a site is of, and what comes after its @."""
    of, at, when = name.rpartition("@")
    return (of, when) if at else (name, None)


def moment(site: Site, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Step (or `EVERY_STEP`) and position at that step, int64 [F], of words of a run-time site."""
    _, when = parse(site.name)
    if when == DRAWN:
        return np.divmod(index, math.prod(site.shape[1:]))
    return np.full(index.shape, EVERY_STEP if when is None else int(when)), index


def steps_of(sites: Sequence[Site], faults: Faults) -> np.ndarray | None:
    """The step each fault strikes at, int32 [F], or `EVERY_STEP`; None where all are permanent."""
    transient = [number for number, site in enumerate(sites) if parse(site.name)[1] is not None]
    if not transient:
        return None
    found = np.full(faults.site.size, EVERY_STEP, np.int32)
    for number in transient:
        own = faults.site == number
        found[own] = moment(sites[number], faults.index[own])[0]
    return found


def operands(tap: Tap, site: Site, faults: Faults) -> tuple[np.ndarray, np.ndarray]:
    """What `injection` takes, of F faults: int32 [F, 1 + rank], and words [F, 2]."""
    step, index = moment(site, faults.index)
    place = np.unravel_index(index, tap.shape) if tap.shape else ()
    at = np.stack([step, *place], axis=1).astype(np.int32)
    return at, np.stack(bits.masks(tap.dtype, faults.bit, faults.polarity), axis=1)


def harmless(tap: Tap) -> tuple[np.ndarray, np.ndarray]:
    """The operands of a fault that changes nothing."""
    words = np.array([0, 0], bits.word_dtype(tap.dtype))
    words[0] = ~words[0]
    return np.full(1 + len(tap.shape), 0, np.int32), words


def injection(tap: Tap, at: Sequence[Any], words) -> Injection:
    """A fault from its operands: step and position on each axis, and the two masks."""
    step, *position = at
    at = tuple(None if d == 1 else i for i, d in zip(position, tap.shape, strict=True))
    return Injection(tap.name, at, words[0], words[1], step)
