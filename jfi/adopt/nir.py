"""NIR graphs: spiking networks as snnTorch, Norse, SpikingJelly and Sinabs exchange them.

A graph (Pedersen et al., "Neuromorphic intermediate representation", Nature Communications, 2024)
holds differential equations, v' = (v_leak - v + R I) / tau, and how neurons fire and are reset:
z = v > v_threshold, then v = v_reset where z. Here they are stepped forward by Euler's rule, a step
of `dt` at a time, as snnTorch does: a synapse's current first, then the membrane with the new
current, then the spike. In a cycle the neuron's spikes come back one step later.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jfi.adopt.adopted import Adopted, library
from jfi.errors import InputError

_Shape = tuple[int, ...]


def adopt_file(path: str, dt: float) -> Adopted:
    """The graph in a `.nir` file.

    Raises:
      InputError: nir is not installed, a file that it can't read; as `adopt`.
    """
    nir = library("nir", "nir")
    try:
        graph = nir.read(path)
    except Exception as error:
        raise InputError(f"model {path!r} is no NIR graph that nir can read: {error}") from error
    return adopt(graph, dt)


def adopt(graph: Any, dt: float) -> Adopted:
    """A graph with one input and one output, over images [B, T, ...]; float64 words as float32.

    Logits are the output summed over the T steps. Sites are `node/parameter`, with nodes of a
    subgraph as `subgraph/node/parameter`; membrane potentials and spikes are run-time values,
    `node/potential` and `node/spike`.

    Raises:
      InputError: a node of a kind that is not known, several inputs or outputs, a cycle without a
        neuron or with several, a `dt` that is not positive.
    """
    if not 0 < dt < float("inf"):
        raise InputError(f"dt is {dt}; the time step of a NIR graph must be positive, in seconds")
    plan = _plan(*_flat(graph), *(_only("", graph, way) for way in _ENDS))
    params = {
        f"{name}/{key}": _words(value)
        for name, node in plan.nodes.items()
        for key, value in vars(node).items()
        if key in _PARAMETERS and value is not None
    }

    def apply(params, x):
        by_node = {
            name: {key: params[f"{name}/{key}"] for key in _PARAMETERS if f"{name}/{key}" in params}
            for name in plan.nodes
        }
        return _simulate(plan, by_node, dt, x)

    return Adopted(apply, params, None)


class _Plan(NamedTuple):
    """The nodes of a flat graph in the order of a step, and what each is fed with.

    late: (from, to) of edges over which spikes come one step later.
    """

    nodes: Mapping[str, Any]
    sources: Mapping[str, Sequence[str]]
    late: frozenset[tuple[str, str]]
    input: str
    output: str


def _flat(graph, prefix: str = "") -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Nodes and edges with subgraphs in their place."""
    nodes, edges, ends = {}, [], {}
    for name, node in graph.nodes.items():
        full = f"{prefix}{name}"
        if _kind(node) == "NIRGraph":
            inner, more = _flat(node, f"{full}/")
            nodes.update(inner)
            edges += more
            ends[name] = tuple(_only(f"{full}/", node, way) for way in _ENDS)
        else:
            nodes[full] = node
            ends[name] = (full, full)
    edges += [(ends[start][1], ends[end][0]) for start, end in graph.edges]
    return nodes, edges


def _only(prefix: str, graph, kind: str) -> str:
    """The one node of a kind."""
    found = [f"{prefix}{name}" for name, node in graph.nodes.items() if _kind(node) == kind]
    if len(found) != 1:
        where = f"subgraph {prefix[:-1]}" if prefix else "graph"
        raise InputError(
            f"the NIR {where} has {len(found)} {kind} nodes; jfi adopts those with one"
        )
    return found[0]


def _kind(node) -> str:
    return type(node).__name__


