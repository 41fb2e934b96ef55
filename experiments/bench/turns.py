"""Contenders that take turns at the same faults: pacing, rounds and ratios."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jfi.faults import Faults, FaultSpace, take

SWEEP_SECONDS = 1.0  # for each setting of a row


class Row(NamedTuple):
    """One way to do the work.

    run: decides F faults on `images` images: bool [F], critical for at least one of them. Where
      there is nothing to decide, it runs the network over the images F times: None.
    step: faults are given in multiples of it.
    """

    run: Callable[[Faults], np.ndarray | None]
    images: int
    settings: Mapping[str, Any]
    step: int = 1


class Paced(NamedTuple):
    """A row, and how many faults make a block of the wanted length."""

    row: Row
    faults: int
    rate: float  # verdicts/s while pacing


class Turn(NamedTuple):
    """A block that was run: verdicts (or images) per second, and cores busy on average."""

    rate: float
    cores: float


def draw(space: FaultSpace, seed: int, n: int) -> Faults:
    """n faults drawn uniformly, with replacement, in random order."""
    return space.decode(np.random.default_rng(seed).integers(0, space.size, n))


def block(faults: Faults, start: int, n: int) -> Faults:
    """n faults from number `start` on; after the last comes the first."""
    return take(faults, np.arange(start, start + n) % faults.site.size)


def turn(row: Row, faults: Faults) -> Turn:
    """Run a block."""
    wall, busy = time.perf_counter(), time.process_time()
    row.run(faults)
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    return Turn(faults.site.size * row.images / wall, busy / wall)


def pace(row: Row, faults: Faults, seconds: float, n: float = 1) -> Paced:
    """How many faults take a row about `seconds`, tried from n on.

    A block may cost something before its first fault: what each further one costs is taken from
    the last two sizes tried.
    """
    n = _multiple(n, row.step)
    spent = _seconds(row, faults, n)
    each = spent / n
    while spent < seconds / 2:
        more = _multiple(n * min(seconds / spent, 8), row.step)
        before, spent = spent, _seconds(row, faults, more)
        each = max((spent - before) / (more - n), spent / more / 8)
        n = more
    wanted = max(n + (seconds - spent) / each, n / 8)
    return Paced(row, _multiple(wanted, row.step), n * row.images / spent)


def _seconds(row: Row, faults: Faults, n: int) -> float:
    return n * row.images / turn(row, block(faults, 0, n)).rate


def _multiple(n: float, step: int) -> int:
    return max(1, round(n / step)) * step


def fastest(rows: list[Row], faults: Faults, seconds: float) -> Paced:
    """The row at its best settings, paced. Runs every row once before, so that it compiles."""
    for row in rows:
        row.run(block(faults, 0, row.step))
    if len(rows) == 1:
        return pace(rows[0], faults, seconds)
    sweep = min(seconds, SWEEP_SECONDS)
    best = max((pace(row, faults, sweep) for row in rows), key=lambda paced: paced.rate)
    return pace(best.row, faults, seconds, seconds * best.rate / best.row.images)


def take_turns(
    paced: Mapping[str, Paced],
    faults: Faults,
    rounds: int,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, list[Turn]]:
    """Turns by row, one a round; every other round in reverse order, against drift.

    The rows start every block at the same multiple of its length in `faults`.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in paced}
    for number in range(rounds):
        for name in list(paced)[:: (-1) ** number]:
            row, n, _ = paced[name]
            turns[name].append(turn(row, block(faults, number * n, n)))
            tell(f"round {number + 1}: {name} {turns[name][-1].rate:,.0f}/s")
    return turns


def ratio(
    rates: Mapping[str, list[float]], row: str, granted: float, others: tuple[str, ...]
) -> float | None:
    """Median over rounds of a row's rate to `granted` times that of the best of the others.

    None where the row or all of the others are missing.
    """
    there = [name for name in others if name in rates]
    if row not in rates or not there:
        return None
    best = max(there, key=lambda name: statistics.median(rates[name]))
    pairs = zip(rates[row], rates[best], strict=True)
    return statistics.median(ours / (granted * theirs) for ours, theirs in pairs)
