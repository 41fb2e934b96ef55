"""Which leaves are weights of a product: by hand, by names in frameworks; and judged rightly."""

import math

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jfi
from jfi.engine.inputs import MEASURES
from jfi.engine.verify import verify

FEATURES, HIDDEN, CLASSES, IMAGES = 3, 4, 3, 5


def joined(p, x):
    wide = x @ jnp.concatenate([p["a"], p["b"]], axis=1) + jnp.concatenate([p["bias"], p["bias"]])
    return wide[:, :HIDDEN] * wide[:, HIDDEN:] @ p["out"]


def joined_with_its_bias(p, x):
    ones = jnp.ones((len(x), 1))
    h = jnp.concatenate([x, ones], axis=1) @ jnp.concatenate([p["a"], p["bias"][None]])
    return jnp.tanh(h) @ p["out"]


def stacked_in_a_list(p, x):
    both = jnp.stack([p["a"], p["b"]])
    return jnp.tanh(jnp.einsum("bf,kfh->bh", x, both)) @ p["out"]


def rows_of_neurons(p, x):
    return jnp.tanh(x @ jnp.stack([p["u"], p["v"]], axis=1)) @ p["out"][:2]


def sliced_out_of_one(p, x):
    a, b = p["many"][0], p["many"][1]
    return jnp.tanh(jnp.tanh(x @ a[:FEATURES]) @ b) @ p["out"]


def split_apart(p, x):
    a, b = jnp.split(p["wide"], 2, axis=1)
    return jnp.tanh(x @ a) * (x @ b) @ p["out"]


def cut_at_a_place(p, x):
    a = lax.dynamic_slice(p["many"], (1, 0, 0), (1, FEATURES, HIDDEN))[0]
    return jnp.tanh(x @ a) @ p["out"]


def padded(p, x):
    wide = jnp.pad(x, ((0, 0), (1, 1)))
    return jnp.tanh(wide @ jnp.pad(p["a"], ((1, 1), (0, 0)))) @ p["out"]


def written_in_blocks(p, x):
    wide = jnp.zeros((2 * FEATURES, 2 * HIDDEN)).at[:FEATURES, :HIDDEN].set(p["a"])
    wide = lax.dynamic_update_slice(wide, p["b"], (FEATURES, HIDDEN))
    h = jnp.tanh(jnp.concatenate([x, -x], axis=1) @ wide)
    return h[:, :HIDDEN] * h[:, HIDDEN:] @ p["out"]


def permuted(p, x):
    return jnp.tanh(x @ p["a"][:, np.array([2, 0, 3, 1])]) @ p["out"].T.T[::-1]


def all_in_one_vector(p, x):
    flat, n = p["flat"], FEATURES * HIDDEN
    h = jnp.tanh(x @ flat[:n].reshape(FEATURES, HIDDEN) + flat[n : n + HIDDEN])
    return h @ p["out"]


def scaled(p, x):
    h = jnp.tanh(x @ (p["a"] * p["mask"] * p["bias"]))
    return (h * p["scale"]) @ (p["out"] / jnp.linalg.norm(p["out"]) * p["gain"])


def scaled_by_einsum(p, x):
    return jnp.einsum("bh,h->bh", jnp.tanh(x @ p["a"]), p["scale"]) @ p["out"]


def looked_up(p, x):
    token = jnp.argmax(x, axis=1)
    h = p["table"][token] + p["place"][jnp.zeros(len(x), int)]
    return jnp.tanh(h * p["scale"]) @ p["out"]


def tied(p, x):
    """The table that is looked up gives the logits too."""
    return jnp.tanh(p["table"][jnp.argmax(x, axis=1)]) @ p["table"].T


def one_of_many(p, x):
    """An expert that the image chooses."""

    def one(x):
        return jnp.tanh(x @ p["many"][jnp.argmax(x[:2])][:FEATURES])

    return jax.vmap(one)(x) @ p["out"]


