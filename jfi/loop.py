"""Whole networks, one fault at a time on all images: the loop that anyone would write.

One program serves all parameters, with weights that are one for all images. It is the better way
where faults are too few to pay for programs of their own, and where nothing is saved by starting
at the fault, as for weights that every step of an unrolled network uses.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfi import bits, outcomes
from jfi.chunks import chunks, filled_up
from jfi.hardware import SHARED, SPREAD, Hardware
from jfi.program import Program, nbytes, run

BATCH = 128  # images at a time, at most
FAULTS = 64  # of one call and device, at most
LOGITS = 1 << 24  # bytes of the logits of one call and device, at most


class Loop:
    """The network on all images [B, ...], with one word of one parameter leaf faulty.

    Args:
      program, leaves: the network; leaves on all devices.
      images, labels: the workload.
      hardware: faults are spread over its devices.
    """

    def __init__(self, program: Program, leaves: list, images, labels, hardware: Hardware):
        self._leaves, self._images, self._hardware = leaves, len(images), hardware
        self._run = hardware.jit(partial(_run, program), *_RUN)
        size, out = min(BATCH, len(images)), program.out.aval
        self._size = max(1, min(FAULTS, LOGITS // (size * nbytes(out))))
        words = (bits.word_dtype(leaf.dtype) for leaf in leaves if bits.has_words(leaf.dtype))
        self._word = np.result_type(*words)
        self._parts: list[Any] = []
        blank = hardware.share(np.zeros((size, out.shape[1]), out.dtype))
        for part in chunks(len(images), size):
            own = hardware.share([filled_up(x[part], size) for x in (images, labels)])
            # Golden by the same program: what "equal to golden" is judged against.
            found = self._run(
                leaves, own[0], blank, own[1], *self._call(-1, np.zeros((2, 1), self._word))
            )
            self._parts.append((own[0], hardware.share(np.asarray(found[1])[0]), own[1]))

    def run(self, leaf: int, index: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes uint8 [F, B] (`outcomes.classify`) and logits [F, B, C] of F faults.

        Args:
          index: int [F], the word that is set, in C order.
          value: [F], what to.
        """
        columns = np.stack([index.astype(self._word), bits.to_bits(value).astype(self._word)])
        calls = []
        for part in chunks(index.size, self._hardware.count * self._size):
            own = self._call(leaf, columns[:, part])
            calls.append((own[0], [self._run(self._leaves, *block, *own) for block in self._parts]))
        return tuple(np.concatenate(rows) for rows in zip(*map(self._read, calls), strict=True))

    def _call(self, leaf: int, columns: np.ndarray) -> tuple[np.ndarray, ...]:
        """How many faults each device has, and index and word of each; filled up."""
        share = np.array_split(np.arange(columns.shape[1]), self._hardware.count)
        index, word = (
            np.concatenate([np.resize(column[rows], self._size) for rows in share])
            for column in columns
        )
        count = np.array([rows.size for rows in share], np.int32)
        return count, np.full(count.size, leaf, np.int32), index.astype(np.int32), word

    def _read(self, call) -> list[np.ndarray]:
        """Codes and logits of the faults of one call."""
        count, found = call
        rows = np.concatenate([k * self._size + np.arange(n) for k, n in enumerate(count)])
        columns = zip(*jax.device_get(found), strict=True)
        return [np.concatenate(parts, axis=1)[rows, : self._images] for parts in columns]


_RUN = (SHARED, SHARED, SHARED, SHARED, SPREAD, SPREAD, SPREAD, SPREAD)


def _run(program: Program, leaves, images, golden, labels, count, leaf, index, word):
    """Codes [F, b] and logits [F, b, C] of the first `count` of F faults, on one device."""

    def one(number, found):
        faulty = [
            _written(x, leaf[0] == k, index[number], word[number]) for k, x in enumerate(leaves)
        ]
        logits = jax.vmap(lambda image: run(program, faulty, image[None])[program.out][0])(images)
        codes = outcomes.classify(golden, logits, labels)
        return [x.at[number].set(row) for x, row in zip(found, (codes, logits), strict=True)]

    codes, logits = (jnp.zeros((index.size, *x.shape), x.dtype) for x in (labels, golden))
    return lax.fori_loop(0, count[0], one, [codes.astype(jnp.uint8), logits])


def _written(leaf, here, index, word):
    """A leaf with one word set, if that is `here`."""
    if not bits.has_words(leaf.dtype):
        return leaf
    flat = leaf.reshape(-1)
    index = jnp.minimum(index, flat.size - 1)
    own = bits.from_bits(word.astype(bits.word_dtype(leaf.dtype)), leaf.dtype)
    return flat.at[index].set(jnp.where(here, own, flat[index])).reshape(leaf.shape)
