"""The peers of the benchmark: how faults are injected into our networks in PyTorch.

Imports torch, so it is imported where it is used. The logits of the models (`models`) are checked
against ours before anything is timed. The fault injectors are

- `loop`: patch the weight in place, run the images, put the golden value back; what one writes by
  hand;
- `pytorchfi`: PyTorchFI 0.6.0 of the package index (Mahmoud et al., PyTorchFI: a runtime
  perturbation tool for DNNs, DSN-W 2020), `declare_weight_fi`: a faulty copy of the model a fault.

Either runs eager or compiled; `torch.compile` sees the model as an argument, so that PyTorchFI's
copies of it need no new compilation.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from torch import nn

from experiments.bench.models import check_logits, layer_name, module, to_torch
from jfi import bits
from jfi.engine.engine import Engine
from jfi.errors import InputError
from jfi.faults import Faults
from nets.net import Net

LAYERS = (nn.Conv2d, nn.Linear)
LAYOUTS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}


class Layer(NamedTuple):
    """Where the words of one site are in PyTorch.

    name: of the tensor. number: of its layer among those of `LAYERS`; None where that is not known.
    places: int64 [words, rank], index in the weight of each of our words, in our order.
    values: [words], their golden values.
    """

    name: str
    number: int | None
    places: np.ndarray
    values: np.ndarray


class Peer(NamedTuple):
    """A PyTorch model on a device with its workload; `layers` follow the engine's sites."""

    model: nn.Module
    forward: Callable[[nn.Module, Any], Any]
    batches: list[Any]  # [b, C, H, W] each
    golden: Any  # top-1, int64 [B]
    layers: list[Layer]


def peer(net: Net, engine: Engine, *, batch: int, layout: str, compiled: bool) -> Peer:
    """The peer at these settings, on the kind of device that JAX uses.

    Raises:
      InputError: its logits differ from ours, it has no model of the network, or that takes trains
        of spikes, of which `experiments.bench.spiking_peer` has the loop.
    """
    if len(net.input_shape) != 3:
        raise InputError(
            f"net {net.name} takes no images; experiments.bench.spiking_peer is its peer"
        )
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    _full_precision()
    model = module(net, engine.network).to(device, memory_format=LAYOUTS[layout])
    images = torch.tensor(engine.images.transpose(0, 3, 1, 2))
    images = images.to(device).to(memory_format=LAYOUTS[layout])
    forward, batches = _forward(compiled), list(images.split(batch))
    with torch.inference_mode():
        logits = torch.cat([forward(model, batch) for batch in batches])
    check_logits(net, logits.cpu().numpy(), engine.golden.logits)
    return Peer(model, forward, batches, logits.argmax(1), _layers(net, engine, model))


def _full_precision() -> None:
    # As ours: no TF32 on a GPU.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@cache
def _forward(compiled: bool) -> Callable[[nn.Module, Any], Any]:
    def forward(model, x):
        return model(x)

    return torch.compile(forward, dynamic=False) if compiled else forward


def _layers(net: Net, engine: Engine, model: nn.Module) -> list[Layer]:
    numbers = {
        name: number
        for number, name in enumerate(
            name for name, layer in model.named_modules() if isinstance(layer, LAYERS)
        )
    }
    found = []
    for site in engine.sites:
        ours = np.arange(site.words).reshape(site.shape)
        theirs = to_torch(net, site.name, ours)  # our position of each of their words
        places = np.stack(np.unravel_index(np.argsort(theirs.ravel()), theirs.shape), axis=1)
        name = layer_name(site.name)
        values = engine.network.values(site).ravel()
        found.append(Layer(f"{name}.weight", numbers[name], places, values))
    return found


def is_module(model: Any) -> bool:
    """Whether a model that a user brings is one of PyTorch."""
    return isinstance(model, nn.Module)


def own_peer(model: nn.Module, engine: Engine, *, batch: int, layout: str, compiled: bool) -> Peer:
    """The peer that a user's own module is, at these settings; the images are as it takes them."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    _full_precision()
    model = copy.deepcopy(model).eval().to(device)
    images = torch.tensor(engine.images).to(device)
    if images.dtype == torch.int32:  # indices are int64 in PyTorch
        images = images.long()
    if images.ndim == 4:
        model, images = (x.to(memory_format=LAYOUTS[layout]) for x in (model, images))
    forward, batches = _forward(compiled), list(images.split(batch))
    with torch.inference_mode():
        logits = torch.cat([forward(model, batch) for batch in batches])
    layers = [
        Layer(
            site.name, None, np.stack(np.unravel_index(np.arange(site.words), site.shape), axis=1),
            engine.network.values(site).ravel(),
        )
        for site in engine.sites
    ]  # fmt: skip
    return Peer(model, forward, batches, logits.argmax(1), layers)


class Injection(NamedTuple):
    """A fault as PyTorch needs it: the layer, the place in its weight, what to write there."""

    layer: Layer
    place: tuple[int, ...]
    faulty: float
    golden: float


def _injections(peer: Peer, faults: Faults) -> Iterator[Injection]:
    for site, index, bit, polarity in zip(*faults, strict=True):
        layer = peer.layers[site]
        golden = layer.values[index : index + 1]
        faulty = bits.faulty(golden, bit, polarity)
        yield Injection(layer, tuple(layer.places[index].tolist()), float(faulty[0]), golden.item())


def _critical(peer: Peer, model: nn.Module):
    """Whether a model changes the top-1 of any image: bool, on the device."""
    with torch.inference_mode():
        top1 = torch.cat([peer.forward(model, batch).argmax(1) for batch in peer.batches])
        return (top1 != peer.golden).any()


def _on_host(found: list) -> np.ndarray:
    return torch.stack(found).cpu().numpy()


def golden(peer: Peer, faults: Faults) -> None:
    """Run the fault-free model over all images, once for each of the faults."""
    _on_host([_critical(peer, peer.model) for _ in range(faults.site.size)])


def loop(peer: Peer, faults: Faults) -> np.ndarray:
    """bool [F], critical for at least one image: patch, run, restore."""
    found = []
    for layer, place, faulty, before in _injections(peer, faults):
        owner, _, leaf = layer.name.rpartition(".")
        weight = getattr(peer.model.get_submodule(owner), leaf).data
        weight[place] = faulty
        found.append(_critical(peer, peer.model))
        weight[place] = before
    return _on_host(found)


def pytorchfi(peer: Peer, faults: Faults) -> np.ndarray:
    """bool [F], critical for at least one image, by PyTorchFI.

    Raises:
      ImportError: PyTorchFI 0.6.0 is not installed.
    """
    injector = _injector(peer)
    found = []
    for layer, place, faulty, _ in _injections(peer, faults):
        # It takes four indices; None adds an axis, which leaves the two of a dense layer as meant.
        at = [[axis] for axis in (*place, None, None)[:4]]
        where = dict(zip(("k", "dim1", "dim2", "dim3"), at, strict=True))
        model = injector.declare_weight_fi(layer_num=[layer.number], value=[faulty], **where)
        found.append(_critical(peer, model))
    return _on_host(found)


@torch.no_grad()
def _injector(peer: Peer):
    try:
        from pytorchfi.core import fault_injection
    except ImportError as error:
        message = "PyTorchFI is not installed: pip install pytorchfi==0.6.0 --no-deps"
        raise ImportError(message) from error
    batch, *shape = peer.batches[0].shape
    return fault_injection(peer.model, batch, input_shape=shape, layer_types=list(LAYERS))
