"""Every criterion on a small network, each verdict against NumPy's own reading of a naive run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

import jfi
from jfi import bits, forms, outcomes
from jfi.criteria import names
from jfi.criteria.criterion import own
from jfi.engine import certify, verify
from jfi.errors import InputError
from jfi.faults import FAULT_MODELS, FaultSpace
from jfi.networks.program import run, section

BATCH, HIDDEN = 6, 8
ENDS = {
    "scores": lambda y: y,
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "sigmoid": jax.nn.sigmoid,
}


def network(shape, end="scores", seed=0):
    """Two layers, scores of this shape for an image, and what the network ends in."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    params = {
        "a": rng.normal(size=(5, HIDDEN)).astype(np.float32),
        "b": rng.normal(size=(HIDDEN, size)).astype(np.float32) * np.float32(0.7),
    }

    def apply(params, x):
        scores = jax.nn.relu(x @ params["a"]) @ params["b"]
        return ENDS[end](scores.reshape(-1, *shape))

    images = rng.normal(size=(BATCH, 5)).astype(np.float32)
    return apply, params, images


def faults_of(space):
    """Flips of all bits of some words of each site."""
    every = space.decode(np.arange(space.size))
    rng = np.random.default_rng(1)
    some = np.zeros(space.size, bool)
    for site in range(len(space.sites)):
        words = rng.choice(space.sites[site].words, 6, replace=False)
        some |= (every.site == site) & np.isin(every.index, words)
    return jfi.Faults(*(column[some] for column in every))


def naive(apply, params, images, sites, faults):
    """Outputs of every fault on all images, and golden ones, as the network returns them."""
    run = jax.jit(apply)
    found = []
    for number, index, bit, polarity in zip(*faults, strict=True):
        name = sites[number].name
        words = params[name].ravel().copy()
        words[index] = bits.faulty(words[index : index + 1], bit, polarity)[0]
        found.append(run({**params, name: words.reshape(params[name].shape)}, images))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
    return jax.tree.map(np.asarray, run(params, images)), stacked


def top(rows):
    """argmax as NumPy has it: the first of equals, and the first NaN."""
    return rows.argmax(-1)


def among(golden, faulty, k):
    """Whether the golden top-1 is among the k highest, by a sort of (value, -number)."""
    t = golden.argmax()
    values = np.where(np.isnan(faulty), np.inf, faulty)
    order = sorted(range(faulty.size), key=lambda j: (~np.isnan(faulty[j]), -values[j], j))
    return t in order[:k]


def lost_tokens(golden, faulty):
    return (top(golden) != top(faulty)).any()


def too_far(golden, faulty):
    with np.errstate(invalid="ignore"):
        return not (
            np.abs(faulty - golden) <= np.float32(0.2) + np.float32(0.1) * np.abs(golden)
        ).all()


def flipped(t):
    def of(golden, faulty):
        return ((golden > t) != (faulty > t)).any() or np.isnan(faulty).any()

    return of


# Name, shape of the scores, what they end in, and the criterion in NumPy.
CASES = {
    "top1": ((4,), "scores", lambda g, f: top(g) != top(f)),
    "top1 of probabilities": ((4,), "softmax", lambda g, f: top(g) != top(f)),
    "top1 of logs": ((4,), "log_softmax", lambda g, f: top(g) != top(f)),
    "top_k:3": ((7,), "scores", lambda g, f: not among(g, f, 3)),
    "top_k:2 of probabilities": ((7,), "softmax", lambda g, f: not among(g, f, 2)),
    "threshold": ((3,), "scores", flipped(0)),
    "threshold of chances": ((3,), "sigmoid", flipped(0.5)),
    "threshold:0.3": ((1,), "sigmoid", flipped(np.float32(0.3))),
    "threshold:-0.5": ((), "scores", flipped(np.float32(-0.5))),
    "tolerance:0.2,0.1": ((3,), "scores", too_far),
    "tolerance:absolute=0.2,relative=0.1 of probabilities": ((3,), "softmax", too_far),
    "tokens:any": ((3, 5), "scores", lost_tokens),
    "tokens:last": ((3, 5), "softmax", lambda g, f: top(g)[-1] != top(f)[-1]),
    "pixels:0.2": ((3, 4, 3), "scores", lambda g, f: (top(g) != top(f)).mean() > 0.2),
    "pixels": ((2, 2, 3), "softmax", lambda g, f: (top(g) != top(f)).any()),
}


