"""jfi.study: three lines from a model to its result, and the result from the disk alone."""

import importlib.util
import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jfi
from jfi.bits import DEAD, FLIP, POLARITIES, STUCK_AT_0, STUCK_AT_1
from jfi.campaign import records
from jfi.campaign.rounds import METHODS
from jfi.sampling import estimands
from jfi.sampling.sampling import SAMPLERS
from jfi.study import live, result

RNG = np.random.default_rng(0)
PARAMS = {
    "first": RNG.standard_normal((6, 8), np.float32),
    "second": RNG.standard_normal((8, 3), np.float32),
}
IMAGES = RNG.standard_normal((12, 6), np.float32)
LABELS = np.arange(12) % 3


def mlp(params, x):
    return jnp.maximum(x @ params["first"], 0) @ params["second"]


def naive(params, x):
    return np.maximum(x @ params["first"], 0) @ params["second"]


def study(labels=LABELS, **options):
    return jfi.study((mlp, PARAMS), IMAGES, labels, **options)


@pytest.fixture(scope="module")
def door():
    return jfi.study((mlp, PARAMS), IMAGES, LABELS)


@pytest.fixture(scope="module")
def whole(door, tmp_path_factory):
    """Every stuck-at fault."""
    path = tmp_path_factory.mktemp("whole") / "run"
    return door.run("exhaustive", workdir=path, progress=False)


