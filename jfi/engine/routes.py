"""Which way faults are run: what each would cost, estimated before any of it is compiled.

Costs are in operations. They depend on the network and on how many faults and images there are,
not on the clock: a campaign that goes on takes the ways it took before. Where a loop and the
programs of a site come close and there is much to do they are timed, once (`tuning.kept`).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property

from jfi.engine import certify
from jfi.engine.split import Split
from jfi.networks.program import Program, count, dependents, flops, nbytes, section

MOVE = 100  # operations in the time that a byte of the largest value takes on its way
EQUATION = 3 << 30  # in the time that compiling one equation takes, for faults in one site
PROGRAM = 1 << 34  # in the time that compiling a loop takes, and that for each equation
LINE = 1 << 28
LOOPED = 20  # as MOVE, of a loop, whose values stay near
FAULT = 1 << 20  # in the time that a loop takes for a fault, whatever the network
HOST = 1 << 18  # in the time that a pair takes on the host which may leave before the logits
LISTED = 1 << 14  # in that of a pair which may not
BOUNDS = 12  # programs as long as the network's to compile, before anything is certified
CERTIFIED = 0.5  # share of pairs that a cut is hoped to certify
RADII = 0.95  # share of pairs that radii are hoped to certify: 92 to 99% of dense nets and LeNets
LEAST = 0.1  # share of a loop's work that programs of a site are hoped to spare
CLOSE = 0.35  # a suffix that takes less than this share of the network's work is the faster way


def work(operations: int, live: int) -> int:
    """Operations of a run whose largest value has `live` bytes, moving it included."""
    return operations + MOVE * live


class Ways:
    """What the ways to run faults cost on one network and so many images.

    Args:
      proven: the part of the program that makes what is proven of a fault.
    """

    def __init__(self, program: Program, images: int, proven: Program):
        self._program, self._images, self._proven = program, images, proven
        self._expected = Counter[int]()
        self._bounded: frozenset[int] = frozenset()

    def expect(self, faults: Mapping[int, int]) -> None:
        """Say how many faults there are to run in all, by site."""
        self._expected = Counter(faults)

    def expected(self, site: int, faults: int) -> int:
        """How many faults a site has in all, of which so many are to be run now."""
        return max(faults, self._expected[site])

    @cached_property
    def whole(self) -> int:
        """Work of the network on one image."""
        return work(*self._image)

    @cached_property
    def _image(self) -> tuple[int, int]:
        """Operations of the network on one image, and bytes of the largest value."""
        image = dependents(self._program, self._program.x)  # the rest is made once for all images
        own = [eqn for eqn in self._program.eqns if image.intersection(eqn.outvars)]
        return flops(own), max(nbytes(var.aval) for var in image)

    @property
    def compiling(self) -> int:
        """What the programs of one site cost."""
        return EQUATION * count(self._program.eqns)

    def looping(self, faults: int) -> int:
        """What a loop over so many faults costs."""
        operations, live = self._image
        return faults * (self._images * (operations + LOOPED * live) + FAULT)

    def are_few(self, faults: int) -> bool:
        """Whether a loop is through with the faults of a site before its programs were compiled."""
        return self.looping(faults) < self.compiling

    def own_loop(self, faults: int, leaf: int) -> bool:
        """Whether what a loop of one leaf spares, which comes before it, pays for compiling it."""
        reached = dependents(self._program, self._program.leaves[leaf])
        after = flops([eqn for eqn in self._program.eqns if reached.intersection(eqn.outvars)])
        before = 1 - after / max(1, flops(self._program.eqns))
        return before * self.looping(faults) > PROGRAM + LINE * count(self._program.eqns)

    def are_worth(self, faults: int, parts: Split) -> bool:
        """Whether programs of a site are hoped to spare a loop more than compiling them takes."""
        spared = max(LEAST, 1 - work(parts.flops, parts.live) / self.whole)
        return spared * self.looping(faults) > self.compiling

    def is_close(self, parts: Split) -> bool:
        """Whether the programs of a site may be slower than a loop, for all that is known."""
        return work(parts.flops, parts.live) > CLOSE * self.whole

    def bounded(self, faults: Mapping[int, int], parts: Callable[[int], Split]) -> frozenset[int]:
        """The sites where bounds spare more than they cost, those found before among them.

        Args:
          faults: how many there are to be run now, by site; more may be expected.
          parts: the split at a site's parameter.
        """
        faults = Counter(faults) | self._expected
        many = {site: n for site, n in faults.items() if not self.are_few(n)}
        spared = {
            site: n * self._images * self._spared(parts(site)) - self.compiling
            for site, n in many.items()
        }
        found = frozenset(site for site, operations in spared.items() if operations > 0)
        if sum(spared[site] for site in found) > BOUNDS * self.compiling:
            self._bounded |= found
        return self._bounded

    def _spared(self, parts: Split) -> float:
        """Operations that bounds are hoped to spare a pair of a site."""
        plain = LISTED + min(self.whole, work(parts.flops, parts.live))
        left = HOST + plain * (1 - CERTIFIED * self._after_cut(parts.source))
        if certify.product(self._proven, parts.source) is not None:  # it may have radii
            left *= 1 - RADII
        return plain - left

    def _after_cut(self, leaf: int) -> float:
        """What share of the operations after a leaf comes after the first cut behind it."""
        reached = dependents(self._program, self._program.leaves[leaf])
        after = [eqn for eqn in self._program.eqns if reached.intersection(eqn.outvars)]
        number = certify.first_cut(self._program, self._cuts, leaf)
        if number == len(self._cuts):
            return 0.0
        rest = section(self._program, self._cuts[number])
        return flops(rest.eqns) / max(1, flops(after))

    @cached_property
    def _cuts(self) -> list:
        return certify.cuts(self._proven)
