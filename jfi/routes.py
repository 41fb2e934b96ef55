"""Which way faults are run: what each would cost, estimated before any of it is compiled.

Costs are in operations, as a CPU core does them. They depend on the network and on how many faults
and images there are, not on the clock: a campaign that goes on takes the ways it took before.
Where two ways come close and there is much to do they are timed, once (`jfi.tuning.kept`).
"""

from jfi.program import Program, dependents, flops, nbytes
from jfi.split import Split

MOVE = 100  # operations in the time that a byte of the largest value takes on its way
EQUATION = 1 << 30  # in the time that compiling one equation takes, for a fault in one site
CALL = 1 << 23  # in the time that one call takes
BOUNDS = 12  # programs as long as the network's to compile, before anything is certified
CLOSE = 0.35  # a suffix that takes less than this share of the network's work is the faster way


def work(operations: int, live: int) -> int:
    """Operations of a run whose largest value has `live` bytes, moving it included."""
    return operations + MOVE * live


def whole(program: Program) -> int:
    """Work of the network on one image."""
    image = dependents(program, program.x)  # what the weights make is made once for all images
    live = max(nbytes(var.aval) for var in image)
    own = [eqn for eqn in program.eqns if image.intersection(eqn.outvars)]
    return work(flops(own), live)


def compiling(program: Program) -> int:
    """What the programs of one site cost."""
    return EQUATION * len(program.eqns)


def looping(program: Program, faults: int, images: int) -> int:
    """What a loop over faults costs."""
    return faults * (images * whole(program) + CALL)


def is_few(program: Program, faults: int, images: int) -> bool:
    """Whether a loop is through with the faults of a site before its programs were compiled."""
    return looping(program, faults, images) < compiling(program)


def is_close(program: Program, parts: Split) -> bool:
    """Whether the programs of a site may be slower than a loop, for all that is known."""
    return work(parts.flops, parts.live) > CLOSE * whole(program)


def bounds_pay(program: Program, faults: list[int], images: int) -> bool:
    """Whether running so many faults by site costs more than bounds, which spare most of it.

    A suffix is taken to start half way.
    """
    each = compiling(program)
    runs = [looping(program, n, images) for n in faults]
    plain = sum(min(run, each + run // 2) for run in runs)
    return plain > (BOUNDS + len(faults)) * each
