"""Spiking neurons and networks: plain loops over time and snnTorch as the reference."""

import importlib.util
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import traverse_util

import nets
from nets import surrogate
from nets.spiking import DenseFeedback, Leaky, SpikingDense, Synaptic
from nets.weights import from_torch

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
CHECKPOINTS = SHARED / "weights" / "spikingjet"
NMNIST = SHARED / "data" / "nmnist" / "NMNISTsmall"
GESTURES = SHARED / "data" / "dvs128gesture"
RELEASED = {"snn_nmnist": "NMNIST.th", "snn_shd": "SHD.th", "snn_dvs128": "CSNN.th"}

needs_data = pytest.mark.skipif(
    not (CHECKPOINTS.is_dir() and NMNIST.is_dir() and GESTURES.is_dir()),
    reason="no ../shared with SpikingJET's weights and event files",
)
needs_snntorch = pytest.mark.skipif(
    importlib.util.find_spec("snntorch") is None, reason="snnTorch is not installed"
)


def numpy_neurons(current, beta, threshold, alpha=None, reset="subtract", feedback=None):
    """Potentials and spikes [T, B, n] of the equations, one step and one line at a time."""
    potential, synaptic, spike = (np.zeros_like(current[0]) for _ in range(3))
    found = []
    for now in current:
        resetting = (potential > threshold).astype(np.float32)
        now = now if feedback is None else now + feedback(spike)
        if alpha is not None:
            now = synaptic = np.clip(alpha, 0, 1) * synaptic + now
        elif reset == "zero":
            potential = (1 - resetting) * potential
        potential = np.clip(beta, 0, 1) * potential + now
        if reset == "zero" and alpha is not None:
            potential = potential - potential * resetting
        if reset == "subtract":
            potential = potential - resetting * threshold
        spike = (potential > threshold).astype(np.float32)
        found.append((potential, spike))
    return tuple(np.stack(values) for values in zip(*found, strict=True))


class PlainNeurons(torch.nn.Module):
    """snn.Leaky or, with alpha, snn.Synaptic, with reset by subtraction."""

    def __init__(self, shape, synaptic=False):
        super().__init__()
        names = ("beta", "threshold", "alpha")[: 3 if synaptic else 2]
        for name in names:
            self.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))
        self.states = len(names) - 1

    def forward(self, current, *state):
        state = state or (torch.zeros_like(current),) * self.states
        potential = state[-1]
        reset = (potential > self.threshold).float()
        if self.states == 2:
            current = self.alpha.clamp(0, 1) * state[0] + current
        potential = self.beta.clamp(0, 1) * potential + current - reset * self.threshold
        spike = (potential > self.threshold).float()
        return (spike, current, potential) if self.states == 2 else (spike, potential)


def snntorch_neurons(shape, synaptic=False):
    import snntorch

    learnt = {"learn_beta": True, "learn_threshold": True, "threshold": torch.ones(shape)}
    if synaptic:
        ones = {"alpha": torch.ones(shape), "beta": torch.ones(shape)}
        return snntorch.Synaptic(learn_alpha=True, **ones, **learnt)
    return snntorch.Leaky(beta=torch.ones(shape), **learnt)


NEURONS = [
    pytest.param(PlainNeurons, id="loop"),
    pytest.param(snntorch_neurons, id="snntorch", marks=needs_snntorch),
]


class TorchDense(torch.nn.Module):
    """Dense layers of leaky neurons, stepped as SpikingJET does; spikes of the output layer."""

    def __init__(self, neurons, units=(578, 20, 10)):
        super().__init__()
        self.layers = len(units) - 1
        for i in range(1, self.layers + 1):
            setattr(self, f"fc{i}", torch.nn.Linear(units[i - 1], units[i]))
            setattr(self, f"lif{i}", neurons((units[i],)))

    def forward(self, x):
        states, out = [()] * self.layers, []
        for now in x.flatten(2).unbind(1):
            for i in range(self.layers):
                current = getattr(self, f"fc{i + 1}")(now)
                now, *states[i] = getattr(self, f"lif{i + 1}")(current, *states[i])
            out.append(now)
        return torch.stack(out).sum(0)


class TorchRecurrent(torch.nn.Module):
    """700-200-20 of synaptic neurons; largest potential of the output layer."""

    def __init__(self, neurons):
        super().__init__()
        self.fc1, self.fb1 = torch.nn.Linear(700, 200), torch.nn.Linear(200, 200)
        self.fc2 = torch.nn.Linear(200, 20)
        self.lif1, self.lif2 = neurons((200,), synaptic=True), neurons((20,), synaptic=True)

    def forward(self, x):
        hidden, last, spike, out = (), (), torch.zeros(200), []
        for now in x.unbind(1):
            spike, *hidden = self.lif1(self.fc1(now) + self.fb1(spike), *hidden)
            _, *last = self.lif2(self.fc2(spike), *last)
            out.append(last[-1])
        return torch.stack(out).max(0).values


