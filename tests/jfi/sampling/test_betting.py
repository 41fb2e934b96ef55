"""Confidence sequences against enumerated draws, brute-force arithmetic and simulated campaigns."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jfi.sampling import betting
from jfi.sampling.betting import Open


def sequences(strata, chance, draws):
    """(probability, strata drawn, answers) of every way to draw so often without replacement.

    `strata` holds the answers of each stratum's faults.
    """
    if draws == 0:
        yield 1.0, (), ()
        return
    alive = [h for h, faults in enumerate(strata) if faults]
    total = sum(chance[h] for h in alive)
    for h in alive:
        for i, y in enumerate(strata[h]):
            rest = [list(f) for f in strata]
            del rest[h][i]
            p = chance[h] / total / len(strata[h])
            for q, hs, ys in sequences(rest, chance, draws - 1):
                yield p * q, (h, *hs), (y, *ys)


# Critical or not, and other outcomes in [0, 1].
faults = st.lists(st.integers(0, 1) | st.floats(0, 1), min_size=1, max_size=3)
populations = st.lists(faults, min_size=1, max_size=3)
numbers = st.lists(st.floats(0.01, 0.99), min_size=3, max_size=3)
portions = st.lists(st.floats(0, 1), min_size=3, max_size=3)


def opened(population, guess, portion, chance, found=0):
    """A guess at squares anywhere between that of the mean and the mean."""
    h = len(population)
    left = np.array([len(f) for f in population], float)
    guess, portion = np.array(guess[:h]), np.array(portion[:h])
    square = guess**2 + portion * (guess - guess**2)
    return Open(left, guess, square, np.array(chance[:h]), found)


@settings(max_examples=40, deadline=None)
@given(populations, numbers, portions, numbers, st.integers(1, 3), st.floats(0, 5))
def test_every_value_is_unbiased_and_capital_at_the_truth_a_martingale(
    population, guess, portion, chance, draws, found
):
    """Enumerated: whatever the guesses and chances, before each draw and for the whole of them."""
    unit = opened(population, guess, portion, chance, found)
    truth = found + sum(map(sum, population))
    draws = min(draws, sum(map(len, population)))
    mean, up, down, total = np.zeros(draws), 0.0, 0.0, 0.0
    for p, hs, ys in sequences(population, chance, draws):
        stratum, outcome = np.array(hs), np.array(ys)
        value, low, high = betting.values(unit, stratum, outcome)
        assert (low - 1e-9 <= value).all() and (value <= high + 1e-9).all()
        drawn = betting.add(betting.no_bets(), unit, stratum, outcome, (1.0, 1.0))
        up += p * np.exp(betting.log_capital_up(drawn, truth))
        down += p * np.exp(betting.log_capital_down(drawn, truth))
        mean += p * value
        total += p
    assert total == pytest.approx(1)
    np.testing.assert_allclose(mean, truth, rtol=1e-9, atol=1e-9)
    assert up == pytest.approx(1, rel=1e-9)
    assert down == pytest.approx(1, rel=1e-9)


def test_values_are_the_formula_draw_by_draw():
    left, guess, chance = [3.0, 2.0], [0.2, 0.6], [0.5, 1.5]
    unit = Open(*(np.array(x) for x in (left, guess, guess, chance)), 4)
    stratum, outcome = [0, 1, 1, 0], [1, 0, 0.3, 0]
    value, _, _ = betting.values(unit, np.array(stratum), np.array(outcome))
    found = 4
    for z, h, y in zip(value, stratum, outcome, strict=True):
        alive = sum(c for c, r in zip(chance, left, strict=True) if r)
        expected = found + sum(g * r for g, r in zip(guess, left, strict=True))
        assert z == pytest.approx(expected + (y - guess[h]) * left[h] / (chance[h] / alive))
        found, left[h] = found + y, left[h] - 1


def test_capital_falls_and_grows_with_the_number_tested():
    rng = np.random.default_rng(0)
    drawn = a_round(rng, [400, 50], [20, 25], 120)
    tested = np.linspace(0, 450, 60)
    up = np.array([betting.log_capital_up(drawn, m) for m in tested])
    down = np.array([betting.log_capital_down(drawn, m) for m in tested])
    assert (np.diff(up) <= 1e-9).all()
    assert (np.diff(down) >= -1e-9).all()
    assert np.isfinite(up).all() and np.isfinite(down).all()


def test_the_interval_is_what_a_search_of_every_number_finds():
    rng = np.random.default_rng(1)
    for _ in range(20):
        drawn = a_round(rng, [300, 100], [3, 40], 150)
        enough = betting.threshold(0.9)
        possible = [
            m
            for m in range(401)
            if betting.log_capital_up(drawn, m) < enough
            and betting.log_capital_down(drawn, m) < enough
        ]
        assert betting.interval(drawn, 0, 400, 0.9) == (min(possible), max(possible))


def a_round(rng, sizes, critical, draws, guess=(0.1, 0.4), chance=(1.0, 1.0), margin=10.0):
    """Bets on a round from two strata; the chances in proportion to size by default."""
    stratum = rng.choice(len(sizes), draws, p=np.array(chance) / sum(chance))
    stratum = stratum[betting.occurrences(stratum) < np.array(sizes)[stratum]]
    orders = [rng.permutation(np.arange(n) < k) for n, k in zip(sizes, critical, strict=True)]
    k = betting.occurrences(stratum)
    answers = np.array([orders[h][i] for h, i in zip(stratum, k, strict=True)])
    unit = Open(np.array(sizes, float), np.array(guess), np.array(guess), np.array(chance), 0)
    return betting.add(betting.no_bets(), unit, stratum, answers, (margin, margin))


@pytest.mark.parametrize(
    ("sizes", "critical", "guess", "chance"),
    [
        ([900, 100], [2, 60], (0.01, 0.5), (0.5, 0.5)),
        # Guesses and chances that are as wrong as can be.
        ([900, 100], [2, 60], (0.9, 0.01), (0.9, 0.1)),
        ([900, 100], [40, 0], (0.0001, 0.5), (0.1, 0.9)),
        ([50, 20], [25, 20], (0.5, 0.5), (0.7, 0.3)),
    ],
)
def test_intervals_hold_at_every_look(sizes, critical, guess, chance):
    """Looked at after every 20 draws: the truth is ever left out in at most 10% of campaigns."""
    rng = np.random.default_rng(2)
    truth, repeats, missed = sum(critical), 400, 0
    for _ in range(repeats):
        drawn = a_round(rng, sizes, critical, 200, guess, chance)
        looks = range(20, len(drawn.value) + 1, 20)
        parts = (betting.Bets(*(x[:n] for x in drawn)) for n in looks)
        enough = betting.threshold(0.9)
        missed += any(
            betting.log_capital_up(p, truth) >= enough
            or betting.log_capital_down(p, truth) >= enough
            for p in parts
        )
    assert missed <= 0.1 * repeats + 3 * (0.1 * 0.9 * repeats) ** 0.5


def test_intervals_of_shares_of_images_hold_at_every_look():
    """Whole numbers of a seventh, guessed well and badly: as for critical or not."""
    rng = np.random.default_rng(5)
    low, high = rng.binomial(7, 0.9, 900) / 7, rng.binomial(7, 0.02, 300) / 7
    truth, repeats, missed, widths = low.sum() + high.sum(), 300, 0, []
    for k in range(repeats):
        guess, square = ((0.9, 0.02), (0.85, 0.01)) if k % 2 else ((0.2, 0.5), (0.1, 0.4))
        drawn, unit = betting.no_bets(), None
        stratum = rng.integers(0, 2, 240)
        orders = rng.permutation(low), rng.permutation(high)
        answers = [orders[h][i] for h, i in zip(stratum, betting.occurrences(stratum), strict=True)]
        unit = Open(*(np.array(x) for x in ((900.0, 300.0), guess, square, (0.5, 0.5))), 0.0)
        drawn = betting.add(drawn, unit, stratum, np.array(answers), (60.0, 60.0))
        looks = (betting.Bets(*(x[:n] for x in drawn)) for n in range(20, 241, 20))
        found = [betting.interval(part, 0, 1200, 0.9, 7) for part in looks]
        ends = np.array(found) * 7
        np.testing.assert_allclose(ends, ends.round(), atol=1e-9)
        missed += any(not a - 1e-9 <= truth <= b + 1e-9 for a, b in found)
        widths.append(found[-1][1] - found[-1][0])
    assert missed <= 0.1 * repeats + 3 * (0.1 * 0.9 * repeats) ** 0.5
    assert np.mean(widths[1::2]) < np.mean(widths[::2]) < 1200


def test_a_guessed_variance_that_is_small_lets_bets_grow_faster():
    wide, narrow = (
        Open(*(np.array([x]) for x in (1000.0, 0.5, square, 1.0)), 0.0) for square in (0.5, 0.26)
    )
    for slow, fast in zip(
        betting.best_bets(wide, 5, 5), betting.best_bets(narrow, 5, 5), strict=True
    ):
        # The square of the aim over twice the variance: 1/4 and 1/100.
        assert slow[1] == pytest.approx(5**2 / (2 * 1000**2 * 0.25), rel=0.1)
        assert fast[1] == pytest.approx(5**2 / (2 * 1000**2 * 0.01), rel=0.25)


def test_no_critical_fault_bounds_all_strata_together():
    """300 strata of one draw or two each: bounded as one sample of 400, within a factor of 2."""
    rng = np.random.default_rng(3)
    stratum = rng.integers(0, 300, 400)
    unit = Open(np.full(300, 1000.0), np.full(300, 1e-3), np.full(300, 1e-3), np.ones(300), 0)
    drawn = betting.add(betting.no_bets(), unit, stratum, np.zeros(400, bool), (3000.0, 3000.0))
    low, high = betting.interval(drawn, 0, 300_000, 0.95)
    alone = 300_000 * (1 - 0.025 ** (1 / 400))
    assert low == 0
    assert alone < high < 2 * alone


def test_nothing_drawn_says_nothing_and_all_drawn_says_all():
    assert betting.interval(betting.no_bets(), 0, 70, 0.95) == (0, 70)
    rng = np.random.default_rng(4)
    drawn = a_round(rng, [30, 10], [3, 7], 4000)
    assert len(drawn.value) == 40
    assert drawn.value[-1] == pytest.approx(10, abs=1)


@given(st.lists(st.integers(0, 5), max_size=30))
def test_occurrences_are_counted_one_by_one(x):
    expected = [x[:i].count(v) for i, v in enumerate(x)]
    assert betting.occurrences(np.array(x, np.int64)).tolist() == expected
