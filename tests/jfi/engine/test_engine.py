"""The engine against naive re-runs, on networks of three kinds, none of them edited."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jfi
from jfi import bits, outcomes
from jfi.engine import cut_to_cut, verify
from jfi.engine.inputs import MEASURES
from jfi.faults import Faults, take

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(11, 8, 8, 3)).astype(np.float32)
LABELS = RNG.integers(0, 5, 11)


class LinenNet(linen.Module):
    """What CIFAR networks are made of: BN, a residual, a depthwise convolution, pooling."""

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(8, (3, 3), use_bias=False, name="conv1")(x)
        x = linen.relu(linen.BatchNorm(use_running_average=True, name="bn1")(x))
        y = linen.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = x + linen.relu6(y)
        x = linen.max_pool(x, (2, 2), (2, 2))
        x = linen.Conv(6, (3, 3), strides=2, padding="VALID", name="conv2")(x)
        return linen.Dense(5, name="fc")(linen.silu(x).reshape(x.shape[0], -1))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), strides=(2, 2), rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.fc = nnx.Linear(96, 5, rngs=rngs)

    def __call__(self, x):
        x = self.drop(nnx.gelu(self.norm(self.conv(x))))
        return self.fc(x.reshape(x.shape[0], -1))


def linen_net():
    net = LinenNet()
    return net.apply, net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def nnx_net():
    graph, state = nnx.split(NnxNet(nnx.Rngs(0)))
    return (lambda state, x: nnx.merge(graph, state)(x)), state


def plain_net():
    """A function of weights in a list and a tuple, one of them in bfloat16, one in int8."""
    params = {
        "hidden": [normal(192, 12), normal(12).astype(jnp.bfloat16)],
        "out": (RNG.integers(-99, 99, (12, 5)).astype(np.int8), np.float32(0.02)),
    }

    def apply(params, x):
        w, b = params["hidden"]
        y = jnp.tanh(x.reshape(len(x), -1) @ w / 8 + b.astype(jnp.float32))
        out, scale = params["out"]
        return y @ (out.astype(jnp.float32) * scale)

    return apply, params


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


NETS = {"linen": linen_net, "nnx": nnx_net, "plain": plain_net}


def make(name="linen", pattern=".*", **options):
    network = jfi.network(*NETS[name](), IMAGES[0])
    return jfi.Engine(network, IMAGES, LABELS, jfi.select(network, pattern), **options)


def every_bit(runner, words=2, polarities=(0, 1, 2)) -> Faults:
    """Faults of every bit of a few words of every site."""
    space = jfi.FaultSpace(runner.sites, polarities)
    rng = np.random.default_rng(1)
    ids = [
        space.stratum_ids(site, bit, rng.integers(0, space.cells[site, bit], words))
        for site, bit in np.argwhere(space.cells)
    ]
    return space.decode(np.concatenate(ids))


@pytest.mark.parametrize("name", NETS)
def test_agrees_with_naive_reruns_in_every_bit_of_every_leaf(name):
    runner = make(name)
    faults = every_bit(runner)
    image = RNG.integers(0, len(IMAGES), faults.site.size)
    found = verify.verify(runner, faults, image)
    assert found.disagreements == 0, found.worst
    assert found.agreements > 0.9 * found.pairs == 0.9 * faults.site.size


def test_site_names_and_kernels():
    names = {name: make(name).network for name in NETS}
    assert [s.name for s in names["linen"].sites][:2] == ["conv1/kernel", "batch_stats/bn1/mean"]
    assert names["linen"].kernels == {
        "conv1/kernel", "depthwise/kernel", "conv2/kernel", "fc/kernel",
    }  # fmt: skip
    assert names["nnx"].kernels == {"conv/kernel", "fc/kernel"}
    assert names["plain"].kernels == {"hidden/0", "out/0"}
    assert [str(s.dtype) for s in names["plain"].sites] == [
        "float32",
        "bfloat16",
        "int8",
        "float32",
    ]


def test_run_tallies_the_pairs_of_a_whole_rerun():
    """Outcomes per fault, against NumPy flips and the jitted network, image by image."""
    runner = make(pattern="conv2/kernel")
    faults = every_bit(runner, words=3)
    done = runner.run(faults, keep_bits=True)
    params = runner.network.params
    kernel = np.asarray(params["params"]["conv2"]["kernel"])
    predict = jax.jit(runner.network.apply)
    golden = np.asarray(predict(params, IMAGES))
    for row in range(0, faults.site.size, 7):
        words = kernel.reshape(-1).view(np.uint32).copy()
        bit = np.uint32(1) << np.uint32(faults.bit[row])
        word = words[faults.index[row]]
        words[faults.index[row]] = [word & ~bit, word | bit, word ^ bit][faults.polarity[row]]
        broken = {**params["params"], "conv2": dict(params["params"]["conv2"])}
        broken["conv2"]["kernel"] = words.view(np.float32).reshape(kernel.shape)
        logits = np.asarray(predict({**params, "params": broken}, IMAGES))
        critical = logits.argmax(1) != golden.argmax(1)
        assert done.critical[row] == critical.sum()
        assert done.first_critical[row] == (np.flatnonzero(critical)[0] if critical.any() else -1)
        np.testing.assert_array_equal(
            np.unpackbits(done.critical_bits[row])[: len(IMAGES)], critical
        )
        assert done.correct[row] == (logits.argmax(1) == LABELS).sum()
        assert done.non_finite[row] == (~np.isfinite(logits).all(1)).sum()


def test_blocks_of_images_change_nothing():
    """A tight memory bound takes the images in blocks; the outcomes are the same."""
    small = make(pattern="conv.*/kernel", memory=20_000)
    assert len(small._to_logits.image_blocks(0)) > 2
    whole = make(pattern="conv.*/kernel")
    faults = every_bit(small, words=1)
    for measure in MEASURES:
        one, other = (runner.run(faults, measure)._asdict() for runner in (small, whole))
        for field in one:
            if measure != "detect" or field not in ("inferred", "certified"):
                np.testing.assert_array_equal(one[field], other[field], field)


@pytest.mark.parametrize("name", NETS)
def test_every_measure_gives_the_same_verdicts(name):
    runner = make(name)
    faults = every_bit(runner, words=3)
    full, critical, detect = (runner.run(faults, measure, keep_bits=True) for measure in MEASURES)
    for field in ("critical", "first_critical", "correct", "non_finite", "critical_bits"):
        np.testing.assert_array_equal(getattr(critical, field), getattr(full, field), field)
    np.testing.assert_array_equal(detect.critical, full.critical > 0)
    np.testing.assert_array_equal(detect.first_critical >= 0, full.critical > 0)
    assert critical.masked is None
    same = runner.identity(faults)
    for done in (full, critical):
        judged = done.inferred + done.certified
        np.testing.assert_array_equal(judged, np.where(same, 0, len(IMAGES)))
    assert (detect.inferred <= critical.inferred).all()


def test_detect_presents_a_chosen_workload_as_it_is_given(monkeypatch):
    """Blocks of one image: a fault is judged up to the first it is critical for, and no further."""
    monkeypatch.setattr(cut_to_cut, "DETECT_BLOCK", 1)
    whole = make("plain")
    faults = every_bit(whole, words=3)
    bits = np.unpackbits(whole.run(faults, keep_bits=True).critical_bits, axis=1)[:, : len(IMAGES)]
    rows = np.random.default_rng(0).permutation(len(IMAGES))[:7]
    network, pick = whole.network, whole.images[rows]
    runner = jfi.Engine(network, pick, LABELS[rows], whole.sites, order=np.arange(7), loop=False)
    done = runner.run(faults, "detect")
    hit = bits[:, rows].astype(bool)
    first = np.where(hit.any(1), hit.argmax(1), -1)
    np.testing.assert_array_equal(done.first_critical, first)
    judged = np.where(hit.any(1), first + 1, rows.size)
    same = runner.identity(faults)
    np.testing.assert_array_equal(done.inferred + done.certified, np.where(same, 0, judged))
    with pytest.raises(jfi.InputError, match="must name each of the 6 images once"):
        jfi.Engine(network, pick[1:], LABELS[rows[1:]], whole.sites, order=np.arange(7))


def test_unknown_measure():
    with pytest.raises(jfi.InputError, match="measure 'all' is unknown; choose from full, crit"):
        make("plain").run(every_bit(make("plain")), "all")


def test_identity_is_masked_without_a_run(monkeypatch):
    runner = make()
    space = jfi.FaultSpace(runner.sites, (0, 1))
    faults = space.decode(np.arange(0, 6400))
    same = runner.identity(faults)
    assert same.sum() * 2 == same.size  # one of the two polarities, whatever the word
    monkeypatch.setattr(runner._to_logits, "pairs", None)
    done = runner.run(take(faults, np.flatnonzero(same)))
    assert (done.masked == len(IMAGES)).all()
    assert (done.correct == (runner.answers == LABELS).sum()).all()


@pytest.mark.parametrize("name", NETS)
def test_golden_word_is_masked_on_every_lane(name):
    """Run all the same, a fault that changes nothing equals golden to the last bit."""
    runner = make(name)
    faults = every_bit(runner, polarities=(0, 1))
    faults = take(faults, np.flatnonzero(runner.identity(faults)))
    found = runner.pairs(faults, RNG.integers(0, len(IMAGES), faults.site.size))
    assert (found.codes & outcomes.CLASS_MASK == outcomes.MASKED).all()


def test_compiles_two_programs_a_site():
    """Prefix and suffix, whatever the number of faults and images."""
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    runner = make()
    faults = every_bit(runner)
    jax.monitoring.register_event_duration_secs_listener(listen)
    runner.run(faults)
    first = len(compiled)
    runner.run(take(faults, np.arange(5)))
    runner.run(take(faults, np.arange(faults.site.size // 2)))
    assert 0 < first <= 2 * len(runner.sites)
    assert len(compiled) == first


def test_full_float32_products():
    """The precision is part of the program, so no device computes in fewer bits."""
    products = [
        eqn
        for eqn in make().network.program.eqns
        if eqn.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    assert products
    assert all("HIGHEST" in str(eqn.params["precision"]) for eqn in products)


def test_verify_finds_a_wrong_engine(monkeypatch):
    """A rule that goes wrong is reported as disagreement, with the fault."""
    runner = make("plain", "hidden/0")
    faults = every_bit(runner, words=4, polarities=(2,))
    image = np.zeros(faults.site.size, int)
    right = bits.from_bits
    monkeypatch.setattr(bits, "from_bits", lambda *a: -right(*a))
    found = verify.verify(runner, faults, image)
    assert found.disagreements > 0
    assert "hidden/0 index" in found.worst
    assert found.pairs == found.agreements + found.near_ties + found.disagreements


def overflowing_when_fused(p, x):
    """Of values near 1e37, x * 1.05 minus its largest is 0, or 1e30 where XLA contracts the two."""
    h = jax.nn.log_softmax(jax.nn.selu(x.reshape(-1, 3, 6) @ p["in"]))
    return h.reshape(len(x), 18) @ p["out"]


def test_what_only_fusing_decides_is_a_near_tie():
    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(6, 6)), "out": rng.normal(size=(18, 6)) / 64}
    params = {name: np.float32(leaf) for name, leaf in params.items()}
    images = np.float32(rng.normal(size=(24, 18)))
    network = jfi.network(overflowing_when_fused, params, images[0])
    runner = jfi.Engine(network, images, np.zeros(24, int), network.sites)
    rows = [("in", index, 30, "flip") for index in range(36)]
    faults = jfi.fault_list([row for row in rows for _ in images], network.sites)
    image = np.tile(np.arange(24), 36)
    for measure in MEASURES:
        found = verify.verify(runner, faults, image, measure)
        assert found.disagreements == 0, found.worst
    # And it is no excuse for an engine that is wrong.
    wrong = np.where(runner.critical_pairs(faults, image)[0] & outcomes.CRITICAL, 0, 1)
    spoilt = verify.verify(runner, faults, image, "critical", np.int8(wrong))
    assert spoilt.disagreements > 300


def image_mixing(params, x):
    return (x - x.mean(0)).reshape(len(x), -1) @ params["w"]


BAD = [
    (dict(images=IMAGES[:, :7]), r"images have shape \(11, 7, 8, 3\).*takes \[B, 8, 8, 3\]"),
    (dict(images=IMAGES.astype(np.float64)), "float64.*of float32"),
    (dict(images=IMAGES[:0]), r"images have shape \(0,"),
    (dict(labels=LABELS[:3]), r"labels have shape \(3,\).*11 integers"),
    (dict(labels=LABELS * 0 + 5), "label 5 is out of range; the classes are 0 to 4"),
    (dict(images={"pixels": IMAGES}), "images are dict of 'pixels'; they must be one array"),
    (dict(images=[IMAGES[0], IMAGES[1][:3]]), "images are list of 2; they must be one array"),
    (dict(images=(IMAGES, IMAGES)), r"images have shape \(2, 11, 8, 8, 3\)"),
    (dict(images=jax.random.key(0)), r"images are key<fry>\[\]; they must be one array"),
    (dict(labels=[[1], [1, 2]]), "labels are list of 2; they must be one array"),
    (dict(images=IMAGES * np.float32(np.nan)), "golden output of image 0 .* must be finite"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_workload(change, message):
    network = jfi.network(*linen_net(), IMAGES[0])
    arguments = {"images": IMAGES, "labels": LABELS} | change
    with pytest.raises(jfi.InputError, match=message):
        jfi.Engine(network, arguments["images"], arguments["labels"], jfi.select(network))


def test_images_that_influence_each_other():
    network = jfi.network(image_mixing, {"w": normal(192, 5)}, IMAGES[0])
    with pytest.raises(jfi.InputError, match="must not influence each other"):
        jfi.Engine(network, IMAGES, LABELS, network.sites)


def test_bad_network():
    apply, params = linen_net()
    params["params"]["fc"]["kernel"] = params["params"]["fc"]["kernel"].at[3, 1].set(jnp.nan)
    with pytest.raises(jfi.InputError, match="parameter fc/kernel is nan at index 16"):
        jfi.network(apply, params, IMAGES[0])
    maps = jfi.network(lambda p, x: x * p["w"], {"w": normal(3)}, IMAGES[0])
    with pytest.raises(jfi.InputError, match=r"say what is critical there .*: pixels:SHARE"):
        jfi.Engine(maps, IMAGES, None, maps.sites)
    with pytest.raises(jfi.InputError, match="no array with bits"):
        jfi.network(lambda p, x: x.reshape(len(x), -1), {"w": normal(3)}, IMAGES[0])


def double_net():
    params = {"a": RNG.normal(size=(192, 12)), "b": RNG.normal(size=(12, 5))}
    return (lambda p, x: jnp.tanh(x.reshape(len(x), -1) @ p["a"]) @ p["b"]), params


def test_float64_needs_x64():
    with pytest.raises(jfi.InputError, match=r"parameter a is float64.* enable jax_enable_x64"):
        jfi.network(*double_net(), IMAGES[0])
    with jax.enable_x64(True):
        images = IMAGES.astype(np.float64)
        network = jfi.network(*double_net(), images[0])
        runner = jfi.Engine(network, images, LABELS, network.sites)
        faults = every_bit(runner)
        assert set(faults.bit) == set(range(64))
        image = RNG.integers(0, len(images), faults.site.size)
        for measure in ("full", "critical"):
            assert verify.verify(runner, faults, image, measure).disagreements == 0


def test_bad_pattern():
    network = jfi.network(*linen_net(), IMAGES[0])
    with pytest.raises(jfi.InputError, match="'conv' matches no site in full; the sites are conv1"):
        jfi.select(network, "conv")
    with pytest.raises(jfi.InputError, match="is not a regular expression"):
        jfi.select(network, "conv(")


def test_a_single_class_is_no_answer():
    """Its top-1 never changes: a sigmoid's logit would come out as proof against every fault."""
    flat = lambda p, x: x.reshape(len(x), -1) @ p["w"]  # noqa: E731
    network = jfi.network(flat, {"w": normal(192, 1)}, IMAGES[0])
    with pytest.raises(jfi.InputError, match=r"float32\[B, 1\]: say what is critical"):
        jfi.Engine(network, IMAGES, None, network.sites)
    with pytest.raises(jfi.InputError, match=r"scores \[B, C\] of two classes or more"):
        jfi.Engine(network, IMAGES, None, network.sites, criterion="top1")
    assert jfi.Engine(network, IMAGES, LABELS * 0, network.sites).criterion.text == "threshold"