@pytest.mark.parametrize("name", CASES)
def test_verdicts_are_those_of_a_naive_run(name):
    shape, end, critical = CASES[name]
    apply, params, images = network(shape, end)
    net = jfi.network(apply, params, images[0])
    engine = jfi.Engine(net, images, None, net.sites, criterion=name.split(" of ")[0])
    space = FaultSpace(net.sites, FAULT_MODELS["flip"])
    faults = faults_of(space)
    golden, found = naive(apply, params, images, net.sites, faults)
    right = np.array([[critical(g, f) for g, f in zip(golden, row, strict=True)] for row in found])
    # Where rounding decides, engine and naive run may differ: by a share of a pair's largest.
    rng = np.random.default_rng(0)
    size = np.abs(np.nan_to_num(found, posinf=1, neginf=1)).reshape(*right.shape, -1).max(-1)
    off = (1e-5 * np.maximum(1, size)).reshape(*right.shape, *[1] * len(shape))
    sure = np.ones_like(right)
    for _ in range(8):
        moved = (found + off * rng.choice([-1, 1], found.shape)).astype(np.float32)
        again = [[critical(g, f) for g, f in zip(golden, row, strict=True)] for row in moved]
        sure &= np.array(again) == right
    sure |= ~np.isfinite(found.reshape(*right.shape, -1)).all(-1)
    assert 0.003 < right.mean() < 0.9 and sure.mean() > 0.9
    engine.make_radii()
    for measure in ("full", "critical"):
        told = engine.run(faults, measure, keep_bits=True)
        said = np.unpackbits(told.critical_bits, axis=1, count=BATCH).astype(bool)
        assert (said == right)[sure].all(), measure
    told = engine.run(faults, "detect")
    settled = sure.all(1)
    assert ((told.critical > 0) == right.any(1))[settled].all()
    site, image = (
        np.repeat(np.arange(faults.site.size), BATCH),
        np.tile(np.arange(BATCH), right.shape[0]),
    )
    pairs = jfi.Faults(*(column[site] for column in faults))
    codes, proven = engine.critical_pairs(pairs, image)
    said = (codes & outcomes.CRITICAL) != 0
    assert (said == right.ravel())[sure.ravel()].all()
    assert not (proven & right.ravel() & sure.ravel()).any()
    # No bound is known of probabilities themselves.
    assert proven.mean() > 0.3 or (engine.by.on_outputs and end == "softmax")
    for measure in ("full", "critical"):
        checked = verify.verify(engine, jfi.Faults(*(c[::17] for c in pairs)), image[::17], measure)
        assert not checked.disagreements, checked.worst


def test_probabilities_are_not_taken_twice():
    """The bins of a network that ends in softmax are those of its scores, by SciPy."""
    apply, params, images = network((4,), "softmax")
    net = jfi.network(apply, params, images[0])
    assert net.outputs.link == "softmax"
    engine = jfi.Engine(net, images, None, net.sites)
    faults = faults_of(FaultSpace(net.sites, FAULT_MODELS["flip"]))
    golden, found = naive(apply, params, images, net.sites, faults)
    told = engine.run(faults, "full")
    at = golden.argmax(-1)
    rows = np.arange(BATCH)
    change = np.abs(found[:, rows, at] - golden[rows, at]) / golden[rows, at]
    kept = (found.argmax(-1) == at) & (found != golden).any(-1) & np.isfinite(found).all(-1)
    clear = (np.abs(change - 0.2) > 1e-4).all(1)
    wanted = (kept & (change >= 0.2)).sum(1)
    assert (told.sdc_20 == wanted)[clear].all() and wanted.sum() > 10
    # Softmax once more would call most of them small.
    twice = softmax(found, axis=-1)[:, rows, at] / softmax(golden, axis=-1)[rows, at]
    assert ((kept & (np.abs(twice - 1) >= 0.2)).sum(1) != wanted).any()


