"""Our spiking networks in snnTorch, and faults in them one at a time.

What one writes by hand with snnTorch 1.x, and what SpikingJET's tool does but for its mistakes: a
parameter is patched in place, all samples run through all time steps, and the golden value is put
back; a potential or a spike is broken in the loop over time, at every step or at one. A potential
is broken before it is compared with the threshold: the spike of that neuron is decided again.

Imports torch and snntorch, so it is imported where it is used.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import snntorch
import torch
import torch.nn.functional as F
from torch import nn

from experiments import peers
from jfi import bits
from jfi.errors import InputError
from jfi.faults import Faults, Site
from jfi.networks.sites import Network
from nets import spiking
from nets.net import Net

STATE = ("potential", "spike")  # values that exist only while the network runs
PERMANENT = -1  # in place of a time step


class StateFault(NamedTuple):
    """A fault in a potential or a spike of one neuron, for all samples.

    neurons: name of the layer. value: one of STATE. place: the neuron in [C, H, W] or [units].
    broken: from its golden values [B] to its faulty ones. step: the time step, or PERMANENT.
    """

    neurons: str
    value: str
    place: tuple[int, ...]
    broken: Callable[[torch.Tensor], torch.Tensor]
    step: int

    def strike(self, layer: nn.Module, spike: torch.Tensor, potential: torch.Tensor) -> None:
        """Break it in place."""
        at = (slice(None), *self.place)
        if self.value == "spike":
            spike[at] = self.broken(spike[at])
            return
        potential[at] = self.broken(potential[at])
        threshold = layer.threshold.expand(potential.shape[1:])[self.place]
        spike[at] = (potential[at] > threshold).to(spike.dtype)


class SpikingModel(nn.Module):
    """A net of `nets.spiking` layer for layer, stepped through time: [T, B, ...] -> logits [B, C].

    A recurrent one has synaptic neurons, feeds the first layer back to itself, and its logits are
    the largest potentials.
    """

    def __init__(self, net: Net):
        super().__init__()
        self.recurrent = isinstance(net.module, spiking.SpikingRecurrent)
        convolutional = isinstance(net.module, spiking.SpikingConv)
        self.names = []  # of each connection and the neurons it feeds
        for name, connection, neurons in (_convolutions if convolutional else _dense)(net):
            self.names.append((name, f"lif{len(self.names) + 1}"))
            self.add_module(name, connection)
            self.add_module(self.names[-1][1], _neurons(neurons, self.recurrent))
        if self.recurrent:
            self.fb1 = nn.Linear(net.module.hidden, net.module.hidden)

    def forward(self, x: torch.Tensor, fault: StateFault | None = None) -> torch.Tensor:
        states = {neurons: () for _, neurons in self.names}
        for neurons in states:
            getattr(self, neurons).reset_mem()
        fed_back, recorded = None, []
        for step, now in enumerate(x):
            for name, neurons in self.names:
                current, layer = self._current(name, now), getattr(self, neurons)
                if self.recurrent and neurons == "lif1":
                    spikes = torch.zeros_like(current) if fed_back is None else fed_back
                    current = current + self.fb1(spikes)
                now, *states[neurons] = layer(current, *states[neurons])
                if fault and fault.neurons == neurons and fault.step in (step, PERMANENT):
                    fault.strike(layer, now, states[neurons][-1])
                if neurons == "lif1":
                    fed_back = now
            recorded.append(states[neurons][-1] if self.recurrent else now)
        recorded = torch.stack(recorded)
        return recorded.amax(0) if self.recurrent else recorded.sum(0)

    def _current(self, name: str, spikes: torch.Tensor) -> torch.Tensor:
        connection = getattr(self, name)
        if isinstance(connection, nn.Conv2d):
            return F.max_pool2d(connection(spikes), 2)
        return connection(spikes.flatten(1))


def _dense(net: Net) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, connection, neurons that differ) of each layer."""
    hidden, inputs = net.module.hidden, int(np.prod(net.input_shape[1:]))
    hidden = hidden if isinstance(hidden, tuple) else (hidden,)
    units = (inputs, *hidden, net.module.num_classes)
    for i, (before, after) in enumerate(pairwise(units), start=1):
        yield f"fc{i}", nn.Linear(before, after), after


def _convolutions(net: Net) -> Iterator[tuple[str, nn.Module, int]]:
    """As `_dense`; the neurons after a convolution differ by column."""
    _, _, width, before = net.input_shape
    for i, after in enumerate(net.module.channels, start=1):
        width = (width - 4) // 2
        yield f"conv{i}", nn.Conv2d(before, after, 5), width
        before = after
    ((_, flattened),) = net.flattened
    yield "fc1", nn.Linear(int(np.prod(flattened)), net.num_classes), net.num_classes


