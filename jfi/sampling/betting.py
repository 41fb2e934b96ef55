"""A confidence sequence for the total outcome of a unit's faults, by betting.

The outcome of a fault is a number in [0, 1]: 1 where it is critical and 0 where not, and the total
T the number of critical faults; or the share of images it is critical on, or any other.

Faults are drawn one at a time, without replacement: a stratum h with probability pi_h, then any of
its R_h faults that are left. Each draw gives an unbiased value of T, whatever the earlier draws
were:

    Z = found + sum_h g_h R_h + (y - g_h) R_h / pi_h,

with y the fault's outcome, g_h any guess at the mean of those left in a stratum, and ``found`` the
outcomes that are known: all that Z needs is that y is in [0, 1], so that what a bet may lose is
known before the draw. For a number m the bettor's capital is the product over draws of 1 + bet (Z -
m), the bet set before the draw and small enough to leave it positive. At m = T it is a non-negative
martingale: by Ville's inequality it ever exceeds 2 / alpha with probability at most alpha / 2. So
the m with less capital, for bets on Z above and below m, hold T with confidence 1 - alpha at all
times at once: **an interval may be looked at after any draw, and drawing stopped for any reason**.
Guesses, probabilities and bets may follow from all earlier draws; bad ones only cost draws. No
stratum needs a draw of its own: those without a critical fault are bounded together.

Bets are chosen as if each stratum's outcomes had two values, of the mean and square that are
guessed: 0 and another to bet on more, 1 and another to bet on less. Of all distributions in [0, 1]
with that mean and variance it lets the capital grow least (Karlin and Studden, "Tchebycheff
systems", 1966: the logarithm's third derivative is positive); of 0 and 1 it is the only one.

Sources: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B
86, 2024 (capital, bets), and "Confidence sequences for sampling without replacement", NeurIPS 2020
(the finite population); Shekhar, Xu, Lipton, Liang and Ramdas, "Risk-limiting financial audits via
weighted sampling without replacement", UAI 2023 (unequal probabilities, guesses as control
variates).
"""

from typing import NamedTuple

import numpy as np
from scipy import optimize

MOST = 0.9  # share of the capital that one draw may lose
# Two bettors share the capital: one bets as the guesses say, the other a fifth of that, for when
# the guesses were far off and the first has lost all. The mean of martingales is one too.
SCALES, SHARES = (1.0, 0.2), (0.8, 0.2)
_LAMBDAS = np.geomspace(1e-4, 1e3, 36)  # bets tried, in units of 1 / (range of Z)


class Open(NamedTuple):
    """What a unit's strata are like before a round of draws; float64 arrays [H] of its strata.

    left: faults not drawn yet, R. guess: g, in (0, 1). square: the guess at the mean of y^2, from
    g^2 to g. chance: pi, positive where left is; need not sum to one. found: the total of the
    outcomes that are known.
    """

    left: np.ndarray
    guess: np.ndarray
    square: np.ndarray
    chance: np.ndarray
    found: float

    @property
    def jump(self) -> np.ndarray:
        """R / pi: how far a guess that is wrong by one moves Z."""
        return self.left / self.chance * self.chance.sum()

    @property
    def expected(self) -> float:
        """The unit's total, if the guesses were right."""
        return float(self.found + (self.guess * self.left).sum())


class Bets(NamedTuple):
    """Draws and the bets on them, float64 [n] each, in faults.

    low, high: bounds of the value Z, known before the draw. up, down: the bets that T is more, and
    less, than a number m.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    up: np.ndarray
    down: np.ndarray


def no_bets() -> Bets:
    """Before the first draw."""
    return Bets(*(np.empty(0) for _ in Bets._fields))


def values(unit: Open, stratum: np.ndarray, outcome: np.ndarray) -> tuple[np.ndarray, ...]:
    """(Z, its lower bound, its upper bound), float64 [n] each, of a round of draws.

    Args:
        stratum: int [n], positions in the unit's strata in the order of the draws. A stratum is
            not drawn once it is empty, and leaves the choice to the others.
        outcome: y [n], in [0, 1].
    """
    left = unit.left[stratum] - occurrences(stratum)
    guess, chance = unit.guess[stratum], unit.chance[stratum]
    emptied = np.where(left == 1, chance, 0.0)
    choice = np.maximum(unit.chance.sum() - _before(emptied), chance)
    base = unit.expected + _before(outcome - guess)
    reach = unit.left / unit.chance
    return (
        base + (outcome - guess) * left / chance * choice,
        base - (unit.guess * reach).max() * choice,
        base + ((1 - unit.guess) * reach).max() * choice,
    )


def best_bets(unit: Open, up: float, down: float) -> tuple[tuple[float, float], ...]:
    """(bet, growth of log capital a draw) of the bets that T is above T - up and below T + down.

    The fastest growth that is to be expected if the guesses are right: Kelly's criterion on a
    grid. ``up`` and ``down`` are positive numbers of faults.
    """
    mean, rest = unit.guess, 1 - unit.guess
    win, lose = (rest * unit.jump).max(), (mean * unit.jump).max()
    span = win + lose
    return (
        _kelly(up, *_two_values(unit, mean, unit.square), lose - up, span + up),
        _kelly(
            down, *_two_values(unit, rest, rest - (mean - unit.square)), win - down, span + down
        ),
    )


def _two_values(unit: Open, mean: np.ndarray, square: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far 0 and another value, of that mean and square, move Z, and their chances, [2 H]."""
    value = square / mean
    chance = unit.chance / unit.chance.sum()
    moves = np.concatenate([(value - mean) * unit.jump, -mean * unit.jump])
    return moves, np.concatenate([chance * (mean / value), chance * (1 - mean / value)])


