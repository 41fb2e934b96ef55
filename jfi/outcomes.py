"""The outcome of a fault: one partition of (fault, image) pairs, and its counts per fault.

A pair is *masked* (outputs equal to golden), *critical* (as the criterion says: by default, top-1
differs from the golden top-1, not from the label) or *non-critical* (outputs differ, no more). The
classes below refine that: every pair is in exactly one of them.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jfi import bits
from jfi.criteria.criterion import Judgement

CLASSES = ("masked", "sdc_0_5", "sdc_5_10", "sdc_10_20", "sdc_20", "sdc_1", "non_finite")
MASKED, SDC_20, SDC_1, NON_FINITE = (
    CLASSES.index(name) for name in ("masked", "sdc_20", "sdc_1", "non_finite")
)

# A code is a class in its low three bits and two flags that hold beside any class.
CLASS_MASK, CRITICAL, CORRECT = 0b00111, 0b01000, 0b10000


class Outcomes(NamedTuple):
    """Counts of images per fault, one row a fault (NumPy, int32 ``[F]`` unless said).

    ``masked + non_critical + critical`` is the number of images, and so is the sum of the
    fields named in ``CLASSES``: ``non_finite`` pairs are counted on their own and as one of
    non-critical and critical. Fields that a measure does not tell are None.
    """

    critical: np.ndarray
    first_critical: np.ndarray  # the first image (of those asked) it is critical for, or -1
    inferred: np.ndarray | None = None  # images run to the logits
    certified: np.ndarray | None = None  # images decided by a certificate before
    non_finite: np.ndarray | None = None
    correct: np.ndarray | None = None  # images whose faulty answer is the label (faulty accuracy)
    masked: np.ndarray | None = None
    non_critical: np.ndarray | None = None
    sdc_0_5: np.ndarray | None = None
    sdc_5_10: np.ndarray | None = None
    sdc_10_20: np.ndarray | None = None
    sdc_20: np.ndarray | None = None
    sdc_1: np.ndarray | None = None
    critical_bits: np.ndarray | None = None  # uint8 [F, ceil(B / 8)], images by np.packbits
    masked_bits: np.ndarray | None = None  # as critical_bits


def sdc_bin(golden: jax.Array, faulty: jax.Array) -> jax.Array:
    """Class 1 to 4 of a confidence that moved: [0, 5%), [5%, 10%), [10%, 20%), [20%, inf).

    The change relative to golden is compared as ``20 |d| < golden`` and so on: products with
    small integers, exact at the edges wherever the edge itself is a float.
    """
    change = jnp.abs(faulty - golden)
    inside = [(times * change < golden).astype(jnp.uint8) for times in (20, 10, 5)]
    # A change below 5% is below all three edges; NaN is below none and lands in the last bin.
    return jnp.uint8(SDC_20) - sum(inside)


def classify(golden: jax.Array, faulty: jax.Array, label: jax.Array, by: Judgement) -> jax.Array:
    """The outcome code of every pair: uint8 ``[...]``, under jit and vmap too.

    ``golden`` and ``faulty`` are rows of outputs ``[..., N]``, ``label`` is ``[..., *]``, of the
    form that ``by`` takes; leading axes broadcast. Low three bits: the index in ``CLASSES``, the
    first that holds of

    * masked: every output has the bits of golden (``-0`` is not ``0``, a NaN is the same NaN);
    * non_finite: an infinity or NaN in the faulty outputs (DUE: it can be detected);
    * sdc_1: critical, as ``by`` says;
    * sdc_a_b: the worst of the confidences moved by a to b percent of itself.

    Bit 3 (``CRITICAL``) is set where the pair is critical, non-finite outputs included; bit 4
    (``CORRECT``) where the faulty outputs are what the label says.
    """
    label, axes = jnp.asarray(label), max(golden.ndim, faulty.ndim) - 1
    lead = np.broadcast_shapes(golden.shape[:-1], faulty.shape[:-1], label.shape[:axes])
    if not lead:
        return _classify(by, golden, faulty, label)
    rest = label.shape[len(lead) :] if label.ndim > len(lead) else ()
    wanted = (*lead, golden.shape[-1]), (*lead, faulty.shape[-1]), (*lead, *rest)
    full = (
        jnp.broadcast_to(x, shape).reshape(-1, *shape[len(lead) :])
        for x, shape in zip((golden, faulty, label), wanted, strict=True)
    )
    return jax.vmap(partial(_classify, by))(*full).reshape(lead)


def _classify(by: Judgement, golden, faulty, label) -> jax.Array:
    """The code of one pair, of rows [N]."""
    changed = by.critical(golden, faulty)
    masked = ~jnp.any(bits.differs(golden, faulty), axis=-1)
    finite = jnp.all(jnp.isfinite(faulty), axis=-1)
    moved = sdc_bin(*by.confidences(golden, faulty)).max(initial=jnp.uint8(MASKED + 1))
    code = jnp.where(changed, jnp.uint8(SDC_1), moved)
    code = jnp.where(finite, code, jnp.uint8(NON_FINITE))
    code = jnp.where(masked, jnp.uint8(MASKED), code)
    code = code | changed.astype(jnp.uint8) * CRITICAL
    if by.correct is not None:
        code = code | by.correct(faulty, label).astype(jnp.uint8) * CORRECT
    return code.astype(jnp.uint8)


def tally(codes: np.ndarray, keep_bits: bool = False) -> Outcomes:
    """Counts per fault of the codes uint8 ``[F, B]`` of its pairs, images in workload order.

    With ``keep_bits`` it is kept, packed, for which images each is critical and masked.
    """
    codes = np.asarray(codes)
    told = tally_critical(codes, keep_bits)
    classes = codes & CLASS_MASK
    by_class = {name: _count(classes == code) for code, name in enumerate(CLASSES)}
    non_critical = np.int32(codes.shape[1]) - by_class["masked"] - told.critical
    masked_bits = np.packbits(classes == MASKED, axis=1) if keep_bits else None
    return told._replace(**by_class, non_critical=non_critical, masked_bits=masked_bits)


def tally_critical(codes: np.ndarray, keep_bits: bool = False) -> Outcomes:
    """What codes tell whose classes are not known, but for non-finite: critical or not."""
    hit = (codes & CRITICAL) != 0
    critical = _count(hit)
    return Outcomes(
        critical=critical,
        first_critical=np.where(critical > 0, hit.argmax(axis=1), -1).astype(np.int32),
        non_finite=_count((codes & CLASS_MASK) == NON_FINITE),
        correct=_count(codes & CORRECT),
        critical_bits=np.packbits(hit, axis=1) if keep_bits else None,
    )


def _count(flags: np.ndarray) -> np.ndarray:
    return np.count_nonzero(flags, axis=1).astype(np.int32)
