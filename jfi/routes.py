"""Which way faults are run: what each would cost, estimated before any of it is compiled.

Costs are in operations. They depend on the network and on how many faults and images there are,
not on the clock: a campaign that goes on takes the ways it took before. Where a loop and the
programs of a site come close and there is much to do they are timed, once (`jfi.tuning.kept`).
"""

from collections.abc import Mapping
from functools import cached_property

from jfi.program import Program, dependents, flops, nbytes
from jfi.split import Split

MOVE = 100  # operations in the time that a byte of the largest value takes on its way
EQUATION = 1 << 30  # in the time that compiling one equation takes, for faults in one site
CALL = 1 << 23  # in the time that one call takes
BOUNDS = 12  # programs as long as the network's to compile, before anything is certified
CLOSE = 0.35  # a suffix that takes less than this share of the network's work is the faster way


def work(operations: int, live: int) -> int:
    """Operations of a run whose largest value has `live` bytes, moving it included."""
    return operations + MOVE * live


class Ways:
    """What the ways to run faults cost on one network and so many images."""

    def __init__(self, program: Program, images: int):
        self._program, self._images = program, images

    @cached_property
    def whole(self) -> int:
        """Work of the network on one image."""
        image = dependents(self._program, self._program.x)  # the rest is made once for all images
        own = [eqn for eqn in self._program.eqns if image.intersection(eqn.outvars)]
        return work(flops(own), max(nbytes(var.aval) for var in image))

    @property
    def compiling(self) -> int:
        """What the programs of one site cost."""
        return EQUATION * len(self._program.eqns)

    def looping(self, faults: int) -> int:
        """What a loop over so many faults costs."""
        return faults * (self._images * self.whole + CALL)

    def are_few(self, faults: int) -> bool:
        """Whether a loop is through with the faults of a site before its programs were compiled."""
        return self.looping(faults) < self.compiling

    def is_close(self, parts: Split) -> bool:
        """Whether the programs of a site may be slower than a loop, for all that is known."""
        return work(parts.flops, parts.live) > CLOSE * self.whole

    def bounds_pay(self, faults: Mapping[int, int]) -> bool:
        """Whether running so many faults by site costs more than bounds, which spare most of it.

        A suffix is taken to start half way.
        """
        runs = [self.looping(n) for n in faults.values()]
        plain = sum(min(run, self.compiling + run // 2) for run in runs)
        return plain > (BOUNDS + len(runs)) * self.compiling