@pytest.mark.parametrize("end", ["softmax", "log_softmax", "sigmoid"])
def test_the_link_is_found_and_nothing_else_is(end):
    apply, params, images = network((4,), end)
    net = jfi.network(apply, params, images[0])
    assert net.outputs.link == end
    plain = network((4,))[0]
    for other in (
        lambda p, x: jnp.exp(plain(p, x)),
        lambda p, x: plain(p, x) / plain(p, x).sum(-1, keepdims=True),
        lambda p, x: jnp.exp(plain(p, x)) / jnp.exp(plain(p, x)).sum(-1, keepdims=True),
        lambda p, x: jax.nn.softmax(plain(p, x), axis=0),
        lambda p, x: jax.nn.softmax(plain(p, x).reshape(-1, 2, 2)).reshape(-1, 4),
        lambda p, x: jax.nn.softmax(plain(p, x)) * 2,
        lambda p, x: plain(p, x) - jax.nn.logsumexp(plain(p, x) * 2, -1, keepdims=True),
    ):
        assert jfi.network(other, params, images[0]).outputs.link == ""


def test_a_tie_is_the_first_of_equals_and_a_nan_is_above_all():
    judged = names.parse("top_k:2").judge(forms.outputs(jnp.zeros((1, 4))))
    golden = jnp.array([0.0, 3, 2, 1])
    for faulty, wanted in (
        ([3.0, 3, 3, 1], False),  # 0 and 1 are the first of three equal
        ([3.0, 3, 3.5, 1], True),
        ([0, np.nan, 9, 9], False),  # its own NaN is above all
        ([np.nan, 3, 2, 1], False),
        ([np.nan, 3, np.nan, 1], True),
    ):
        assert bool(judged.critical(golden, jnp.array(faulty))) == wanted
    judged = names.parse("threshold").judge(forms.outputs(jnp.zeros((1, 1))))
    assert not judged.critical(jnp.array([-1.0]), jnp.array([0.0]))  # 0 is not above 0
    assert judged.critical(jnp.array([-1.0]), jnp.array([np.nan]))
    judged = names.parse("tolerance:1").judge(forms.outputs(jnp.zeros((1, 1))))
    assert not judged.critical(jnp.array([0.0]), jnp.array([1.0]))
    assert judged.critical(jnp.array([0.0]), jnp.array([np.nan]))


def test_accuracy_is_of_the_whole_workload():
    """Counted by hand: images made right stand against those made wrong."""
    apply, params, images = network((4,), seed=3)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 5)).astype(np.float32)
    net = jfi.network(apply, params, images[0])
    faults = faults_of(FaultSpace(net.sites, FAULT_MODELS["flip"]))
    golden, found = naive(apply, params, images, net.sites, faults)
    labels = np.where(rng.random(40) < 0.7, golden.argmax(-1), rng.integers(0, 4, 40))
    lost = (golden.argmax(-1) == labels).sum() - (found.argmax(-1) == labels).sum(1)
    changed = (found.argmax(-1) != golden.argmax(-1)).sum(1)
    wanted = lost * 100 / 40 > 10
    assert 0.02 < wanted.mean() < 0.95 and (changed[~wanted] > 0).any()
    engine = jfi.Engine(net, images, labels, net.sites, criterion="accuracy_drop:10")
    for measure in ("full", "critical"):
        told = engine.run(faults, measure)
        assert ((told.critical > 0) == wanted).mean() > 0.995
        assert (told.critical == np.where(wanted, changed, 0)).mean() > 0.99
    with pytest.raises(InputError, match="measure 'detect' ends at the first image"):
        engine.run(faults, "detect")


def both_wrong(golden, faulty):
    """A criterion of two outputs together."""
    (ga, gb), (fa, fb) = ((x["kind"], x["size"]) for x in (golden, faulty))
    return (ga.argmax() != fa.argmax()) & ~(jnp.abs(fb - gb).max() < 0.05)