def test_an_output_that_is_not_one_row_an_image():
    apply = lambda p, x: (x.reshape(len(x), -1) @ p["w"]).sum(0, keepdims=True)  # noqa: E731
    network = jfi.network(apply, {"w": normal(192, 5)}, IMAGES[0])
    with pytest.raises(jfi.InputError, match=r"float32\[1, 5\] for 11 images; .* \[11, C\]"):
        jfi.Engine(network, IMAGES, LABELS, network.sites)


NO_FAULTS = [
    ((-1, 0, 0, 2), "site -1 in row 1 is not in 0 to 3"),
    ((4, 0, 0, 2), "site 4 in row 1 is not in 0 to 3"),
    ((0, -1, 0, 2), "index -1 in row 1 is not in 0 to 2303"),
    ((0, 2304, 0, 2), "index 2304 in row 1 is not in 0 to 2303"),
    ((1, 0, 16, 2), "bit 16 in row 1 is not in 0 to 15"),
    ((0, 0, -1, 2), "bit -1 in row 1 is not in 0 to 31"),
    ((0, 0, 0, 5), "polarity 5 in row 1 is not in 0 to 4"),
    ((0, 0.5, 0, 2), "index has dtype float64, not an integer"),
]


@pytest.mark.parametrize(("row", "message"), NO_FAULTS)
def test_a_fault_that_there_is_not_is_refused(row, message):
    runner = make("plain")
    faults = Faults(*(np.array([good, bad]) for good, bad in zip((0, 0, 0, 2), row, strict=True)))
    image = np.zeros(2, int)
    calls = [lambda m=m: runner.run(faults, m) for m in MEASURES]
    calls += [lambda: runner.pairs(faults, image), lambda: runner.critical_pairs(faults, image)]
    calls += [lambda: runner.identity(faults), lambda: verify.verify(runner, faults, image)]
    for call in calls:
        with pytest.raises(jfi.InputError, match=message):
            call()


