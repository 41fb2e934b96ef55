"""Sampling in rounds, each where the last ones say it helps, until every margin is met.

Strata (`jfi.sampling.strata`) are drawn from with probabilities that keep the number of faults
still needed small: the Neyman allocation for many units at once, from the shares of critical faults
seen so far. The first round, before any is seen, is the pilot. The intervals are those of
`jfi.sampling.betting`: valid at every look, for any probabilities, with no assumption on the
faults. So each unit's interval holds its true share with at least the confidence asked for, at any
sample size, though the campaign stops as soon as margins are met; strata, guesses and scores that
are wrong cost injections and nothing else.

Sources: Neyman, JRSS 97, 1934; Chromy, "Design optimization with multiple objectives", Proc. ASA
Survey Research Methods, 1987 (many units); `jfi.sampling.betting` for the intervals.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from jfi.faults import FaultSpace
from jfi.sampling import betting, methods, shuffle
from jfi.sampling.betting import Bets, Open
from jfi.sampling.methods import Interval, Method, Oracle, Result, Unit
from jfi.sampling.sampling import Request, check
from jfi.sampling.strata import Split, Strata, by_cell, strata

# None of these touches validity. They were tuned on truths of LeNet and ResNet-20.
PRIOR = 0.05  # share of critical faults that is guessed of strata before the first draw
STRENGTH = 3.0  # injections that a coarser group's share counts for in a finer one
DOUBT = 0.75  # critical faults that bets reckon with beyond those guessed, in all draws of a unit
ROUND = 0.5  # of the faults that seem to be needed, the share drawn in a round
PILOT = 64  # faults of the first round
FEWEST = 64  # faults of a later one
_SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the margin, how far below T is aimed at


class Drawn(NamedTuple):
    """Counts of the faults drawn from each stratum, int64 [H]."""

    injections: np.ndarray
    critical: np.ndarray


class Draw(NamedTuple):
    """A round: guesses and chances of strata, float64 [H]; strata drawn, int64 [n]; answers."""

    guess: np.ndarray
    chance: np.ndarray
    stratum: np.ndarray
    critical: np.ndarray


class Watch(NamedTuple):
    """A unit under way: its strata int64 [h], the margin wanted, the bets and the bounds so far.

    Margin and bounds are numbers of faults.
    """

    unit: Unit
    strata: np.ndarray
    margin: float
    bets: Bets
    low: int
    high: int

    @property
    def met(self) -> bool:
        """Whether half the interval's width is within the margin."""
        return self.high - self.low <= 2 * self.margin


def adaptive(split: Callable[[FaultSpace, Sequence[np.ndarray]], Split] = by_cell) -> Method:
    """The adaptive sampler over the strata that ``split`` makes, such as `strata.by_distance`."""
    return over(lambda space, leaves: strata(space, leaves, split(space, leaves)))


def over(make: Callable[[FaultSpace, Sequence[np.ndarray]], Strata]) -> Method:
    """The adaptive sampler over strata that are there already, or made in another way."""
    return partial(_run, make)


def _run(
    make, space: FaultSpace, leaves, request: Request, levels, oracle: Oracle, seed: int
) -> Result:
    check(request)
    asked = methods.units(space, levels)
    parts = make(space, leaves)
    watches = [_watch(space, parts, unit, request) for unit in asked]
    drawn = Drawn(np.zeros_like(parts.size), np.zeros_like(parts.size))
    keys, rounds, narrowed = shuffle.keys(seed, len(parts.size)), [], []
    whole = space.stratum_size(asked[0].site, asked[0].bit)
    while not all(watch.met for watch in watches):
        guess = guesses(parts, drawn)
        left = parts.size - drawn.injections
        chance = allocate(left, guess, watches, request.confidence)
        stream = np.random.default_rng([seed, len(rounds)])
        stratum = pick(chance, left, _size(chance, rounds), stream)
        k = drawn.injections[stratum] + betting.occurrences(stratum)
        faults = parts.ids(stratum, shuffle.shuffled(k, parts.size[stratum], keys[stratum]))
        draw = Draw(guess, chance, stratum, np.asarray(oracle(faults), bool))
        watches = [_look(watch, parts, drawn, draw, request.confidence) for watch in watches]
        drawn = _counted(drawn, draw)
        rounds.append(len(stratum))
        narrowed.append((watches[0].low / whole, watches[0].high / whole))
    units = tuple(_interval(space, watch, drawn) for watch in watches)
    return Result(units, tuple(rounds), tuple(narrowed))


