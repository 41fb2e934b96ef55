"""The deep networks against their PyTorch definitions, written here as their authors write them.

Random weights and BN statistics, saved as a checkpoint, loaded by `nets.load`: same logits.
"""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nets


class MobileBlock(nn.Module):
    """Inverted residual with an expansion always, and no convolution on the shortcut."""

    def __init__(self, before, after, expansion, stride):
        super().__init__()
        wide = expansion * before
        self.conv1 = nn.Conv2d(before, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3 = nn.Conv2d(wide, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.residual = stride == 1 and before == after

    def forward(self, x):
        y = F.relu6(self.bn1(self.conv1(x)))
        y = F.relu6(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Table 2 of the paper with (t, c, n, s) and the strides of CIFAR-10."""

    table = (
        (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    )  # fmt: skip

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)
        blocks, before = [], 32
        for t, c, n, s in self.table:
            for i in range(n):
                blocks.append(MobileBlock(before, c, t, s if i == 0 else 1))
                before = c
        self.layers = nn.Sequential(*blocks)
        self.conv2, self.bn2 = nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, 10)

    def forward(self, x):
        x = self.layers(F.relu6(self.bn1(self.conv1(x))))
        x = F.relu6(self.bn2(self.conv2(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ResidualBlock(nn.Module):
    """Basic block with the option-B shortcut."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride > 1 or before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        self.layer1 = self.stage(64, 64, 1)
        self.layer2 = self.stage(64, 128, 2)
        self.layer3 = self.stage(128, 256, 2)
        self.layer4 = self.stage(256, 512, 2)
        self.linear = nn.Linear(512, 10)

    @staticmethod
    def stage(before, after, stride):
        return nn.Sequential(ResidualBlock(before, after, stride), ResidualBlock(after, after, 1))

    def forward(self, x):
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(F.adaptive_avg_pool2d(self.layer4(self.layer3(x)), 1).flatten(1))


def block(before, after, pool=False):
    layers = [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class ResNet9(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = block(channels, 64), block(64, 128, pool=True)
        self.res1 = nn.Sequential(block(128, 128), block(128, 128))
        self.conv3, self.conv4 = block(128, 256, pool=True), block(256, 512, pool=True)
        self.res2 = nn.Sequential(block(512, 512), block(512, 512))
        last = (nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 10))
        self.classifier = nn.Sequential(*last)

    def forward(self, x):
        x = self.conv2(self.conv1(x))
        x = self.conv4(self.conv3(x + self.res1(x)))
        return self.classifier(x + self.res2(x))


class VGG11(nn.Module):
    def __init__(self, channels):
        super().__init__()
        layers, before = [], channels
        for after in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"):
            if after == "M":
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            else:
                conv = nn.Conv2d(before, after, 3, padding=1)
                layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
                before = after
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(512, 10)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


TWINS = {"mobilenetv2": MobileNetV2, "resnet18": ResNet18, "resnet9": ResNet9, "vgg11": VGG11}


def randomised(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """BN that does something, and keeps what passes through it of order one."""
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.uniform_(-0.5, 0.5, generator=generator)
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)  # the running statistics are those of this batch
    for norm in norms:
        norm.running_mean += 0.1 * torch.randn(norm.num_features, generator=generator)
    return model.eval()


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3)])
@pytest.mark.parametrize("name", TWINS)
def test_gives_the_logits_of_pytorch(name, shape, tmp_path):
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    model = randomised(TWINS[name](shape[2]), torch.randn(8, *images.shape[1:]))
    torch.save(model.state_dict(), tmp_path / "net.pt")
    net = nets.build(name, shape)
    logits = jax.jit(net.module.apply)(nets.load(net, tmp_path / "net.pt"), x)
    with torch.no_grad():
        expected = model(images).numpy()
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_a_checkpoint_with_convolutions_on_shortcuts_is_refused(tmp_path):
    """Kuangliu's own MobileNetV2 is another network: the first block widens its shortcut."""
    state = MobileNetV2(3).state_dict() | {"layers.0.shortcut.0.weight": torch.zeros(16, 32, 1, 1)}
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(nets.NetError, match="holds params/layers_0/shortcut_0/kernel, which is no"):
        nets.load(nets.build("mobilenetv2"), tmp_path / "net.pt")
