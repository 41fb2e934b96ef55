"""What every way of choosing faults and bounding their criticality has in common.

A method asks an oracle for the outcomes of faults, in rounds, until it can say for every unit asked
for what their mean is (`jfi.sampling.estimands`: the share of critical faults, or another); it
knows nothing of networks or engines. Its faults depend on the seed and on earlier answers alone, so
a campaign that was killed repeats its rounds from its records.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from jfi.errors import InputError
from jfi.faults import FaultSpace
from jfi.sampling.estimands import CRITICAL, Estimand
from jfi.sampling.sampling import Request

LEVELS = ("network", "layer", "bit")

# The outcome [n], in [0, 1], of each fault of ids int64 [n]: whether it is critical, or another.
Oracle = Callable[[np.ndarray], np.ndarray]


class Interval(NamedTuple):
    """The mean outcome of a unit's faults lies from ``low`` to ``high`` with the confidence.

    injections: those that fell in the unit. total: of their outcomes, so many critical faults.
    """

    unit: str
    level: str
    site: str | None
    bit: int | None
    population: int
    injections: int
    total: float
    estimate: float
    low: float
    high: float

    @property
    def margin(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


class Result(NamedTuple):
    """What a method found: an interval a unit, in the order of the levels asked for.

    rounds: faults injected in each round.
    narrowed: after each round, the interval (low, high) of the first unit; none where a method
        tells intervals at its end alone.
    """

    units: tuple[Interval, ...]
    rounds: tuple[int, ...]
    narrowed: tuple[tuple[float, float], ...] = ()

    @property
    def injections(self) -> int:
        """Faults injected in all."""
        return sum(self.rounds)


class Method(Protocol):
    """Chooses faults, asks for them, and bounds the mean outcome of every unit of some levels."""

    def __call__(
        self,
        space: FaultSpace,
        leaves: Sequence[np.ndarray | None],
        request: Request,
        levels: Sequence[str],
        oracle: Oracle,
        seed: int,
        estimand: Estimand = CRITICAL,
    ) -> Result:
        """``leaves`` holds the golden values of each site of ``space``, None of run-time values.

        Raises:
            InputError: a request or a level that does not exist.
        """


class Unit(NamedTuple):
    """A part of the fault space that is reported on; None is every site, every bit."""

    level: str
    site: int | None
    bit: int | None

    def holds(self, site: np.ndarray, bit: np.ndarray) -> np.ndarray:
        """Whether faults or strata of these sites and bits are in the unit, bool [n]."""
        inside = np.ones(np.shape(site), bool)
        if self.site is not None:
            inside &= site == self.site
        if self.bit is not None:
            inside &= bit == self.bit
        return inside


def units(space: FaultSpace, levels: Sequence[str]) -> list[Unit]:
    """The units of the levels that have a population.

    Raises:
        InputError: a level that is not one of `LEVELS`, or none.
    """
    if not levels:
        raise InputError(f"no level is asked for; choose from {', '.join(LEVELS)}")
    for level in levels:
        if level not in LEVELS:
            raise InputError(f"level {level!r} is unknown; choose from {', '.join(LEVELS)}")
    found = {
        "network": [Unit("network", None, None)],
        "layer": [Unit("layer", s, None) for s in range(len(space.sites))],
        "bit": [Unit("bit", None, int(b)) for b in np.flatnonzero(space.cells.any(axis=0))],
    }
    return [unit for level in levels for unit in found[level]]


def interval(space: FaultSpace, unit: Unit, injections, total, estimate, low, high) -> Interval:
    """The interval of a unit, its name and population filled in."""
    site = None if unit.site is None else space.sites[unit.site].name
    name = site or ("network" if unit.bit is None else f"bit {unit.bit}")
    size = space.stratum_size(unit.site, unit.bit)
    counts = size, int(injections), float(total)
    return Interval(name, unit.level, site, unit.bit, *counts, *map(float, (estimate, low, high)))
