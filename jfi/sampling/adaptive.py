"""Sampling in rounds, each where the last ones say it helps, until every margin is met.

Strata (`jfi.sampling.strata`) are drawn from with probabilities that keep the number of faults
still needed small: the Neyman allocation for many units at once, from the means and variances of
outcomes (`jfi.sampling.estimands`: critical or not, or any number in [0, 1]) seen so far. The first
round, before any is seen, is the pilot. The intervals are those of `jfi.sampling.betting`: valid at
every look, for any probabilities, with no assumption on the faults. So each unit's interval holds
its true mean with at least the confidence asked for, at any sample size, though the campaign stops
as soon as margins are met; strata, guesses and scores that are wrong cost injections and nothing
else.

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
from jfi.sampling.estimands import CRITICAL, Estimand
from jfi.sampling.methods import Interval, Method, Oracle, Result, Unit
from jfi.sampling.sampling import Request, check
from jfi.sampling.strata import Split, Strata, by_cell, strata

# None of these touches validity. They were tuned on truths of LeNet and ResNet-20.
PRIOR = 0.05  # share of faults whose outcome is guessed to be far off before the first draw
STRENGTH = 3.0  # injections that a coarser group's share counts for in a finer one
DOUBT = 0.75  # outcomes of 1, and of 0, that bets reckon with beyond the guesses, in a unit's draws
ROUND = 0.5  # of the faults that seem to be needed, the share drawn in a round
PILOT = 64  # faults of the first round
FEWEST = 64  # faults of a later one
_SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the margin, how far below T is aimed at


class Drawn(NamedTuple):
    """The faults drawn from each stratum, how many, and the sums of their outcomes and of the
    outcomes' squares: [H]."""

    injections: np.ndarray
    total: np.ndarray
    squares: np.ndarray


class Draw(NamedTuple):
    """A round: guesses of outcomes and of their squares, and chances, of strata, float64 [H];
    strata drawn, int64 [n]; outcomes, float64 [n]."""

    guess: np.ndarray
    square: np.ndarray
    chance: np.ndarray
    stratum: np.ndarray
    outcome: np.ndarray


class Watch(NamedTuple):
    """A unit under way: its strata int64 [h], the margin wanted, the bets and the bounds so far.

    known: the total outcome of its faults that are in no stratum. Margin, known and bounds are
    numbers of faults.
    """

    unit: Unit
    strata: np.ndarray
    margin: float
    known: float
    bets: Bets
    low: float
    high: float

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
    make,
    space: FaultSpace,
    leaves,
    request: Request,
    levels,
    oracle: Oracle,
    seed: int,
    estimand: Estimand = CRITICAL,
) -> Result:
    check(request)
    asked = methods.units(space, levels)
    parts = make(space, leaves)
    watches = [_watch(space, parts, unit, request, estimand) for unit in asked]
    drawn = Drawn(np.zeros_like(parts.size), *np.zeros((2, len(parts.size))))
    keys, rounds, narrowed = shuffle.keys(seed, len(parts.size)), [], []
    whole = space.stratum_size(asked[0].site, asked[0].bit)
    while not all(watch.met for watch in watches):
        guess, square = guesses(parts, drawn, estimand.unchanged)
        left = parts.size - drawn.injections
        # g (1 - g) of outcomes 0 and 1, whose squares are themselves.
        variance = np.maximum(guess * (1 - guess) - (guess - square), 0)
        chance = allocate(left, variance, watches, request.confidence)
        stream = np.random.default_rng([seed, len(rounds)])
        stratum = pick(chance, left, _size(chance, rounds), stream)
        k = drawn.injections[stratum] + betting.occurrences(stratum)
        faults = parts.ids(stratum, shuffle.shuffled(k, parts.size[stratum], keys[stratum]))
        draw = Draw(guess, square, chance, stratum, np.asarray(oracle(faults), float))
        look = partial(_look, parts=parts, drawn=drawn, draw=draw)
        watches = [look(watch, request.confidence, estimand.parts) for watch in watches]
        drawn = _counted(drawn, draw)
        rounds.append(len(stratum))
        narrowed.append((watches[0].low / whole, watches[0].high / whole))
    units = tuple(_interval(space, watch, drawn) for watch in watches)
    return Result(units, tuple(rounds), tuple(narrowed))


