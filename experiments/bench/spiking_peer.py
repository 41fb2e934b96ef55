"""Our spiking networks in snnTorch, and faults in them one at a time.

What one writes by hand with snnTorch 1.x, and what SpikingJET's tool does but for its mistakes: a
parameter is patched in place, all samples run through all time steps, and the golden value is put
back; a potential or a spike is broken in the loop over time, at every step or at one. A potential
is broken before it is compared with the threshold: the spike of that neuron is decided again.

Imports torch and snntorch, so it is imported where it is used.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from experiments.bench import models
from experiments.bench.spiking_model import PERMANENT, STATE, SpikingModel, StateFault
from jfi import bits
from jfi.errors import InputError
from jfi.faults import Faults, Site
from jfi.networks.sites import Network
from nets.net import Net


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
    model = models.module(net, network)
    axes = (1, 0, 4, 2, 3) if x.ndim == 5 else (1, 0, 2)
    trains = torch.tensor(np.ascontiguousarray(x.transpose(axes)))
    with torch.inference_mode():
        logits = model(trains)
    models.check_logits(net, logits.numpy(), np.asarray(network.apply(network.params, x)))
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
    layer, leaf = models.layer_name(site.name), site.name.rpartition("/")[2]
    parameter = getattr(peer.model.get_submodule(layer), models.LEAVES.get(leaf, leaf)).data
    place = _place(peer.net, site, index)
    parameter[place] = float(bits.faulty(golden, bit, polarity)[0])
    out = peer.model(peer.x)
    parameter[place] = golden.item()
    return out


def _place(net: Net, site: Site, index: int) -> tuple[int, ...]:
    """Where PyTorch keeps a word of a parameter."""
    ours = np.arange(site.words).reshape(site.shape)
    theirs = models.to_torch(net, site.name, ours)
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
