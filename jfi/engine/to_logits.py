"""Pairs run to the logits, whatever they do: by programs of a site, or one fault at a time.

`jfi.engine.whole` runs pairs of one site side by side; `jfi.engine.loop` runs faults one by one on
all images. `jfi.engine.routes` estimates which is the faster; where both come close they are timed.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from jfi import bits
from jfi.engine import screen as screening
from jfi.engine.judge import Case, parts, positions
from jfi.engine.loop import Loop
from jfi.engine.split import image_bytes, split
from jfi.engine.whole import Block, Pairs, SiteProgram
from jfi.faults import Faults, by_site, take
from jfi.hardware import tuning
from jfi.hardware.chunks import blocks, filled_up
from jfi.networks import taps
from jfi.networks.program import text
from jfi.networks.taps import Tap

TIMED = 16  # faults that a loop is timed on
ANY, OWN = "any", "own"  # loops by a program of all parameters, of one


class ToLogits:
    """The judge that tells the outcome class of every pair.

    Args:
      case: what is judged.
      screen: a name of `jfi.engine.screen.REDUCED`, for `screened`.
      loop: whether faults in parameters are run one by one, always or never; None for where that is
        the faster way.
    """

    def __init__(self, case: Case, screen: str | None, loop: bool | None):
        self._case, self._screen, self._always = case, screen, loop
        self._programs: dict[int, SiteProgram] = {}
        self._slow: dict[int, bool] = {}
        self._loaded: tuple[int, Block] | None = None

    def judge(self, faults, rows, codes, *, detect=False, only=None) -> np.ndarray:
        """As of `jfi.engine.judge.Judge`; every pair is run."""
        if only is not None:
            row, image = np.nonzero(only[rows])
            codes[rows[row], image] = self._pairs(take(faults, rows[row]), image, None).codes
            run = only[rows].sum(axis=1)
        else:
            self._judge_all(faults, rows, codes)
            run = np.full(rows.size, codes.shape[1])
        return np.stack([run, np.zeros_like(run)])

    def _judge_all(self, faults: Faults, rows: np.ndarray, codes: np.ndarray) -> None:
        """Write the codes of faults on all images."""
        for site, own in by_site(faults, rows):
            way = self._loops(site, own.size)
            if way:
                for some, found, _ in self._looped(site, faults, own, way):
                    codes[some] = found
                continue
            for part in self.image_blocks(site):
                images = np.arange(part.start, part.stop)
                for some in parts(own, images.size):
                    pairs = take(faults, np.repeat(some, images.size))
                    found = self._pairs(pairs, np.tile(images, some.size), None).codes
                    codes[some, part] = found.reshape(some.size, -1)

    def pairs(self, faults: Faults, image: np.ndarray, *, reduced: bool = False) -> Pairs:
        """Run P pairs: the k-th fault on image `image[k]`, with their logits.

        Args:
          reduced: in the precision of the screen.
        """
        golden = self._case.golden.logits
        logits = np.empty((image.size, golden.shape[1]), golden.dtype)
        return self._pairs(faults, image, logits, reduced)

    def _pairs(
        self, faults: Faults, image: np.ndarray, logits: np.ndarray | None, reduced: bool = False
    ) -> Pairs:
        """Run P pairs; `logits` [P, N] are written to, unless they are not wanted."""
        found = Pairs(np.empty(image.size, np.uint8), logits)
        for site, rows in by_site(faults, np.arange(image.size)):
            way = None if reduced else self._loops(site, rows.size)
            if way:
                for some, *done in self._looped(site, faults, rows, way):
                    each = np.arange(some.size), image[some]
                    found.codes[some] = done[0][each]
                    if logits is not None:
                        logits[some] = done[1][each]
                continue
            at, faulty = self._operands(site, take(faults, rows))
            for part in self.image_blocks(site):
                inside = np.flatnonzero((image[rows] >= part.start) & (image[rows] < part.stop))
                if inside.size:
                    block = self._load(site, part)
                    local = image[rows[inside]] - part.start
                    done = self.program(site).run(
                        block, at[inside], faulty[inside], local, reduced, logits is not None
                    )
                    found.codes[rows[inside]] = done.codes
                    if logits is not None:
                        logits[rows[inside]] = done.logits
        return found

    def screened(self, faults: Faults, image: np.ndarray) -> np.ndarray:
        """Codes of P pairs by reduced precision, and in full where it leaves a doubt."""
        found = self.pairs(faults, image, reduced=True)
        doubt = np.flatnonzero(screening.doubtful(found.logits, self._threshold))
        found.codes[doubt] = self._pairs(take(faults, doubt), image[doubt], None).codes
        return found.codes

    @cached_property
    def _threshold(self) -> float:
        """`jfi.engine.screen.threshold` of flips of all bits, all over the sites and the images."""
        sites = self._case.sites
        each = -(-screening.PAIRS // len(sites))
        words = [np.arange(each) * site.words // each for site in sites]
        bit = [np.arange(each) % site.width for site in sites]
        number = np.repeat(np.arange(len(sites)), each)
        flip = np.full(number.size, bits.FLIP, np.int8)
        faults = Faults(number, np.concatenate(words), np.concatenate(bit), flip)
        image = np.arange(number.size) % len(self._case.images)
        both = (self.pairs(faults, image, reduced=way).logits for way in (False, True))
        return screening.threshold(*both)

    def program(self, site: int) -> SiteProgram:
        """The compiled programs of a site."""
        if site not in self._programs:
            apart = split(self._case.network.program, self._case.source(site))
            reduced = screening.REDUCED.get(self._screen)
            self._programs[site] = SiteProgram(apart, self._case.by, self._case.hardware, reduced)
        return self._programs[site]

    def image_blocks(self, site: int) -> list[slice]:
        """The images whose golden values are kept together for a site."""
        image = max(1, image_bytes(self.program(site).parts))
        return blocks(len(self._case.images), self._case.memory // image)

    def _operands(self, site: int, faults: Faults) -> tuple[np.ndarray, np.ndarray]:
        """Where F faults of one site strike, int32 [F, rank], and what they put there [F, ...]."""
        source, own = self._case.source(site), self._case.sites[site]
        if isinstance(source, Tap):
            return taps.operands(source, own, faults)
        return positions(faults.index, own.shape), self._case.change(site, faults)[0]

    def _load(self, site: int, part: slice) -> Block:
        # Golden values are large: only the last block used is kept.
        if self._loaded is None or self._loaded[0] != site or self._loaded[1].start != part.start:
            self._loaded = None
            size = self._case.hardware.round_up(self.image_blocks(site)[0].stop)
            rows = filled_up(np.arange(part.start, part.stop), size)
            columns = self._case.images[rows], self._case.labels[rows]
            self._loaded = site, self.program(site).load(self._case.leaves, *columns, part.start)
        return self._loaded[1]

    def _loops(self, site: int, faults: int) -> str | None:
        """The loop for so many faults in a site, on all images, if one is the faster way.

        That is by a program of all parameters (`ANY`) or of this one (`OWN`).
        """
        ways = self._case.ways
        if self._case.at_run_time[site] or self._screen or self._always is False:
            return None
        expected = ways.expected(site, faults)
        if not self._always and not ways.are_few(expected):
            apart = self.program(site).parts
            if not ways.is_close(apart):
                return None
            if ways.are_worth(expected, apart):
                return OWN if self._is_slow(site) else None
        return OWN if ways.own_loop(expected, self._case.source(site)) else ANY

    def _looped(
        self, site: int, faults: Faults, rows: np.ndarray, way: str
    ) -> Iterator[tuple[Any, ...]]:
        """The `rows` of one parameter's faults, some at a time: rows [f], codes [f, B], logits.

        Args:
          way: of `_loops`.
        """
        own = take(faults, rows)
        value = self._case.change(site, own)[0]
        done = self._loop.run(self._case.source(site), own.index, value, way == OWN)
        for part, *found in done:
            yield rows[part], *found

    @cached_property
    def _loop(self) -> Loop:
        case = self._case
        columns = case.images, case.labels, case.by
        return Loop(case.network.program, case.leaves, *columns, case.hardware)

    def _is_slow(self, site: int) -> bool:
        """Whether the programs of a site were timed to be slower than a loop, now or before."""
        if site not in self._slow:
            name = self._case.sites[site].name
            what = f"{self._text}, {name}, {len(self._case.images)} images, loop of its own"

            self._slow[site] = tuning.kept(self._case.hardware, what, lambda: self._time_both(site))
        return self._slow[site]

    def _time_both(self, site: int) -> bool:
        """Time a loop and the programs of a site, each once compiled, on faults of no effect."""
        own, program, images = self._case.sites[site], self.program(site), len(self._case.images)
        word = self._case.network.values(own).ravel()[:1]
        words = np.repeat(word, TIMED)
        part = self.image_blocks(site)[0]
        block, size = self._load(site, part), program.chunk
        at = np.zeros((size, len(own.shape)), np.int32)
        image = np.arange(size) % (part.stop - part.start)
        source = self._case.source(site)
        ways = (
            (lambda: list(self._loop.run(source, np.zeros(TIMED, int), words, True)),
             TIMED * images),
            (lambda: program.run(block, at, np.repeat(word, size), image), size),
        )  # fmt: skip
        loop, suffix = (tuning.seconds(way) / pairs for way, pairs in ways)
        return loop < suffix

    @cached_property
    def _text(self) -> str:
        """What the network computes, in few letters."""
        return hashlib.sha256(text(self._case.network.program).encode()).hexdigest()[:16]