def _plan(nodes: dict[str, Any], edges: list[tuple[str, str]], start: str, end: str) -> _Plan:
    """The order of a step: every node after those that feed it, but for spikes in a cycle."""
    known = (*_NEURONS, *_STATELESS)
    for name, node in nodes.items():
        if _kind(node) not in known:
            raise InputError(
                f"NIR node {name} is a {_kind(node)}; jfi adopts {', '.join(sorted(known))}"
            )
    edges = list(dict.fromkeys(edges))
    reached = {name: _reached(name, edges) for name in nodes}
    late = set()
    for name in nodes:
        cycle = [other for other in reached[name] if name in reached[other]]
        neurons = [other for other in cycle if _kind(nodes[other]) in _NEURONS]
        if cycle and len(neurons) != 1:
            raise InputError(
                f"NIR nodes {', '.join(sorted(cycle))} feed each other with "
                f"{len(neurons)} neuron nodes among them; jfi adopts cycles with one"
            )
        late |= {(a, b) for a, b in edges if a in neurons and b in cycle}
    order = _order(list(nodes), [edge for edge in edges if edge not in late])
    sources = {name: [a for a, b in edges if b == name] for name in order}
    return _Plan({name: nodes[name] for name in order}, sources, frozenset(late), start, end)


def _order(names: list[str], edges: list[tuple[str, str]]) -> list[str]:
    """Every node after those that feed it."""
    done: list[str] = []
    while len(done) < len(names):
        before = {b: [a for a, c in edges if c == b and a not in done] for b in names}
        ready = [name for name in names if name not in done and not before[name]]
        if not ready:
            left = ", ".join(sorted(set(names) - set(done)))
            raise InputError(f"NIR nodes {left} feed each other without a neuron between them")
        done += ready
    return done


def _reached(start: str, edges: list[tuple[str, str]]) -> set[str]:
    """Every node that a node feeds, over others too."""
    found: set[str] = set()
    new = {b for a, b in edges if a == start}
    while new:
        found |= new
        new = {b for a, b in edges if a in new} - found
    return found


def _simulate(plan: _Plan, params, dt: float, x):
    """Output summed over the steps [B, ...], from input [B, T, ...]."""
    over_time = jnp.moveaxis(jnp.asarray(x, jnp.result_type(x, jnp.float32)), 1, 0)
    step = partial(_step, plan, params, dt)
    start = _start(plan, params, step, over_time[0])
    _, outputs = lax.scan(step, start, over_time)
    return outputs.sum(axis=0)


def _start(plan: _Plan, params, step, x):
    """State of every neuron at rest: zeros of the shapes that a step gives them."""
    state = {}
    for name, node in plan.nodes.items():
        if _kind(node) in _NEURONS:
            shape = np.shape(next(iter(params[name].values())))
            zero = jnp.zeros((len(x), *shape), x.dtype)
            late = ["late"] if any(a == name for a, _ in plan.late) else []
            state[name] = dict.fromkeys([*_NEURONS[_kind(node)][1], *late], zero)
    shapes = jax.tree.map(jnp.shape, state)
    while True:
        after, _ = jax.eval_shape(step, state, x)
        if jax.tree.map(jnp.shape, after) == shapes:
            return state
        state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, x.dtype), after)
        shapes = jax.tree.map(jnp.shape, state)


def _step(plan: _Plan, params, dt: float, state, x):
    """State after a step, and the output [B, ...]."""
    values, after = {}, {}
    for name, node in plan.nodes.items():
        given = [
            state[a]["late"] if (a, name) in plan.late else values[a] for a in plan.sources[name]
        ]
        total = x if name == plan.input else sum(given[1:], start=given[0]) if given else 0.0
        if _kind(node) in _NEURONS:
            advance, _ = _NEURONS[_kind(node)]
            values[name], own = advance(name, params[name], dt, state[name], total)
            after[name] = {**own, "late": values[name]} if "late" in state[name] else own
        else:
            values[name] = _STATELESS[_kind(node)](node, params[name], total)
    return after, values[plan.output]


# Neurons: (name, parameters, dt, state, input) -> output, state.


def _membrane(p, dt, v, current):
    return v + dt / p["tau"] * (p["v_leak"] - v + p["r"] * current)


def _fired(name, p, v):
    """Spikes and the potential after them."""
    v = checkpoint_name(v, f"{name}/potential")
    spike = checkpoint_name(
        jnp.where(v > p["v_threshold"], 1.0, 0.0).astype(v.dtype), f"{name}/spike"
    )
    return spike, jnp.where(spike > 0, p["v_reset"], v)


def _lif(name, p, dt, state, x):
    spike, v = _fired(name, p, _membrane(p, dt, state["v"], x))
    return spike, {"v": v}


def _li(name, p, dt, state, x):
    v = checkpoint_name(_membrane(p, dt, state["v"], x), f"{name}/potential")
    return v, {"v": v}