def repeated(p, x):
    twice = jnp.repeat(p["a"], 2, axis=1)
    return jnp.tanh(x @ twice) @ jnp.concatenate([p["out"], p["out"]])


def layers_in_a_loop(p, x):
    def body(h, layer):
        w, b = layer
        return jnp.tanh(h @ w + b), None

    h, _ = lax.scan(body, x @ p["a"], (p["many"], p["biases"]))
    return h @ p["out"]


def layers_in_a_loop_backwards(p, x):
    """The stack on another axis, two kernels a step joined, in reverse."""

    def body(h, w):
        return jnp.tanh(jnp.concatenate([h, h], axis=1) @ jnp.concatenate([w, w * 0.5])), h

    h, hs = lax.scan(body, x @ p["a"], jnp.moveaxis(p["last"], 2, 0), reverse=True)
    return (h + hs.sum(axis=0)) @ p["out"]


def a_loop_in_a_loop(p, x):
    def inner(h, w):
        return jnp.tanh(h @ w), None

    def outer(h, ws):
        return lax.scan(inner, h, ws)[0], None

    h, _ = lax.scan(outer, x @ p["a"], p["deep"])
    return h @ p["out"]


def counted(p, x):
    """Layers by number: the stack is carried as it is, or a constant, of loops of both kinds."""

    def carried(k, state):
        h, ws = state
        return jnp.tanh(h @ ws[k]), ws

    h, _ = lax.fori_loop(0, 2, carried, (x @ p["a"], p["many"]))
    done = lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["b2"])), (0, h)
    )
    return done[1] @ p["out"]


def branches(p, x):
    """A branch that the image chooses."""

    def one(x):
        h = x @ p["a"]
        return lax.cond(h.sum() > 0, lambda h: h @ p["b2"], lambda h: jnp.tanh(h @ p["c2"]), h)

    return jnp.stack([one(row) for row in x]) @ p["out"]


def recurrent(p, x):
    """A cell whose kernels are joined at every step; `start` is its state, no weight."""

    def body(h, i):
        both = jnp.concatenate([p["a"], p["b2"]])
        return jnp.tanh(jnp.concatenate([i, h], axis=1) @ both + p["bias"]), None

    start = jnp.broadcast_to(p["start"], (len(x), HIDDEN))
    return lax.scan(body, start, jnp.stack([x, -x, x * 0.5]))[0] @ p["out"]


def loops_make_weights(p, x):
    """Kernels made anew in a loop of their own, used after it."""
    _, ws = lax.scan(lambda c, w: (c, w - w.mean()), 0.0, p["many"])
    return jnp.tanh(jnp.tanh(x @ p["a"] @ ws[0]) @ ws[1]) @ p["out"]


def state_before_the_loop(p, x):
    """A learned state, and a bias, meet kernels before any value of the image."""
    h = jnp.tanh(p["start"][None] @ p["b2"] + p["bias"])
    return jnp.tanh(h @ p["c2"] + x @ p["a"]) @ p["out"]


def low_rank(p, x):
    return jnp.tanh(x @ (p["a"] + p["b"] @ p["b2"])) @ p["out"]


def rank_one(p, x):
    return jnp.tanh(x @ (p["tall"] @ p["flat2"])) @ p["out"]


def scaled_row(p, x):
    """The kernel of one input, as long as its scale."""
    return jnp.tanh(x[:, :1] @ (p["flat2"] * p["scale"])) @ p["out"]


def tables_of_several_rows(p, x):
    """Looked up as matrices, but values: they meet kernels, not values of the image."""
    rows = p["many"][jnp.argmax(x[:, :2], axis=1)].mean(axis=1)
    return jnp.tanh(rows @ p["b2"]) @ p["out"]


def tables_by_kernels(p, x):
    return jnp.tanh(p["many"][jnp.argmax(x[:, :2], axis=1)] @ p["b2"]).sum(axis=1) @ p["out"]


