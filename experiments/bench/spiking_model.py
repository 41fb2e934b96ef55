"""A net of `nets.spiking` in snnTorch, which a fault may break as it runs.

Imports torch and snntorch, so it is imported where it is used.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import snntorch
import torch
import torch.nn.functional as F
from torch import nn

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