def two_heads():
    rng = np.random.default_rng(5)
    params = {
        "a": rng.normal(size=(5, HIDDEN)), "kind": rng.normal(size=(HIDDEN, 4)),
        "size": rng.normal(size=(HIDDEN, 2)),
    }  # fmt: skip
    params = {name: value.astype(np.float32) for name, value in params.items()}

    def apply(params, x):
        y = jax.nn.relu(x @ params["a"])
        return {"kind": y @ params["kind"], "size": y @ params["size"]}

    return apply, params, rng.normal(size=(BATCH, 5)).astype(np.float32)


def judged(engine, faults):
    told = engine.run(faults, "critical", keep_bits=True)
    return np.unpackbits(told.critical_bits, axis=1, count=BATCH).astype(bool)


def test_a_criterion_of_ones_own_and_heads_by_name():
    apply, params, images = two_heads()
    net = jfi.network(apply, params, images[0])
    assert [array.name for array in net.outputs.arrays] == ["kind", "size"]
    faults = faults_of(FaultSpace(net.sites, FAULT_MODELS["flip"]))
    golden, found = naive(apply, params, images, net.sites, faults)
    kind = found["kind"].argmax(-1) != golden["kind"].argmax(-1)
    with np.errstate(invalid="ignore"):
        size = ~(np.abs(found["size"] - golden["size"]).max(-1) < 0.05)
        far = ~(np.abs(found["size"] - golden["size"]) <= 0.05).all(-1)
    ours = judged(jfi.Engine(net, images, None, net.sites, criterion=own(both_wrong)), faults)
    assert (ours == (kind & size)).mean() > 0.999 and ours.any()
    with pytest.raises(InputError, match=r"float32.B, 4. as kind.*say what is critical"):
        jfi.Engine(net, images, None, net.sites)
    alone = jfi.network(apply, params, images[0], output="kind")
    sites = alone.sites
    own_faults = faults_of(FaultSpace(sites, FAULT_MODELS["flip"]))
    golden, found = naive(apply, params, images, sites, own_faults)
    wanted = found["kind"].argmax(-1) != golden["kind"].argmax(-1)
    assert (judged(jfi.Engine(alone, images, None, sites), own_faults) == wanted).mean() > 0.999
    with pytest.raises(InputError, match=r"output 'colour' is none of .*: kind, size"):
        jfi.network(apply, params, images[0], output="colour")
    every = judged(jfi.Engine(net, images, None, net.sites, criterion="tolerance:0.05"), faults)
    assert (every >= far).mean() > 0.999 and every.any()


def test_constraints_of_ones_own_are_proven():
    """Of a linear rule, what is certified is never critical, and much is."""
    apply, params, images = network((3,))
    weights = jnp.array([1.0, -2.0, 0.5])

    def critical(golden, faulty):
        return ~(jnp.abs(weights @ (faulty - golden)) < 0.3)

    def constraints(golden):
        return jnp.stack([weights, -weights]), jnp.full(2, 0.3)

    net = jfi.network(apply, params, images[0])
    engine = jfi.Engine(net, images, None, net.sites, criterion=own(critical, constraints))
    faults = faults_of(FaultSpace(net.sites, FAULT_MODELS["flip"]))
    golden, found = naive(apply, params, images, net.sites, faults)
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = ~(np.abs((found - golden) @ np.asarray(weights)) < 0.3)
    row, image = np.nonzero(np.ones_like(wanted))
    codes, proven = engine.critical_pairs(jfi.Faults(*(c[row] for c in faults)), image)
    assert proven.mean() > 0.3 and not wanted[row, image][proven].any()
    assert (((codes & outcomes.CRITICAL) != 0) == wanted[row, image]).mean() > 0.999