def _watch(
    space: FaultSpace, parts: Strata, unit: Unit, request: Request, estimand: Estimand
) -> Watch:
    inside = np.flatnonzero(unit.holds(parts.site, parts.bit))
    whole, drawable = space.stratum_size(unit.site, unit.bit), int(parts.size[inside].sum())
    margin, known = request.error_margin * whole, (whole - drawable) * estimand.unchanged
    return Watch(unit, inside, margin, known, betting.no_bets(), known, known + drawable)


def _size(chance: np.ndarray, rounds: Sequence[int]) -> int:
    """Faults of the next round: a share of those needed, at most as many as there were."""
    return int(max(FEWEST, min(ROUND * chance.sum(), sum(rounds)))) if rounds else PILOT


def _counted(drawn: Drawn, draw: Draw) -> Drawn:
    count = partial(np.bincount, draw.stratum, minlength=len(drawn.injections))
    sums = count(), count(draw.outcome), count(draw.outcome**2)
    return Drawn(*(x + new for x, new in zip(drawn, sums, strict=True)))


def guesses(parts: Strata, drawn: Drawn, unchanged: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The mean outcome guessed of each stratum, and the mean of its square, float64 [H] each.

    Each group's is drawn towards that of the coarser group around it, the coarsest towards that of
    `prior`.
    """
    found = []
    for sums, first in zip(drawn[1:], prior(unchanged), strict=True):
        mean = np.full(len(parts.size), first)
        for group in (*reversed(parts.groups), np.arange(len(parts.size))):
            total, injections = (np.bincount(group, x)[group] for x in (sums, drawn.injections))
            mean = (total + STRENGTH * mean) / (injections + STRENGTH)
        found.append(mean)
    return tuple(found)


def prior(unchanged: float) -> tuple[float, float]:
    """The mean outcome, and the mean of its square, that are guessed before the first draw.

    That of a fault that changes nothing, but for a share `PRIOR` at the far end of [0, 1].
    """
    far = float(unchanged < 0.5)
    return tuple((1 - PRIOR) * unchanged**k + PRIOR * far for k in (1, 2))


def allocate(
    left: np.ndarray, variance: np.ndarray, watches: Sequence[Watch], confidence: float
) -> np.ndarray:
    """The faults still to be drawn from each stratum, float64 [H], if the guesses are right.

    A unit's capital must grow by what it lacks. The growth of a bet at distance e from T is
    e^2 / 2 over the variance, which sums over strata as in Neyman's allocation; and at most e over
    the largest jump, which a stratum's share of the draws sets where all outcomes are one.

    Args:
        left: faults of each stratum not drawn yet, int64 [H].
        variance: of their outcomes, as guessed.
    """
    spread, fewest = [], np.zeros(len(left))
    for watch in watches:
        if not watch.met:
            margins = np.zeros(len(left))
            margins[watch.strata] = left[watch.strata] / watch.margin
            lacks = _lacks(watch, confidence)
            spread.append(2 * lacks * margins**2 * variance)
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


def _look(
    watch: Watch, confidence: float, whole: int, *, parts: Strata, drawn: Drawn, draw: Draw
) -> Watch:
    """The watch after a round; as it was where it is done."""
    if watch.met:
        return watch
    left = parts.size - drawn.injections
    at = watch.strata[left[watch.strata] > 0]
    position = np.full(len(left), -1)
    position[at] = np.arange(len(at))
    own = position[draw.stratum] >= 0
    stratum, outcome = position[draw.stratum[own]], draw.outcome[own]
    found = float(watch.known + drawn.total[watch.strata].sum())
    doubt = DOUBT / (watch.bets.value.size + 1)
    guess, square = ((x[at] + doubt) / (1 + 2 * doubt) for x in (draw.guess, draw.square))
    unit = Open(left[at].astype(float), guess, square, draw.chance[at], found)
    bets = betting.add(watch.bets, unit, stratum, outcome, _aims(watch, unit, confidence))
    # What was drawn is known.
    low = max(watch.low, found + float(outcome.sum()))
    high = max(low, min(watch.high, found + float(left[at].sum() - (1 - outcome).sum())))
    low, high = betting.interval(bets, low, high, confidence, whole)
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
    counts = (x[watch.strata].sum() for x in drawn[:2])
    middle = (watch.low + watch.high) / 2
    if watch.bets.value.size and watch.low < watch.high:
        middle = np.clip(betting.estimate(watch.bets), watch.low, watch.high)
    return methods.interval(
        space, watch.unit, *counts, middle / size, watch.low / size, watch.high / size
    )
