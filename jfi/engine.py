"""The engine: outcomes of faults on a workload, many pairs at a time.

The unit of work is a list of (fault, image) pairs of one site, cut into chunks of one size so
that nothing recompiles. Per site there are two compiled programs: the prefix, which leaves on
the device what the suffix reads of the golden run, and the suffix over a chunk of pairs.
"""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jfi import bits, outcomes
from jfi.errors import InputError
from jfi.faults import Faults, Site
from jfi.outcomes import Outcomes
from jfi.program import nbytes
from jfi.sites import Network
from jfi.split import Split, prefix, split, suffix

MEMORY = 1 << 30  # bytes of golden values kept on the device at a time
LIVE = 8 << 20  # bytes of the largest value of a chunk: more falls out of the caches
CHUNK = (128, 8192)  # fewest and most pairs of a chunk
PAIRS = 1 << 20  # most pairs listed on the host at a time
IN_FLIGHT = 4  # chunks under way before the first is read back
GOLDEN_BATCH = 128  # images of one golden batch


class Golden(NamedTuple):
    """The fault-free run of B images: logits [B, C] and top-1 int [B]."""

    logits: np.ndarray
    top1: np.ndarray


class Block(NamedTuple):
    """The golden values that one site's suffix needs, for b images from number `start` on."""

    start: int
    constants: list[Any]
    residuals: list[Any]  # [b, ...]
    logits: Any  # [b, C], golden lanes of the same compiled suffix
    labels: Any  # int32 [b]


class Pairs(NamedTuple):
    """Results of P pairs: outcome codes uint8 [P] (`outcomes.classify`) and logits [P, C]."""

    codes: np.ndarray
    logits: np.ndarray