class TorchConv(torch.nn.Module):
    """12C5-32C5-800-11, pooled before the neurons; spikes of the output layer."""

    def __init__(self, neurons):
        super().__init__()
        self.conv1, self.conv2 = torch.nn.Conv2d(2, 12, 5), torch.nn.Conv2d(12, 32, 5)
        self.fc1 = torch.nn.Linear(800, 11)
        self.lif1, self.lif2, self.lif3 = neurons((14,)), neurons((5,)), neurons((11,))

    def forward(self, x):
        one, two, three, out = (), (), (), []
        for now in x.unbind(1):
            now, *one = self.lif1(F.max_pool2d(self.conv1(now), 2), *one)
            now, *two = self.lif2(F.max_pool2d(self.conv2(now), 2), *two)
            now, *three = self.lif3(self.fc1(now.flatten(1)), *three)
            out.append(now)
        return torch.stack(out).sum(0)


TORCH = {"snn_nmnist": TorchDense, "snn_shd": TorchRecurrent, "snn_dvs128": TorchConv}


def torch_logits(model, x: np.ndarray) -> np.ndarray:
    """Of frames [B, T, H, W, P] or trains [B, T, channels]."""
    axes = (0, 1, 4, 2, 3) if x.ndim == 5 else (0, 1, 2)
    with torch.no_grad():
        return model(torch.from_numpy(x.transpose(axes).copy())).numpy()


def randomise(model, seed: int = 0):
    """A network that spikes, and whose neurons all differ."""
    generator = torch.Generator().manual_seed(seed)
    bounds = {"beta": (0.3, 1.1), "alpha": (0.3, 1.1), "threshold": (0.5, 1.5)}
    for name, parameter in model.named_parameters():
        reach = np.sqrt(20 / parameter[0].numel()) if name.endswith("weight") else 0.2
        low, high = bounds.get(name.split(".")[-1], (-reach, reach))
        parameter.data.uniform_(low, high, generator=generator)
    return model.eval()


def imported(net: nets.Net, model) -> dict:
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    return traverse_util.unflatten_dict(from_torch(state, dict(net.flattened)), sep="/")


def spikes(shape, rate=0.1, seed=0) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) < rate).astype(np.float32)


def events(path: Path, keep: int) -> np.ndarray:
    """[x, y, p, t in us] of 5-byte events, every `keep`-th row and column."""
    x, y, *last = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 5).T.astype(int)
    found = np.array([x, y, last[0] >> 7, (last[0] & 127) << 16 | last[1] << 8 | last[2]])
    return found[:, (x % keep == 0) & (y % keep == 0)] // np.array([keep, keep, 1, 1])[:, None]


def frames(path: Path, side: int, keep: int, steps: int) -> np.ndarray:
    """[T, H, W, P] counts in `steps` equal windows."""
    x, y, p, t = events(path, keep)
    edges = np.linspace(0, t.max() + 1, steps + 1)
    return np.histogramdd((t, y, x, p), (edges, *map(np.arange, (side + 1, side + 1, 3))))[0]


@cache
def recordings(name: str) -> np.ndarray:
    if name == "snn_nmnist":
        found = [frames(NMNIST / f"{n}.bs2", 17, 2, 100) for n in range(60001, 60041)]
    elif name == "snn_dvs128":
        found = [frames(GESTURES / f"{n}.bs2", 32, 4, 25) for n in range(1, 11)]
    else:
        found = spikes((8, 100, 700), 0.02)
    return np.asarray(found, np.float32)


CURRENTS = np.random.default_rng(1).normal(0.2, 0.6, (60, 3, 7)).astype(np.float32)


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("kind", [Leaky, Synaptic])
@pytest.mark.parametrize("recurrent", [False, True])
def test_neurons_are_those_of_a_plain_loop(kind, reset, recurrent):
    draw = np.random.default_rng(2)
    names = ("beta", "threshold", "alpha")[: 3 if kind is Synaptic else 2]
    params = {name: draw.uniform(0.2, 1.2, 7).astype(np.float32) for name in names}
    kernel, bias = draw.normal(0, 0.3, (7, 7)).astype(np.float32), np.full(7, 0.1, np.float32)
    back = DenseFeedback(7).apply({"params": {"kernel": kernel, "bias": bias}})
    expected = numpy_neurons(
        CURRENTS,
        reset=reset,
        feedback=(lambda s: s @ kernel + bias) if recurrent else None,
        **params,
    )
    for record, values in zip(("potential", "spike"), expected, strict=True):
        layer = kind(reset=reset, record=record)
        found = layer.apply({"params": params}, CURRENTS, back if recurrent else None)
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-5)
    assert 0.05 < expected[1].mean() < 0.95