def test_labels_of_the_last_token_may_be_those_of_all():
    apply, params, images = network((3, 5))
    net = jfi.network(apply, params, images[0])
    labels = np.asarray(apply(params, images)).argmax(-1)
    labels[:2, -1] = (labels[:2, -1] + 1) % 5
    labels[3, 0] = (labels[3, 0] + 1) % 5
    for given in (labels, labels[:, -1]):
        engine = jfi.Engine(net, images, given, net.sites, criterion="tokens:last")
        assert engine.accuracy == 4 / 6 and engine.labels.shape == (6,)
    assert jfi.Engine(net, images, labels, net.sites, criterion="tokens").accuracy == 3 / 6
    with pytest.raises(InputError, match=r"labels have shape .6, 2."):
        jfi.Engine(net, images, labels[:, :2], net.sites, criterion="tokens:last")


def test_bounds_of_many_outputs_take_little_memory():
    """Affine in a few features, as the end of a decoder: rows of 5,000 scores, some at a time."""
    features, shape = 16, (50, 50, 2)
    rng = np.random.default_rng(0)
    params = {
        "a": rng.normal(size=(5, features)), "b": rng.normal(size=(features, int(np.prod(shape))))
    }  # fmt: skip
    params = {name: value.astype(np.float32) for name, value in params.items()}

    def apply(params, x):
        return (jax.nn.relu(x @ params["a"]) @ params["b"]).reshape(-1, *shape)

    images = rng.normal(size=(2, 5)).astype(np.float32)
    net = jfi.network(apply, params, images[0])
    engine = jfi.Engine(net, images, None, net.sites, criterion="pixels:0.05", loop=False)
    scores = section(net.program, certify.features(net.program))
    by = engine.by.constraints

    def weights(images):
        env = run(net.program, net.leaves, images)
        return certify._weights(scores, env, jnp.float32(1e-3), by)

    used = jax.jit(weights).lower(images[:1]).compile().memory_analysis().temp_size_in_bytes
    assert used < 64 << 20  # the identity of all scores alone is 100 MB
    cost, certain = weights(images[:1])
    found = by(engine.golden.logits[0])
    index, weight, slack = (np.asarray(x, np.float64) for x in found)
    moved = weight[:, :1] * params["b"].T[index[:, 0].astype(int)]
    moved += weight[:, 1:] * params["b"].T[index[:, 1].astype(int)]
    left = np.maximum(slack - 1e-3, 1e-30)
    kept = slack > 1e-3
    wanted = (np.abs(moved)[kept] / left[kept, None]).max(0)
    np.testing.assert_allclose(np.ravel(cost), wanted, rtol=1e-3)
    assert bool(certain) == kept.all()


def test_labels_of_many_kinds_and_accuracy():
    apply, params, images = network((3,), "sigmoid")
    net = jfi.network(apply, params, images[0])
    golden = np.asarray(apply(params, images))
    labels = (golden > 0.5).astype(int)
    labels[0, 1] ^= 1
    engine = jfi.Engine(net, images, labels, net.sites, criterion="threshold")
    assert engine.accuracy == 5 / 6
    with pytest.raises(
        InputError, match=r"labels have shape .6,. and dtype int64; .6, 3. integers"
    ):
        jfi.Engine(net, images, np.zeros(6, int), net.sites, criterion="threshold")
    one, params, images = network((1,), "sigmoid")
    net = jfi.network(one, params, images[0])
    labels = (np.asarray(one(params, images))[:, 0] > 0.5).astype(int)
    engine = jfi.Engine(net, images, labels, net.sites)  # labels of 0 and 1 say what is meant
    assert engine.criterion.text == "threshold" and engine.accuracy == 1
    with pytest.raises(InputError, match=r"returns float32.B, 1.: say what is critical"):
        jfi.Engine(net, images, None, net.sites)


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [("top1", (4,), True), ("tokens:any", (3, 5), True), ("top_k:2", (4,), False),
     ("pixels:0.2", (3, 4, 3), False), ("tolerance:0.2", (3,), False)],
)  # fmt: skip
def test_what_is_correct_is_told_where_it_is_known(name, shape, told):
    """A certificate of some criteria lets the answer change: `critical` says nothing of it then."""
    apply, params, images = network(shape)
    net = jfi.network(apply, params, images[0])
    faults = faults_of(FaultSpace(net.sites, FAULT_MODELS["flip"]))
    golden, found = naive(apply, params, images, net.sites, faults)
    if name.startswith("tolerance"):
        labels = golden + np.float32(0.15)
        right = (np.abs(found - labels) <= np.float32(0.2)).all(-1)
    elif name == "top_k:2":
        labels = golden.argsort(-1)[:, -2]
        right = (labels[:, None] == found.argsort(-1)[..., -2:]).any(-1)
    else:
        labels = golden.argmax(-1)
        right = (found.argmax(-1) == labels).reshape(*found.shape[:2], -1).all(-1)
    sites = net.sites
    engine = jfi.Engine(net, images, labels, sites, criterion=name, loop=False)
    assert engine.accuracy == 1
    exact = np.isfinite(found.reshape(*right.shape, -1)).all((1, 2))
    assert (engine.run(faults, "full").correct == right.sum(1))[exact].mean() > 0.99
    engine.make_radii()
    quick = engine.run(faults, "critical")
    assert quick.certified.sum() > 0 and (quick.correct is not None) == told
    if told:
        assert (quick.correct == right.sum(1))[exact].mean() > 0.99
    # Without labels a criterion that has no answers knows of none that are correct.
    bare = jfi.Engine(net, images, None, sites, criterion=name)
    assert (bare.run(faults, "full").correct is None) == name.startswith("tolerance")


