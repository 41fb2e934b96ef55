"""What float rounding may do to the logits: how far two compiled programs may be apart.

A network makes long sums, which each program adds up in an order of its own. Where values cancel,
or are held in few bits, on the way to the logits, that moves them by far more than an epsilon of
theirs: `spread` measures it by runs whose every operand is moved at random by one epsilon of its
own type (Monte Carlo arithmetic: Parker, 1997; CESTAC: Vignes, 1993).
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jfi.networks.program import Program, bind, run

TOLERANCE = 2.0**10  # epsilons of the largest logit that programs may be apart
SAFETY = 64  # times the spread: about the TOLERANCE on LeNet and ResNet-20 (4 to 15 epsilons)
PATTERNS = 2  # runs that measure it


def allowance(program: Program, env: dict) -> Any:
    """How far each logit of one image may be off; infinite where that can't be told.

    Args:
      env: the golden run, by variable (`jfi.networks.program.run`).
    """
    logits = env[program.out]
    usual = TOLERANCE * jnp.finfo(logits.dtype).eps * jnp.maximum(1, jnp.abs(logits).max())
    return jnp.maximum(usual, SAFETY * spread(program, env))


def allowances(program: Program, leaves: Sequence[Any], images) -> Any:
    """`allowance` of each of B images [B, ...]: [B], of the type of the logits."""
    return jax.vmap(lambda image: allowance(program, run(program, leaves, image[None])))(images)


def spread(program: Program, env: dict) -> Any:
    """The most that a logit moves when every operand of every equation moves by one epsilon."""
    leaves, x, golden = [env[v] for v in program.leaves], env[program.x], env[program.out]
    seeds = jnp.arange(PATTERNS, dtype=jnp.uint32)
    moved = jax.vmap(lambda seed: shaken(program, leaves, x, seed))(seeds)
    most = jnp.max(jnp.abs(moved - golden))
    return jnp.where(jnp.isnan(most), jnp.inf, most)


def shaken(program: Program, leaves: Sequence[Any], x: Any, seed) -> Any:
    """Logits [1, C] of a run on one image whose every operand is moved by one epsilon.

    Args:
      seed: uint32, says which go up and which down; may be traced.
    """
    places = itertools.count()

    def evaluate(eqn, values):
        # A variable that comes twice is moved once: x != x asks for NaN, and x - x is 0.
        moved: dict[int, Any] = {}
        for atom, value in zip(eqn.invars, values, strict=True):
            fixed = isinstance(atom, core.Literal) or not _is_float(value)
            if id(atom) not in moved:
                place = next(places)
                moved[id(atom)] = value if fixed else _moved(value, place, seed)
        return bind(eqn, [moved[id(atom)] for atom in eqn.invars])

    return run(program, leaves, x, evaluate)[program.out]


def _is_float(value) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def _moved(value, place: int, seed):
    """`value` times one plus or minus an epsilon; the signs are a hash of place and position."""
    number = lax.iota(jnp.uint32, value.size).reshape(value.shape)
    start = jnp.uint32(seed) * np.uint32(2654435769) + np.uint32(place * 40503 & 0xFFFFFFFF)
    hashed = (number + start) * np.uint32(2654435761)
    hashed = (hashed ^ (hashed >> 15)) * np.uint32(2246822519)
    eps = jnp.finfo(value.dtype).eps.astype(value.dtype)
    one = jnp.ones((), value.dtype)
    return value * jnp.where(hashed >> 31 == 1, one + eps, one - eps)


def rounding(logits: np.ndarray) -> np.ndarray:
    """[P]: how far logits [P, C] may be off between two compiled programs, at least.

    That is `TOLERANCE` epsilons of the type, relative to the largest finite logit (at least 1).
    """
    size = np.abs(np.where(np.isfinite(logits), logits, 0).astype(np.float64)).max(axis=-1)
    return TOLERANCE * float(jnp.finfo(logits.dtype).eps) * np.maximum(size, 1)


def close(a: np.ndarray, b: np.ndarray, least: np.ndarray | float = 0.0) -> np.ndarray:
    """bool [P]: logits [P, C] agree within `rounding` or `least` [P], or neither are all finite.

    Where logits overflow, the order of summation says which come out infinite and which NaN.
    """
    off = np.maximum(np.maximum(rounding(a), rounding(b)), least)[..., None]
    with np.errstate(invalid="ignore"):
        near = (np.abs(a.astype(np.float64) - b.astype(np.float64)) <= off).all(axis=-1)
    return near | (overflows(a) & overflows(b))


def overflows(logits: np.ndarray) -> np.ndarray:
    """bool [P]: logits [P, C] that are not all finite."""
    return ~np.isfinite(logits.astype(np.float64)).all(axis=-1)