@needs_snntorch
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("kind", [Leaky, Synaptic])
def test_neurons_are_those_of_snntorch(kind, reset):
    import snntorch

    names = ("alpha", "beta")[0 if kind is Synaptic else 1 :]
    params = {name: np.linspace(-0.1, 1.1, 7, dtype=np.float32) for name in (*names, "threshold")}
    theirs = getattr(snntorch, kind.__name__)(
        **{name: torch.from_numpy(value) for name, value in params.items()}, reset_mechanism=reset
    )
    state, potentials, found = (), [], []
    for current in torch.from_numpy(CURRENTS):
        spike, *state = theirs(current, *state)
        potentials.append(state[-1])
        found.append(spike)
    for record, values in (("potential", potentials), ("spike", found)):
        ours = kind(reset=reset, record=record).apply({"params": params}, CURRENTS)
        np.testing.assert_allclose(ours, torch.stack(values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("reset", "potentials"),
    [("subtract", [1.5, 0.5, 0.5]), ("zero", [1.5, 0, 0]), ("none", [1.5, 1.5, 1.5])],
)
def test_a_reset_comes_one_step_late(reset, potentials):
    current = np.float32([1.5, 0, 0]).reshape(3, 1, 1)
    params = {"beta": np.ones(1, np.float32), "threshold": np.ones(1, np.float32)}
    found = Leaky(reset=reset, record="potential").apply({"params": params}, current)
    assert found.ravel().tolist() == potentials


def test_a_potential_below_threshold_is_a_geometric_series():
    params = {"beta": np.float32([0.8]), "threshold": np.float32([100])}
    found = Leaky(record="potential").apply({"params": params}, np.ones((30, 1, 1), np.float32))
    expected = (1 - 0.8 ** np.arange(1, 31)) / 0.2
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-5)


@pytest.mark.parametrize("neurons", NEURONS)
@pytest.mark.parametrize("name", TORCH)
def test_networks_are_those_of_a_loop_over_time(name, neurons):
    """With weights at random, so that every axis and every parameter matters."""
    net, model = nets.build(name), randomise(TORCH[name](neurons))
    x = spikes((3, *net.input_shape), 0.05)[:, :25]
    found = jax.jit(net.module.apply)(imported(net, model), x)
    expected = torch_logits(model, x)
    assert len(np.unique(expected)) > 5
    if name == "snn_shd":
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    else:
        np.testing.assert_array_equal(found, expected)


@needs_data
@pytest.mark.data
@pytest.mark.parametrize("neurons", NEURONS)
@pytest.mark.parametrize("name", TORCH)
def test_released_weights_give_the_released_outputs(name, neurons):
    """Spike counts exactly, softmax to 1e-6, on real events (SHD: on random trains)."""
    net, model = nets.build(name), TORCH[name](neurons)
    path, x = CHECKPOINTS / RELEASED[name], recordings(name)
    state = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(state, strict=neurons is not PlainNeurons)
    found = np.asarray(jax.jit(net.module.apply)(nets.load(net, path), x))
    expected = torch_logits(model, x)
    if name != "snn_shd":
        np.testing.assert_array_equal(found, expected)
    one, other = jax.nn.softmax(found), torch.softmax(torch.from_numpy(expected), 1)
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert len(set(found.argmax(-1))) > 2


def test_networks_take_any_number_of_steps_and_keep_samples_apart():
    net, x = nets.build("snn_nmnist", (12, 17, 17, 2)), spikes((4, 12, 17, 17, 2), 0.3)
    variables = nets.init(net, 0)
    found = nets.apply(net, variables, nets.normalise(net, x))
    assert found.shape == (4, 10) and found.max() > 0
    np.testing.assert_array_equal(found[1:2], nets.apply(net, variables, x[1:2]))


