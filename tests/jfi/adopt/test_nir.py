"""NIR graphs adopted: against the equations step by step, against snnTorch, and a campaign."""

import numpy as np
import pytest
from adopting import check_campaign

import jfi

nir = pytest.importorskip("nir")
DT = 1e-4
RNG = np.random.default_rng(0)


def draw(*shape, scale=1.0):
    return (RNG.normal(size=shape) * scale).astype(np.float32)


def full(value, *shape):
    return np.full(shape, value, np.float32)


def lif(size, v_reset=-0.1):
    return nir.LIF(
        tau=RNG.uniform(3e-4, 2e-3, size).astype(np.float32),
        r=RNG.uniform(4, 8, size).astype(np.float32),
        v_leak=full(0.05, size),
        v_threshold=full(0.6, size),
        v_reset=full(v_reset, size),
    )


def cuba_lif(size):
    return nir.CubaLIF(
        tau_syn=full(5e-4, size), tau_mem=full(1e-3, size), r=full(6.0, size),
        v_leak=full(0.0, size), v_threshold=full(0.7, size), v_reset=full(0.0, size),
        w_in=full(2.0, size),
    )  # fmt: skip


def spikes(*shape, rate=0.4):
    return (RNG.uniform(size=shape) < rate).astype(np.float32)


def output(network, images):
    return np.asarray(network.apply(network.params, images))


def feedforward():
    return nir.NIRGraph.from_list(
        nir.Affine(draw(8, 6, scale=0.5), draw(8, scale=0.1)), lif(8),
        nir.Linear(draw(5, 8, scale=0.5)), cuba_lif(5),
    )  # fmt: skip


def by_the_equations(graph, images):
    """Spikes summed over time, neuron models written out, one image and one step at a time."""
    affine, one, linear, two = (
        graph.nodes[name] for name in ("affine", "lif", "linear", "cubalif")
    )
    counts = []
    for image in images:
        v1, v2, i2, total = np.zeros(8), np.zeros(5), np.zeros(5), np.zeros(5)
        for x in image:
            current = affine.weight @ x + affine.bias
            v1 = v1 + DT * ((one.v_leak - v1) + one.r * current) / one.tau
            z1 = v1 > one.v_threshold
            v1 = np.where(z1, one.v_reset, v1)
            current = linear.weight @ z1.astype(np.float32)
            i2 = i2 + DT * (-i2 + two.w_in * current) / two.tau_syn
            v2 = v2 + DT * ((two.v_leak - v2) + two.r * i2) / two.tau_mem
            z2 = v2 > two.v_threshold
            v2 = np.where(z2, two.v_reset, v2)
            total += z2
        counts.append(total)
    return np.array(counts)


def test_neurons_follow_their_equations():
    graph, images = feedforward(), spikes(8, 30, 6)
    network = jfi.adopt(graph, images)
    wanted = by_the_equations(graph, images)
    assert wanted.mean() > 2 and wanted.std() > 1
    np.testing.assert_array_equal(output(network, images), wanted)
    names = {"affine/weight", "lif/tau", "lif/v_threshold", "lif/v_reset", "cubalif/w_in"}
    assert names <= set(network.positions)


def test_the_time_step_is_told():
    graph, images = feedforward(), spikes(8, 30, 6)
    fast = jfi.adopt(graph, images, dt=5e-5)
    assert (output(fast, images) != output(jfi.adopt(graph, images), images)).any()
    with pytest.raises(jfi.InputError, match=r"dt is 0; the time step of a NIR graph must be pos"):
        jfi.adopt(graph, images, dt=0)


def test_campaign_and_dead_neurons(tmp_path):
    graph, images = feedforward(), spikes(8, 30, 6)
    nir.write(tmp_path / "net.nir", graph)
    network = jfi.adopt(tmp_path / "net.nir", images)
    check_campaign(network, images)
    plan = jfi.plan(network, "exhaustive", sites_pattern="cubalif/spike", fault_model="dead")
    engine = jfi.Engine(network, images, np.zeros(8, int), plan.space.sites)
    summary = jfi.run(plan, engine, tmp_path / "dead", {}, verify_pairs=20)
    assert summary["verify"]["disagreements"] == 0 and summary["verify"]["pairs"] == 20


@pytest.mark.parametrize("neuron", ["LI", "CubaLI", "I", "IF"])
def test_other_neurons(neuron):
    size = 4
    values = dict(
        tau=full(1e-3, size), tau_syn=full(5e-4, size), tau_mem=full(1e-3, size),
        r=full(3e3 if neuron in ("I", "IF") else 5.0, size), v_leak=full(0.1, size),
        v_threshold=full(0.8, size), v_reset=full(0.1, size), w_in=full(1.5, size),
    )  # fmt: skip
    make = getattr(nir, neuron)
    node = make(**{key: values[key] for key in make.__dataclass_fields__ if key in values})
    images = spikes(3, 12, 4)
    network = jfi.adopt(nir.NIRGraph.from_list(node), images)
    wanted = np.zeros((3, size))
    v, i = np.zeros((3, size)), np.zeros((3, size))
    for t in range(12):
        x = images[:, t]
        if neuron == "CubaLI":
            i = i + DT / 5e-4 * (-i + 1.5 * x)
            v = v + DT / 1e-3 * (0.1 - v + 5 * i)
        elif neuron == "LI":
            v = v + DT / 1e-3 * (0.1 - v + 5 * x)
        else:
            v = v + DT * 3e3 * x
        fires = v > 0.8 if neuron == "IF" else None
        wanted += v if fires is None else fires
        v = v if fires is None else np.where(fires, 0.1, v)
    np.testing.assert_allclose(output(network, images), wanted, rtol=1e-5)


