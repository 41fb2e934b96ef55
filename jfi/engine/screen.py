"""Screening: critical or not in reduced precision first, in full where that leaves a doubt.

A pair's suffix is run with its convolutions and dense layers in reduced precision. Where its two
largest logits lie closer together than a threshold, it is run again in full. The threshold is
calibrated on pairs run both ways; how good it is, `jfi.engine.verify` says by naive re-runs of
random pairs, with the bound of `Verification.bound` on the share of verdicts that are wrong. It
pays on devices that multiply faster in fewer bits; a CPU gains nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jfi.networks.program import PRODUCTS, bind

SAFETY = 4  # times the largest error seen in calibration
PAIRS = 1024  # run both ways to calibrate


def _bfloat16(eqn, values: Sequence[Any]) -> list[Any]:
    """float32 products of operands rounded to bfloat16, summed in float32."""
    if eqn.primitive.name not in PRODUCTS or eqn.outvars[0].aval.dtype != jnp.float32:
        return bind(eqn, values)
    less = [jnp.asarray(value).astype(jnp.bfloat16) for value in values]
    params = {**eqn.params, "precision": None, "preferred_element_type": np.dtype(np.float32)}
    return [eqn.primitive.bind(*less, **params)]


def _tfloat32(eqn, values: Sequence[Any]) -> list[Any]:
    """float32 products at the device's default precision: TF32 on an NVIDIA GPU."""
    if eqn.primitive.name not in PRODUCTS:
        return bind(eqn, values)
    return [eqn.primitive.bind(*values, **{**eqn.params, "precision": None})]


REDUCED: dict[str, Callable[[Any, Sequence[Any]], list[Any]]] = {
    "bfloat16": _bfloat16,
    "tfloat32": _tfloat32,
}


def threshold(full: np.ndarray, reduced: np.ndarray) -> float:
    """Gap below which a verdict is in doubt, in units of the largest logit (`doubtful`).

    Args:
      full, reduced: logits [P, C] of the same pairs in full and in reduced precision.
    """
    finite = np.isfinite(full).all(axis=1) & np.isfinite(reduced).all(axis=1)
    off = np.abs(full[finite] - reduced[finite]).max(axis=1) / _size(full[finite])
    # Both logits of a gap may be off.
    return SAFETY * 2 * float(off.max(initial=0))


def doubtful(logits: np.ndarray, threshold: float) -> np.ndarray:
    """bool [P]: logits [P, C] not finite, or the largest two closer than the threshold."""
    finite = np.isfinite(logits).all(axis=1)
    known = np.where(finite[:, None], logits, 0)
    second, first = np.sort(known, axis=1)[:, -2:].T
    return ~finite | (first - second <= threshold * _size(known))


def _size(logits: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(logits).max(axis=1), 1)
