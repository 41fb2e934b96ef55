"""Pairs run from one narrow place of the network to the next, that leave when proven.

What no radius certifies goes through `jfi.engine.prune`, or through the screen. This tells critical
or not, no more.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from jfi import outcomes
from jfi.engine.judge import Case, parts, positions
from jfi.engine.prune import Block, Line, Pruner
from jfi.engine.radii import code
from jfi.faults import Faults, by_site, take
from jfi.hardware.chunks import blocks, chunks, filled_up

RADII_BLOCK = 64  # images whose radii are held at a time
DETECT_BLOCK = 64  # images that a fault is judged on before it may be dropped as critical


class CutToCut:
    """The judge that takes certificates in place of inference where they hold.

    Args:
      case: what is judged.
      screened: `ToLogits.screened`, to run pairs by that where no radius certifies them.
    """

    def __init__(self, case: Case, screened: Callable[..., np.ndarray] | None):
        self._case, self._screened = case, screened
        self._least: dict[int, np.ndarray] = {}
        self._at_cuts: tuple[np.ndarray, Block] | None = None

    def judge(self, faults, rows, codes, *, detect=False, only=None) -> np.ndarray:
        """As of `jfi.engine.judge.Judge`; of codes only whether they are critical counts."""
        todo, order, most = rows, np.arange(len(self._case.images)), self._block()
        inferred, judged = np.zeros((2, faults.site.size), np.int64)
        if only is not None:
            order = np.flatnonzero(only[rows].any(axis=0))
        if detect:
            # The first images show most faults; a dropped fault saves the rest.
            order, most = self._case.order, min(most, DETECT_BLOCK)
        apart = blocks(order.size, most)
        size = self._case.hardware.round_up(apart[0].stop)
        for part in apart:
            images = order[part]
            arrived = self._judge_block(faults, todo, images, size, codes, only)
            judged[todo] += images.size if only is None else only[np.ix_(todo, images)].sum(axis=1)
            np.add.at(inferred, arrived, 1)
            if detect:
                critical = (codes[np.ix_(todo, images)] & outcomes.CRITICAL).any(axis=1)
                todo = todo[~critical]
        return np.stack([inferred, judged - inferred])[:, rows]

    def make_radii(self) -> None:
        """Make now what a long campaign comes to make: all radii."""
        every = np.arange(len(self._case.images))
        for part in blocks(every.size, self._block()):
            for start in self.pruner.starts.values():
                start.radii.keep(every[part].tobytes(), self._case.images[part])

    def least_radii(self, site: int) -> np.ndarray:
        """Codes uint16 [words] of the smallest radius over the images; 0 where there is none."""
        if site not in self._least:
            radii, words = self.pruner.starts[site].radii, self._case.sites[site].words
            least = np.full(words, np.iinfo(np.uint16).max, np.uint16)
            for part in chunks(len(self._case.images), RADII_BLOCK):
                codes = radii.codes(self._case.images[part])
                least = np.minimum(least, 0 if codes is None else codes.min(axis=1))
            self._least[site] = least
        return self._least[site]

    @cached_property
    def pruner(self) -> Pruner:
        """The cuts, and what leads from every parameter to the first of them."""
        case, program = self._case, self._case.network.program
        leaves = {int(site): case.source(site) for site in np.flatnonzero(~case.at_run_time)}
        half = case.memory // 2  # the other half is golden values
        return Pruner(
            program, case.network.leaves, leaves, case.images, case.by, case.scores, case.hardware,
            half,
        )  # fmt: skip

    def _block(self) -> int:
        """Most images of a block: their golden values fit."""
        return max(1, self._case.memory // 2 // max(1, self.pruner.image_bytes()))

    def _judge_block(self, faults, rows, images, size, codes, only) -> np.ndarray:
        """Judge faults on one block of images; the rows of those run to the logits, one a pair."""
        block = self._load(filled_up(images, size))
        ends: list[tuple[np.ndarray, Any]] = []
        line = Line(self.pruner, block, lambda pair, found: ends.append((pair, found)))
        for site, row, image, faulty in self._left(faults, rows, images, only):
            pair = row * np.int64(codes.shape[1]) + images[image]
            own = take(faults, row)
            if self._screened:
                ends.append((pair, self._screened(own, images[image])))
            else:
                at = positions(own.index, self._case.sites[site].shape)
                golden = block.golden[site]
                self.pruner.starts[site].run(line, golden, at, faulty, pair, image)
        line.drain()
        for pair, found in ends:
            codes.flat[pair[pair >= 0]] = np.asarray(found)[pair >= 0]
        arrived = np.concatenate([pair for pair, _ in ends] or [np.empty(0, np.int64)])
        return arrived[arrived >= 0] // codes.shape[1]

    def _left(self, faults: Faults, rows, images, only) -> Iterator[tuple[int, Any, Any, Any]]:
        """The pairs of faults on `images` that no radius certifies, some at a time.

        That is (site, row of the fault [P], int32 position in `images` [P], faulty value [P]).
        """
        for site, own in by_site(faults, rows):
            wanted = None if only is None else only[np.ix_(own, images)]
            radii = self._radii(site, images, own.size, wanted)
            for some in parts(np.arange(own.size), images.size):
                group = take(faults, own[some])
                faulty, moved = self._case.change(site, group)
                near = np.zeros((some.size, images.size), bool)
                if radii is not None:
                    near = code(moved)[:, None] < radii[group.index]
                if wanted is not None:
                    near |= ~wanted[some]
                row, image = np.nonzero(~near)
                yield site, own[some][row], image.astype(np.int32), faulty[row]

    def _radii(self, site: int, images, faults: int, wanted) -> np.ndarray | None:
        """Codes of certified radii [words, b] or None; of the images `wanted` of all [F, b]."""
        radii, own = self.pruner.starts[site].radii, self._case.images
        if wanted is None:
            return radii.where_worth(images.tobytes(), own[images], faults)
        some = wanted.any(axis=0)
        codes = radii.codes(own[images[some]]) if some.any() else None
        if codes is None:
            return None
        found = np.zeros((len(codes), images.size), codes.dtype)
        found[:, some] = codes
        return found

    def _load(self, images: np.ndarray) -> Block:
        """Golden values and maps at the cuts; the last are kept for the next shard."""
        if self._at_cuts is None or not np.array_equal(self._at_cuts[0], images):
            self._at_cuts = None
            case = self._case
            columns = (x[images] for x in (case.images, case.golden.logits, case.labels))
            self._at_cuts = images, self.pruner.load(*columns)
        return self._at_cuts[1]