def _watch(space: FaultSpace, parts: Strata, unit: Unit, request: Request) -> Watch:
    inside = np.flatnonzero(unit.holds(parts.site, parts.bit))
    margin = request.error_margin * space.stratum_size(unit.site, unit.bit)
    return Watch(unit, inside, margin, betting.no_bets(), 0, int(parts.size[inside].sum()))


def _size(chance: np.ndarray, rounds: Sequence[int]) -> int:
    """Faults of the next round: a share of those needed, at most as many as there were."""
    return int(max(FEWEST, min(ROUND * chance.sum(), sum(rounds)))) if rounds else PILOT


def _counted(drawn: Drawn, draw: Draw) -> Drawn:
    count = partial(np.bincount, draw.stratum, minlength=len(drawn.injections))
    return Drawn(drawn.injections + count(), drawn.critical + count(draw.critical).astype(np.int64))


def guesses(parts: Strata, drawn: Drawn) -> np.ndarray:
    """The share of critical faults guessed of each stratum, float64 [H], in (0, 1).

    Each group's share is drawn towards that of the coarser group around it, the coarsest towards
    `PRIOR`.
    """
    share = np.full(len(parts.size), PRIOR)
    for group in (*reversed(parts.groups), np.arange(len(parts.size))):
        critical, injections = (np.bincount(group, x)[group] for x in reversed(drawn))
        share = (critical + STRENGTH * share) / (injections + STRENGTH)
    return share


def allocate(
    left: np.ndarray, guess: np.ndarray, watches: Sequence[Watch], confidence: float
) -> np.ndarray:
    """The faults still to be drawn from each stratum, float64 [H], if the guesses are right.

    A unit's capital must grow by what it lacks. The growth of a bet at distance e from T is
    e^2 / 2 over the variance, which sums over strata as in Neyman's allocation; and at most e over
    the largest jump, which a stratum's share of the draws sets where no fault is critical.

    Args:
        left: faults of each stratum not drawn yet, int64 [H].
        guess: as of `guesses`.
    """
    spread, fewest = [], np.zeros(len(left))
    for watch in watches:
        if not watch.met:
            margins = np.zeros(len(left))
            margins[watch.strata] = left[watch.strata] / watch.margin
            lacks = _lacks(watch, confidence)
            spread.append(2 * lacks * margins**2 * guess * (1 - guess))
            fewest = np.maximum(fewest, lacks * margins)
    return np.minimum(chromy(np.array(spread), fewest), left)


def _lacks(watch: Watch, confidence: float) -> float:
    """The growth of log capital that the unit's worse bound still lacks."""
    enough = betting.threshold(confidence)
    if not watch.bets.value.size:
        return enough
    middle = np.clip(betting.estimate(watch.bets), watch.low, watch.high)
    has = min(
        betting.log_capital_up(watch.bets, middle - watch.margin),
        betting.log_capital_down(watch.bets, middle + watch.margin),
    )
    return float(np.clip(enough - has, 0.05 * enough, 2 * enough))


