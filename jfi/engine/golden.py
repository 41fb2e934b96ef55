"""The golden run: the fault-free network on the workload, its rate, and what rounding it bears."""

import time
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from jfi.criteria.criterion import Judgement
from jfi.engine import rounding
from jfi.engine.rounding import close
from jfi.errors import InputError, kind
from jfi.hardware.chunks import chunks, filled_up
from jfi.hardware.compiling import jit
from jfi.networks.program import run, section
from jfi.networks.sites import Network

BATCH = 128  # images of one golden batch


class Golden(NamedTuple):
    """The fault-free run of B images: rows of outputs [B, N], and of scores [B, N], which are what
    the network's own softmax or sigmoid is taken of."""

    logits: np.ndarray
    scores: np.ndarray

    def margin(self, by: Judgement) -> np.ndarray:
        """[B]: the least slack of the constraints of a criterion that has them."""
        least = jit(jax.vmap(lambda row: by.constraints(row).slack.min()))
        return np.asarray(least(self.logits if by.on_outputs else self.scores))


def golden_run(network: Network, images: np.ndarray) -> Golden:
    """The fault-free run of images [B, ...], checked.

    Raises:
      InputError: an output that is not finite, is not one row an image, or depends on the rest of
        the batch.
    """
    batch, outputs = min(BATCH, len(images)), network.outputs
    together = _rows(jit(network.apply), network.params, images, batch)
    wide = together.astype(np.float64)
    if not np.isfinite(wide).all():
        bad = int(np.flatnonzero(~np.isfinite(wide).all(axis=1))[0])
        where = outputs.told(~np.isfinite(wide[bad]))
        raise InputError(
            f"the golden output{where} of image {bad} is {_shown(together[bad])}; it must be finite"
        )
    alone = _rows(jit(partial(_alone, network.apply)), network.params, images, batch)
    apart = np.flatnonzero(~close(alone, together))
    # Images that are rounded by more than is usual: by as much as theirs may be.
    least = allowances(network, images[apart])
    apart = apart[~close(alone[apart], together[apart], least)]
    if apart.size:
        bad = int(apart[0])
        where = outputs.told(alone[bad] != together[bad])
        raise InputError(
            f"apply gives{where} {_shown(alone[bad])} for image {bad} alone and "
            f"{_shown(together[bad])} in a batch of {batch}; images must not influence each other "
            "(is batch normalisation in training mode?)"
        )
    return Golden(together, _scores(network, images, together, batch))


def _scores(network: Network, images: np.ndarray, together: np.ndarray, batch: int) -> np.ndarray:
    """[B, N]: what the network's own softmax or sigmoid is taken of, by image; the outputs where
    there is none."""
    if not network.outputs.link:
        return together
    part = section(network.program, end=network.scores)

    def one(leaves, image):
        return run(part, leaves, image[None])[network.scores].ravel()

    return _rows(jit(jax.vmap(one, (None, 0))), network.leaves, images, batch)


def _shown(row: np.ndarray) -> str:
    """A row of outputs, short where it is long."""
    return np.array2string(row, threshold=20, edgeitems=3)


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
