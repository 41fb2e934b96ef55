"""jfi.campaign.rounds: methods that choose faults in rounds, on a real engine, against exhaustive
truth."""

import jax
import numpy as np
import pytest

import jfi
from jfi.campaign import campaign, records, rounds
from jfi.engine import cut_to_cut

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(12, 6)).astype(np.float32)
PARAMS = {
    "first": RNG.normal(size=(6, 8)).astype(np.float32),
    "second": RNG.normal(size=(8, 3)).astype(np.float32),
}
REQUEST = jfi.Request(error_margin=0.05, confidence=0.95)


def apply(params, x):
    return jax.nn.relu(x @ params["first"]) @ params["second"]


@pytest.fixture(scope="module")
def engine():
    network = jfi.network(apply, PARAMS, IMAGES[0])
    return jfi.Engine(network, IMAGES, np.zeros(12, int), jfi.select(network))


@pytest.fixture(scope="module")
def space(engine):
    return jfi.FaultSpace(engine.sites, (0, 1))


@pytest.fixture(scope="module")
def truth(engine, space):
    """Which fault is critical for any image, bool [N]."""
    return engine.run(space.decode(np.arange(space.size)), "full").first_critical >= 0


def run(name, space, engine, path, **options):
    options = {"request": REQUEST, "levels": ("network", "layer"), "verify_pairs": 50} | options
    return rounds.run(name, space, engine, path, {"sampler": name}, **options)


@pytest.mark.parametrize("name", rounds.METHODS)
def test_margins_are_met_and_hold_the_truth(name, space, engine, truth, tmp_path):
    summary = run(name, space, engine, tmp_path)
    sites = space.decode(np.arange(space.size)).site
    shares = [truth.mean(), *(truth[sites == site].mean() for site in (0, 1))]
    assert [unit["level"] for unit in summary["estimates"]] == ["network", "layer", "layer"]
    for unit, share in zip(summary["estimates"], shares, strict=True):
        assert unit["margin"] <= 0.0501
        assert unit["low"] <= share <= unit["high"]
        assert unit["cp_low"], unit["cp_high"] == (unit["low"], unit["high"])
    assert sum(summary["rounds"]) == summary["injections"] < space.size
    assert summary["verify"]["pairs"] == 50
    assert summary["verify"]["disagreements"] == 0
    shards = list(records.read_shards(tmp_path))
    ids = np.concatenate([np.asarray(shard["id"]) for shard in shards])
    assert np.unique(ids).size == ids.size == summary["injections"]
    found = np.concatenate([np.asarray(shard["first_critical"]) for shard in shards]) >= 0
    assert np.array_equal(found, truth[ids])


@pytest.fixture(scope="module")
def labelled(engine):
    """The engine with labels of which some are right."""
    labels = np.where(np.arange(12) % 4 == 0, (engine.answers + 1) % 3, engine.answers)
    return jfi.Engine(engine.network, IMAGES, labels, engine.sites)


@pytest.mark.parametrize("estimate", ["pairs", "accuracy"])
@pytest.mark.parametrize("name", rounds.METHODS)
def test_margins_of_pairs_and_accuracy_hold_the_truth(name, estimate, space, labelled, tmp_path):
    told = labelled.run(space.decode(np.arange(space.size)), "full")
    outcome = (told.critical if estimate == "pairs" else told.correct) / 12
    summary = run(name, space, labelled, tmp_path, estimate=estimate)
    sites = space.decode(np.arange(space.size)).site
    means = [outcome.mean(), *(outcome[sites == site].mean() for site in (0, 1))]
    critical = told.critical > 0
    assert summary["estimate"] == estimate
    ids = np.concatenate([shard["id"] for shard in records.read_shards(tmp_path)])
    for unit, mean in zip(summary["estimates"], means, strict=True):
        assert name == "iterative" or unit["margin"] <= 0.0501
        assert unit["low"] - 1e-9 <= mean <= unit["high"] + 1e-9
        inside = np.isin(sites[ids], sites if unit["site"] is None else [
            [site.name for site in space.sites].index(unit["site"])
        ])  # fmt: skip
        assert unit["critical"] == critical[ids[inside]].sum()
        assert unit["injections"] == inside.sum()
    manifest = records.read_manifest(tmp_path)
    assert manifest["identity"]["estimate"] == estimate
    assert manifest["golden_accuracy"] == 0.75


def test_certified_flips_are_harmless_and_never_asked_for(
    engine, space, truth, tmp_path, monkeypatch
):
    """By the exhaustive truth; in blocks of images as all at once."""
    faults = space.decode(np.arange(space.size))
    changes = ~engine.identity(faults)
    safe = np.zeros(space.size, bool)
    for site, bit in np.argwhere(space.cells):
        own = (faults.site == site) & (faults.bit == bit) & changes
        safe[own] = engine.certified(site, bit)[faults.index[own]]
    assert safe[changes].mean() > 0.2
    assert not truth[safe].any()
    run("adaptive_certified", space, engine, tmp_path)
    asked = np.concatenate([np.asarray(s["id"]) for s in records.read_shards(tmp_path)])
    assert not safe[asked].any()
    monkeypatch.setattr(cut_to_cut, "RADII_BLOCK", 5)
    again = jfi.Engine(engine.network, IMAGES, np.zeros(12, int), engine.sites)
    for site, bit in ((0, 3), (1, 20)):
        assert np.array_equal(again.certified(site, bit), engine.certified(site, bit))


def test_a_leaf_without_radii_has_no_certified_flip():
    def twice(params, x):
        return x @ params["w"] + params["w"].sum()

    network = jfi.network(twice, {"w": PARAMS["second"][:6]}, IMAGES[0])
    one = jfi.Engine(network, IMAGES, np.zeros(12, int), network.sites)
    assert not one.certified(0, 0).any()


def test_goes_on_where_it_was_stopped(space, engine, tmp_path, monkeypatch):
    whole = run("adaptive", space, engine, tmp_path / "whole")
    run_shard, left = campaign.run_shard, [1]

    def stopped(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        run_shard(*args)

    with monkeypatch.context() as patch:
        patch.setattr(campaign, "run_shard", stopped)
        with pytest.raises(KeyboardInterrupt):
            run("adaptive", space, engine, tmp_path / "part")
    again = run("adaptive", space, engine, tmp_path / "part")
    assert again["estimates"] == whole["estimates"]
    assert again["run"]["faults"] < whole["run"]["faults"] == whole["injections"]


def test_records_of_other_faults_are_refused(space, engine, tmp_path):
    run("adaptive", space, engine, tmp_path)
    with pytest.raises(jfi.InputError, match="seed was 0, is 1"):
        run("adaptive", space, engine, tmp_path, seed=1)
    with pytest.raises(jfi.InputError, match='estimate was not set, is "pairs"'):
        run("adaptive", space, engine, tmp_path, estimate="pairs")


BAD = [
    ({"name": "clever"}, "sampler 'clever' is unknown; choose from adaptive"),
    ({"levels": ("image",)}, "level 'image' is unknown"),
    ({"measure": "some"}, "measure 'some' is unknown"),
    ({"estimate": "some"}, "estimate 'some' is unknown; choose from faults, pairs, accuracy"),
    ({"estimate": "pairs", "measure": "detect"}, "measure 'detect' tells only one"),
    ({"request": jfi.Request(error_margin=2.0)}, "error_margin 2.0 is not between 0 and 1"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change, message, space, engine, tmp_path):
    options = {"name": "adaptive"} | change
    with pytest.raises(jfi.InputError, match=message):
        run(options.pop("name"), space, engine, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
