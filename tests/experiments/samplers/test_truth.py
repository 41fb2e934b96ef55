"""The truth file against naive re-runs, exhaustive campaigns and itself after a stop."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

import jfi
import nets
from experiments import target
from experiments.data import sets
from experiments.samplers import truth
from experiments.samplers.truth import Truth
from jfi import bits, outcomes
from jfi.campaign import campaign, records
from jfi.engine.engine import Engine
from jfi.errors import InputError, VerificationError
from jfi.faults import FAULT_MODELS, Faults, FaultSpace, Site
from jfi.networks import sites

EXPERIMENTS = Path(target.__file__).parent
SHARED = EXPERIMENTS.parents[1] / "shared"
RESNET20 = SHARED / "weights" / "resnet_cifar10" / "resnet20-12fca82f.th"
CIFAR10 = SHARED / "data" / "cifar10" / "cifar10_exact_subset.npz"
IMAGES = 7
CONFIG = {"net": "tiny", "dataset": "noise", "seed": 0}


def logits(params, x, relu=np.maximum):
    """Two dense layers, in NumPy or JAX."""
    return relu(x @ params["hidden"] + params["bias"], 0) @ params["out"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    import jax.numpy as jnp

    draw = np.random.default_rng(0).standard_normal
    params = {
        "bias": draw(5, np.float32) / 4,
        "hidden": draw((4, 5), np.float32),
        "out": draw((5, 3), np.float32),
    }
    images = draw((IMAGES, 4), np.float32)
    network = jfi.network(lambda p, x: logits(p, x, jnp.maximum), params, images[0])
    return Engine(network, images, np.zeros(IMAGES, int), sites.select(network))


def engine_of(engine: Engine, work: campaign.Plan) -> Engine:
    """The same, compiled anew only for other sites."""
    if work.space.sites == engine.sites:
        return engine
    return Engine(engine.network, engine.images, engine.labels, work.space.sites)


def written(engine: Engine, out: Path, **options) -> Truth:
    work = truth.plan(engine.network, options.pop("pattern", None), options.pop("share", None))
    return truth.write(out, work, engine_of(engine, work), CONFIG, **options)


@pytest.fixture(scope="module")
def whole(engine, tmp_path_factory) -> Truth:
    """Of both kernels."""
    return written(engine, tmp_path_factory.mktemp("truth") / "t.npz", verify_pairs=50)


@pytest.fixture(scope="module")
def part(engine, tmp_path_factory) -> Truth:
    """Of the second kernel, and a quarter of the first."""
    return written(engine, tmp_path_factory.mktemp("part") / "t.npz", pattern="out", share=0.25)


def naive_images(engine: Engine, site: str, index: int, bit: int, polarity: int) -> int:
    """Images whose answer a fault changes, by NumPy alone."""
    params = {name: np.array(value) for name, value in engine.network.params.items()}
    golden = logits(params, engine.images).argmax(1)
    words = params[site].view(np.uint32).reshape(-1)
    mask = np.uint32(1 << bit)
    words[index] = (words[index] & ~mask, words[index] | mask, words[index] ^ mask)[polarity]
    with np.errstate(invalid="ignore", over="ignore"):
        return int((logits(params, engine.images).argmax(1) != golden).sum())


def test_truth_is_what_naive_reruns_say(engine, whole):
    assert [site.name for site in whole.sites] == ["hidden", "out"]
    for site, images in zip(whole.sites, whole.critical, strict=True):
        assert images.dtype == np.int32 and images.shape == (site.words, 32)
        naive = [
            [naive_images(engine, site.name, index, bit, bits.FLIP) for bit in range(32)]
            for index in range(site.words)
        ]
        np.testing.assert_array_equal(images, naive)
        assert 0 < (images > 0).mean() < 1


def test_images_answered_right_are_what_naive_reruns_say(engine, whole, tmp_path):
    """All labels are 0: right where the faulty answer is."""
    golden = logits(engine.network.params, engine.images).argmax(1)
    assert whole.meta["golden_correct"] == (golden == 0).sum()
    draw = np.random.default_rng(0)
    for number, site in enumerate(whole.sites):
        for index, bit in draw.integers(0, (site.words, 32), (40, 2)):
            params = {name: np.array(value) for name, value in engine.network.params.items()}
            params[site.name].view(np.uint32).reshape(-1)[index] ^= np.uint32(1 << bit)
            with np.errstate(invalid="ignore", over="ignore"):
                right = (logits(params, engine.images).argmax(1) == 0).sum()
            assert whole.correct[number][index, bit] == right
    # Without labels nothing is right or wrong, and the file says so.
    own = Engine(engine.network, engine.images, None, engine.sites)
    unlabelled = written(own, tmp_path / "t.npz")
    assert unlabelled.correct is truth.load(tmp_path / "t.npz").correct is None
    assert "golden_correct" not in unlabelled.meta


def test_oracle_is_what_naive_reruns_say_of_stuck_at_faults(engine, whole):
    faults = whole.space.decode(np.arange(whole.space.size))
    naive = [
        naive_images(engine, whole.sites[site].name, index, bit, polarity) > 0
        for site, index, bit, polarity in zip(*(f.tolist() for f in faults), strict=True)
    ]
    assert whole.space.size == 2 * 32 * 35
    np.testing.assert_array_equal(truth.is_critical(whole, np.arange(whole.space.size)), naive)
    some = np.array([5, 5, 70, 0])
    np.testing.assert_array_equal(truth.is_critical(whole, some), np.array(naive)[some])


def test_units_are_those_of_an_exhaustive_campaign(engine, whole, tmp_path):
    work = campaign.plan(engine.network, "exhaustive")
    summary = campaign.run(work, engine_of(engine, work), tmp_path, {})
    expected = {e["unit"]: e["estimate"] for e in summary["estimates"]}
    assert truth.shares(whole) == pytest.approx(expected, abs=1e-15)
    assert len(expected) == 1 + 2 + 32 + 64
    for e in truth.unit_estimates(whole):
        assert e.injections == e.population and e.margin == 0
        assert e.low == e.high == e.cp_low == e.cp_high == e.estimate
    assert truth.unit_estimates(whole)[0].population == whole.space.size


def test_values_are_the_golden_ones(engine, whole):
    for name, value in zip(("hidden", "out"), whole.values, strict=True):
        np.testing.assert_array_equal(value, engine.network.params[name])


def test_a_share_of_the_other_sites(whole, part):
    assert [site.name for site in part.sites] == ["hidden", "out"]
    known = part.critical[0] != truth.UNKNOWN
    assert known.sum() == round(0.25 * 32 * 20)
    assert known.any(axis=1).all() and known.any(axis=0).all()  # not the first words or bits
    np.testing.assert_array_equal(part.critical[0][known], whole.critical[0][known])
    np.testing.assert_array_equal(part.critical[1], whole.critical[1])
    exact = truth.shares(whole)
    found = truth.unit_estimates(part)
    assert truth.shares(part).keys() == {"out", *(f"out bit {bit}" for bit in range(32))}
    assert truth.shares(part)["out"] == exact["out"]
    network, hidden = found[0], found[1]
    for e in (network, hidden):
        assert e.margin > 0 and e.cp_low <= exact[e.unit] <= e.cp_high


def test_a_flip_that_was_not_run_is_no_answer(part):
    index, bit = np.argwhere(part.critical[0] == truth.UNKNOWN)[0]
    ids = (32 * index + bit) * 2 + np.arange(2)
    value = int(part.words[0][index]) >> int(bit) & 1
    assert not truth.is_critical(part, ids[[value]]).any()  # stuck at what it is
    with pytest.raises(InputError, match=f"does not know hidden index {index} bit {bit}"):
        truth.is_critical(part, ids)
    only = truth.complete(part)
    assert [site.name for site in only.sites] == ["out"]
    np.testing.assert_array_equal(only.critical[0], part.critical[1])
    with pytest.raises(InputError, match="knows no site in full"):
        truth.complete(Truth({}, part.sites[:1], part.critical[:1], part.words[:1]))


def test_other_kernels_only_with_a_share(engine):
    names = [site.name for site in truth.plan(engine.network, "out").space.sites]
    assert names == ["out"]
    named = truth.plan(engine.network, "bias", 0.5)
    assert {site.name for site in named.space.sites} == {"hidden", "bias", "out"}
    sizes = {named.space.sites[s.site].name: (s.population, s.injections) for s in named.strata}
    assert sizes == {"bias": (160, 160), "hidden": (640, 320), "out": (480, 240)}


@pytest.mark.parametrize("share", [0, 1, -0.1, 2])
def test_a_share_out_of_range_is_refused(engine, share):
    with pytest.raises(InputError, match=f"share {share} is not between 0 and 1"):
        truth.plan(engine.network, None, share)


def content(path: Path) -> dict[str, bytes]:
    """Members of a .npz as they are in it; of the meta what no clock or machine decides."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    del members["meta.npy"]
    meta = truth.load(path).meta
    return members | {"meta": {k: meta[k] for k in meta.keys() - {"seconds", "flips"}}}