def test_accuracy_is_estimated_where_it_is_told(tmp_path):
    """A certificate of top_k says nothing of the label's own rank."""
    apply, params, images = network((5,))
    labels = np.asarray(apply(params, images)).argmax(-1)
    study = jfi.study((apply, params), images, labels, criterion="top_k:2", name="net")
    asked = {"sampler": "network_wise", "error_margin": 0.1, "progress": False, "verify": 0}
    with pytest.raises(InputError, match="with criterion top_k:2 the measure 'critical' does not"):
        study.run(estimate="accuracy", workdir=tmp_path / "a", **asked)
    told = study.run(estimate="accuracy", measure="full", workdir=tmp_path / "b", **asked)
    assert 0.5 < told.estimates().iloc[0].estimate <= 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("top2", "criterion 'top2' is unknown; choose from top1, top_k"),
        ("top_k", "criterion 'top_k' lacks an argument: k"),
        ("top_k:0", "k is int 0; it must be a whole number from 1 on"),
        ("top_k:2.5", "k is float 2.5"),
        ("tolerance:-1", "absolute is int -1; it must be from 0 on"),
        ("tolerance:much", "absolute is str 'much'"),
        ("tokens:first", "position is str 'first'; it must be 'any' or 'last'"),
        ("pixels:1", r"share is int 1; it must be in \[0, 1\)"),
        ("detections:iou=0", r"iou is int 0; it must be in \(0, 1\]"),
        ("detections:size=1", "'size=1' is not understood; detections takes iou, score, boxes"),
        ("threshold:nan", "t is float nan; it must be a finite number"),
        ("accuracy_drop", "lacks an argument: points"),
    ],
)
def test_what_is_no_criterion_is_said(text, said):
    with pytest.raises(InputError, match=said):
        names.parse(text)


@pytest.mark.parametrize(
    ("text", "shape", "said"),
    [
        ("top_k:4", (4,), "there are 4 classes; k must be below"),
        ("top1", (3, 4), r"output it is float32\[B, 3, 4\]; scores \[B, C\] of two classes"),
        ("tokens", (4,), r"scores \[B, T, C\]"),
        ("pixels", (2, 4), r"scores \[B, H, W, C\]"),
        ("detections", (4,), r"the network returns it \[4\] for an image; boxes \[D, 4\]"),
    ],
)
def test_a_criterion_that_does_not_fit_is_refused(text, shape, said):
    with pytest.raises(InputError, match=said):
        names.parse(text).judge(forms.outputs(jnp.zeros((1, *shape))))
