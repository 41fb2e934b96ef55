"""Whole networks, one fault at a time on all images: the loop that anyone would write.

Weights are one for all images. A program that serves all parameters is the better way where faults
are too few to pay for programs of their own. One of a single parameter, from which the compiler
takes what comes before the fault, is where suffixes spare little: where most of a network comes
after the fault, as where every step of an unrolled network uses the weights.
"""

from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfi import bits, outcomes
from jfi.criteria.criterion import Judgement
from jfi.hardware.chunks import chunks, filled_up
from jfi.hardware.devices import SHARED, SPREAD, Hardware
from jfi.networks.program import Program, nbytes, run

BATCH = 128  # images at a time, at most
FAULTS = 64  # of one call and device, at most
IN_FLIGHT = 2  # calls under way before the first is read back
LOGITS = 1 << 24  # bytes of the logits of one call and device, at most


class Loop:
    """The network on all images [B, ...], with one word of one parameter leaf faulty.

    Args:
      program, leaves: the network; leaves on all devices.
      images, labels: the workload.
      by: what is critical.
      hardware: faults are spread over its devices.
    """

    def __init__(
        self, program: Program, leaves: list, images, labels, by: Judgement, hardware: Hardware
    ):
        self._leaves, self._images, self._hardware = leaves, len(images), hardware
        self._by = by
        self._program, self._programs = program, dict[int | None, Any]()
        size, out = min(BATCH, len(images)), program.out.aval
        self._size = max(1, min(FAULTS, LOGITS // (size * nbytes(out))))
        words = (bits.word_dtype(leaf.dtype) for leaf in leaves if bits.has_words(leaf.dtype))
        self._word = np.result_type(*words)
        self._parts = [
            hardware.share([filled_up(x[part], size) for x in (images, labels)])
            for part in chunks(len(images), size)
        ]
        self._blank = hardware.share(np.zeros((size, out.shape[1]), out.dtype))

    def run(
        self, leaf: int, index: np.ndarray, value: np.ndarray, own: bool = False
    ) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """F faults, some at a time: which, codes uint8 [f, B] (`outcomes.classify`), logits.

        Args:
          index: int [F], the word that is set, in C order.
          value: [F], what to.
          own: by a program of this leaf.

        Yields:
          Faults' rows, their codes, their logits [f, B, C].
        """
        words, pending = bits.to_bits(value).astype(self._word), deque()
        run, blocks = self._of(leaf, own)
        for part in chunks(index.size, self._hardware.count * self._size):
            call = self._call(leaf, index[part].astype(np.int32), words[part])
            found = [run(self._leaves, *block, *call) for block in blocks]
            pending.append((part, call[0], found))
            if len(pending) > IN_FLIGHT:
                yield self._read(*pending.popleft())
        yield from (self._read(*call) for call in pending)

    def _of(self, leaf: int, own: bool) -> tuple[Any, list[Any]]:
        """The program of one leaf, or of all, and the blocks of images: with golden logits by it,
        which "equal to golden" is judged against."""
        key = leaf if own else None
        if key not in self._programs:
            run = self._hardware.jit(partial(_run, self._program, self._by, key), *_RUN)
            word = bits.to_bits(np.asarray(self._leaves[leaf]).ravel()[:1]).astype(self._word)
            call = self._call(leaf, np.zeros(1, np.int32), word)  # as it is
            blocks = []
            for images, labels in self._parts:
                _, logits = run(self._leaves, images, self._blank, labels, *call)
                golden = self._hardware.share(np.asarray(logits)[0])
                blocks.append((images, golden, labels))
            self._programs[key] = run, blocks
        return self._programs[key]

    def _call(self, leaf: int, *columns: np.ndarray) -> tuple[np.ndarray, ...]:
        """How many faults each device has, their leaf, and the columns [f] of each, filled up."""
        share = np.array_split(np.arange(columns[0].size), self._hardware.count)
        full = [
            np.concatenate([np.resize(column[rows], self._size) for rows in share])
            for column in columns
        ]
        count = np.array([rows.size for rows in share], np.int32)
        return count, np.full(count.size, leaf, np.int32), *full

    def _read(self, part: slice, count: np.ndarray, found) -> tuple[slice, np.ndarray, np.ndarray]:
        """Codes and logits of the faults of one call."""
        rows = np.concatenate([k * self._size + np.arange(n) for k, n in enumerate(count)])
        codes, logits = (
            np.concatenate(blocks, axis=1)[rows, : self._images]
            for blocks in zip(*jax.device_get(found), strict=True)
        )
        return part, codes, logits


_RUN = (SHARED, SHARED, SHARED, SHARED, SPREAD, SPREAD, SPREAD, SPREAD)


def _run(
    program: Program, by: Judgement, own, leaves, images, golden, labels, count, leaf, index, word
):
    """Codes [F, b] and logits [F, b, C] of the first `count` of F faults, on one device.

    They are in the leaf numbered `own`, or, where that is None, `leaf`.
    """

    def one(number, found):
        faulty = [
            _written(x, leaf[0] == k, index[number], word[number]) if own in (k, None) else x
            for k, x in enumerate(leaves)
        ]
        logits = jax.vmap(lambda image: run(program, faulty, image[None])[program.out][0])(images)
        codes = outcomes.classify(golden, logits, labels, by)
        return [x.at[number].set(row) for x, row in zip(found, (codes, logits), strict=True)]

    codes = jnp.zeros((index.size, len(golden)), jnp.uint8)
    logits = jnp.zeros((index.size, *golden.shape), golden.dtype)
    return lax.fori_loop(0, count[0], one, [codes, logits])


def _written(leaf, here, index, word):
    """A leaf with one word set, if that is `here`."""
    if not bits.has_words(leaf.dtype) or not leaf.size:
        return leaf
    flat = leaf.reshape(-1)
    index = jnp.minimum(index, flat.size - 1)
    own = bits.from_bits(word.astype(bits.word_dtype(leaf.dtype)), leaf.dtype)
    return flat.at[index].set(jnp.where(here, own, flat[index])).reshape(leaf.shape)