def test_a_stopped_run_goes_on_to_the_same_bytes(engine, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "SHARD_FAULTS", (100, 100))

    def stop(progress):
        if progress.done > 400:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(engine, tmp_path / "a.npz", progress=stop)
    assert not (tmp_path / "a.npz").exists()
    done = sum(shard["id"].size for shard in records.read_shards(tmp_path / "a.npz.parts"))
    assert 400 < done < 35 * 32
    resumed = written(engine, tmp_path / "a.npz")
    assert resumed.meta["flips"] == 35 * 32 - done
    written(engine, tmp_path / "b.npz")
    assert content(tmp_path / "a.npz") == content(tmp_path / "b.npz")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.npz", "b.npz"]
    for one, other in zip(resumed.critical, whole.critical, strict=True):
        np.testing.assert_array_equal(one, other)


def test_other_flags_do_not_go_on_with_it(engine, tmp_path):
    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(engine, tmp_path / "t.npz", progress=stop)
    work = truth.plan(engine.network)
    with pytest.raises(InputError, match="seed was 0, is 1"):
        truth.write(tmp_path / "t.npz", work, engine_of(engine, work), {**CONFIG, "seed": 1})


def test_a_file_says_what_was_saved(whole, tmp_path):
    truth.save(tmp_path / "a.npz", whole)
    again = truth.load(tmp_path / "a.npz")
    truth.save(tmp_path / "b.npz", again)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert again.meta == whole.meta and again.sites == whole.sites
    for one, other in zip(again[2:], whole[2:], strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_the_format_is_as_documented(whole, tmp_path):
    truth.save(tmp_path / "t.npz", whole)
    with np.load(tmp_path / "t.npz") as file:
        names = ("critical", "words", "correct")
        assert set(file.files) == {"meta", *(f"{name}_{k}" for name in names for k in (0, 1))}
        meta = json.loads(file["meta"].item())
        assert file["meta"].shape == () and file["words_0"].dtype == np.uint32
        assert file["critical_1"].shape == (15, 32) and file["words_1"].shape == (15,)
    assert meta["fault_model"] == "stuck_at" and meta["images"] == IMAGES
    assert meta["sites"][1] == {"name": "out", "shape": [5, 3], "dtype": "float32"}
    assert {"net", "dataset", "seed", "weights_hash", "commit", "seconds"} <= meta.keys()


def test_words_of_other_widths(tmp_path):
    """Counts are padded to the widest word; bits that a word lacks are no population."""
    own = (Site("a", (3,), np.dtype("f2")), Site("b", (2, 2), np.dtype("i1")))
    critical = (np.zeros((3, 16), np.int32), np.ones((4, 8), np.int32))
    words = (np.arange(3, dtype=np.uint16), np.arange(4, dtype=np.uint8))
    truth.save(tmp_path / "t.npz", Truth({"sites": described(own)}, own, critical, words))
    found = truth.load(tmp_path / "t.npz")
    assert [value.dtype for value in found.values] == [np.float16, np.int8]
    population, known, hit = truth.flip_counts(found)
    assert population.shape == (2, 16) and population.sum() == known.sum() == 48 + 32
    assert hit.sum() == 32
    assert truth.shares(found)["network"] == 32 / (2 * 80)
    assert truth.shares(found)["bit 15"] == 0 and truth.shares(found)["b"] == 0.5
    assert found.space.size == FaultSpace(own, FAULT_MODELS["stuck_at"]).size


def described(own) -> list[dict]:
    return [{"name": s.name, "shape": list(s.shape), "dtype": str(s.dtype)} for s in own]


def test_a_damaged_file_is_named(whole, tmp_path):
    path = tmp_path / "t.npz"
    with pytest.raises(InputError, match=r"t\.npz: no such file"):
        truth.load(path)
    truth.save(path, whole)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"t\.npz: truncated, or not a file of"):
        truth.load(path)
    np.savez(path, x_test=np.zeros(3))
    with pytest.raises(InputError, match=r"t\.npz: truncated, or not a file of"):
        truth.load(path)
    short = whole._replace(critical=(whole.critical[0][1:], whole.critical[1]))
    truth.save(path, short)
    with pytest.raises(InputError, match="hidden has"):
        truth.load(path)


