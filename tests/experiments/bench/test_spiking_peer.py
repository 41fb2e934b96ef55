"""Faults in snnTorch, one at a time: against plain loops over time in NumPy."""

import jax
import numpy as np
import pytest
import torch

import nets
from experiments import target
from experiments.bench import models, peers
from jfi import bits
from jfi.engine.engine import Engine
from jfi.errors import InputError
from jfi.faults import FAULT_MODELS, Faults, FaultSpace, Site

pytest.importorskip("snntorch", reason="snnTorch is not installed")

from experiments.bench import spiking_peer

STATE = ("potential", "spike")
SHAPES = {  # neurons [H, W, C] or [units], small inputs
    "snn_nmnist": ((12, 4, 4, 2), {"lif1": (20,), "lif2": (10,)}),
    "snn_shd": ((12, 30), {"lif1": (200,), "lif2": (20,)}),
    "snn_dvs128": ((5, 16, 20, 2), {"lif1": (6, 8, 12), "lif2": (1, 2, 32), "lif3": (11,)}),
}


def subject(name: str, samples: int = 6):
    """A net whose neurons all differ, as the engine reads it, and samples that make it spike."""
    draw = np.random.default_rng(5)
    net = nets.build(name, SHAPES[name][0])

    def varied(path, leaf):
        bounds = {"beta": (0.3, 1.1), "alpha": (0.3, 1.1), "threshold": (0.5, 1.5)}
        reach = 2 / np.sqrt(leaf[..., 0].size if leaf.ndim > 1 else 100)
        low, high = bounds.get(path[-1].key, (-reach, reach))
        return draw.uniform(low, high, leaf.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(varied, nets.init(net, 0))
    x = (draw.random((samples, *net.input_shape)) < 0.4).astype(np.float32)
    return net, target.read(net, variables), x


def state_sites(name: str) -> list[Site]:
    layers = SHAPES[name][1].items()
    return [Site(f"{n}/{v}", shape, np.dtype("f4")) for n, shape in layers for v in STATE]


def drawn(sites, count: int, polarity="stuck_at") -> Faults:
    space = FaultSpace(sites, FAULT_MODELS[polarity], (22, 23, 25, 27, 29, 30, 31))
    return space.decode(np.random.default_rng(6).integers(0, space.size, count))


def looped(network, x: np.ndarray, sites, fault, step: int) -> np.ndarray:
    """Spike counts of dense layers of leaky neurons, one step, layer and line at a time."""
    values = {site.name: network.values(site) for site in network.parameters}
    number, index, bit, polarity = fault
    name = sites[number].name
    if name in values:
        broken = values[name].ravel().copy()
        broken[index] = bits.faulty(broken[index], bit, polarity)
        values[name] = broken.reshape(values[name].shape)

    def strike(value: str, array: np.ndarray, now: int) -> None:
        if name == value and step in (now, -1):
            array[:, index] = bits.faulty(array[:, index], bit, polarity)

    potentials, counts = [0, 0], 0
    for now in range(x.shape[1]):
        spike = x[:, now].reshape(len(x), -1)
        for i, layer in enumerate("12"):
            beta, threshold = values[f"lif{layer}/beta"], values[f"lif{layer}/threshold"]
            current = spike @ values[f"fc{layer}/kernel"] + values[f"fc{layer}/bias"]
            reset = (potentials[i] > threshold) * threshold
            potentials[i] = np.clip(beta, 0, 1) * potentials[i] + current - reset
            strike(f"lif{layer}/potential", potentials[i], now)
            spike = (potentials[i] > threshold).astype(np.float32)
            strike(f"lif{layer}/spike", spike, now)
        counts = counts + spike
    return counts


@pytest.mark.parametrize("name", SHAPES)
def test_models_give_our_logits(name):
    net, network, x = subject(name)
    peer = spiking_peer.peer(net, network, x, network.parameters)
    assert peer.model(peer.x).std() > 0
    assert peer.golden.shape == (6,)


@pytest.mark.parametrize("polarity", ["stuck_at", "flip"])
def test_faults_are_those_of_a_plain_loop(polarity):
    """Parameters and state, permanent and at one step: the same spike counts."""
    net, network, x = subject("snn_nmnist")
    sites = [*network.parameters, *state_sites("snn_nmnist")]
    first = drawn(network.parameters, 80, polarity)
    then = drawn(sites[len(network.parameters) :], 80, polarity)
    then = then._replace(site=then.site + len(network.parameters))
    faults = Faults(*map(np.concatenate, zip(first, then, strict=True)))
    in_state, numbers = np.arange(160) >= 80, np.arange(160)
    steps = np.where(in_state & (numbers % 2 == 0), numbers % 12, -1)
    peer = spiking_peer.peer(net, network, x, sites)
    found = spiking_peer.outputs(peer, faults, steps)
    golden, changed = peer.model(peer.x), []
    for out, step, *fault in zip(found, steps, *faults, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            expected = looped(network, x, sites, fault, step)
        np.testing.assert_array_equal(out, expected, err_msg=f"{sites[fault[0]].name} {fault}")
        changed.append(not torch.equal(out, golden))
    assert min(sum(changed[:80]), sum(changed[80:])) > 5
    critical = [bool((out.argmax(1) != peer.golden).any()) for out in found]
    assert spiking_peer.loop(peer, faults, steps).tolist() == critical
    assert torch.equal(peer.model(peer.x), golden)  # what was broken is whole again


@pytest.mark.parametrize("name", ["snn_shd", "snn_dvs128"])
def test_parameters_break_where_ours_do(name):
    net, network, x = subject(name)
    faults = drawn(network.parameters, 40)
    peer = spiking_peer.peer(net, network, x, network.parameters)
    found = spiking_peer.outputs(peer, faults)
    apply = jax.jit(net.module.apply)
    changed = 0
    for out, number, index, bit, polarity in zip(found, *faults, strict=True):
        leaves = list(network.leaves)
        leaf = network.positions[network.parameters[number].name]
        leaves[leaf] = bits.inject(leaves[leaf], int(index), int(bit), int(polarity))
        params = jax.tree.unflatten(jax.tree.structure(network.params), leaves)
        expected = apply(params, x)
        np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)
        changed += not np.allclose(expected, peer.model(peer.x).detach())
    assert changed > 5


def test_a_neuron_of_a_convolution_is_found_among_channels_first():
    """A spike stuck at 0.5 or so is seen by the next layer at this neuron, and nowhere else."""
    net, network, x = subject("snn_dvs128")
    site = state_sites("snn_dvs128")[1]
    assert site.name == "lif1/spike"
    peer = spiking_peer.peer(net, network, x, [site])
    index, seen = int(np.ravel_multi_index((2, 5, 7), site.shape)), []
    hook = peer.model.conv2.register_forward_hook(lambda m, inputs, out: seen.append(*inputs))
    one = np.ones(1, np.int64)
    faults = Faults(0 * one, index * one, 31 * one, bits.STUCK_AT_1 * one)
    spiking_peer.outputs(peer, faults)
    hook.remove()
    negative = {tuple(at[1:]) for spikes in seen for at in torch.signbit(spikes).nonzero().tolist()}
    assert negative == {(7, 2, 5)}


def test_a_parameter_does_not_break_for_one_step():
    net, network, x = subject("snn_nmnist")
    peer = spiking_peer.peer(net, network, x, network.parameters)
    with pytest.raises(InputError, match=r"fc1/kernel at step 3: parameters have permanent ones"):
        spiking_peer.loop(peer, Faults(*np.zeros((4, 1), int)), np.array([3]))


def test_other_weights_than_ours_are_refused(monkeypatch):
    net, network, x = subject("snn_nmnist")
    model = models.module(net, network)
    torch.nn.init.ones_(model.fc1.bias)
    monkeypatch.setattr(models, "module", lambda *given: model)
    with pytest.raises(InputError, match=r"logits .* away from ours"):
        spiking_peer.peer(net, network, x, network.parameters)


def test_spiking_nets_are_no_peers_that_take_images():
    net = nets.build("snn_nmnist")
    with pytest.raises(InputError, match=r"takes no images; experiments\.bench\.spiking_peer"):
        peers.peer(net, None, batch=1, layout="channels_first", compiled=False)


@pytest.mark.parametrize("name", SHAPES)
def test_the_engine_agrees_on_a_thousand_mixed_faults(name):
    """Weights, biases, beta, threshold, alpha, potentials and spikes, as the engine runs them."""
    net, network, x = subject(name)
    faults = drawn(network.sites, 1000 if name == "snn_nmnist" else 300)
    image = np.random.default_rng(8).integers(0, len(x), faults.site.size)
    runner = Engine(network, x, np.zeros(len(x), int), network.sites)
    found = runner.pairs(faults, image).logits
    peer = spiking_peer.peer(net, network, x, network.sites)
    runs = zip(spiking_peer.outputs(peer, faults), image, strict=True)
    expected = np.stack([out[k].numpy() for out, k in runs])
    same = np.isclose(found, expected, rtol=1e-3, atol=1e-4, equal_nan=True).all(axis=1)
    changed = (expected != runner.golden.logits[image]).any(axis=1)
    assert same.all(), [f"{network.sites[f[0]].name} {f}" for f in np.stack(faults, 1)[~same]]
    assert changed.sum() > 15
