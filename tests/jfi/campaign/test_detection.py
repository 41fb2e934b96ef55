"""Algorithm 1 as printed, by its double loop; covers by brute force; curves against campaigns."""

from itertools import combinations

import numpy as np
import pytest

import jfi
from jfi.campaign import detection
from jfi.campaign.detection import Verdicts
from jfi.errors import InputError
from jfi.workload import workload

MASKED, NON_CRITICAL, CRITICAL = range(3)


def verdicts(severity: np.ndarray) -> Verdicts:
    packed = (np.packbits(severity == kind, axis=1) for kind in (CRITICAL, MASKED))
    return Verdicts(*packed, severity.shape[1])


def severities(seed: int, faults: int = 60, images: int = 21) -> np.ndarray:
    """[F, B], most faults masked everywhere, some critical for a few images."""
    draw = np.random.default_rng(seed)
    harm = draw.random((faults, 1)) ** 3 * draw.random((1, images)) * 1.5
    return (draw.random((faults, images)) < harm).astype(int) + (
        draw.random((faults, images)) < harm
    )


def algorithm_1(severity: np.ndarray, order) -> list[tuple[int, int, int]]:
    """(masked, not critical, critical) after each image, as the paper writes it."""
    severity_list = [0] * len(severity)
    counts = []
    for image in order:
        for fault in range(len(severity)):
            label = severity[fault, image]
            if label > severity_list[fault]:
                severity_list[fault] = label
        counts.append(tuple(severity_list.count(kind) for kind in range(3)))
    return counts


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_curves_are_those_of_algorithm_1(seed, block, monkeypatch):
    monkeypatch.setattr(detection, "_BLOCK", block)
    severity = severities(seed)
    order = np.random.default_rng(seed).permutation(21)[: 21 - seed]
    found = detection.curves(verdicts(severity), order)
    columns = zip(found.masked, found.non_critical, found.critical, strict=True)
    assert list(columns) == [(60, 0, 0), *algorithm_1(severity, order)]
    assert found.critical[-1] > 0


def test_curves_without_masked_verdicts():
    whole = verdicts(severities(0))
    found = detection.curves(whole._replace(masked=None), np.arange(21))
    np.testing.assert_array_equal(found.critical, detection.curves(whole, np.arange(21)).critical)
    assert found.masked is None and found.non_critical is None


def test_faults_by_image_and_shares_of_inferences():
    severity, order = severities(1), np.array([4, 2, 9])
    data = verdicts(severity)
    own = detection.by_image(data.critical, 21)
    np.testing.assert_array_equal(own, (severity == CRITICAL).sum(0))
    found = detection.shares(data, order)
    for kind, share in enumerate((found.masked, found.non_critical, found.critical)):
        expected = [(severity[:, order[:n]] == kind).mean() for n in (1, 2, 3)]
        np.testing.assert_allclose(share, [kind == MASKED, *expected])
    np.testing.assert_array_equal(
        detection.shares(data._replace(masked=None), order).critical, found.critical
    )


def test_images_needed():
    critical = np.array([0, 3, 3, 9, 10, 10])
    assert detection.images_needed(critical, 10) == (3, 4, 4, 4)
    assert detection.images_needed(critical, 20, (0.25, 0.5, 0.51)) == (3, 4, None)
    assert detection.images_needed(np.zeros(3, int), 0) == (0, 0, 0, 0)
    # A share of 0.1 of 30 is 3 faults, whatever 0.1 * 30 is in floating point.
    assert detection.images_needed(critical, 30, (0.1,)) == (1,)


@pytest.mark.parametrize("seed", range(8))
def test_the_greedy_cover_covers_and_the_bound_bounds(seed):
    severity = severities(seed, faults=25, images=9)
    data = verdicts(severity)
    hit = severity == CRITICAL
    cover = detection.set_cover(data)
    found = detection.curves(data, cover.indices).critical
    assert found[-1] == hit.any(1).sum() and len(set(cover.indices)) == cover.indices.size
    bound = detection.cover_bound(data)
    for n in range(10):
        best = max(hit[:, list(some)].any(1).sum() for some in combinations(range(9), n))
        assert bound[n] >= best
        assert found[min(n, found.size - 1)] >= (1 - 1 / np.e) * best
    assert bound[1] == found[1] and bound[-1] == found[-1]


def test_covers_of_nothing():
    data = verdicts(np.ones((4, 9), int))
    with pytest.raises(InputError, match="no fault is critical for any of 9 images"):
        detection.set_cover(data)
    assert not detection.cover_bound(data).any()


@pytest.mark.parametrize(
    "order, said",
    [
        ([], "one image or more"),
        ([0, 3, 21], "image 21 is out of range"),
        ([0, 3, 3], "image 3 comes twice"),
        ([0.5], "numbers"),
    ],
)
def test_bad_orders_are_refused(order, said):
    with pytest.raises(InputError, match=said):
        detection.curves(verdicts(severities(0)), np.array(order))


@pytest.fixture(scope="module")
def engine():
    draw = np.random.default_rng(0).standard_normal
    params = {"hidden": draw((4, 5), np.float32), "out": draw((5, 3), np.float32)}
    images = draw((11, 4), np.float32)
    network = jfi.network(lambda p, x: (x @ p["hidden"]).clip(0) @ p["out"], params, images[0])
    return jfi.Engine(network, images, np.zeros(11, int), jfi.select(network))


@pytest.mark.parametrize("measure", ["full", "critical"])
def test_curves_end_at_the_totals_of_the_campaign(engine, measure, tmp_path):
    plan = jfi.plan(engine.network, "network_wise", request=jfi.Request(0.04))
    options = {"measure": measure, "keep_bits": True}
    summary = jfi.run(plan, engine, tmp_path, {}, **options)
    found = detection.read_verdicts(tmp_path)
    order = workload.order(engine.golden.margin(engine.by), high=False)
    ends = detection.curves(found, order)
    assert ends.critical[-1] == summary["estimates"][0]["critical"] > 0
    assert detection.by_image(found.critical, 11).sum() == summary["pairs"]["critical"]
    if measure == "full":
        shards = list(jfi.campaign.records.read_shards(tmp_path))
        masked = sum((shard["masked"] == 11).sum() for shard in shards)
        assert ends.masked[-1] == masked > 0
        assert ends.masked[-1] + ends.non_critical[-1] + ends.critical[-1] == plan.injections
    else:
        assert ends.masked is None


def test_a_campaign_without_bits_is_refused(engine, tmp_path):
    jfi.run(jfi.plan(engine.network, request=jfi.Request(0.2)), engine, tmp_path, {})
    with pytest.raises(InputError, match="holds no bits by image"):
        detection.read_verdicts(tmp_path)
