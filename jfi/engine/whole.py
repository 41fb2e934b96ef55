"""Pairs of one site run to the logits: a compiled prefix, and a suffix over chunks of pairs.

The prefix leaves on the devices what the suffix reads of the golden run. `jfi.engine.prune` is the
other way, for pairs that may leave before the logits.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jfi import outcomes
from jfi.criteria.criterion import Judgement
from jfi.engine.split import Split, prefix, suffix
from jfi.hardware.chunks import chunk_size, chunks, filled_up
from jfi.hardware.devices import SHARED, SPREAD, Hardware
from jfi.networks import taps
from jfi.networks.program import bind
from jfi.networks.taps import Tap

IN_FLIGHT = 4  # chunks under way before the first is read back


class Block(NamedTuple):
    """The golden values that one site's suffix needs, for b images from number `start` on."""

    start: int
    constants: list[Any]
    residuals: list[Any]  # [b, ...]
    logits: Any  # [b, C], golden lanes of the same compiled suffix
    labels: Any  # int32 [b]


class Pairs(NamedTuple):
    """Results of P pairs: outcome codes uint8 [P] (`outcomes.classify`), and rows of outputs [P, N]
    where they are asked for."""

    codes: np.ndarray
    logits: np.ndarray | None


class SiteProgram:
    """The two compiled programs of one site; `chunk` pairs are run at a time."""

    def __init__(self, parts: Split, by: Judgement, hardware: Hardware, reduced: Callable | None):
        self.parts, self._hardware = parts, hardware
        self.chunk = hardware.count * chunk_size(parts.live, hardware.chunk_bytes, parts.flops)
        self._prefix = hardware.jit_golden(partial(prefix, parts), (SHARED, SPREAD))
        # In full, and in reduced precision.
        self._suffix = [
            hardware.jit(partial(_run_chunk, parts, by, evaluate), *_RUN_CHUNK)
            for evaluate in (bind, reduced or bind)
        ]

    def load(self, leaves, images: np.ndarray, labels: np.ndarray, start: int = 0) -> Block:
        """Run the prefix on images [b, ...], which are those from number `start` on."""
        constants, residuals = self._prefix(leaves, images)
        out = self.parts.program.out.aval
        blank = np.zeros((len(images), out.shape[1]), out.dtype)
        block = Block(start, constants, residuals, *self._hardware.share((blank, labels)))
        # A fault that changes nothing: what "equal to golden" is judged against.
        at, value = (np.stack([part] * len(images)) for part in self._harmless(leaves))
        same = self.run(block, at, value, np.arange(len(images)))
        return block._replace(logits=self._hardware.share(same.logits))

    def _harmless(self, leaves) -> tuple[np.ndarray, np.ndarray]:
        """Index and value of a fault that changes nothing."""
        source = self.parts.source
        if isinstance(source, Tap):
            return taps.harmless(source)
        leaf = np.asarray(leaves[source])
        return np.zeros(leaf.ndim, np.int32), leaf.flat[0]

    def run(
        self,
        block: Block,
        at: np.ndarray,
        value: np.ndarray,
        image: np.ndarray,
        reduced: bool = False,
        logits: bool = True,
    ) -> Pairs:
        """Run P pairs: the word at index `at` [P, rank] set to `value` [P].

        Args:
          at, value: of run-time values as of `jfi.networks.taps.operands`.
          image: int [P], positions in the block.
          reduced: in reduced precision.
          logits: keep them; without, they are None.
        """
        done, pending = [], deque()
        for part in chunks(image.size, self.chunk):
            columns = (image.astype(np.int32), at, value)
            full = (filled_up(column[part], self.chunk) for column in columns)
            found = self._suffix[reduced](*block[1:], *full)
            pending.append(found if logits else found[:1])
            if len(pending) > IN_FLIGHT:
                done.append(jax.device_get(pending.popleft()))
        done.extend(jax.device_get(list(pending)))
        codes, *rows = (np.concatenate(column)[: image.size] for column in zip(*done, strict=True))
        return Pairs(codes, *(rows or [None]))


_RUN_CHUNK = (SHARED, SHARED, SHARED, SHARED, SPREAD, SPREAD, SPREAD)


def _run_chunk(
    parts: Split, by: Judgement, evaluate, constants, residuals, golden, labels, image, at, value
):
    def one(image, at, value):
        return suffix(parts, constants, residuals, image, list(at), value, evaluate)[0]

    logits = jax.vmap(one)(image, at, value)
    return outcomes.classify(golden[image], logits, labels[image], by), logits
