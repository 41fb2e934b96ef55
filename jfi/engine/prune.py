"""Critical or not, with as little inference as can be: pairs leave as soon as they are proven.

A pair runs from its fault to the first cut of the program (`certify.cuts`) after it, and from
cut to cut. At each it leaves if its difference from golden is certified to keep the top-1
answer, or is zero; the others wait in a buffer on the device and go on together. A pair whose
weight changes by less than the certified radius of that weight and image is not run at all.

What is left unsaid is what the certificates do not tell: masked against non-critical.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jfi import bits, outcomes
from jfi.criteria.criterion import Judgement
from jfi.engine import certify, rounding
from jfi.engine.radii import Radii, Shelf, shared_out
from jfi.engine.routes import work
from jfi.engine.split import Split, image_bytes, read, split, suffix
from jfi.hardware.chunks import chunk_size, chunks, dealt, filled_up, mapped
from jfi.hardware.devices import SHARED, SPREAD, Hardware
from jfi.networks.program import Program, flops, nbytes, run, section

BUFFER = 128 << 20  # bytes of values that wait at one cut
TRIAL = 8  # images on which it is tried what maps are worth


# Which arguments of the functions at the end are spread over devices.
_START = (SPREAD, SHARED, SHARED, SHARED, SPREAD, SPREAD, SPREAD)
_WHOLE = (SHARED, SHARED, SPREAD, SPREAD, SPREAD, SHARED, SHARED)
_ADVANCE = (SPREAD, SHARED, SHARED, SPREAD, SPREAD)
_PROVEN = (SPREAD, SHARED, SHARED, SPREAD)
_FINISH = (SHARED, SPREAD, SPREAD, SPREAD, SHARED, SHARED)
_MAPS = PartitionSpec(None, *SPREAD)


class Cut(NamedTuple):
    """Golden values at a cut, for b images: values [b, ...], and bound maps [S, b, ...]."""

    values: Any
    maps: Any


class Block(NamedTuple):
    """What pruning needs of b images, on the device.

    By cut, golden values and maps; by site, constants and residuals (`split.prefix`); golden
    logits [b, C]; labels [b].
    """

    cuts: list[Cut]
    golden: dict[int, tuple[Any, Any]]
    logits: Any
    labels: Any


class Pruner:
    """A network cut up for pruning: from each site to the first cut after it, then cut to cut.

    Args:
      program, leaves: the network.
      sites: by site, the number of the parameter leaf that is faulted.
      images: [B, ...] as the network takes them; the first few are tried.
      by: what is critical, with constraints that prove it is not.
      scores: the variable that these are of.
      hardware: what to run on.
      memory: bytes that certified radii may take on the host, and, about, what makes them.
    """

    def __init__(
        self,
        program: Program,
        leaves: Sequence[Any],
        sites: Mapping[int, int],
        images: np.ndarray,
        by: Judgement,
        scores: Any,
        hardware: Hardware,
        memory: int,
    ):
        self.program, self.hardware, self.by = program, hardware, by
        # What is proven is said of scores, which the outputs follow from.
        proven = section(program, end=scores)
        self.leaves = hardware.share(leaves)
        self.allowances = hardware.jit_golden(partial(rounding.allowances, proven), SPREAD)
        trial = images[:TRIAL], np.asarray(self.allowances(self.leaves, images[:TRIAL]))
        self.cuts, self._maps = _useful(
            proven, by.constraints, self.leaves, trial, hardware, memory
        )
        ends = [*self.cuts, None][1:]
        stretches = [section(program, a, b) for a, b in zip(self.cuts, ends, strict=True)]
        self.chunks = [chunk_size(_live(s), hardware.chunk_bytes, flops(s.eqns)) for s in stretches]
        self.advance = [
            hardware.jit(partial(_advance, s), *_ADVANCE, donate_argnums=(0,))
            for s in stretches[:-1]
        ]
        # Apart from what makes the values: fused with it, XLA's code for CPUs would make them anew
        # for each reduction.
        self.proven = hardware.jit(_proven, *_PROVEN)
        self.finish = (
            hardware.jit(partial(_finish, stretches[-1], by), *_FINISH) if stretches else None
        )
        shelf = Shelf(memory)
        self.starts = {
            site: SiteStart(self, proven, leaf, shelf, memory) for site, leaf in sites.items()
        }
        parts = {site: start.parts for site, start in self.starts.items()}
        of_images = SPREAD, dict.fromkeys(parts, (SHARED, SPREAD))
        self._golden = hardware.jit_golden(partial(_golden, program, self.cuts, parts), of_images)

    def image_bytes(self) -> int:
        """Bytes that `load` keeps for one image."""
        at_cuts = (1 + len(certify.SCALES)) * sum(nbytes(cut.aval) for cut in self.cuts)
        return at_cuts + sum(image_bytes(start.parts) for start in self.starts.values())

    def load(self, images: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> Block:
        """Golden values and maps of b images."""
        values, golden = self._golden(self.leaves, images)
        rows = images, np.asarray(self.allowances(self.leaves, images))
        maps = [maps(self.leaves, rows) for maps in self._maps]
        cuts = [Cut(*pair) for pair in zip(values, maps, strict=True)]
        return Block(cuts, golden, *self.hardware.share((logits, labels)))


class Waiting(NamedTuple):
    """A chunk that waits at a cut: P = devices x `size` pairs, from row `offset` of each device on.

    proven bool [P]; pair int64 [P], -1 for none; image int32 [P], of the block.
    """

    offset: int
    size: int
    proven: Any
    pair: np.ndarray
    image: np.ndarray


class Line:
    """Pairs on their way through the stretches, for one block of images.

    `put` adds the values of a chunk of pairs at a cut; `drain` brings all to an end and hands
    each chunk that came as far as the logits to `arrive(pair, codes)`. A pair stays on its device.
    """

    def __init__(self, pruner: Pruner, block: Block, arrive: Callable[[Any, Any], None]):
        self.pruner, self.block, self.arrive = pruner, block, arrive
        self.waiting: list[list[Waiting]] = [[] for _ in pruner.cuts]
        self.buffers: list[Any] = [None] * len(pruner.cuts)

    def put(self, cut: int, step: Callable[[Any, int], Any], size: int, pair, image):
        """Run `step(buffer, offset) -> buffer`, for `size` pairs a device, and see what is proven.

        Args:
          pair: int64 [P], -1 for none.
        """
        if self.buffers[cut] is None:
            self.buffers[cut] = self.pruner.hardware.zeros(self._rows(cut), self._aval(cut))
        if self._filled(cut) + size > self._rows(cut):
            self._drain_one(cut)
        offset = self._filled(cut)
        self.buffers[cut] = step(self.buffers[cut], offset)
        proven = self.pruner.proven(self.buffers[cut], offset, self.block.cuts[cut], image)
        self.waiting[cut].append(Waiting(offset, size, proven, pair, image))

    def drain(self) -> None:
        """Run every waiting pair to its end."""
        for cut in range(len(self.waiting)):
            self._drain_one(cut)

    def _filled(self, cut: int) -> int:
        return sum(self.waiting[cut][-1][:2]) if self.waiting[cut] else 0

    def _aval(self, cut: int):
        return self.pruner.cuts[cut].aval

    def _rows(self, cut: int) -> int:
        """Rows of the buffer at a cut, on each device."""
        most = BUFFER // self.pruner.hardware.count // nbytes(self._aval(cut))
        return max(2 * max(self.pruner.chunks), most)

    def _drain_one(self, cut: int) -> None:
        device, row, pair, image = self._survivors(cut)
        self.waiting[cut] = []
        run = self._end if cut == len(self.waiting) - 1 else self._on
        for some in dealt(device, self.pruner.hardware.count, self.pruner.chunks[cut]):
            run(cut, row[some], np.where(some < 0, -1, pair[some]), image[some])

    def _survivors(self, cut: int) -> tuple[np.ndarray, ...]:
        """Device, row of its buffer, pair and image of the pairs that are not proven."""
        found = [[np.empty(0, np.int32)] * 4]
        for offset, size, proven, pair, image in self.waiting[cut]:
            left = np.flatnonzero(~np.asarray(proven) & (pair >= 0))
            device, row = np.divmod(left.astype(np.int32), np.int32(size))
            found.append([device, np.int32(offset) + row, pair[left], image[left]])
        return tuple(np.concatenate(column) for column in zip(*found, strict=True))

    def _on(self, cut: int, row, pair, image) -> None:
        source = self.buffers[cut]

        def step(buffer, offset):
            return self.pruner.advance[cut](buffer, offset, self.pruner.leaves, source, row)

        self.put(cut + 1, step, self.pruner.chunks[cut], pair, image)

    def _end(self, cut: int, row, pair, image) -> None:
        golden = self.block.logits, self.block.labels
        codes = self.pruner.finish(self.pruner.leaves, self.buffers[cut], row, image, *golden)
        self.arrive(pair, codes)


class SiteStart:
    """The program of one site up to the first cut after it, and its certified radii.

    Where no cut comes after the site, its pairs run to the logits at once.
    """

    def __init__(self, pruner: Pruner, proven: Program, leaf: int, shelf: Shelf, memory: int):
        self.pruner, hardware = pruner, pruner.hardware
        self.cut = certify.first_cut(pruner.program, pruner.cuts, leaf)
        end = pruner.cuts[self.cut] if self.cut < len(pruner.cuts) else None
        self.parts = split(section(pruner.program, end=end), leaf)
        self.chunk = chunk_size(self.parts.live, hardware.chunk_bytes, self.parts.flops)
        self._start = hardware.jit(partial(_start, self.parts), *_START, donate_argnums=(0,))
        self._whole = hardware.jit(partial(_whole, self.parts, pruner.by), *_WHOLE)
        pair = work(self.parts.flops, self.parts.live)
        self.radii = Radii(
            proven, pruner.by.constraints, pruner.leaves, leaf, pair, hardware, shelf,
            pruner.allowances, memory,
        )  # fmt: skip

    def run(self, line: Line, golden: tuple[Any, Any], at, value, pair, image) -> None:
        """Send P pairs on their way: word `at` [P, rank] set to `value` [P], on `image` [P]."""
        size = self.pruner.hardware.count * self.chunk
        for part in chunks(pair.size, size):
            numbers = filled_up(pair[part], size, -1)
            full = [filled_up(column[part], size) for column in (image, at, value)]
            if self.cut < len(self.pruner.cuts):
                step = partial(self._step, golden, full)
                line.put(self.cut, step, self.chunk, numbers, full[0])
            else:
                ends = line.block.logits, line.block.labels
                line.arrive(numbers, self._whole(*golden, *full, *ends))

    def _step(self, golden, full, buffer, offset):
        return self._start(buffer, offset, *golden, *full)


def _useful(
    program: Program, constraints, leaves, rows, hardware: Hardware, memory: int
) -> tuple[list[Any], list[Callable]]:
    """The cuts from the first on whose maps certify anything, and what makes their maps.

    Bounds grow with the distance to the logits, so those before it would certify nothing.
    """
    found: list[tuple[Any, Callable]] = []
    for cut in reversed(certify.cuts(program)):
        room = memory // certify.footprint(section(program, cut))
        maps = hardware.jit_golden(
            partial(_maps, program, constraints, cut, room // hardware.count), _MAPS
        )
        if not certify.is_useful(maps(leaves, rows)):
            break
        found.insert(0, (cut, maps))
    return [cut for cut, _ in found], [maps for _, maps in found]


def _live(program: Program) -> int:
    return max(nbytes(var.aval) for eqn in program.eqns for var in eqn.outvars)


def _golden(program: Program, cuts: Sequence[Any], sites: Mapping[int, Split], leaves, images):
    """Golden values [b, ...] at the cuts, and by site its constants and residuals."""

    def one(image):
        env = run(program, leaves, image[None])
        return [env[cut] for cut in cuts], {
            site: read(parts.residuals, env) for site, parts in sites.items()
        }

    values, residuals = jax.vmap(one)(images)
    # Constants do not depend on the image: any will do, and the compiler drops its part.
    env = run(program, leaves, jnp.zeros((1, *images.shape[1:]), images.dtype))
    return values, {
        site: (read(parts.constants, env), residuals[site]) for site, parts in sites.items()
    }


def _maps(program: Program, constraints, cut, room: int, leaves, rows):
    """Bound maps [S, b, ...] at a cut, one for every scale; rows: images and their allowances.

    There is room for so many images times scales at a time.
    """
    images, scales = shared_out(room, len(rows[0]), 1)

    def one(row):
        image, allowance = row
        env = run(program, leaves, image[None])
        each = jnp.asarray(certify.SCALES, env[cut].dtype)
        return mapped(
            lambda scale: certify.bound_map(program, env, cut, scale, allowance, constraints),
            each,
            scales,
        )

    return jnp.swapaxes(mapped(one, rows, images), 0, 1)


def _start(parts: Split, buffer, offset, constants, residuals, image, at, value):
    """A chunk of pairs from the fault to the first cut."""
    values = jax.vmap(
        lambda image, at, value: suffix(parts, constants, residuals, image, list(at), value)
    )(image, at, value)
    return _store(buffer, offset, values)


def _whole(parts: Split, by: Judgement, constants, residuals, image, at, value, golden, labels):
    """A chunk of pairs from the fault to their outcome codes, where no cut comes between."""
    logits = jax.vmap(
        lambda image, at, value: suffix(parts, constants, residuals, image, list(at), value)[0]
    )(image, at, value)
    return outcomes.classify(golden[image], logits, labels[image], by)


def _advance(stretch: Program, buffer, offset, leaves, source, row):
    """A chunk of pairs from one cut to the next."""
    values = jax.vmap(lambda value: run(stretch, leaves, value)[stretch.out])(source[row])
    return _store(buffer, offset, values)


def _finish(stretch: Program, by: Judgement, leaves, source, row, image, golden, labels):
    """A chunk of pairs from the last cut to their outcome codes."""
    logits = jax.vmap(lambda value: run(stretch, leaves, value)[stretch.out][0])(source[row])
    return outcomes.classify(golden[image], logits, labels[image], by)


def _store(buffer, offset, values):
    return lax.dynamic_update_slice(buffer, values, (offset, *[0] * (values.ndim - 1)))


def _proven(buffer, offset, cut: Cut, image):
    """`proven` of the chunk of pairs that lies in the buffer from row `offset` on."""
    return proven(lax.dynamic_slice_in_dim(buffer, offset, len(image)), cut, image)


def proven(values, cut: Cut, image):
    """bool [P]: the difference of `values` [P, ...] from golden is certified to keep top-1."""
    golden = cut.values[image]
    moved = jnp.abs(values - golden).reshape(len(values), -1)
    # Of bits: what follows may tell -0 from 0, and a maximum may lose a NaN on some devices.
    differs = bits.differs(values, golden).reshape(len(values), -1)
    # Both in one reduction: XLA's code for CPUs is two to four times as fast as for one each.
    most, other = lax.reduce(
        (moved, differs), (jnp.zeros((), moved.dtype), False), _most_and_any, dimensions=(1,)
    )
    scales = jnp.asarray(certify.SCALES, moved.dtype)
    fit = jnp.minimum(jnp.sum(most[:, None] > scales, axis=1), scales.size - 1)
    cost = jnp.sum(moved * cut.maps[fit, image].reshape(moved.shape), axis=1)
    # A NaN, an infinity and a difference beyond the largest scale all fail these tests.
    return ~other | ((most <= scales[-1]) & (cost < certify.LIMIT))


def _most_and_any(one, other):
    return jnp.maximum(one[0], other[0]), one[1] | other[1]
