"""The golden run: the fault-free network on the workload, its rate, and what rounding it bears."""

import time
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from jfi.engine import rounding
from jfi.engine.rounding import close
from jfi.errors import InputError, kind
from jfi.hardware.chunks import chunks, filled_up
from jfi.hardware.compiling import jit
from jfi.networks.sites import Network

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
      InputError: an output of one class alone, that is not finite, is not one row an image, or
        depends on the rest of the batch.
    """
    batch, classes = min(BATCH, len(images)), network.program.out.aval.shape[1]
    if classes < 2:
        raise InputError(
            f"logits are [B, {classes}]; two classes at least are needed for an answer to change "
            "(of one sigmoid's logit y, return 0 and y)"
        )
    together = _rows(jit(network.apply), network.params, images, batch)
    if not np.isfinite(together.astype(np.float64)).all():
        bad = int(np.flatnonzero(~np.isfinite(together.astype(np.float64)).all(axis=1))[0])
        raise InputError(f"the golden output of image {bad} is {together[bad]}; it must be finite")
    alone = _rows(jit(partial(_alone, network.apply)), network.params, images, batch)
    apart = np.flatnonzero(~close(alone, together))
    # Images that are rounded by more than is usual: by as much as theirs may be.
    least = allowances(network, images[apart])
    apart = apart[~close(alone[apart], together[apart], least)]
    if apart.size:
        bad = int(apart[0])
        raise InputError(
            f"apply gives {alone[bad]} for image {bad} alone and {together[bad]} in a batch of "
            f"{batch}; images must not influence each other (is batch normalisation in training "
            "mode?)"
        )
    return Golden(together, together.argmax(axis=1))


def allowances(network: Network, images: np.ndarray) -> np.ndarray:
    """float64 [B]: how far the logits of each image may be off (`engine.rounding.allowance`)."""
    found, batch = jit(partial(rounding.allowances, network.program)), min(BATCH, len(images))
    return np.float64(_rows(found, network.leaves, images, batch)) if len(images) else np.zeros(0)


def _rows(of, params, images: np.ndarray, batch: int) -> np.ndarray:
    """A row [B, ...] of every image, so many images at a time."""
    parts = (filled_up(images[part], batch) for part in chunks(len(images), batch))
    found = [np.asarray(of(params, part)) for part in parts]
    if len(found[0]) != batch:
        raise InputError(
            f"apply returned {kind(found[0])} for {batch} images; it must return logits "
            f"[{batch}, C], one row an image"
        )
    return np.concatenate(found)[: len(images)]


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