def test_three_lines(door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = door.run("adaptive", error_margin=0.05)
    assert "2 sites, 12 images, labels" in repr(door)
    assert found.workdir == result.Path("runs/mlp_adaptive")
    assert found.manifest["config"]["sampler"] == "adaptive_distance"
    (unit,) = found.summary["estimates"]
    assert unit["margin"] <= 0.05
    assert repr(found).startswith(found.sentence)
    assert "With 99% confidence between" in found.sentence
    shown = found._repr_html_()
    assert "<table>" in shown and shown.count("<iframe") == shown.count("</iframe>") == 1
    assert "&lt;figure id=&quot;layers&quot;" in shown and "<figure" not in shown
    assert "Golden accuracy" in repr(found)
    assert found.summary["verify"]["pairs"] == 200
    # Once more: it is found finished.
    again = door.run("adaptive", error_margin=0.05)
    assert again.summary["run"]["faults"] == 0
    assert again.summary["estimates"] == found.summary["estimates"]
    assert again.summary["measured"]["seconds"] == found.summary["measured"]["seconds"]
    with pytest.raises(jfi.InputError, match=r"error_margin was 0\.05, is 0\.04"):
        door.run("adaptive", error_margin=0.04)


def test_load_needs_no_model(whole):
    code = (
        "import json, sys, jfi\n"
        f"found = jfi.load({str(whole.workdir)!r})\n"
        "print(json.dumps([found.sentence, repr(found), found.summary,"
        " found.faults(True).to_dict('records')]))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    sentence, shown, summary, faults = json.loads(said.stdout)
    assert (sentence, shown, summary) == (whole.sentence, repr(whole), whole.summary)
    assert faults == json.loads(json.dumps(whole.faults(True).to_dict("records")))


def test_what_is_returned_is_json(door, whole, tmp_path):
    assert json.loads(json.dumps(whole.summary)) == whole.summary
    for frame in (whole.estimates(), whole.faults()):
        json.dumps(frame.to_dict("records"))
    json.dumps(whole.manifest)
    plan = jfi.plan(door.network, "data_aware")
    json.dumps(jfi.run(plan, door.engine(plan.space.sites), tmp_path, {}, measure="critical"))


@pytest.mark.parametrize("level", [None, "network", "layer", "bit", "layer_bit"])
def test_estimates_are_those_of_the_summary(whole, level):
    units = [u for u in whole.summary["estimates"] if level in (None, u["level"])]
    assert whole.estimates(level).to_dict("records") == units
    assert list(whole.estimates(level)) == list(jfi.Estimate._fields)


def test_a_unit_without_injections_is_shown(door, tmp_path):
    """JSON has no NaN."""
    found = door.run("data_aware", workdir=tmp_path, progress=False, error_margin=0.2, verify=0)
    assert None in [u["estimate"] for u in found.summary["estimates"]]
    assert found.estimates("bit")["estimate"].isna().any()
    html, text, *figures = found.report()
    assert html.endswith("report.html") and text.endswith("report.md")
    assert len(figures) == 2
    assert "<h2>" in Path(html).read_text()
    assert "first" in repr(found)


def broken(word, bit, polarity):
    """A float32 word with a fault, by arithmetic on integers."""
    return {
        STUCK_AT_0: word & ~(1 << bit),
        STUCK_AT_1: word | 1 << bit,
        FLIP: word ^ 1 << bit,
        DEAD: 0,
    }[polarity]


def number(word):
    return struct.unpack("<f", struct.pack("<I", word))[0]


def check_words(row):
    word = int(PARAMS[row.site].ravel()[row.index].view(np.uint32))
    after = broken(word, row.bit, POLARITIES.index(row.polarity))
    assert row.before_hex == f"0x{word:08x}"
    assert row.after_hex == f"0x{after:08x}"
    assert row.before == float(PARAMS[row.site][row.position])
    assert np.array_equal(row.after, number(after), equal_nan=True)
    return number(after)


def judged(row, after):
    """The images a fault is critical for, and those that rounding may decide, by a naive run."""
    params = {name: value.copy() for name, value in PARAMS.items()}
    params[row.site].ravel()[row.index] = after
    with np.errstate(all="ignore"):
        found = naive(params, IMAGES)
    top, golden = found.argmax(axis=1), naive(PARAMS, IMAGES).argmax(axis=1)
    with np.errstate(all="ignore"):
        second, first = np.sort(found, axis=1)[:, -2:].T
        sure = first - second > 1e-4 * np.abs(found).max(axis=1)
    return top != golden, sure


def test_faults_by_hand(whole):
    frame = whole.faults()
    assert list(frame) == list(result.FAULTS)
    assert len(frame) == whole.summary["population"] == 72 * 64
    checked = 0
    for row in frame.itertuples(index=False):
        after = check_words(row)
        assert row.critical == (len(row.images) > 0) == (row.first_image >= 0)
        assert row.first_image == (row.images or [-1])[0]
        critical, sure = judged(row, after)
        flags = np.isin(np.arange(12), row.images)
        assert np.array_equal(flags[sure], critical[sure])
        checked += sure.sum()
    assert checked > 0.9 * 12 * len(frame)
    critical = whole.faults(critical=True)
    assert critical.equals(frame[frame.critical].reset_index(drop=True))
    assert len(whole.faults(critical=False)) + len(critical) == len(frame)
    assert len(critical) == whole.summary["estimates"][0]["critical"]


@pytest.mark.parametrize("fault_model", ["flip", "dead"])
def test_words_of_other_fault_models(door, tmp_path, fault_model):
    found = door.run(
        "network_wise", workdir=tmp_path, fault_model=fault_model, sites=".*", progress=False,
        measure="detect", error_margin=0.2, verify=0,
    )  # fmt: skip
    rows = list(found.faults().itertuples(index=False))
    assert rows
    for row in rows:
        check_words(row)
        assert row.images is None
        assert row.critical == (row.first_image >= 0)


TYPED = {
    "a": jnp.asarray(PARAMS["first"], jnp.bfloat16),
    "scale": np.float32(1.5),
    "c": RNG.integers(-9, 9, (8, 3)).astype(np.int8),
}


def typed(p, x):
    hidden = checkpoint_name(jnp.maximum(x @ p["a"].astype(jnp.float32), 0), "hidden")
    return hidden @ p["c"].astype(jnp.float32) * p["scale"]


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    """Every flip of every site, without labels."""
    door, path = jfi.study((typed, TYPED), IMAGES), tmp_path_factory.mktemp("typed")
    return door.run(
        "exhaustive", workdir=path, sites=".*", fault_model="flip", verify=0, progress=False
    )


def test_words_of_other_types_and_of_run_time_values(unlabelled):
    frame = unlabelled.faults()
    for name, word, digits in (("a", np.uint16, 4), ("c", np.uint8, 2), ("scale", np.uint32, 8)):
        values = np.asarray(TYPED[name])
        own = frame[frame.site == name]
        assert len(own) == values.size * values.dtype.itemsize * 8
        for row in own.itertuples(index=False):
            golden = values[row.position].view(word)
            after = golden ^ word(1 << row.bit)
            assert row.before_hex == f"0x{golden:0{digits}x}"
            assert row.after_hex == f"0x{after:0{digits}x}"
            assert row.before == float(values[row.position])
            number = float(after.view(values.dtype))
            assert np.array_equal(row.after, number, equal_nan=True)
    hidden = frame[frame.site == "hidden"]
    assert len(hidden) == 8 * 32
    assert hidden.before.isna().all()
    assert set(hidden.before_hex) == {None} or hidden.before_hex.isna().all()
    assert sorted(set(hidden.position)) == [(k,) for k in range(8)]


def test_without_labels_accuracy_is_left_out(whole, unlabelled):
    for found, labels in ((unlabelled, "none"), (whole, "given")):
        assert found.manifest["config"]["labels"] == labels
        for told in (
            "correct" in found.summary["pairs"],
            "golden_accuracy" in found.summary["measured"],
            "Golden accuracy" in repr(found),
        ):
            assert told == (labels == "given")
    # Critical is against golden all the same.
    one = unlabelled.faults(critical=True).iloc[0]
    flipped = np.asarray(TYPED[one.site]).copy()
    flipped[one.position] = one.after
    golden, faulty = (np.asarray(typed(p, IMAGES)) for p in (TYPED, {**TYPED, one.site: flipped}))
    assert np.flatnonzero(golden.argmax(1) != faulty.argmax(1)).tolist() == one.images


@pytest.fixture
def heard():
    """Ctrl-C is heard, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(
    ("way", "sampler"),
    [("raised", "adaptive"), ("pressed", "network_wise"), ("pressed twice", "adaptive")],
)
def test_goes_on_after_an_interrupt(door, tmp_path, way, sampler, monkeypatch):
    monkeypatch.setattr("jfi.campaign.campaign.shard_size", lambda images, measure: 256)
    options = {"error_margin": 0.03, "verify": 0}
    end = door.run(sampler, workdir=tmp_path / "whole", progress=False, **options)

    def stop(state):
        if way == "raised":
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)
        if way == "pressed twice":
            signal.raise_signal(signal.SIGINT)

    path = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt, match=r"on record in .*part, and the same run\(\) goes"):
        door.run(sampler, workdir=path, progress=stop, **options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(list(records.read_shards(path))) == 1
    with pytest.raises(jfi.InputError, match="holds a campaign that has not finished"):
        jfi.load(path)
    again = door.run(sampler, workdir=path, progress=False, **options)
    assert again.summary["estimates"] == end.summary["estimates"]
    assert again.faults().equals(end.faults())
    assert 0 < again.summary["run"]["faults"] < end.summary["run"]["faults"]


@pytest.mark.parametrize("sampler", [*METHODS, "adaptive_cell", *SAMPLERS])
def test_every_sampler_by_its_name(door, tmp_path, sampler):
    options = {} if sampler in SAMPLERS else {"levels": ["network", "layer"]}
    found = door.run(
        sampler, workdir=tmp_path, error_margin=0.2, progress=False, verify=0, **options
    )
    assert found.estimates("layer")["site"].tolist() == ["first", "second"]
    assert len(found.faults()) == found.summary["injections"]
    assert found.faults()["images"].notna().all()


def test_one_level_alone(door, tmp_path):
    found = door.run("adaptive", workdir=tmp_path, error_margin=0.2, levels="bit", verify=0)
    assert found.sentence == "By bit, share of critical faults: see the table."
    assert "bit 31" in repr(found)
    with pytest.raises(jfi.InputError, match="level 'layer' was not estimated; this campaign has"):
        found.estimates("layer")


def right(whole):
    """Of each fault of an exhaustive result the number of images answered right, by the record."""
    shards = list(records.read_shards(whole.workdir))
    return np.concatenate([shard["correct"] for shard in shards])


def test_pairs_and_accuracy_of_every_fault_are_exact(door, whole, tmp_path):
    golden = np.mean(naive(PARAMS, IMAGES).argmax(1) == LABELS)
    means = {
        "pairs": np.mean([len(images) / 12 for images in whole.faults().images]),
        "accuracy": right(whole).mean() / 12,
    }
    assert 0 < means["pairs"] < 1 and means["accuracy"] != golden
    for estimate, mean in means.items():
        path = tmp_path / estimate
        found = door.run("exhaustive", estimate=estimate, workdir=path, verify=0, progress=False)
        unit = found.summary["estimates"][0]
        assert unit["estimate"] == pytest.approx(mean)
        assert unit["cp_low"] == unit["cp_high"] == unit["estimate"] and unit["margin"] == 0
        assert jfi.load(path).estimated == estimate == found.summary["estimate"]
    pairs, accuracy = (jfi.load(tmp_path / estimate).sentence for estimate in means)
    assert pairs.startswith(f"Exactly {100 * means['pairs']:.3f}% of the (fault, image) pairs of ")
    assert "Mean accuracy under fault, over the 4,608 stuck-at faults" in accuracy
    assert f"exactly {100 * means['accuracy']:.3f}% of 12 images; without a fault " in accuracy
    assert f"without a fault {100 * golden:.3f}%" in accuracy


@pytest.mark.parametrize("estimate", ["pairs", "accuracy"])
@pytest.mark.parametrize("sampler", [*SAMPLERS, *METHODS])
def test_every_sampler_estimates_pairs_and_accuracy(door, whole, sampler, estimate, tmp_path):
    counts = right(whole) if estimate == "accuracy" else [len(x) for x in whole.faults().images]
    found = door.run(
        sampler, estimate=estimate, workdir=tmp_path, error_margin=0.05, levels="network",
        verify=0, progress=False, seed=1,
    )  # fmt: skip
    unit = found.summary["estimates"][0]
    assert unit["cp_low"] - 1e-9 <= np.mean(counts) / 12 <= unit["cp_high"] + 1e-9
    if sampler.startswith("adaptive"):
        assert unit["margin"] <= 0.05
    html, text, *_ = found.report()
    words = {
        "pairs": "of the (fault, image) pairs of",
        "accuracy": "Mean accuracy under fault, ove",
    }
    for path in (html, text):
        assert words[estimate] in Path(path).read_text()
    titles = {"pairs": "Critical pairs per layer", "accuracy": "Accuracy under fault per layer"}
    assert titles[estimate] in Path(html).read_text()
    assert "share of (fault, image) pairs" in Path(html).read_text() or estimate == "accuracy"


def test_a_campaign_of_another_estimate_is_refused(door, tmp_path):
    options = {"workdir": tmp_path, "error_margin": 0.2, "verify": 0, "progress": False}
    found = door.run("adaptive", **options)
    with pytest.raises(jfi.InputError, match='estimate was "faults", is "pairs"'):
        door.run("adaptive", estimate="pairs", **options)
    # A record of before there were others is one of faults, and goes on.
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["config"].pop("estimate") == "faults"
    assert "estimate" not in manifest["identity"]
    path.write_text(json.dumps(manifest))
    assert jfi.load(tmp_path).estimated == "faults"
    again = door.run("adaptive", **options)
    assert again.summary["run"]["faults"] == 0
    assert again.summary["estimates"] == found.summary["estimates"]


def test_accuracy_without_labels_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(jfi.InputError, match="estimate 'accuracy' needs labels"):
        study(None).run(estimate="accuracy")
    assert not list(tmp_path.iterdir())


BAD = [
    ({"estimate": "share"}, "estimate 'share' is unknown; choose from faults, pairs, accuracy"),
    ({"estimate": "pairs", "measure": "detect"}, "measure 'detect' tells only one"),
    ({"sampler": "clever"}, "sampler 'clever' is unknown; choose from adaptive, adaptive_cell,"),
    ({"sampler": 3}, "sampler 3 is unknown"),
    ({"error_margin": 2}, "error_margin 2 is not between 0 and 1"),
    ({"error_margin": "1%"}, "error_margin 1% is not between 0 and 1"),
    ({"confidence": 99}, "confidence 99 is not between"),
    ({"measure": "some"}, "measure 'some' is unknown"),
    ({"sites": "third"}, "sites 'third' matches no site"),
    ({"sites": 3}, "sites is int 3; it must be a regular expression, or None"),
    ({"fault_model": "burnt"}, "fault model 'burnt' is unknown"),
    ({"levels": ("image",)}, "level 'image' is unknown"),
    ({"levels": "image", "sampler": "data_aware"}, "level 'image' is unknown"),
    ({"seed": -1}, "seed -1 is no seed"),
    ({"seed": "a"}, "seed 'a' is no seed"),
    ({"verify": -1}, "verify is int -1"),
    ({"progress": "yes"}, "progress is str 'yes'; it must be True, False or a function"),
    ({"workdir": 3}, "workdir is int 3; it must be the path of a directory"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_options(door, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(jfi.InputError, match=message):
        door.run(**change)
    assert not list(tmp_path.iterdir())


def test_bad_models_images_and_labels(tmp_path):
    with pytest.raises(jfi.InputError, match="model is int 3, which jfi does not know"):
        jfi.study(3, IMAGES)
    with pytest.raises(jfi.InputError, match="images are None; it must be a batch"):
        jfi.study((mlp, PARAMS), None)
    with pytest.raises(jfi.InputError, match="12 integers are needed"):
        study(LABELS[:3])
    with pytest.raises(jfi.InputError, match="label 3 is out of range; the classes are 0 to 2"):
        study(LABELS + 1)
    with pytest.raises(jfi.InputError, match="name is str ''"):
        study(name="")
    with pytest.raises(jfi.InputError, match=r"nothing.manifest\.json can't be read"):
        jfi.load(tmp_path / "nothing")


def test_without_pandas(whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    for table in (whole.estimates, whole.faults):
        with pytest.raises(jfi.InputError, match="pip install pandas"):
            table()
    assert whole.sentence in repr(whole)


def test_names_of_studies():
    network = jfi.network(mlp, PARAMS, IMAGES[0])
    assert jfi.study(network, IMAGES).name == "network"
    assert jfi.study((lambda p, x: mlp(p, x), PARAMS), IMAGES).name == "network"
    assert study(name="my net").name == "my net"


def test_a_wrong_verdict_is_on_record_and_raised(door, tmp_path, monkeypatch):
    from jfi.campaign import campaign

    verify = campaign.verify
    monkeypatch.setattr(
        campaign, "verify",
        lambda *args: verify(*args)._replace(disagreements=1, worst="one is wrong"),
    )  # fmt: skip
    with pytest.raises(jfi.VerificationError, match="one is wrong"):
        door.run("adaptive", workdir=tmp_path, error_margin=0.2, progress=False)
    found = jfi.load(tmp_path)
    assert "1 disagree" in repr(found)
    assert found.summary["measured"]["images"] == 12


def test_progress_in_words():
    state = live.campaign.Progress(300, 900, 100, None)
    assert live.told(state, 2.0) == "300 of 900 faults, 100 faults/s, 6 s left"
    assert live.told(state._replace(total=None), 2.0) == "300 faults, 100 faults/s"


def test_progress_names_what_is_estimated():
    """Strata not yet reached count as unchanged: what is told is of those that were."""
    e = jfi.Estimate("network", "network", None, None, 100, 10, 1, 0.86, 0.02, 0, 1, 0, 1, 0.5)
    state = live.campaign.Progress(10, 20, 0, e, estimands.Estimand("accuracy", 10, 0.9))
    assert live.told(state, 1.0).endswith(
        "accuracy 82.000 ± 4.000% of the 50% of faults sampled so far"
    )
    pairs = state._replace(estimate=e._replace(estimate=0.1), estimand=estimands.Estimand("pairs"))
    assert "critical pairs 20.000 ± 4.000%" in live.told(pairs, 1.0)
    faults = pairs._replace(estimand=estimands.CRITICAL)
    assert "faults/s, 1 s left, critical 20.000 ± 4.000%" in live.told(faults, 1.0)
    rounds = pairs._replace(estimate=None, total=None)
    assert live.told(rounds, 1.0).endswith(
        "for the share of (fault, image) pairs that are critical"
    )


def test_a_pytorch_module(tmp_path):
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("torchax") is None:
        pytest.skip("torchax is not installed")

    class Tiny(torch.nn.Sequential):
        pass

    model = Tiny(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    door = jfi.study(model, torch.tensor(IMAGES), torch.tensor(LABELS))
    assert door.name == "Tiny"
    found = door.run("adaptive", workdir=tmp_path, error_margin=0.1, verify=50, progress=False)
    assert set(found.faults().site) <= {"0.weight", "2.weight"}
    assert found.summary["verify"]["disagreements"] == 0
