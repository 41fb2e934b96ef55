"""Our networks in PyTorch, with our weights: what the peers of the benchmark run.

Imports torch, so it is imported where it is used.
"""

import re
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from jfi.errors import InputError
from jfi.networks.sites import Network
from nets import lenet, mobilenet, resnet, spiking
from nets.net import Net

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
            from experiments.bench.spiking_model import SpikingModel  # needs snnTorch

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


def check_logits(net: Net, logits: np.ndarray, ours: np.ndarray) -> None:
    """Raise InputError where a model's logits [B, C] are further from ours than rounding goes."""
    apart = float(np.abs(logits - ours).max())
    if not apart <= TOLERANCE:
        raise InputError(
            f"the PyTorch model of {net.name} gives logits {apart:.2g} away from ours; "
            f"{TOLERANCE:g} is the most that rounding explains"
        )
