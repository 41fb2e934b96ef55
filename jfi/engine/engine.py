"""The engine: outcomes of faults on a workload, many pairs at a time.

The unit of work is a list of (fault, image) pairs of one site, cut into chunks of one size so
that nothing recompiles. Pairs run to the logits (`jfi.engine.whole`) or, where only critical or not
is asked, from cut to cut and leave when proven (`jfi.engine.prune`). Where neither pays, faults are
run one by one on all images (`jfi.engine.loop`); `jfi.engine.routes` estimates which way is the
fastest.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from jfi import bits, outcomes
from jfi.engine import screen as screening
from jfi.engine.golden import Golden, golden_run
from jfi.engine.loop import Loop
from jfi.engine.prune import Block as PrunerBlock
from jfi.engine.prune import Line, Pruner
from jfi.engine.radii import code, distance
from jfi.engine.routes import Ways
from jfi.engine.split import image_bytes, split
from jfi.engine.whole import Block, Pairs, SiteProgram
from jfi.errors import InputError, kind
from jfi.faults import Faults, Site, check_faults, check_range
from jfi.hardware import tuning
from jfi.hardware.chunks import blocks, chunks, filled_up
from jfi.hardware.devices import Hardware
from jfi.networks import taps
from jfi.networks.program import text
from jfi.networks.sites import Network, check_sites
from jfi.networks.taps import Tap
from jfi.outcomes import Outcomes

# What is asked of every fault: its outcome class on every image; whether it is critical for each
# image; or only whether it is critical for any.
MEASURES = ("full", "critical", "detect")
MEMORY = 1 << 30  # bytes of golden values kept on the device at a time
PAIRS = 1 << 20  # most pairs listed on the host at a time
RADII_BLOCK = 64  # images whose radii are held at a time
TIMED = 16  # faults that a loop is timed on
ANY, OWN = "any", "own"  # loops by a program of all parameters, of one
DETECT_BLOCK = 64  # images that a fault is judged on before it may be dropped as critical


class Engine:
    """A network with its workload, golden run and compiled programs.

    Args:
      network: from `jfi.networks.sites.network`.
      images: [B, ...], preprocessed as the network takes them.
      labels: int [B], in [0, C); None where there are none: golden answers stand for them.
      sites: the sites that faults name by position.
      memory: bytes of golden values kept on the device at a time; where all images do not fit
        they are taken in blocks.
      hardware: what to run on, by default all local devices.
      screen: a name of `jfi.engine.screen.REDUCED`: the measures critical and detect then run pairs
        in that precision first, and in full where it leaves a doubt.
      order: int [B], the order in which `detect` presents the images, by default those nearest to
        another answer first (the golden margin).
      loop: whether faults in parameters are run one by one through the whole network, always or
        never; by default where that is estimated to be faster, or was once timed to be.

    Raises:
      InputError: images or labels of the wrong shape or range; an order that does not name each
        image once; a golden output that is not finite, or that depends on the other images of the
        batch; an unknown screen, or one with `loop=True`.
    """

    def __init__(
        self,
        network: Network,
        images,
        labels,
        sites: tuple[Site, ...],
        *,
        memory: int = MEMORY,
        hardware: Hardware | None = None,
        screen: str | None = None,
        order: np.ndarray | None = None,
        loop: bool | None = None,
    ):
        self.network, self.screen = network, _check_screen(screen)
        self.hardware = tuning.usual() if hardware is None else hardware
        self.images = _check_images(network, images)
        self.golden = golden_run(network, self.images)
        shape = self.golden.logits.shape
        self.labels = check_labels(self.golden.top1 if labels is None else labels, shape)
        self.order, self.is_ordered = _check_order(order, self.golden), order is not None
        self.sites = check_sites(network, sites)
        if screen and loop:
            raise InputError(f"screen {screen!r} has no loop: leave loop=True out, or the screen")
        self._memory, self._always = memory, loop
        self._ways = Ways(network.program, len(self.images))
        self._expected = Counter[int]()
        self._leaves = self.hardware.share(network.leaves)
        self._programs: dict[int, SiteProgram] = {}
        self._slow: dict[int, bool] = {}
        self._pruned: frozenset[int] = frozenset()  # sites whose faults run from cut to cut
        self._least: dict[int, np.ndarray] = {}
        self._loaded: tuple[int, Block] | None = None
        self._at_cuts: tuple[np.ndarray, PrunerBlock] | None = None

    def expect(self, faults: Mapping[int, int]) -> None:
        """Say how many faults there are to run in all, by site: ways are chosen for so many.

        Unsaid, they are chosen for each `run` by itself.
        """
        self._expected = Counter(faults)

    def run(self, faults: Faults, measure: str = "full", *, keep_bits: bool = False) -> Outcomes:
        """Outcomes of F faults on all B images; takes F x B bytes of host memory meanwhile.

        Args:
          faults: their `site` is a position in `sites`.
          measure: `full` tells the class of every pair; `critical` whether it is critical, with
            certificates in place of inference where they hold; `detect` only whether the fault
            is critical for any image, and stops at the first block of images that shows it.
          keep_bits: also keep which images each fault is critical for, and masked if told.

        Raises:
          InputError: an unknown measure; `full` of an engine that screens; a fault that is none
            of the sites', naming its column and row (`jfi.faults.check_faults`).
        """
        check_measure(measure, self.screen)
        faults = check_faults(faults, self.sites)
        codes = np.empty((faults.site.size, len(self.images)), np.uint8)
        # A fault that leaves its word as it is needs no run: masked, and top-1 is the golden one.
        codes[:] = np.where(self.golden.top1 == self.labels, outcomes.CORRECT, 0)
        todo = np.flatnonzero(~self.identity(faults))
        inferred = np.zeros((2, faults.site.size), np.int32)  # and certified
        if measure == "full":
            self._run_full(faults, todo, codes)
            inferred[0, todo] = len(self.images)
            told = outcomes.tally(codes, keep_bits)
        else:
            plain = ~np.isin(faults.site[todo], self._bounded(faults.site[todo]))
            whole, todo = todo[plain], todo[~plain]
            self._run_full(faults, whole, codes)
            inferred[:] = self._run_pruned(faults, todo, codes, detect=measure == "detect")
            inferred[0, whole] = len(self.images)
            told = outcomes.tally_critical(codes, keep_bits)
        told = told._replace(inferred=inferred[0], certified=inferred[1])
        return self._detected(told, codes) if measure == "detect" else told

    def _detected(self, told: Outcomes, codes: np.ndarray) -> Outcomes:
        """What is known when a fault was dropped at the first images it was critical for."""
        hit = (codes[:, self.order] & outcomes.CRITICAL) != 0
        first = np.where(hit.any(axis=1), self.order[hit.argmax(axis=1)], -1)
        unsaid = dict.fromkeys(("non_finite", "correct", "critical_bits"))
        return told._replace(
            critical=(first >= 0).astype(np.int32), first_critical=first.astype(np.int32), **unsaid
        )

    def told(self, first: np.ndarray, image: np.ndarray, measure: str) -> np.ndarray:
        """int8 [P]: critical 1, not critical 0, unsaid -1, of P faults, each on one image.

        Args:
          first: int [P], the first image that each fault is critical for as `measure` told it, -1
            for none: it tells of the images up to that one.
        """
        order = self.order if measure == "detect" else np.arange(len(self.images))
        rank = np.argsort(order)
        before = (first < 0) | (rank[image] < rank[first])
        return np.where(image == first, 1, np.where(before, 0, -1)).astype(np.int8)

    def _run_full(self, faults: Faults, todo: np.ndarray, codes: np.ndarray) -> None:
        """Write the codes of the faults `todo` on all images."""
        for number, rows in by_site(faults, todo):
            looped = self._loops(number, rows.size)
            if looped:
                for some, found, _ in self._looped(number, faults, rows, looped):
                    codes[some] = found
                continue
            for part in self.image_blocks(number):
                images = np.arange(part.start, part.stop)
                for some in _parts(rows, images.size):
                    pairs = self._pairs(
                        take(faults, np.repeat(some, images.size)), np.tile(images, some.size)
                    )
                    codes[some, part] = pairs.codes.reshape(some.size, -1)

    def make_radii(self) -> None:
        """Make now what a long campaign of the measure `critical` comes to make: all radii."""
        for part in blocks(len(self.images), self._pruned_block()):
            images = np.arange(len(self.images))[part]
            for start in self._pruner.starts.values():
                start.radii.keep(images.tobytes(), self.images[images])

    def certified(self, site: int, bit: int, polarity: int = bits.FLIP) -> np.ndarray:
        """bool [words]: the fault, by default the flip, is proven to keep top-1 on every image.

        The first call for a site makes its radii for all images.
        """
        golden = self.network.values(self.sites[site]).ravel()
        moved = distance(bits.faulty(golden, bit, polarity), golden)
        return code(moved) < self._least_radii(site)

    def _least_radii(self, site: int) -> np.ndarray:
        """Codes uint16 [words] of the smallest radius over the images; 0 where there is none."""
        if site not in self._least:
            radii = self._pruner.starts[site].radii
            least = np.full(self.sites[site].words, np.iinfo(np.uint16).max, np.uint16)
            for part in chunks(len(self.images), RADII_BLOCK):
                codes = radii.codes(self.images[part])
                least = np.minimum(least, 0 if codes is None else codes.min(axis=1))
            self._least[site] = least
        return self._least[site]

    def critical_pairs(self, faults: Faults, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Run P pairs as `critical` does: the k-th fault on image `image[k]`.

        Returns:
          Codes uint8 [P], of which only the flags count, and bool [P], certified. Radii are used
          whether they pay or not: this is for verifying them.

        Raises:
          InputError: as of `pairs`.
        """
        faults, image = self.check_pairs(faults, image)
        codes = np.zeros((image.size, len(self.images)), np.uint8)
        only = np.zeros(codes.shape, bool)
        pair = np.arange(image.size), image
        only[pair] = True
        plain = ~np.isin(faults.site, self._bounded(faults.site))
        whole = np.flatnonzero(plain)
        codes[whole, image[whole]] = self._pairs(take(faults, whole), image[whole]).codes
        inferred, _ = self._run_pruned(faults, np.flatnonzero(~plain), codes, only=only)
        return codes[pair], (inferred == 0) & ~plain

    def _run_pruned(
        self,
        faults: Faults,
        todo: np.ndarray,
        codes: np.ndarray,
        *,
        detect: bool = False,
        only: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Write the codes of pairs that may be critical.

        Args:
          only: bool [F, B], the pairs to run; by default all of the faults `todo`.

        Returns:
          Images run to the logits, and certified, int [F] each.
        """
        inferred, judged = np.zeros((2, faults.site.size), np.int64)
        if not todo.size:
            return inferred, judged
        order, most = np.arange(len(self.images)), self._pruned_block()
        if only is not None:
            order = np.flatnonzero(only.any(axis=0))
        if detect:
            # The first images show most faults; a dropped fault saves the rest.
            order, most = self.order, min(most, DETECT_BLOCK)
        parts = blocks(order.size, most)
        size = self.hardware.round_up(parts[0].stop)
        for part in parts:
            images = order[part]
            arrived = self._run_block(faults, todo, images, size, codes, only)
            judged[todo] += images.size
            np.add.at(inferred, arrived, 1)
            if detect:
                critical = (codes[np.ix_(todo, images)] & outcomes.CRITICAL).any(axis=1)
                todo = todo[~critical]
        return inferred, judged - inferred

    def _run_block(self, faults, todo, images, size, codes, only) -> np.ndarray:
        """Run faults `todo` on one block of images; the fault rows of pairs run to the logits."""
        block = self._load_cuts(filled_up(images, size))
        ends: list[tuple[np.ndarray, Any]] = []
        line = Line(self._pruner, block, lambda pair, found: ends.append((pair, found)))
        for number, row, image, faulty in self._left(faults, todo, images, only):
            pair = row * np.int64(len(self.images)) + images[image]
            own = take(faults, row)
            if self.screen:
                ends.append((pair, self._screened(own, images[image])))
            else:
                at = _positions(own.index, self.sites[number].shape)
                golden = block.golden[number]
                self._pruner.starts[number].run(line, golden, at, faulty, pair, image)
        line.drain()
        for pair, found in ends:
            codes.flat[pair[pair >= 0]] = np.asarray(found)[pair >= 0]
        arrived = np.concatenate([pair for pair, _ in ends] or [np.empty(0, np.int64)])
        return arrived[arrived >= 0] // len(self.images)

    def _left(self, faults, todo, images, only) -> Iterator[tuple[int, Any, Any, Any]]:
        """The pairs of faults `todo` on `images` that no radius certifies, some at a time.

        That is (site, row of the fault [P], int32 position in `images` [P], faulty value [P]).
        """
        for number, rows in by_site(faults, todo):
            wanted = None if only is None else only[np.ix_(rows, images)]
            radii = self._radii(number, images, rows.size, wanted)
            for some in _parts(np.arange(rows.size), images.size):
                own = take(faults, rows[some])
                faulty, moved = self._change(number, own)
                near = np.zeros((some.size, images.size), bool)
                if radii is not None:
                    near = code(moved)[:, None] < radii[own.index]
                if wanted is not None:
                    near |= ~wanted[some]
                row, image = np.nonzero(~near)
                yield number, rows[some][row], image.astype(np.int32), faulty[row]

    def _screened(self, faults: Faults, image: np.ndarray) -> np.ndarray:
        """Codes of P pairs by reduced precision, and in full where it leaves a doubt."""
        found = self._pairs(faults, image, reduced=True)
        doubt = np.flatnonzero(screening.doubtful(found.logits, self._threshold))
        found.codes[doubt] = self._pairs(take(faults, doubt), image[doubt]).codes
        return found.codes

    @cached_property
    def _threshold(self) -> float:
        """`jfi.engine.screen.threshold` of flips of all bits, all over the sites and the images."""
        each = -(-screening.PAIRS // len(self.sites))
        words = [np.arange(each) * site.words // each for site in self.sites]
        bit = [np.arange(each) % site.width for site in self.sites]
        number = np.repeat(np.arange(len(self.sites)), each)
        flip = np.full(number.size, bits.FLIP, np.int8)
        faults = Faults(number, np.concatenate(words), np.concatenate(bit), flip)
        image = np.arange(number.size) % len(self.images)
        both = (self._pairs(faults, image, reduced=way).logits for way in (False, True))
        return screening.threshold(*both)

    def _radii(self, site: int, images, faults: int, wanted) -> np.ndarray | None:
        """Codes of certified radii [words, b] or None; of the images `wanted` of all [F, b]."""
        radii = self._pruner.starts[site].radii
        if wanted is None:
            return radii.where_worth(images.tobytes(), self.images[images], faults)
        some = wanted.any(axis=0)
        codes = radii.codes(self.images[images[some]]) if some.any() else None
        if codes is None:
            return None
        found = np.zeros((len(codes), images.size), codes.dtype)
        found[:, some] = codes
        return found

    def pairs(self, faults: Faults, image: np.ndarray, *, reduced: bool = False) -> Pairs:
        """Run P pairs to the logits: the k-th fault on image `image[k]`, whatever it does.

        Args:
          reduced: in the precision of the screen.

        Raises:
          InputError: a fault that is none of the sites', or an image that there is not, naming
            column and row; not one image a fault.
        """
        return self._pairs(*self.check_pairs(faults, image), reduced=reduced)

    def check_pairs(self, faults: Faults, image) -> tuple[Faults, np.ndarray]:
        """P faults and their images int64 [P], checked. Raises InputError as `pairs` does."""
        faults = check_faults(faults, self.sites)
        image = check_range("image", image, len(self.images))
        if image.shape != faults.site.shape:
            raise InputError(
                f"images {kind(image)} are not one a fault: there are {faults.site.size} faults"
            )
        return faults, image

    def _pairs(self, faults: Faults, image: np.ndarray, *, reduced: bool = False) -> Pairs:
        golden = self.golden.logits
        logits = np.empty((image.size, golden.shape[1]), golden.dtype)
        found = Pairs(np.empty(image.size, np.uint8), logits)
        for number, rows in by_site(faults, np.arange(image.size)):
            looped = None if reduced else self._loops(number, rows.size)
            if looped:
                for some, *done in self._looped(number, faults, rows, looped):
                    each = np.arange(some.size), image[some]
                    found.codes[some], found.logits[some] = (column[each] for column in done)
                continue
            at, faulty = self._operands(number, take(faults, rows))
            for part in self.image_blocks(number):
                inside = np.flatnonzero((image[rows] >= part.start) & (image[rows] < part.stop))
                if inside.size:
                    block = self._load(number, part)
                    local = image[rows[inside]] - part.start
                    program = self.program(number)
                    done = program.run(block, at[inside], faulty[inside], local, reduced)
                    found.codes[rows[inside]], found.logits[rows[inside]] = done
        return found

    def _looped(
        self, site: int, faults: Faults, rows: np.ndarray, way: str
    ) -> Iterator[tuple[Any, ...]]:
        """The `rows` of one parameter's faults, some at a time: rows [f], codes [f, B], logits.

        Args:
          way: of `_loops`.
        """
        own = take(faults, rows)
        value = self._change(site, own)[0]
        done = self._loop.run(self._source(site), own.index, value, way == OWN)
        for part, *found in done:
            yield rows[part], *found

    def _loops(self, site: int, faults: int) -> str | None:
        """The loop for so many faults in a site, on all images, if one is the faster way.

        That is by a program of all parameters (`ANY`) or of this one (`OWN`).
        """
        if self._at_run_time[site] or self.screen or self._always is False:
            return None
        if self._ways.are_few(max(faults, self._expected[site])):
            return ANY
        if self._always:
            return OWN
        slow = self._ways.is_close(self.program(site).parts) and self._is_slow(site)
        return OWN if slow else None

    def _is_slow(self, site: int) -> bool:
        """Whether the programs of a site were timed to be slower than a loop, now or before."""
        if site not in self._slow:
            name = self.sites[site].name
            what = f"{self._text}, {name}, {len(self.images)} images, loop of its own"
            self._slow[site] = tuning.kept(self.hardware, what, lambda: self._time_both(site))
        return self._slow[site]

    def _time_both(self, site: int) -> bool:
        """Time a loop and the programs of a site, each once compiled, on faults of no effect."""
        source, program = self._source(site), self.program(site)
        word = self.network.values(self.sites[site]).ravel()[:1]
        words = np.repeat(word, TIMED)
        part = self.image_blocks(site)[0]
        block, size = self._load(site, part), program.chunk
        at = np.zeros((size, len(self.sites[site].shape)), np.int32)
        image = np.arange(size) % (part.stop - part.start)
        ways = (
            (lambda: list(self._loop.run(source, np.zeros(TIMED, int), words, True)),
             TIMED * len(self.images)),
            (lambda: program.run(block, at, np.repeat(word, size), image), size),
        )  # fmt: skip
        loop, suffix = (tuning.seconds(way) / pairs for way, pairs in ways)
        return loop < suffix

    def _bounded(self, sites: np.ndarray) -> list[int]:
        """The sites whose faults run from cut to cut, of those of F faults, int [F].

        No bound is known of what a run-time fault may do: it is run to the logits.
        """
        own = Counter(sites[~self._at_run_time[sites]].tolist())
        if self.screen or self._always is not None:
            return [] if self._always else [*own]
        expected = {k: n for k, n in self._expected.items() if not self._at_run_time[k]}
        faults = own | Counter(expected)
        self._pruned |= self._ways.bounded(faults, lambda site: self.program(site).parts)
        return [site for site in own if site in self._pruned]

    def _operands(self, site: int, faults: Faults) -> tuple[np.ndarray, np.ndarray]:
        """Where F faults of one site strike, int32 [F, rank], and what they put there [F, ...]."""
        source, own = self._source(site), self.sites[site]
        if isinstance(source, Tap):
            return taps.operands(source, own, faults)
        return _positions(faults.index, own.shape), self._change(site, faults)[0]

    def _change(self, site: int, faults: Faults) -> tuple[np.ndarray, np.ndarray]:
        """Faulty values [F] of faults in one site, and how far they are from golden, float64."""
        golden = self.network.values(self.sites[site]).ravel()[faults.index]
        faulty = bits.faulty(golden, faults.bit, faults.polarity)
        return faulty, distance(faulty, golden)

    def identity(self, faults: Faults) -> np.ndarray:
        """bool [F]: the fault leaves its word as it is; not known of run-time values.

        Raises:
          InputError: as of `run`.
        """
        return unchanged(self.network, self.sites, check_faults(faults, self.sites))

    def subnormal(self, faults: Faults) -> np.ndarray:
        """bool [F]: the faulty word is subnormal (`bits.is_subnormal`); not known at run time."""
        found = np.zeros(faults.site.size, bool)
        for number, rows in by_site(faults, np.flatnonzero(~self._at_run_time[faults.site])):
            found[rows] = bits.is_subnormal(self._change(number, take(faults, rows))[0])
        return found

    def program(self, site: int) -> SiteProgram:
        """The compiled programs of a site, by its position in `sites`."""
        if site not in self._programs:
            parts = split(self.network.program, self._source(site))
            reduced = screening.REDUCED.get(self.screen)
            self._programs[site] = SiteProgram(parts, self.hardware, reduced)
        return self._programs[site]

    def image_blocks(self, site: int) -> list[slice]:
        """The images whose golden values are kept together for a site."""
        return blocks(
            len(self.images), self._memory // max(1, image_bytes(self.program(site).parts))
        )

    def _source(self, site: int) -> int | Tap:
        return self.network.source(self.sites[site])

    @cached_property
    def _at_run_time(self) -> np.ndarray:
        """bool [S]: the site is a run-time value."""
        return np.array([isinstance(self.network.source(site), Tap) for site in self.sites])

    def _load(self, site: int, part: slice) -> Block:
        # Golden values are large: only the last block used is kept.
        if self._loaded is None or self._loaded[0] != site or self._loaded[1].start != part.start:
            self._loaded = None
            size = self.hardware.round_up(self.image_blocks(site)[0].stop)
            rows = filled_up(np.arange(part.start, part.stop), size)
            block = self.program(site).load(
                self._leaves, self.images[rows], self.labels[rows], part.start
            )
            self._loaded = site, block
        return self._loaded[1]

    def _load_cuts(self, images: np.ndarray) -> PrunerBlock:
        """Golden values and maps at the cuts; the last are kept for the next shard."""
        if self._at_cuts is None or not np.array_equal(self._at_cuts[0], images):
            self._at_cuts = None
            columns = (x[images] for x in (self.images, self.golden.logits, self.labels))
            self._at_cuts = images, self._pruner.load(*columns)
        return self._at_cuts[1]

    @cached_property
    def _text(self) -> str:
        """What the network computes, in few letters."""
        return hashlib.sha256(text(self.network.program).encode()).hexdigest()[:16]

    @cached_property
    def _loop(self) -> Loop:
        columns = self.images, self.labels
        return Loop(self.network.program, self._leaves, *columns, self.hardware)

    @cached_property
    def _pruner(self) -> Pruner:
        network = self.network
        leaves = {int(site): self._source(site) for site in np.flatnonzero(~self._at_run_time)}
        half = self._memory // 2  # the other half is golden values
        return Pruner(network.program, network.leaves, leaves, self.images, self.hardware, half)

    def _pruned_block(self) -> int:
        """Most images of a block: their golden values fit."""
        return max(1, self._memory // 2 // max(1, self._pruner.image_bytes()))


def check_measure(measure: str, screen: str | None = None) -> None:
    """Raises InputError for an unknown measure, or one that can't be screened."""
    if measure not in MEASURES:
        raise InputError(f"measure {measure!r} is unknown; choose from {', '.join(MEASURES)}")
    if screen and measure == "full":
        raise InputError(f"screen {screen!r} tells critical or not; measure 'full' tells more")


def _check_screen(screen: str | None) -> str | None:
    if screen is not None and screen not in screening.REDUCED:
        known = ", ".join(screening.REDUCED)
        raise InputError(f"screen {screen!r} is unknown; choose from {known}, or None for none")
    return screen


def _check_order(order, golden: Golden) -> np.ndarray:
    """Images as `detect` presents them: as told, or those nearest to another answer first."""
    if order is None:
        return np.argsort(golden.margin, kind="stable")
    order, images = np.asarray(order), len(golden.top1)
    if not np.array_equal(np.sort(order, axis=None), np.arange(images)):
        raise InputError(
            f"order is {kind(order)}; it must name each of the {images} images once, from 0 on"
        )
    return order


def _positions(index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """int32 [P, rank]: C-order positions as one index an axis."""
    at = np.unravel_index(index, shape) if shape else []
    return np.array(at, np.int32).reshape(len(shape), index.size).T


def unchanged(network: Network, sites: Sequence[Site], faults: Faults) -> np.ndarray:
    """bool [F]: the fault in a parameter leaves its word as it is."""
    same = np.zeros(faults.site.size, bool)
    for number, rows in by_site(faults, np.arange(faults.site.size)):
        if sites[number].name in network.positions:
            golden = network.values(sites[number]).ravel()[faults.index[rows]]
            faulty = bits.faulty(golden, faults.bit[rows], faults.polarity[rows])
            same[rows] = bits.to_bits(golden) == bits.to_bits(faulty)
    return same


def golden_words(network: Network, sites: Sequence[Site], faults: Faults) -> np.ndarray:
    """uint64 [F]: the word that each fault breaks, as it is without; 0 of a run-time value."""
    words = np.zeros(faults.site.size, np.uint64)
    for number, rows in by_site(faults, np.arange(faults.site.size)):
        if sites[number].name in network.positions:
            golden = network.values(sites[number]).ravel()[faults.index[rows]]
            words[rows] = bits.to_bits(golden)
    return words


def take(faults: Faults, rows) -> Faults:
    """The faults of these rows."""
    return Faults(*(column[rows] for column in faults))


def by_site(faults: Faults, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(site, the `rows` of its faults) for every site that occurs."""
    sites = faults.site[rows]
    for number in np.unique(sites):
        yield int(number), rows[sites == number]


def _parts(rows: np.ndarray, images: int) -> list[np.ndarray]:
    """Rows of faults in parts whose pairs with the images are few enough to list."""
    return np.array_split(rows, -(-rows.size * images // PAIRS))


def _array(what: str, values) -> np.ndarray:
    """`values` as NumPy, where they are an array or make one."""
    try:
        found = np.asarray(values)
    except (TypeError, ValueError):  # random keys, rows of unequal length
        found = np.array(None)
    if found.dtype == object:
        raise InputError(f"{what} are {kind(values)}; they must be one array, a row an image")
    return found


def _check_images(network: Network, images) -> np.ndarray:
    images, wanted = _array("images", images), network.program.x.aval
    if images.shape[1:] != wanted.shape[1:] or images.dtype != wanted.dtype or not len(images):
        raise InputError(
            f"images have shape {images.shape} and dtype {images.dtype}; "
            f"the network takes [B, {', '.join(map(str, wanted.shape[1:]))}] of {wanted.dtype}"
        )
    return images


def check_labels(labels, logits_shape: tuple[int, int]) -> np.ndarray:
    """The labels as int32 [B], for logits [B, C].

    Raises:
      InputError: not one integer an image, or one that is not in [0, C).
    """
    labels, (images, classes) = _array("labels", labels), logits_shape
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        raise InputError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}; "
            f"{images} integers are needed, one an image"
        )
    bad = labels[(labels < 0) | (labels >= classes)]
    if bad.size:
        raise InputError(f"label {bad[0]} is out of range; the classes are 0 to {classes - 1}")
    return labels.astype(np.int32)