def test_columns_and_images_that_do_not_fit_are_refused():
    runner = make("plain")
    fault = Faults(*(np.array([value]) for value in (0, 0, 0, 2)))
    images = [([11], "image 11 in row 0 is not in 0 to 10"), ([-1], "image -1"), ([0.5], "float64")]
    images += [([0, 0], r"images int64\[2\] are not one a fault: there are 1 faults")]
    for image, message in images:
        for run in (runner.pairs, runner.critical_pairs):
            with pytest.raises(jfi.InputError, match=message):
                run(fault, np.array(image))
    bad = [
        (
            fault._replace(index=np.zeros(2, int)),
            r"index \[2\].*; they must be flat and of one len",
        ),
        (Faults(*(column[None] for column in fault)), "must be flat"),
        (fault._replace(bit=[[1], [1, 2]]), "bit is list of 2, not an array of integers"),
        (None, "faults are None, not jfi.Faults"),
    ]
    for faults, message in bad:
        with pytest.raises(jfi.InputError, match=message):
            runner.run(faults)
    lists = runner.run(Faults([0], [0], [30], [2]))
    np.testing.assert_array_equal(lists.critical, runner.run(fault._replace(bit=[30])).critical)


@pytest.mark.parametrize("activation", [linen.relu, linen.gelu, linen.tanh])
def test_a_bfloat16_cnn_with_float32_logits_is_taken(activation):
    """Its logits are rounded by far more than their own type would say."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = activation(linen.Conv(16, (3, 3), dtype=jnp.bfloat16)(x))
            x = activation(linen.Conv(8, (3, 3), strides=2, dtype=jnp.bfloat16)(x))
            return linen.Dense(5)(x.reshape(len(x), -1)).astype(jnp.float32)

    params = Net().init(jax.random.key(0), IMAGES[:1])
    network = jfi.network(Net().apply, params, IMAGES[0])
    runner = jfi.Engine(network, IMAGES, LABELS, jfi.select(network))
    faults = every_bit(runner, words=1, polarities=(2,))
    image = RNG.integers(0, len(IMAGES), faults.site.size)
    assert verify.verify(runner, faults, image).disagreements == 0