def test_a_disagreement_writes_no_file(engine, tmp_path, monkeypatch):
    """With an engine that takes every pair it is asked for again for critical."""

    def critical_pairs(self, faults, image):
        return np.full(image.size, outcomes.CRITICAL), np.zeros(image.size, bool)

    monkeypatch.setattr(Engine, "critical_pairs", critical_pairs)
    with pytest.raises(VerificationError, match=r"verification failed: (hidden|out) index"):
        written(engine, tmp_path / "t.npz", verify_pairs=50)
    assert not (tmp_path / "t.npz").exists()


def test_the_command(script, tmp_path, lenet_weights):
    arguments = [
        "--sites=fc3/kernel", "--images=10", "--verify=20",
        f"--weights={lenet_weights}", f"--out={tmp_path / 't.npz'}",
    ]  # fmt: skip
    ended = script(truth, *arguments)
    assert ended.status == 0, ended.err
    found = truth.load(tmp_path / "t.npz")
    lines = ended.out.splitlines()
    assert lines[1].split()[:3] == ["network", "15,360", "15,360"]
    assert lines[1].split()[3] == f"{100 * truth.shares(found)['network']:.3f}"
    assert lines[-2].startswith("7,680 flips in ")
    assert found.meta["images"] == 10 and found.meta["net"] == "lenet"
    assert (found.meta["mean"], found.meta["std"]) == ([0.1307], [0.3081])
    assert not (tmp_path / "t.npz.parts").exists()
    again = script(truth, *arguments)
    assert again.status == 2 and "is there already" in again.err
    assert "share 2.0 is not between" in script(truth, *arguments, "--share=2").err