def test_layers_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    w, b = draw(6, 2, 3, 3, scale=0.3), draw(6)
    image, steps = spikes(4, 5, 4, 9, 9), 5
    graph = nir.NIRGraph.from_list(
        nir.Conv2d((9, 9), w, (2, 1), (1, 0), (1, 2), 2, b),
        nir.SumPool2d(np.array([2, 2]), np.array([1, 1]), np.array([0, 0])),
        nir.Scale(full(0.5, 6, 4, 4)),
        nir.AvgPool2d(np.array([2, 2]), np.array([2, 2]), np.array([1, 1])),
        nir.Threshold(full(0.2, 6, 3, 3)),
        nir.Flatten({"input": np.array([6, 3, 3])}, 0, -1),
        nir.Linear(draw(5, 54)),
        type_check=False,
    )
    network = jfi.adopt(graph, image)
    wanted = 0
    for t in range(steps):
        x = torch.from_numpy(image[:, t])
        x = f.conv2d(x, torch.from_numpy(w), torch.from_numpy(b), (2, 1), (1, 0), (1, 2), 2)
        x = f.avg_pool2d(x, 2, 1) * 4 * 0.5
        x = (f.avg_pool2d(x, 2, 2, 1) > 0.2).float().flatten(1)
        wanted = wanted + x @ torch.from_numpy(graph.nodes["linear"].weight).T
    np.testing.assert_allclose(output(network, image), wanted.numpy(), rtol=1e-4, atol=1e-5)
    assert {"conv2d/weight", "conv2d/bias", "threshold/threshold"} <= set(network.positions)


def recurrent():
    inner = nir.NIRGraph(
        nodes={
            "input": nir.Input({"input": np.array([6])}),
            "lif": lif(6),
            "w_rec": nir.Affine(draw(6, 6, scale=0.4), draw(6, scale=0.2)),
            "output": nir.Output({"output": np.array([6])}),
        },
        edges=[("input", "lif"), ("lif", "w_rec"), ("w_rec", "lif"), ("lif", "output")],
    )
    nodes = {
        "in": nir.Input({"input": np.array([4])}),
        "fc": nir.Linear(draw(6, 4, scale=0.5)),
        "layer": inner,
        "out": nir.Output({"output": np.array([6])}),
    }
    return nir.NIRGraph(nodes, [("in", "fc"), ("fc", "layer"), ("layer", "out")], type_check=False)


def test_spikes_in_a_cycle_come_back_one_step_later():
    graph, images = recurrent(), spikes(8, 25, 4)
    network = jfi.adopt(graph, images)
    assert {"layer/lif/tau", "layer/w_rec/weight", "fc/weight"} <= set(network.positions)
    p, back = graph.nodes["layer"].nodes["lif"], graph.nodes["layer"].nodes["w_rec"]
    v, z, wanted = np.zeros((8, 6)), np.zeros((8, 6)), np.zeros((8, 6))
    for t in range(25):
        current = images[:, t] @ graph.nodes["fc"].weight.T + z @ back.weight.T + back.bias
        v = v + DT / p.tau * (p.v_leak - v + p.r * current)
        z = (v > p.v_threshold).astype(float)
        v = np.where(z > 0, p.v_reset, v)
        wanted += z
    assert wanted.std() > 0
    np.testing.assert_array_equal(output(network, images), wanted)


@pytest.mark.filterwarnings("ignore:nirtorch.extract_nir_graph:DeprecationWarning")
def test_snntorch_gives_the_same_spikes():
    torch, snn = pytest.importorskip("torch"), pytest.importorskip("snntorch")
    pytest.importorskip("nirtorch")
    from snntorch import utils
    from snntorch.export_nir import export_to_nir

    torch.manual_seed(0)
    options = dict(reset_mechanism="zero", reset_delay=False, init_hidden=True)
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 10),
        snn.Leaky(beta=0.9 * torch.ones(10), threshold=0.4 * torch.ones(10), **options),
        torch.nn.Linear(10, 5),
        snn.Synaptic(
            alpha=0.6 * torch.ones(5),
            beta=0.8 * torch.ones(5),
            threshold=0.5 * torch.ones(5),
            **options,
        ),
    )
    images = spikes(8, 20, 6)
    graph = export_to_nir(net, torch.from_numpy(images[0, 0]))
    utils.reset(net)
    with torch.no_grad():
        wanted = sum(net(torch.from_numpy(images[:, t])) for t in range(20)).numpy()
    assert wanted.max() > 2 and wanted.std() > 0
    np.testing.assert_array_equal(output(jfi.adopt(graph, images), images), wanted)


def ends(*nodes):
    return {
        "a": nir.Input({"input": np.array([4])}),
        **dict(nodes),
        "z": nir.Output({"output": np.array([4])}),
    }


@pytest.mark.parametrize(
    ("nodes", "edges", "message"),
    [
        ([("d", nir.Delay(full(1e-3, 4)))], [("a", "d"), ("d", "z")], "node d is a Delay; jfi ad"),
        (
            [("w", nir.Linear(draw(4, 4)))],
            [("a", "w"), ("w", "w"), ("w", "z")],
            "nodes w feed each other with 0 neuron nodes",
        ),
        (
            [("b", nir.Input({"input": np.array([4])}))],
            [("a", "z"), ("b", "z")],
            "the NIR graph has 2 Input nodes",
        ),
    ],
)
def test_graphs_that_are_refused(nodes, edges, message):
    graph = nir.NIRGraph(ends(*nodes), edges, type_check=False)
    with pytest.raises(jfi.InputError, match=message):
        jfi.adopt(graph, spikes(2, 5, 4))