def _neurons(number: int, synaptic: bool) -> nn.Module:
    """Leaky or synaptic neurons whose parameters all differ."""
    names = ("beta", "threshold", "alpha")[: 3 if synaptic else 2]
    options = {name: torch.ones(number) for name in names}
    options |= {f"learn_{name}": True for name in names}
    return (snntorch.Synaptic if synaptic else snntorch.Leaky)(**options)


class Peer(NamedTuple):
    """A model with its weights and its workload.

    x: [T, B, P, H, W] or [T, B, channels]. golden: top-1, int64 [B].
    sites: of the faults it is given. values: golden words of those that are parameters.
    """

    net: Net
    model: SpikingModel
    x: torch.Tensor
    golden: torch.Tensor
    sites: Sequence[Site]
    values: dict[str, np.ndarray]


def peer(net: Net, network: Network, x: np.ndarray, sites: Sequence[Site]) -> Peer:
    """The peer on samples [B, T, ...], for faults in `sites`: parameters, `lif1/potential`, ...

    Raises:
      InputError: its logits differ from ours.
    """
    model = peers.module(net, network)
    axes = (1, 0, 4, 2, 3) if x.ndim == 5 else (1, 0, 2)
    trains = torch.tensor(np.ascontiguousarray(x.transpose(axes)))
    with torch.inference_mode():
        logits = model(trains)
    peers.check_logits(net, logits.numpy(), np.asarray(network.apply(network.params, x)))
    values = {site.name: network.values(site) for site in network.parameters}
    return Peer(net, model, trains, logits.argmax(1), tuple(sites), values)


def loop(peer: Peer, faults: Faults, steps: np.ndarray | None = None) -> np.ndarray:
    """bool [F], critical for at least one sample: break, run, restore, fault after fault.

    `steps` are the time steps of faults in potentials and spikes; permanent ones where it is None
    or PERMANENT.
    """
    return np.array(
        [bool((out.argmax(1) != peer.golden).any()) for out in outputs(peer, faults, steps)]
    )


@torch.inference_mode()
def outputs(peer: Peer, faults: Faults, steps: np.ndarray | None = None) -> list[torch.Tensor]:
    """Logits [B, C] of each fault, one after the other; arguments as in `loop`."""
    steps = np.full(faults.site.size, PERMANENT) if steps is None else steps
    found = []
    for number, index, bit, polarity, step in zip(*faults, steps, strict=True):
        site = peer.sites[number]
        run = _run_with_state if site.name.rpartition("/")[2] in STATE else _run_patched
        found.append(run(peer, site, int(index), int(bit), int(polarity), int(step)))
    return found


def _run_patched(peer: Peer, site: Site, index: int, bit: int, polarity: int, step: int):
    """With a parameter broken; faults in parameters are permanent."""
    if step != PERMANENT:
        raise InputError(f"a fault in {site.name} at step {step}: parameters have permanent ones")
    golden = peer.values[site.name].ravel()[index : index + 1]
    layer, leaf = peers.layer_name(site.name), site.name.rpartition("/")[2]
    parameter = getattr(peer.model.get_submodule(layer), peers.LEAVES.get(leaf, leaf)).data
    place = _place(peer.net, site, index)
    parameter[place] = float(bits.faulty(golden, bit, polarity)[0])
    out = peer.model(peer.x)
    parameter[place] = golden.item()
    return out


def _place(net: Net, site: Site, index: int) -> tuple[int, ...]:
    """Where PyTorch keeps a word of a parameter."""
    ours = np.arange(site.words).reshape(site.shape)
    theirs = peers.to_torch(net, site.name, ours)
    return tuple(int(i[0]) for i in np.nonzero(theirs == index))


def _run_with_state(peer: Peer, site: Site, index: int, bit: int, polarity: int, step: int):
    """With a potential or a spike broken as the network runs."""
    neurons, _, value = site.name.rpartition("/")
    place = np.unravel_index(index, site.shape)
    place = tuple(int(i) for i in (*place[-1:], *place[:-1]))  # channels first
    broken = _breaking(bit, polarity)
    return peer.model(peer.x, StateFault(neurons, value, place, broken, step))


def _breaking(bit: int, polarity: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What breaks float32 numbers."""
    keep, change = (torch.tensor(m.view(np.int32)) for m in bits.masks(np.float32, bit, polarity))
    return lambda values: ((values.view(torch.int32) & keep) ^ change).view(torch.float32)