SHAPES = {
    "a": (FEATURES, HIDDEN), "b": (FEATURES, HIDDEN), "mask": (FEATURES, HIDDEN),
    "b2": (HIDDEN, HIDDEN), "c2": (HIDDEN, HIDDEN), "bias": (HIDDEN,), "scale": (HIDDEN,),
    "gain": (), "u": (FEATURES,), "v": (FEATURES,), "many": (2, HIDDEN, HIDDEN),
    "biases": (2, HIDDEN), "last": (HIDDEN, HIDDEN, 2), "deep": (2, 2, HIDDEN, HIDDEN),
    "wide": (FEATURES, 2 * HIDDEN), "flat": (FEATURES * HIDDEN + HIDDEN,), "start": (HIDDEN,),
    "tall": (FEATURES, 1), "flat2": (1, HIDDEN),
    "table": (FEATURES, HIDDEN), "place": (2, HIDDEN), "out": (HIDDEN, CLASSES),
}  # fmt: skip

# Of each network the leaves that are weights, and those that are not.
WEIGHTS = {
    joined: ("a b out", "bias"),
    joined_with_its_bias: ("a out", "bias"),
    stacked_in_a_list: ("a b out", ""),
    rows_of_neurons: ("u v out", ""),
    sliced_out_of_one: ("many out", ""),
    split_apart: ("wide out", ""),
    cut_at_a_place: ("many out", ""),
    padded: ("a out", ""),
    written_in_blocks: ("a b out", ""),
    permuted: ("a out", ""),
    all_in_one_vector: ("flat out", ""),
    scaled: ("a mask out", "bias scale gain"),
    scaled_by_einsum: ("a out", "scale"),
    looked_up: ("out", "table place scale"),
    tied: ("table", ""),
    one_of_many: ("many out", ""),
    repeated: ("a out", ""),
    layers_in_a_loop: ("a many out", "biases"),
    layers_in_a_loop_backwards: ("a last out", ""),
    a_loop_in_a_loop: ("a deep out", ""),
    counted: ("a many b2 out", ""),
    branches: ("a b2 c2 out", ""),
    recurrent: ("a b2 out", "bias start"),
    loops_make_weights: ("a many out", ""),
    state_before_the_loop: ("a b2 c2 out", "start bias"),
    low_rank: ("a b b2 out", ""),
    rank_one: ("tall flat2 out", ""),
    scaled_row: ("flat2 out", "scale"),
    tables_of_several_rows: ("b2 out", "many"),
    tables_by_kernels: ("b2 out", "many"),
}


def parameters(names):
    draw = np.random.default_rng(0)
    drawn = {name: draw.normal(size=shape).astype("f4") for name, shape in SHAPES.items()}
    return {name: drawn[name] for name in names}


def images(*shape):
    return np.random.default_rng(1).normal(size=(IMAGES, *shape)).astype("f4")


def read(net):
    weights, others = (names.split() for names in WEIGHTS[net])
    return jfi.network(net, parameters([*weights, *others]), images(FEATURES)[0])


@pytest.mark.parametrize("net", WEIGHTS, ids=lambda net: net.__name__)
def test_the_kernels_are_what_enters_a_product_as_its_weight(net):
    network = read(net)
    weights, others = (set(names.split()) for names in WEIGHTS[net])
    assert network.kernels == weights
    assert {site.name for site in network.sites} == weights | others
    assert {site.name for site in jfi.select(network)} == weights


def agrees(network, x, sites, step, loop):
    """Flips of every `step`-th bit, each on one image, as naive runs have them; in all measures."""
    runner = jfi.Engine(network, x, np.zeros(len(x), int), sites, loop=loop)
    space = jfi.FaultSpace(runner.sites, (2,))
    faults = space.decode(np.arange(0, space.size, step))
    image = np.arange(faults.site.size) % len(x)
    for measure in ("full", "critical"):
        found = verify(runner, faults, image, measure)
        assert found.disagreements == 0, found.worst
        assert found.agreements > 0.8 * found.pairs
    critical = {measure: runner.run(faults, measure).first_critical >= 0 for measure in MEASURES}
    assert all((found == critical["critical"]).all() for found in critical.values())
    assert not critical["critical"].all()
    assert (runner.run(faults, "full").masked < len(x)).any()


