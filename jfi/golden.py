"""The golden run: the fault-free network on the workload, its rate, and what rounding it bears."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jfi import certify
from jfi.chunks import chunks, filled_up
from jfi.compiling import jit
from jfi.errors import InputError
from jfi.sites import Network

BATCH = 128  # images of one golden batch


class Golden(NamedTuple):
    """The fault-free run of B images: logits [B, C] and top-1 int [B]."""

    logits: np.ndarray
    top1: np.ndarray

    @property
    def margin(self) -> np.ndarray:
        """[B]: the largest logit minus the second."""
        second, first = np.sort(self.logits, axis=1)[:, -2:].T
        return first - second


def golden_run(network: Network, images: np.ndarray) -> Golden:
    """The fault-free run of images [B, ...], checked.

    Raises:
      InputError: an output that is not finite, or that depends on the rest of the batch.
    """
    run = jit(network.apply)
    batch = min(BATCH, len(images))
    parts = (filled_up(images[part], batch) for part in chunks(len(images), batch))
    logits = np.concatenate([np.asarray(run(network.params, part)) for part in parts])
    logits = logits[: len(images)]
    if not np.isfinite(logits.astype(np.float64)).all():
        bad = int(np.flatnonzero(~np.isfinite(logits.astype(np.float64)).all(axis=1))[0])
        raise InputError(f"the golden output of image {bad} is {logits[bad]}; it must be finite")
    alone = np.asarray(run(network.params, images[:1]))
    if not close(alone, logits[:1]).all():
        raise InputError(
            f"apply gives {alone[0]} for image 0 alone and {logits[0]} in a batch of {batch}; "
            "images must not influence each other (is batch normalisation in training mode?)"
        )
    return Golden(logits, logits.argmax(axis=1))


def golden_rate(network: Network, images: np.ndarray, seconds: float = 1.0) -> float:
    """Images per second of the network itself, compiled, at its better batch size."""
    return max(_rate(network, images, size, seconds) for size in sorted({BATCH, 512}))


def _rate(network: Network, images: np.ndarray, batch: int, seconds: float) -> float:
    run = jit(network.apply)
    batch_images = jax.device_put(np.resize(images, (batch, *images.shape[1:])))
    jax.block_until_ready(run(network.params, batch_images))
    started, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < seconds:
        jax.block_until_ready(run(network.params, batch_images))
        done += batch
    return done / spent


def rounding(logits: np.ndarray) -> np.ndarray:
    """[P]: how far logits [P, C] may be off between two compiled programs.

    That is `certify.TOLERANCE` epsilons of the type, relative to the largest finite logit (at
    least 1): the sums a network makes are reordered.
    """
    size = np.abs(np.where(np.isfinite(logits), logits, 0).astype(np.float64)).max(axis=-1)
    return certify.TOLERANCE * float(jnp.finfo(logits.dtype).eps) * np.maximum(size, 1)


def close(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """bool [P]: logits [P, C] agree within `rounding`; those not finite must be the same."""
    off = np.maximum(rounding(a), rounding(b))[..., None]
    with np.errstate(invalid="ignore"):
        near = np.abs(a.astype(np.float64) - b.astype(np.float64)) <= off
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(np.isfinite(a) & np.isfinite(b), near, same).all(axis=-1)