def test_the_networks_have_the_sizes_of_the_paper():
    """Words of kernels and biases, and of beta, threshold and alpha."""
    sizes = {}
    for name in ("snn_nmnist", "snn_nmnist500", "snn_shd", "snn_dvs128"):
        net = nets.build(name)
        shapes = jax.eval_shape(
            net.module.init, jax.random.key(0), jnp.zeros((1, *net.input_shape))
        )
        leaves = traverse_util.flatten_dict(shapes["params"])
        neurons = sum(leaf.size for path, leaf in leaves.items() if path[0].startswith("lif"))
        sizes[name] = (sum(leaf.size for leaf in leaves.values()) - neurons, neurons)
    assert sizes == {
        "snn_nmnist": (578 * 20 + 20 + 200 + 10, 2 * 30),
        "snn_nmnist500": (578 * 500 + 500 + 5000 + 10, 2 * 510),
        "snn_shd": (700 * 200 + 200 + 200 * 200 + 200 + 4000 + 20, 3 * 220),
        "snn_dvs128": (25 * 2 * 12 + 12 + 25 * 12 * 32 + 32 + 8800 + 11, 2 * 30),
    }


def tags(jaxpr) -> list[str]:
    """Names that a program gives its values, those inside its loops as well."""
    found = []
    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr")
        if inner is not None:
            found += tags(getattr(inner, "jaxpr", inner))
        elif eqn.primitive.name == "name":
            found.append(eqn.params["name"])
    return found


@pytest.mark.parametrize(("name", "layers"), [("snn_nmnist", 2), ("snn_shd", 2), ("snn_dvs128", 3)])
def test_potentials_and_spikes_are_tagged_by_layer(name, layers):
    net = nets.build(name)
    x = jnp.zeros((1, *net.input_shape))
    shapes = jax.eval_shape(net.module.init, jax.random.key(0), x)
    program = jax.make_jaxpr(net.module.apply)(shapes, x)
    each = [(f"lif{i}/potential", f"lif{i}/spike") for i in range(1, layers + 1)]
    assert tags(program.jaxpr) == [tag for both in each for tag in both]


@pytest.mark.parametrize(
    ("shape", "smooth"),
    [
        ("atan", lambda k, x: jnp.arctan(jnp.pi / 2 * k * x) / jnp.pi),
        ("fast_sigmoid", lambda k, x: x / (1 + k * jnp.abs(x))),
    ],
)
def test_surrogate_slopes_are_derivatives(shape, smooth):
    chosen = surrogate.named(shape)._replace(steepness=3.0)
    x = jnp.linspace(-2, 2, 8)
    expected = jax.vmap(jax.grad(lambda x: smooth(3.0, x)))(x)
    np.testing.assert_allclose(chosen.slope(x), expected, rtol=1e-5)


def test_training_computes_the_same_forward():
    net = nets.build("snn_shd")
    variables, x = nets.init(net, 0), spikes((2, 20, 700))
    one, other = (net.module.apply(variables, x, train=train) for train in (False, True))
    np.testing.assert_array_equal(one, other)


@needs_snntorch
def test_gradients_are_those_of_snntorch():
    module, x = SpikingDense((6,), 4), spikes((3, 15, 2, 2, 2), 0.5)
    model = randomise(TorchDense(snntorch_neurons, (8, 6, 4)))
    net = nets.Net("small", module, (15, 2, 2, 2), 4, (0.0,), (1.0,), (("fc1/kernel", (2, 2, 2)),))
    weighted = np.random.default_rng(3).normal(size=(3, 4)).astype(np.float32)
    (model(torch.from_numpy(x)) * torch.from_numpy(weighted)).sum().backward()
    flat = {k: p.grad.numpy() for k, p in model.named_parameters()}
    expected = from_torch(flat, {})
    found = jax.grad(lambda v: (module.apply(v, x, train=True) * weighted).sum())(
        imported(net._replace(flattened=()), model)
    )
    for name, leaf in traverse_util.flatten_dict(found, sep="/").items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
        assert abs(leaf).max() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nets.build("snn_nmnist", (17, 17, 2)), "(steps, height, width, polarities)"),
        (lambda: nets.build("snn_shd", (100, 700, 1)), "(steps, channels) is right"),
        (lambda: nets.build("snn_dvs128", (25, 15, 16, 2)), "15x16; 16x16 is smallest"),
        (lambda: surrogate.named("step"), "known are atan, fast_sigmoid"),
        (
            lambda: Leaky(reset="half").init(jax.random.key(0), jnp.zeros((2, 1, 3))),
            "reset 'half' is unknown; known are subtract, zero, none",
        ),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(nets.NetError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("leaf", "value"), [("reset_mechanism_val", 1), ("graded_spikes_factor", 0.5)]
)
def test_other_neurons_than_ours_are_not_loaded(tmp_path, leaf, value):
    net = nets.build("snn_nmnist")
    state = randomise(TorchDense(PlainNeurons)).state_dict()
    torch.save(state | {f"lif1.{leaf}": torch.tensor(value)}, tmp_path / "other.th")
    with pytest.raises(nets.NetError, match=f"params/lif1/{leaf}, which is no parameter"):
        nets.load(net, tmp_path / "other.th")