def add(past: Bets, unit: Open, stratum, outcome, aims: tuple[float, float]) -> Bets:
    """``past`` and a round of draws, as in `values`, with the `best_bets` for the ``aims``."""
    found = values(unit, stratum, outcome)
    (up, _), (down, _) = best_bets(unit, *aims)
    new = (*found, *(np.full(len(stratum), bet) for bet in (up, down)))
    return Bets(*(np.concatenate(pair) for pair in zip(past, new, strict=True)))


def log_capital_up(drawn: Bets, m: float) -> float:
    """Log of the capital at m of the bets that T is more; falls with m."""
    return _log_capital(drawn.value - m, m - drawn.low, drawn.up)


def log_capital_down(drawn: Bets, m: float) -> float:
    """Log of the capital at m of the bets that T is less; grows with m."""
    return _log_capital(m - drawn.value, drawn.high - m, drawn.down)


def interval(
    drawn: Bets, low: float, high: float, confidence: float, parts: int = 1
) -> tuple[float, float]:
    """The totals in [low, high] that the draws leave possible.

    Two-sided: each end misses with probability (1 - confidence) / 2 at most, at all times. Totals
    are whole numbers of 1 / parts; any numbers for 0.
    """
    if not drawn.value.size or low == high:
        return low, high
    enough = threshold(confidence)
    first = _bound(lambda m: log_capital_up(drawn, m) - enough, low, high)
    last = _bound(lambda m: log_capital_down(drawn, m) - enough, high, low)
    first, last = first - _TOLERANCE, last + _TOLERANCE
    if parts:
        first, last = np.ceil(first * parts) / parts, np.floor(last * parts) / parts
    first, last = max(float(first), low), min(float(last), high)
    # They cross with probability alpha at most; then the draws say nothing.
    return (first, last) if first <= last else (low, high)


def threshold(confidence: float) -> float:
    """Log of the capital that excludes a number: log(2 / alpha)."""
    return float(np.log(2 / (1 - confidence)))


def estimate(drawn: Bets) -> float:
    """The mean of the values Z; each is unbiased, though stopping by what was seen is not."""
    return float(drawn.value.mean())


def occurrences(x: np.ndarray) -> np.ndarray:
    """How often each value of int [n] came before, int64 [n]."""
    order = np.argsort(x, kind="stable")
    ordered = x[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    counts = np.empty(len(x), np.int64)
    counts[order] = np.arange(len(x)) - np.repeat(starts, np.diff(starts, append=len(x)))
    return counts


_TOLERANCE = 0.01  # faults


def _before(x: np.ndarray) -> np.ndarray:
    """Sums of what came before each element."""
    return np.cumsum(x) - x


def _kelly(
    aim: float, moves: np.ndarray, weights: np.ndarray, loss: float, span: float
) -> tuple[float, float]:
    gain = aim + moves
    bets = _capped(_LAMBDAS / span, loss)

    def growth(k: int) -> float:
        # Not a product of vectors: its threads cost more than they save where cores are busy.
        return float((np.log1p(bets[k] * gain) * weights).sum())

    # It is concave in the bet: the grid is halved, not searched through.
    low, high = 0, len(bets) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if growth(middle + 1) > growth(middle) else (low, middle)
    return float(bets[low]), growth(low)


def _capped(bet, loss):
    """The bet, at most one that loses the share `MOST` of the capital by the worst ``loss``."""
    return np.minimum(bet, MOST / np.maximum(loss, 1e-300))


def _log_capital(gain: np.ndarray, loss: np.ndarray, bet: np.ndarray) -> float:
    """Of the mixture of bettors."""
    logs = (
        np.log(share) + np.log1p(_capped(scale * bet, loss / scale) * gain).sum()
        for scale, share in zip(SCALES, SHARES, strict=True)
    )
    return float(np.logaddexp(*logs))


def _bound(f, near: float, far: float) -> float:
    """Where f, which falls from ``near`` to ``far``, is zero; an end where it is nowhere."""
    if f(near) < 0:
        return near
    return far if f(far) >= 0 else optimize.brentq(f, near, far, xtol=_TOLERANCE / 2)
