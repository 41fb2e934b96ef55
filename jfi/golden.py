"""The golden run: the fault-free network on the workload, its rate, and what rounding it bears."""

import time
from functools import partial
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
    batch = min(BATCH, len(images))
    together = _logits(jit(network.apply), network.params, images, batch)
    if not np.isfinite(together.astype(np.float64)).all():
        bad = int(np.flatnonzero(~np.isfinite(together.astype(np.float64)).all(axis=1))[0])
        raise InputError(f"the golden output of image {bad} is {together[bad]}; it must be finite")
    alone = _logits(jit(partial(_alone, network.apply)), network.params, images, batch)
    apart = np.flatnonzero(~close(alone, together))
    if apart.size:
        bad = int(apart[0])
        raise InputError(
            f"apply gives {alone[bad]} for image {bad} alone and {together[bad]} in a batch of "
            f"{batch}; images must not influence each other (is batch normalisation in training "
            "mode?)"
        )
    return Golden(together, together.argmax(axis=1))


def _logits(run, params, images: np.ndarray, batch: int) -> np.ndarray:
    """Logits [B, C], so many images at a time."""
    parts = (filled_up(images[part], batch) for part in chunks(len(images), batch))
    return np.concatenate([np.asarray(run(params, part)) for part in parts])[: len(images)]


def _alone(apply, params, images):
    """Every image in a batch of its own."""
    return jax.vmap(lambda image: apply(params, image[None])[0])(images)


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
    """bool [P]: logits [P, C] agree within `rounding`, or neither are all finite.

    Where logits overflow, the order of summation says which come out infinite and which NaN.
    """
    off = np.maximum(rounding(a), rounding(b))[..., None]
    with np.errstate(invalid="ignore"):
        near = (np.abs(a.astype(np.float64) - b.astype(np.float64)) <= off).all(axis=-1)
    return near | (overflows(a) & overflows(b))


def overflows(logits: np.ndarray) -> np.ndarray:
    """bool [P]: logits [P, C] that are not all finite."""
    return ~np.isfinite(logits.astype(np.float64)).all(axis=-1)
