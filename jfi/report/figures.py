"""Figures as places on an axis, in percent of its length: they fit a page of any width."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

FEWEST = 50  # times that shares lie apart before an axis is logarithmic


class Axis(NamedTuple):
    """From ``low`` to ``high``, both in percent; logarithmic where ``log``."""

    low: float
    high: float
    log: bool = False

    def place(self, percent: float) -> float:
        """Where a value stands, from 0 to 100; one that is outside stands at the end."""
        value = min(max(percent, self.low), self.high)
        if self.log:
            value = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            value = (value - self.low) / (self.high - self.low)
        return round(100 * value, 2)

    @property
    def ticks(self) -> list[float]:
        """A few round values."""
        if self.log:
            first, last = (math.log10(end) for end in (self.low, self.high))
            decades = range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
            return [10.0**k for k in decades][:: 1 + len(decades) // 6]
        step = _step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


class Mark(NamedTuple):
    """An estimate on an axis: places of the point (None: there is none), the bar and the truth."""

    at: float | None
    low: float
    high: float
    truth: float | None = None


def axis(points: Iterable[float], ends: Iterable[float], log: bool | None = None) -> Axis:
    """An axis from 0 that holds the shares in [0, 1]; logarithmic where points lie far apart.

    points: estimates; ends: upper ends of intervals.
    """
    points, ends = [100 * x for x in points], [100 * x for x in ends]
    top = max([*points, *ends], default=0.0) or 100.0
    seen = [x for x in points if x > 0]
    if log is None:
        log = len(seen) > 1 and max(seen) >= FEWEST * min([*seen, *(x for x in ends if x > 0)])
    if not log:
        return Axis(0.0, min(100.0, 1.04 * top) if top < 100 else 100.0)
    lowest = min([*seen, *(x for x in ends if x > 0)])
    return Axis(10.0 ** math.floor(math.log10(lowest) - 0.3), min(100.0, 1.2 * top), True)


def around(lows: Sequence[float], highs: Sequence[float]) -> Axis:
    """A linear axis around intervals of shares, from 0 where they are near it."""
    low, high = 100 * min(lows), 100 * max(highs)
    room = 0.06 * ((high - low) or high or 1.0)
    return Axis(0.0 if low < high / 3 else max(0.0, low - room), min(100.0, high + room))


def mark(
    axis: Axis, point: float | None, low: float, high: float, truth: float | None = None
) -> Mark:
    """The places of shares in [0, 1]."""
    places = [None if x is None else axis.place(100 * x) for x in (point, low, high, truth)]
    return Mark(*places)


def shade(share: float) -> float:
    """How dark a cell is, 0 to 1: small shares are told apart, and 0 is white."""
    return round(math.sqrt(min(max(share, 0.0), 1.0)), 3)


def _step(width: float) -> float:
    """The step of 1, 2 or 5 times a power of ten that gives three to eight ticks."""
    rough = width / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(k * power for k in (1, 2, 5, 10) if k * power >= rough * 0.999)