# An odd number of bits apart: all bits of a word take part. Side by side, and whole networks.
# One in three in the usual run, all with -m "slow or not slow".
@pytest.mark.parametrize(
    "net",
    [
        pytest.param(net, id=net.__name__, marks=pytest.mark.slow if k % 3 else [])
        for k, net in enumerate(WEIGHTS)
    ],
)
def test_faults_in_weights_laid_out_anew_are_judged_as_naive_runs_have_them(net):
    network = read(net)
    laid_out = [s for s in jfi.select(network) if s.name != "out"] or network.sites
    agrees(network, images(FEATURES), laid_out, step=11, loop=False)


@pytest.mark.parametrize("net", [layers_in_a_loop, recurrent], ids=lambda net: net.__name__)
def test_faults_in_weights_are_judged_alike_one_by_one(net):
    network = read(net)
    agrees(network, images(FEATURES), network.sites, step=11, loop=True)


class Cells(linen.Module):
    cell: type

    @linen.compact
    def __call__(self, x):
        return linen.Dense(CLASSES)(linen.RNN(self.cell(HIDDEN))(x)[:, -1])


class Attention(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Embed(5, 4)(jnp.arange(x.shape[1])) + linen.Dense(4)(x)
        x = x + linen.MultiHeadDotProductAttention(2)(linen.LayerNorm()(x))
        return linen.Dense(CLASSES)(x.mean(axis=1))


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + linen.Dense(HIDDEN)(linen.relu(linen.LayerNorm()(x))), None


class Deep(linen.Module):
    """Blocks stacked on an axis of their parameters."""

    axis: int = 0

    @linen.compact
    def __call__(self, x):
        many = linen.scan(
            Block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        return linen.Dense(CLASSES)(many()(linen.Dense(HIDDEN)(x), None)[0])


class Tokens(linen.Module):
    """The table that words are looked up in gives the logits too."""

    @linen.compact
    def __call__(self, x):
        table = linen.Embed(6, 4)
        return table.attend(linen.LayerNorm()(table(x.astype(int)).sum(axis=1)))


def of_linen(module, *shape):
    variables = module.init(jax.random.key(0), jnp.ones((1, *shape)))
    return (module, variables), shape


class NnxDeep(nnx.Module):
    """Layers made by `vmap`, run by `scan`, then attention."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,))
        def make(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.layers = make(rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return nnx.tanh(layer(x))

        x = self.attention(self.norm(run(x, self.layers)))
        return self.head(x.mean(axis=1))


class EqxNet(eqx.Module):
    """Fields beside the weights: numbers, functions and None are leaves."""

    attention: eqx.nn.MultiheadAttention
    cell: eqx.nn.LSTMCell
    mlp: eqx.nn.MLP
    gain: float

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=one)
        self.cell = eqx.nn.LSTMCell(4, HIDDEN, key=two)
        self.mlp = eqx.nn.MLP(HIDDEN, CLASSES, 5, 1, key=three)
        self.gain = 0.5

    def __call__(self, x):
        x = self.attention(x, x, x) * self.gain
        state = jnp.zeros(HIDDEN), jnp.zeros(HIDDEN)
        return self.mlp(lax.scan(lambda s, i: (self.cell(i, s), None), state, x)[0][0])


def haiku_net(x):
    core = hk.LSTM(HIDDEN)
    outs, _ = hk.dynamic_unroll(core, x, core.initial_state(len(x)), time_major=False)
    x = hk.MultiHeadAttention(2, 2, w_init=hk.initializers.RandomNormal())(outs, outs, outs)
    stack = hk.experimental.layer_stack(2)(lambda h: jnp.tanh(hk.Linear(4)(h)))
    return hk.Linear(CLASSES)(stack(x.mean(axis=1)))


def of_haiku():
    found = hk.transform(haiku_net)
    return (found, found.init(jax.random.key(0), jnp.ones((1, 3, 4)))), (3, 4)


# A model and its image; how a weight's name ends; sites to judge.
MODELS = {
    "OptimizedLSTMCell": (
        lambda: of_linen(Cells(linen.OptimizedLSTMCell), 3, 2),
        "kernel",
        ".*(hi|io)/kernel",
    ),
    "LSTMCell": (lambda: of_linen(Cells(linen.LSTMCell), 3, 2), "kernel", ".*(hi|io)/kernel"),
    "GRUCell": (lambda: of_linen(Cells(linen.GRUCell), 3, 2), "kernel", ".*(hn|iz)/kernel"),
    "MultiHeadDotProductAttention": (
        lambda: of_linen(Attention(), 3, 2),
        "kernel",
        ".*(query|out)/kernel",
    ),
    "nn.scan": (lambda: of_linen(Deep(), 2), "kernel", ".*Scan.*kernel"),
    "nn.scan on the last axis": (lambda: of_linen(Deep(1), 2), "kernel", ".*Scan.*kernel"),
    "tied embedding": (lambda: of_linen(Tokens(), 3), "embedding", ".*embedding"),
    "nnx.scan": (lambda: ((NnxDeep(nnx.Rngs(0)),), (3, 4)), "kernel", "layers/kernel"),
    "Equinox": (
        lambda: ((EqxNet(jax.random.key(0)),), (3, 4)),
        "weight weight_ih weight_hh",
        ".*(query_proj/weight|_hh)",
    ),
    "Haiku": (of_haiku, "w", ".*(stack.*|query|lstm/linear)/w"),
}


def adopted(name):
    model, shape = MODELS[name][0]()
    x = images(*shape)
    if name == "tied embedding":
        x = np.abs(x * 2).astype("i4") % 6
    return jfi.adopt(model if len(model) > 1 else model[0], x), x


def stored(network):
    """By path, the words of every array of a model's own tree."""
    found = jax.tree.leaves_with_path(network.params)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): x.size for p, x in found}
    return {name.removesuffix("/value"): words for name, words in named.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_population_is_every_word_of_every_weight_of_a_framework(name):
    network, _ = adopted(name)
    ends = MODELS[name][1].split()
    words = [n for path, n in stored(network).items() if path.split("/")[-1] in ends]
    assert words and sum(words) < sum(stored(network).values())
    plan = jfi.plan(network, "exhaustive")
    assert plan.space.size == 2 * 32 * sum(words)
    assert {site.name.split("/")[-1] for site in plan.space.sites} <= set(ends)


def test_the_population_of_an_lstm_by_the_formula():
    """Four gates, each with a kernel for the input and one for the state; and the head."""
    network, _ = adopted("OptimizedLSTMCell")
    assert len(network.kernels) == 9
    words = sum(math.prod(site.shape) for site in jfi.select(network))
    assert words == 4 * (2 * HIDDEN + HIDDEN * HIDDEN) + HIDDEN * CLASSES


# The others take half a minute each: by name.
USUAL = ("OptimizedLSTMCell", "tied embedding")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow) for name in MODELS],
)
def test_faults_in_weights_of_a_framework_are_judged_as_naive_runs_have_them(name):
    network, x = adopted(name)
    chosen = jfi.select(network, MODELS[name][2])
    assert {site.name for site in chosen} <= network.kernels
    agrees(network, x, chosen, step=17, loop=False)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_campaign_on_layers_run_in_a_loop_is_verified(measure, tmp_path):
    """Pairs of the default sites, against the record and naive runs, which would raise."""
    (module, variables), shape = of_linen(Deep(), 2)
    study = jfi.study((module, variables), images(*shape))
    result = study.run(
        "network_wise", error_margin=0.1, measure=measure, fault_model="flip", verify=150,
        workdir=tmp_path, progress=False,
    )  # fmt: skip
    assert result.summary["verify"]["pairs"] == 150
    assert {e["unit"] for e in result.summary["estimates"]} >= {"ScanBlock_0/Dense_0/kernel"}
