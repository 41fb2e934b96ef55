"""Metrics against closed forms and SciPy, selections against their definitions."""

import numpy as np
import pytest
from scipy import special, stats

from jfi.errors import InputError
from jfi.workload import workload
from jfi.workload.workload import METRICS, Pass

DRAW = np.random.default_rng(0)
LOGITS = 4 * DRAW.normal(size=(200, 10)).astype(np.float32)
LABELS = np.where(DRAW.random(200) < 0.7, LOGITS.argmax(1), DRAW.integers(0, 10, 200))
SEEN = workload.golden_pass(
    LOGITS, LABELS, DRAW.normal(size=(200, 5)), DRAW.random((30, 200)).astype(np.float32)
)
VALUES = {name: metric.values(SEEN) for name, metric in METRICS.items()}


def of(*probabilities, labels=None) -> Pass:
    return workload.check(Pass(np.array(probabilities, float), labels))


def test_closed_forms_at_the_corners():
    sure, wrong, border, even = [1, 0, 0], [0, 1, 0], [0.5, 0.5, 0], [1 / 3] * 3
    seen = of(sure, wrong, border, even, labels=np.zeros(4, int))
    expected = {
        "el2n": [0, 2**0.5, 0.5**0.5, (4 / 9 + 2 / 9) ** 0.5],
        "deepgini": [0, 0, 0.5, 2 / 3],
        "cross_entropy": [0, -np.log(np.finfo(float).tiny), np.log(2), np.log(3)],
        "margin": 2 * [-np.log(np.finfo(float).tiny)] + [0, 0],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(METRICS[name].values(seen), values, rtol=1e-12)
    np.testing.assert_allclose(METRICS["ratio"].values(seen)[2:], 1)


def test_the_hot_spot_is_the_value_on_the_border_of_two_classes():
    seen = of([0.5, 0.5, 0.0], labels=np.zeros(1, int))
    for name, metric in METRICS.items():
        if metric.hot_spot is not None:
            assert metric.values(seen)[0] == pytest.approx(metric.hot_spot), name


def test_metrics_against_scipy():
    p = special.softmax(LOGITS.astype(float), axis=1)
    right = np.arange(200), LABELS
    np.testing.assert_allclose(SEEN.probabilities, p, rtol=1e-12)
    loss = special.logsumexp(LOGITS.astype(float), axis=1) - LOGITS[right]
    np.testing.assert_allclose(VALUES["cross_entropy"], loss, rtol=1e-9, atol=1e-12)
    first, second = -np.sort(-LOGITS.astype(float), axis=1)[:, :2].T
    np.testing.assert_allclose(VALUES["margin"], first - second, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(VALUES["ratio"], np.exp(first - second), rtol=1e-9)
    squared = 1 - 2 * p[right] + (p**2).sum(1)
    np.testing.assert_allclose(VALUES["el2n"] ** 2, squared, rtol=1e-9, atol=1e-12)


def test_metrics_stay_in_their_ranges_however_large_the_logits():
    seen = workload.golden_pass(1e4 * LOGITS, LABELS, *SEEN[2:])
    ends = {"el2n": 2**0.5, "deepgini": 0.9, "cross_entropy": 708.4, "margin": 708.4}
    for name, metric in METRICS.items():
        values = metric.values(seen)
        assert np.isfinite(values).all() and (values >= 0).all(), name
        assert values.max() <= ends.get(name, np.inf) + 1e-9, name


def test_margin_and_ratio_give_one_order():
    np.testing.assert_array_equal(*(workload.order(VALUES[n], False) for n in ("margin", "ratio")))


@pytest.mark.parametrize("name", METRICS)
def test_only_supervised_metrics_ask_for_labels(name):
    seen = SEEN._replace(labels=None)
    if METRICS[name].supervised:
        with pytest.raises(InputError, match=f"{name} is supervised.*deepgini"):
            METRICS[name].values(seen)
    else:
        np.testing.assert_array_equal(METRICS[name].values(seen), VALUES[name])


def test_top_is_the_most_challenging():
    found = workload.top(VALUES["el2n"], 20)
    assert VALUES["el2n"][found.indices].min() >= np.sort(VALUES["el2n"])[-20]
    assert (np.diff(VALUES["el2n"][found.indices]) <= 0).all()
    found = workload.top(VALUES["margin"], 20, high=False)
    np.testing.assert_array_equal(found.indices, np.argsort(VALUES["margin"])[:20])


def test_central_is_the_band_and_nearest_first():
    found = workload.central(VALUES["el2n"], 0.7, 0.2)
    off = abs(VALUES["el2n"] - 0.7)
    assert set(found.indices) == set(np.flatnonzero(off <= 0.2))
    assert (np.diff(off[found.indices]) >= 0).all() and found.of == 200
    every = workload.central(VALUES["el2n"], 0.7, 1)
    assert every.indices.size == 200 and "every image" in every.reason


def test_pre_plateau_ends_where_every_further_step_is_small():
    values = np.concatenate([np.linspace(1, 0.5, 6), [0.5 - 1e-5, 0.4], np.zeros(5)])
    mixed = DRAW.permutation(values.size)
    found = workload.pre_plateau(values[mixed], 5e-5)
    # The last step of 5e-5 or more is from 0.4 to 0.
    assert sorted(values[mixed][found.indices]) == sorted(values[:8])
    assert workload.pre_plateau(values, 0.3).indices.size == 8
    low = workload.pre_plateau(1 - values[mixed], 5e-5, high=False)
    np.testing.assert_array_equal(low.indices, found.indices)


def test_random_is_seeded_and_a_shorter_one_a_part_of_a_longer():
    long, short = workload.random(50, 50, 3), workload.random(50, 20, 3)
    np.testing.assert_array_equal(long.indices[:20], short.indices)
    assert sorted(long.indices) == list(range(50))
    assert (workload.random(50, 50, 4).indices != long.indices).any()


def test_ties_go_by_number_and_are_said():
    flat = np.full(7, 0.5)
    found = workload.top(flat, 3)
    assert found.indices.tolist() == [0, 1, 2] and "every image is tied" in found.reason
    some = workload.top(np.array([1.0, 2, 1, 2]), 4)
    assert some.indices.tolist() == [1, 3, 0, 2] and "4 images are tied" in some.reason
    assert "tied" not in workload.top(np.arange(4.0), 2).reason


SPECS = {
    "el2n:top:30": workload.top(VALUES["el2n"], 30),
    "margin": workload.top(VALUES["margin"], 200, high=False),
    "el2n:central": workload.central(VALUES["el2n"], 0.5**0.5, 0.3),
    "deepgini:central:0.2": workload.central(VALUES["deepgini"], 0.5, 0.2),
    "cross_entropy:central:0.2:0.9": workload.central(VALUES["cross_entropy"], 0.9, 0.2),
    "el2n:pre_plateau:0.02": workload.pre_plateau(VALUES["el2n"], 0.02),
    "random:12:5": workload.random(200, 12, 5),
    "random:12": workload.random(200, 12, 0),
    "kennard_stone:top:9": workload.top(VALUES["kennard_stone"], 9),
}


@pytest.mark.parametrize("spec", SPECS)
def test_texts_name_selections(spec):
    found = workload.select(spec, SEEN)
    np.testing.assert_array_equal(found.indices, SPECS[spec].indices)
    assert found.reason.startswith(spec.split(":")[0] if "random" not in spec else "12 at random")


@pytest.mark.parametrize(
    "spec, said",
    [
        ("el3n", "metric 'el3n' is unknown"),
        ("el2n:best", "way 'best' is unknown"),
        ("el2n:top", "a number is missing"),
        ("el2n:top:many", "'many' is not int"),
        ("el2n:top:0", "0 images is out of range"),
        ("el2n:top:201", "there are 1 to 200"),
        ("el2n:top:5:6", "'6' is one number too many"),
        ("el2n:central:0.1:9", "no image is within 0.1 of 9"),
        ("el2n:central:-1", "epsilon negative"),
        ("el2n:central:nan", "epsilon nan is no number"),
        ("kennard_stone:central", "a number is missing"),
        ("el2n:pre_plateau:9", "no step between sorted values is as large as 9"),
        ("random", "a number is missing"),
    ],
)
def test_bad_texts_are_one_clear_line(spec, said):
    with pytest.raises(InputError, match=said):
        workload.select(spec, SEEN)


@pytest.mark.parametrize(
    "seen, said",
    [
        (Pass(np.array([[0.5, 0.4]])), "sum 0.9"),
        (Pass(LOGITS), "are these logits"),
        (Pass(np.array([[np.nan, 1.0]])), "image 0"),
        (Pass(np.zeros((0, 3))), r"\(0, 3\)"),
        (SEEN._replace(labels=LABELS[:5]), "200 integers"),
        (SEEN._replace(labels=LABELS + 1), "classes are 0 to 9"),
        (SEEN._replace(embedding=SEEN.embedding[:5]), r"\[200, D\]"),
        (SEEN._replace(embedding=np.full((200, 2), np.nan)), "finite"),
    ],
)
def test_bad_passes_are_refused(seen, said):
    with pytest.raises(InputError, match=said):
        workload.check(seen)


def test_embedding_metrics_ask_for_one():
    with pytest.raises(InputError, match="needs an embedding"):
        METRICS["kennard_stone"].values(SEEN._replace(embedding=None))


def test_spearman_is_scipys():
    names = ["el2n", "deepgini", "cross_entropy", "margin"]
    found = workload.spearman({name: VALUES[name] for name in names})
    expected = stats.spearmanr(np.column_stack([VALUES[name] for name in names])).statistic
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    tied = np.repeat(np.arange(10.0), 20)
    pair = workload.spearman({"el2n": VALUES["el2n"], "tied": tied})
    assert pair[0, 1] == pytest.approx(stats.spearmanr(VALUES["el2n"], tied).statistic)
    assert workload.spearman({"el2n": VALUES["el2n"]}).shape == (1, 1)


def test_spearman_refuses_a_constant():
    with pytest.raises(InputError, match=r"metric flat is 0\.5 for every image"):
        workload.spearman({"el2n": VALUES["el2n"], "flat": np.full(200, 0.5)})
