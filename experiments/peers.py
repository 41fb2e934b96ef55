"""The peers of the benchmark: our networks in PyTorch, and how faults are injected there.

Imports torch, so it is imported where it is used. The weights are ours, and the logits are checked
against ours before anything is timed. The fault injectors are

- `loop`: patch the weight in place, run the images, put the golden value back; what one writes by
  hand;
- `pytorchfi`: PyTorchFI 0.6.0 of the package index (Mahmoud et al., PyTorchFI: a runtime
  perturbation tool for DNNs, DSN-W 2020), `declare_weight_fi`: a faulty copy of the model a fault.

Either runs eager or compiled; `torch.compile` sees the model as an argument, so that PyTorchFI's
copies of it need no new compilation.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from jfi import bits
from jfi.engine.engine import Engine
from jfi.errors import InputError
from jfi.faults import Faults
from jfi.networks.sites import Network
from nets import lenet, mobilenet, resnet, spiking
from nets.net import Net

LAYERS = (nn.Conv2d, nn.Linear)
LAYOUTS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
TOLERANCE = 1e-4  # of the logits, absolute
# What a model may hold that we have no values for: BN's count, snnTorch's reset and size of spikes.
WITHOUT_VALUES = ("num_batches_tracked", "reset_mechanism_val", "graded_spikes_factor")


class Block(nn.Module):
    """Basic block with the option-A shortcut."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.pad = stride, (after - before) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet(nn.Module):
    """`nets.resnet`: three stages of `blocks`."""

    def __init__(self, blocks: int, channels: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (before, after) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
            first = Block(before, after, 2 if stage > 1 else 1)
            rest = [Block(after, after, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class LeNet(nn.Module):
    """`nets.lenet`, flattened as channels, rows, columns."""

    def __init__(self, net: Net):
        super().__init__()
        widths, (flattened,) = lenet.WIDTHS[net.input_shape[0]], dict(net.flattened).values()
        channels = (net.input_shape[2], *widths.channels)
        units = (int(np.prod(flattened)), *widths.hidden, net.num_classes)
        for i, padding in enumerate(widths.padding):
            conv = nn.Conv2d(*channels[i : i + 2], widths.kernel, padding=padding)
            self.add_module(f"conv{i + 1}", conv)
        for i in range(3):
            self.add_module(f"fc{i + 1}", nn.Linear(*units[i : i + 2]))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection; the input added where shapes are the same."""

    def __init__(self, before: int, expansion: int, after: int, stride: int):
        super().__init__()
        wide = expansion * before
        self.conv1, self.bn1 = nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3, self.bn3 = nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after)
        self.adds = stride == 1 and before == after

    def forward(self, x):
        y = F.relu6(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu6(self.bn2(self.conv2(y)))))
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """`nets.mobilenet`, with the stages and widths of the net."""

    def __init__(self, net: Net):
        super().__init__()
        ours, blocks = net.module, []
        before, head = ours.stem, ours.head
        self.conv1 = nn.Conv2d(net.input_shape[2], ours.stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(ours.stem)
        for stage in ours.stages:
            for i in range(stage.blocks):
                stride = stage.stride if i == 0 else 1
                blocks.append(InvertedResidual(before, stage.expansion, stage.channels, stride))
                before = stage.channels
        self.layers = nn.Sequential(*blocks)
        self.conv2, self.bn2 = nn.Conv2d(before, head, 1, bias=False), nn.BatchNorm2d(head)
        self.linear = nn.Linear(head, net.num_classes)

    def forward(self, x):
        x = self.layers(F.relu6(self.bn1(self.conv1(x))))
        return self.linear(F.relu6(self.bn2(self.conv2(x))).mean((2, 3)))


def module(net: Net, network: Network) -> nn.Module:
    """The network in PyTorch with our weights, in inference mode.

    Raises:
      InputError: there is no PyTorch model of this network here.
    """
    model = blank(net)
    state = {
        f"{layer_name(name)}.{LEAVES.get(leaf, leaf)}": torch.tensor(to_torch(net, name, values))
        for name, leaf, values in _leaves(network)
    }
    model.load_state_dict(state, strict=False)
    missing = [name for name in model.state_dict() if name not in state]
    if any(not name.endswith(WITHOUT_VALUES) for name in missing):
        raise InputError(f"the PyTorch model of {net.name} has no values for {missing[0]}")
    return model.eval()


def blank(net: Net) -> nn.Module:
    """The model with whatever weights PyTorch begins with."""
    match net.module:
        case lenet.LeNet():
            return LeNet(net)
        case resnet.ResNet(blocks=blocks):
            return ResNet(blocks, net.input_shape[2], net.num_classes)
        case mobilenet.MobileNetV2():
            return MobileNetV2(net)
        case spiking.SpikingDense() | spiking.SpikingRecurrent() | spiking.SpikingConv():
            from experiments.spiking_peer import SpikingModel  # needs snnTorch

            return SpikingModel(net)
    raise InputError(
        f"net {net.name} has no PyTorch model here; "
        "lenet, resnet20 to resnet56, mobilenetv2 and spiking networks have"
    )


def _leaves(network: Network) -> Iterator[tuple[str, str, np.ndarray]]:
    """(site name, last part of it, values) of every leaf."""
    for site in network.parameters:
        yield site.name, site.name.rpartition("/")[2], network.values(site)


def layer_name(site: str) -> str:
    """PyTorch's name of the layer of a site: layer1_0/conv1/kernel -> layer1.0.conv1."""
    layer = site.removeprefix("batch_stats/").rpartition("/")[0]
    return re.sub(r"_(?=\d+(/|$))", ".", layer).replace("/", ".")


def to_torch(net: Net, site: str, values: np.ndarray) -> np.ndarray:
    """The values of a leaf in PyTorch's axes and order; the inverse of `nets.weights`."""
    flattened = {name.removeprefix("params/"): shape for name, shape in net.flattened}
    if site in flattened:
        stacked = values.reshape(*flattened[site], -1)
        values = stacked.transpose(2, 0, 1, 3).reshape(values.shape)
    if site.endswith("kernel"):
        values = values.transpose(-1, -2, *range(values.ndim - 2))
    return np.ascontiguousarray(values)


class Layer(NamedTuple):
    """Where the words of one site are in PyTorch.

    name, number: of the layer, among all and among those of `LAYERS`.
    places: int64 [words, rank], index in the weight of each of our words, in our order.
    values: [words], their golden values.
    """

    name: str
    number: int
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
        of spikes, of which `experiments.spiking_peer` has the loop.
    """
    if len(net.input_shape) != 3:
        raise InputError(f"net {net.name} takes no images; experiments.spiking_peer is its peer")
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


def check_logits(net: Net, logits: np.ndarray, ours: np.ndarray) -> None:
    """Raise InputError where a model's logits [B, C] are further from ours than rounding goes."""
    apart = float(np.abs(logits - ours).max())
    if not apart <= TOLERANCE:
        raise InputError(
            f"the PyTorch model of {net.name} gives logits {apart:.2g} away from ours; "
            f"{TOLERANCE:g} is the most that rounding explains"
        )


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
        found.append(Layer(name, numbers[name], places, engine.network.values(site).ravel()))
    return found


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
        weight = peer.model.get_submodule(layer.name).weight.data
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