class SiteProgram:
    """The two compiled programs of one site.

    blocks: (start, stop) of the images whose golden values are kept together.
    chunk: pairs run at a time.
    """

    def __init__(self, parts: Split, images: int, memory: int):
        self.parts = parts
        self.chunk = _chunk_size(parts.live)
        self.blocks = _blocks(images, memory // max(1, _residual_bytes(parts)))
        self._prefix = jax.jit(lambda leaves, images: prefix(parts, leaves, images))
        self._suffix = jax.jit(self._run_chunk)

    def _run_chunk(self, constants, residuals, golden, labels, image, at, value):
        def one(image, at, value):
            return suffix(self.parts, constants, residuals, image, list(at), value)

        logits = jax.vmap(one)(image, at, value)
        return outcomes.classify(golden[image], logits, labels[image]), logits

    def load(self, leaves, images: np.ndarray, labels: np.ndarray, start: int) -> Block:
        """Run the prefix on the block of images that starts at `start`."""
        stop = dict(self.blocks)[start]
        # Every block has the size of the first; the last image fills the last block up.
        rows = np.minimum(np.arange(start, start + self.blocks[0][1]), len(images) - 1)
        constants, residuals = self._prefix(leaves, images[rows])
        classes = self.parts.program.logits.aval
        blank = np.zeros((rows.size, classes.shape[1]), classes.dtype)
        block = Block(start, constants, residuals, blank, labels[rows].astype(np.int32))
        # The word 0 at its golden value: what "equal to golden" is judged against.
        leaf = np.asarray(leaves[self.parts.leaf])
        image = np.arange(start, stop)
        at = np.zeros((image.size, leaf.ndim), np.int32)
        golden = self.run(block, at, np.full(image.size, leaf.flat[0]), image).logits
        blank[: image.size] = golden
        return block._replace(logits=jax.device_put(blank), labels=jax.device_put(block.labels))

    def run(self, block: Block, at: np.ndarray, value: np.ndarray, image: np.ndarray) -> Pairs:
        """Run P pairs: the word at index `at` [P, rank] set to `value` [P], on `image` [P]."""
        done, pending = [], deque()
        for rows in _chunks(image.size, self.chunk):
            pending.append(
                self._suffix(
                    block.constants, block.residuals, block.logits, block.labels,
                    (image[rows] - block.start).astype(np.int32), at[rows], value[rows],
                )
            )  # fmt: skip
            if len(pending) > IN_FLIGHT:
                done.append(jax.device_get(pending.popleft()))
        done.extend(jax.device_get(list(pending)))
        codes, logits = (np.concatenate(column)[: image.size] for column in zip(*done, strict=True))
        return Pairs(codes, logits)


class Engine:
    """A network with its workload, golden run and compiled programs.

    Args:
      network: from `jfi.sites.network`.
      images: [B, ...], preprocessed as the network takes them.
      labels: int [B], in [0, C).
      sites: the sites that faults name by position.
      memory: bytes of golden values kept on the device at a time; where all images do not fit
        they are taken in blocks.

    Raises:
      InputError: images or labels of the wrong shape or range; a golden output that is not
        finite, or that depends on the other images of the batch.
    """

    def __init__(
        self, network: Network, images, labels, sites: tuple[Site, ...], *, memory: int = MEMORY
    ):
        self.network = network
        self.images = _check_images(network, images)
        self.golden = golden_run(network, self.images)
        self.labels = _check_labels(labels, self.golden.logits.shape)
        self.sites = tuple(sites)
        self._memory = memory
        self._programs: dict[int, SiteProgram] = {}
        self._loaded: tuple[int, Block] | None = None

    def run(self, faults: Faults, *, keep_bits: bool = False) -> Outcomes:
        """Outcomes of F faults on all B images; takes F x B bytes of host memory meanwhile.

        Args:
          faults: their `site` is a position in `sites`.
          keep_bits: also keep which images each fault is critical for.
        """
        codes = np.empty((faults.site.size, len(self.images)), np.uint8)
        # A fault that leaves its word as it is needs no run: masked, and top-1 is the golden one.
        codes[:] = np.where(self.golden.top1 == self.labels, outcomes.CORRECT, 0)
        todo = np.flatnonzero(~self.identity(faults))
        for number, rows in by_site(faults, todo):
            for start, stop in self.program(number).blocks:
                images = np.arange(start, stop)
                for part in np.array_split(rows, -(-rows.size * images.size // PAIRS)):
                    pairs = self.pairs(
                        take(faults, np.repeat(part, images.size)), np.tile(images, part.size)
                    )
                    codes[part, start:stop] = pairs.codes.reshape(part.size, -1)
        return outcomes.tally(codes, keep_bits)

    def pairs(self, faults: Faults, image: np.ndarray) -> Pairs:
        """Run P pairs: the k-th fault on image `image[k]`, whatever the fault does."""
        classes = self.golden.logits.shape[1]
        found = Pairs(
            np.empty(image.size, np.uint8),
            np.empty((image.size, classes), self.golden.logits.dtype),
        )
        for number, rows in by_site(faults, np.arange(image.size)):
            site, program = self.sites[number], self.program(number)
            for start, stop in program.blocks:
                inside = rows[(image[rows] >= start) & (image[rows] < stop)]
                if not inside.size:
                    continue
                words = bits.to_bits(self.network.values(site)).ravel()[faults.index[inside]]
                faulty = bits.set_bit(words, faults.bit[inside], faults.polarity[inside])
                at = _positions(faults.index[inside], site.shape)
                done = program.run(
                    self._load(number, start), at,
                    bits.from_bits(faulty, site.dtype), image[inside],
                )  # fmt: skip
                found.codes[inside], found.logits[inside] = done
        return found

    def golden_lanes(self, faults: Faults, image: np.ndarray) -> np.ndarray:
        """Golden logits [P, C] of each pair's image through the suffix of the fault's site."""
        found = np.empty((image.size, self.golden.logits.shape[1]), self.golden.logits.dtype)
        for number, rows in by_site(faults, np.arange(image.size)):
            for start, stop in self.program(number).blocks:
                inside = rows[(image[rows] >= start) & (image[rows] < stop)]
                if inside.size:
                    logits = np.asarray(self._load(number, start).logits)
                    found[inside] = logits[image[inside] - start]
        return found

    def identity(self, faults: Faults) -> np.ndarray:
        """bool [F]: the fault leaves its word as it is."""
        same = np.zeros(faults.site.size, bool)
        for number, rows in by_site(faults, np.arange(faults.site.size)):
            words = bits.to_bits(self.network.values(self.sites[number])).ravel()
            words = words[faults.index[rows]]
            same[rows] = words == bits.set_bit(words, faults.bit[rows], faults.polarity[rows])
        return same

    def program(self, site: int) -> SiteProgram:
        """The compiled programs of a site, by its position in `sites`."""
        if site not in self._programs:
            leaf = self.network.positions[self.sites[site].name]
            parts = split(self.network.program, leaf)
            self._programs[site] = SiteProgram(parts, len(self.images), self._memory)
        return self._programs[site]

    def _load(self, site: int, start: int) -> Block:
        # Golden values are large: only the last block used is kept.
        if self._loaded is None or self._loaded[0] != site or self._loaded[1].start != start:
            self._loaded = None
            block = self.program(site).load(self.network.leaves, self.images, self.labels, start)
            self._loaded = site, block
        return self._loaded[1]


def golden_run(network: Network, images: np.ndarray) -> Golden:
    """The fault-free run of images [B, ...], checked.

    Raises:
      InputError: an output that is not finite, or that depends on the rest of the batch.
    """
    run = jax.jit(network.apply)
    batch = min(GOLDEN_BATCH, len(images))
    logits = np.concatenate(
        [np.asarray(run(network.params, images[rows])) for rows in _chunks(len(images), batch)]
    )[: len(images)]
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
    return max(_rate(network, images, size, seconds) for size in sorted({GOLDEN_BATCH, 512}))


def _rate(network: Network, images: np.ndarray, batch: int, seconds: float) -> float:
    run = jax.jit(network.apply)
    batch_images = jax.device_put(np.resize(images, (batch, *images.shape[1:])))
    jax.block_until_ready(run(network.params, batch_images))
    started, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < seconds:
        jax.block_until_ready(run(network.params, batch_images))
        done += batch
    return done / spent


def close(a: np.ndarray, b: np.ndarray, rounding: float = 2.0**10) -> np.ndarray:
    """bool [P]: logits [P, C] that agree within float rounding.

    That is `rounding` epsilons of the type, relative to the largest logit of the pair: the sums
    a network makes are reordered between compiled programs. Non-finite logits must be the same.
    """
    eps = float(jnp.finfo(a.dtype).eps)
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    scale = np.where(finite, np.maximum(np.abs(a), np.abs(b)), 0).max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        near = np.abs(a - b) <= rounding * eps * np.maximum(scale, 1)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(finite, near, same).all(axis=-1)


def _positions(index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """int32 [P, rank]: C-order positions as one index an axis."""
    at = np.unravel_index(index, shape) if shape else []
    return np.array(at, np.int32).reshape(len(shape), index.size).T


def take(faults: Faults, rows) -> Faults:
    """The faults of these rows."""
    return Faults(*(column[rows] for column in faults))


def by_site(faults: Faults, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(site, the `rows` of its faults) for every site that occurs."""
    sites = faults.site[rows]
    for number in np.unique(sites):
        yield int(number), rows[sites == number]


def _chunks(total: int, size: int) -> Iterator[np.ndarray]:
    """Rows in chunks of one size; the last is filled up with row 0."""
    for start in range(0, total, size):
        rows = np.arange(start, start + size)
        yield np.where(rows < total, rows, 0)


def _chunk_size(live: int) -> int:
    """Pairs of a chunk, a power of two: many, as long as the largest value stays in cache."""
    fewest, most = CHUNK
    return int(np.clip(1 << max(0, (LIVE // max(1, live)).bit_length() - 1), fewest, most))


def _residual_bytes(parts: Split) -> int:
    return sum(nbytes(key.aval) for key in parts.residuals)


def _blocks(images: int, most: int) -> list[tuple[int, int]]:
    """(start, stop) of equal blocks of at most `most` images, at least one each."""
    count = -(-images // max(1, most))
    size = -(-images // count)
    return [(start, min(start + size, images)) for start in range(0, images, size)]


def _check_images(network: Network, images) -> np.ndarray:
    images, wanted = np.asarray(images), network.program.x.aval
    if images.shape[1:] != wanted.shape[1:] or images.dtype != wanted.dtype or not len(images):
        raise InputError(
            f"images have shape {images.shape} and dtype {images.dtype}; "
            f"the network takes [B, {', '.join(map(str, wanted.shape[1:]))}] of {wanted.dtype}"
        )
    return images


def _check_labels(labels, logits_shape: tuple[int, int]) -> np.ndarray:
    labels, (images, classes) = np.asarray(labels), logits_shape
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        raise InputError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}; "
            f"{images} integers are needed, one an image"
        )
    bad = labels[(labels < 0) | (labels >= classes)]
    if bad.size:
        raise InputError(f"label {bad[0]} is out of range; the classes are 0 to {classes - 1}")
    return labels.astype(np.int32)