def chromy(spread: np.ndarray, fewest: np.ndarray, turns: int = 30) -> np.ndarray:
    """A small sample n [H] >= fewest with sum_h spread [U, H] / n <= 1 for every unit.

    Chromy's iteration: a unit's price rises while its variance is too large. With one unit and
    nothing fewest it is Neyman's allocation.
    """
    price = np.ones(len(spread))
    for _ in range(turns):
        sizes = np.maximum(np.sqrt(price @ spread), fewest)
        excess = np.divide(spread, sizes, out=np.zeros_like(spread), where=sizes > 0).sum(axis=1)
        price *= np.clip(excess, 1e-3, 1e3) ** 2
    return sizes * max(1.0, excess.max())


def pick(chance: np.ndarray, left: np.ndarray, draws: int, stream: np.random.Generator):
    """The strata int64 [<= draws] that are drawn from, in order, with chances as ``chance`` [H].

    A draw from a stratum with none left is skipped: the others' chances stay in proportion.
    """
    ends = np.cumsum(chance)
    at = np.minimum(stream.random(draws) * ends[-1], np.nextafter(ends[-1], 0))
    stratum = np.searchsorted(ends, at, side="right")
    return stratum[betting.occurrences(stratum) < left[stratum]]


def _look(watch: Watch, parts: Strata, drawn: Drawn, draw: Draw, confidence: float) -> Watch:
    """The watch after a round; as it was where it is done."""
    if watch.met:
        return watch
    left = parts.size - drawn.injections
    at = watch.strata[left[watch.strata] > 0]
    position = np.full(len(left), -1)
    position[at] = np.arange(len(at))
    own = position[draw.stratum] >= 0
    stratum, critical = position[draw.stratum[own]], draw.critical[own]
    found = int(drawn.critical[watch.strata].sum())
    doubt = DOUBT / (watch.bets.value.size + 1)
    guess = (draw.guess[at] + doubt) / (1 + 2 * doubt)
    unit = Open(left[at].astype(float), guess, draw.chance[at], found)
    bets = betting.add(watch.bets, unit, stratum, critical, _aims(watch, unit, confidence))
    # What was drawn is known.
    low = max(watch.low, found + int(critical.sum()))
    high = min(watch.high, found + int(left[at].sum() - (~critical).sum()))
    low, high = betting.interval(bets, low, high, confidence)
    return watch._replace(bets=bets, low=low, high=high)


def _aims(watch: Watch, unit: Open, confidence: float) -> tuple[float, float]:
    """How far below and above T to bet, two margins together, to be done first.

    Few critical faults bound T from below sooner than from above. Where a bound is already beyond
    the aim the bet has nothing to win: 0, lest the guess that makes it so be wrong.
    """

    def aims(share: float) -> tuple[float, float]:
        up, down = share * watch.margin, (2 - share) * watch.margin
        return (
            up if unit.expected - up > watch.low else 0.0,
            down if unit.expected + down < watch.high else 0.0,
        )

    return min(map(aims, _SHARES), key=partial(_draws, watch, unit, confidence))


def _draws(watch: Watch, unit: Open, confidence: float, aims: tuple[float, float]) -> float:
    """How many draws it takes to reach both aims."""
    growths = (growth for _, growth in betting.best_bets(unit, *aims))
    has = (
        betting.log_capital_up(watch.bets, unit.expected - aims[0]),
        betting.log_capital_down(watch.bets, unit.expected + aims[1]),
    )
    enough = betting.threshold(confidence)
    return max(
        (enough - capital) / max(growth, 1e-12) if aim else 0.0
        for aim, growth, capital in zip(aims, growths, has, strict=True)
    )


def _interval(space: FaultSpace, watch: Watch, drawn: Drawn) -> Interval:
    size = space.stratum_size(watch.unit.site, watch.unit.bit)
    counts = (int(x[watch.strata].sum()) for x in drawn)
    middle = (watch.low + watch.high) / 2
    if watch.bets.value.size and watch.low < watch.high:
        middle = np.clip(betting.estimate(watch.bets), watch.low, watch.high)
    return methods.interval(
        space, watch.unit, *counts, middle / size, watch.low / size, watch.high / size
    )