def beside(*files: Path):
    """Marks of a test that takes minutes and files beside the checkout."""
    absent = not all(file.exists() for file in files)
    return pytest.mark.slow, pytest.mark.data, pytest.mark.skipif(absent, reason=f"no {files}")


@pytest.mark.parametrize(
    ("name", "weights", "dataset", "flips"),
    [
        ("lenet_digits", None, "digits", 8_000),
        pytest.param(
            "lenet_mnist", None, SHARED / "data" / "mnist", 200_000,
            marks=beside(SHARED / "data" / "mnist"),
        ),
        pytest.param("resnet20", RESNET20, CIFAR10, 40_000, marks=beside(RESNET20, CIFAR10)),
        pytest.param("resnet20_part", RESNET20, CIFAR10, 10_000, marks=beside(RESNET20, CIFAR10)),
    ],
)  # fmt: skip
def test_committed_truths_hold_what_runs_without_proofs_tell(
    name, weights, dataset, flips, tmp_path
):
    """They are made by `critical`, whose proofs decide most pairs; `full` runs every pair."""
    found = truth.load(EXPERIMENTS / "truths" / f"{name}.npz")
    if name == "lenet_mnist":
        sets.convert_mnist(dataset, tmp_path / "mnist.npz")
        dataset = tmp_path / "mnist.npz"
    images = sets.load(dataset, train=False)
    net = nets.build(found.meta["net"], images.x_test.shape[1:])
    network = target.load_network(net, weights or EXPERIMENTS / "weights" / f"{name}.safetensors")
    x, y = target.workload(net, images, found.meta["images"])
    engine = Engine(network, x, y, found.sites)
    # Of sign and exponent, where nearly all critical flips are.
    known = [np.argwhere(images >= 0) for images in found.critical]
    at = np.concatenate([np.insert(own, 0, k, axis=1) for k, own in enumerate(known)])
    at = at[at[:, 2] >= 23]
    chosen = np.sort(np.random.default_rng(0).choice(len(at), flips, replace=False))
    site, index, bit = at[chosen].T
    flip = np.full(flips, bits.FLIP, np.int8)
    faults = Faults(site.astype(np.int32), index, bit.astype(np.int16), flip)
    told = np.array([found.critical[s][i, b] for s, i, b in at[chosen]])
    assert told.astype(bool).sum() > flips / 20
    full = engine.run(faults, "full")
    np.testing.assert_array_equal(full.critical, told)
    if found.correct:
        right = [found.correct[s][i, b] for s, i, b in at[chosen]]
        np.testing.assert_array_equal(full.correct, right)