def _synapse(p, dt, state, x):
    """The current, and the parameters and potential of the membrane after it."""
    i = state["i"] + dt / p["tau_syn"] * (p["w_in"] * x - state["i"])
    return i, _membrane({**p, "tau": p["tau_mem"]}, dt, state["v"], i)


def _cuba_lif(name, p, dt, state, x):
    i, v = _synapse(p, dt, state, x)
    spike, v = _fired(name, p, v)
    return spike, {"i": i, "v": v}


def _cuba_li(name, p, dt, state, x):
    i, v = _synapse(p, dt, state, x)
    v = checkpoint_name(v, f"{name}/potential")
    return v, {"i": i, "v": v}


def _if(name, p, dt, state, x):
    spike, v = _fired(name, p, state["v"] + dt * p["r"] * x)
    return spike, {"v": v}


def _i(name, p, dt, state, x):
    v = checkpoint_name(state["v"] + dt * p["r"] * x, f"{name}/potential")
    return v, {"v": v}


_NEURONS = {
    "LIF": (_lif, ("v",)),
    "LI": (_li, ("v",)),
    "CubaLIF": (_cuba_lif, ("i", "v")),
    "CubaLI": (_cuba_li, ("i", "v")),
    "IF": (_if, ("v",)),
    "I": (_i, ("v",)),
}

# Other nodes: (node, parameters, input [B, ...]) -> output [B, ...].


def _same(node, p, x):
    return x


def _linear(node, p, x):
    return x @ p["weight"].T


def _affine(node, p, x):
    return x @ p["weight"].T + p["bias"]


def _convolution(node, p, x):
    dims = p["weight"].ndim - 2
    padding = node.padding
    if not isinstance(padding, str):
        padding = [(n, n) for n in _each_axis(padding, dims)]
    found = lax.conv_general_dilated(
        x,
        p["weight"],
        _each_axis(node.stride, dims),
        padding.upper() if isinstance(padding, str) else padding,
        rhs_dilation=_each_axis(node.dilation, dims),
        feature_group_count=int(node.groups),
    )
    return found + p["bias"].reshape(-1, *[1] * dims)


def _each_axis(value, dims: int) -> tuple[int, ...]:
    return tuple(int(n) for n in np.broadcast_to(np.asarray(value), dims))


def _sum_pool(node, p, x):
    window, stride, padding = (
        _each_axis(value, 2) for value in (node.kernel_size, node.stride, node.padding)
    )
    around = [(0, 0)] * (x.ndim - 2) + [(n, n) for n in padding]
    lead = (1,) * (x.ndim - 2)
    return lax.reduce_window(x, 0.0, lax.add, (*lead, *window), (*lead, *stride), around)


def _average_pool(node, p, x):
    """The mean over the window, zeros of the padding counted, as PyTorch has it."""
    return _sum_pool(node, p, x) / np.prod(_each_axis(node.kernel_size, 2))


def _flatten(node, p, x):
    """Axes are counted without that of the batch."""
    shape = x.shape[1:]
    start, end = (int(n) % len(shape) for n in (node.start_dim, node.end_dim))
    return x.reshape(len(x), *shape[:start], -1, *shape[end + 1 :])


def _scale(node, p, x):
    return x * p["scale"]


def _threshold(node, p, x):
    return jnp.where(x > p["threshold"], 1.0, 0.0).astype(x.dtype)


_ENDS = ("Input", "Output")
_STATELESS = {
    "Input": _same,
    "Output": _same,
    "Linear": _linear,
    "Affine": _affine,
    "Conv1d": _convolution,
    "Conv2d": _convolution,
    "SumPool2d": _sum_pool,
    "AvgPool2d": _average_pool,
    "Flatten": _flatten,
    "Scale": _scale,
    "Threshold": _threshold,
}
# What of a node is stored words; the rest says how it is computed.
_PARAMETERS = tuple(
    "weight bias tau tau_syn tau_mem r v_leak v_threshold v_reset w_in scale threshold".split()
)


def _words(value) -> np.ndarray:
    """As JAX computes it; graphs made with NumPy hold float64 without meaning it."""
    if hasattr(value, "detach"):  # PyTorch tensors, as snnTorch's export leaves them
        value = value.detach().cpu().numpy()
    value = np.asarray(value)
    if not np.issubdtype(value.dtype, np.floating):
        value = value.astype(np.float32)
    return value.astype(jax.dtypes.canonicalize_dtype(value.dtype))
