"""Networks as PyTorch's users write them, with the names that torchvision gives their parts."""

import torch
from torch import nn
from torch.nn import functional


class LeNet(nn.Module):
    """LeNet-5 on 12x12 images, with a dropout."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16, 12), nn.Linear(12, 8), nn.Linear(8, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc3(self.dropout(torch.relu(self.fc2(x))))


class Convolutions(nn.Module):
    """Grouped, strided, dilated, depthwise and transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.pool, self.act = nn.AvgPool2d(2), nn.GELU()
        self.norm, self.fc = nn.GroupNorm(2, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.act(self.depthwise(torch.relu(self.grouped(x))))
        return self.fc(self.norm(self.pool(self.up(x))).mean((2, 3)))


class Recurrent(nn.Module):
    """Two layers of LSTM or GRU, the first of two directions; a start is made in `forward`."""

    def __init__(self, of):
        super().__init__()
        self.first = of(4, 6, batch_first=True, bidirectional=True)
        self.second = of(12, 6, batch_first=True)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        start = torch.zeros(1, x.shape[0], 6)
        x, _ = self.first(x)
        x, _ = self.second(x, (start, start) if isinstance(self.second, nn.LSTM) else start)
        return self.fc(x[:, -1])


class Encoder(nn.Module):
    """A transformer encoder with learned positions, pre-norm, and a mask of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.position = nn.Parameter(torch.randn(6, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("mask", torch.triu(torch.full((6, 6), -1e9), 1), persistent=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.position, self.mask).mean(1))


class Embedding(nn.Module):
    """A classifier of token sequences; its table is also its output layer, as language models tie
    them, and it looks up positions by an integer buffer."""

    def __init__(self):
        super().__init__()
        self.table, self.places = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.register_buffer("position", torch.arange(6))
        self.fc = nn.Linear(8, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        x = self.table(x) + self.places(self.position)
        return self.out(torch.tanh(self.fc(x.mean(1))))


class BasicBlock(nn.Module):
    """Of ResNet-18 (He et al., 2016)."""

    def __init__(self, before, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or before != width:
            shortcut = nn.Conv2d(before, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(width))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet-18 by default; with one stage of few channels, the batch-norm CNN of quick tests."""

    def __init__(self, widths=(64, 128, 256, 512), blocks=2, classes=1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        before = widths[0]
        for number, width in enumerate(widths, 1):
            stride = 1 if number == 1 else 2
            layers = [BasicBlock(before, width, stride)]
            layers += [BasicBlock(width, width, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{number}", nn.Sequential(*layers))
            before = width
        self.stages = len(widths)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(before, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in range(1, self.stages + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class InvertedResidual(nn.Module):
    """Of MobileNetV2 (Sandler et al., 2018)."""

    def __init__(self, before, width, stride, expand):
        super().__init__()
        inner = before * expand
        layers = [conv_bn(before, inner, 1)] if expand != 1 else []
        layers.append(conv_bn(inner, inner, 3, stride, inner))
        self.conv = nn.Sequential(
            *layers, nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        )
        self.residual = stride == 1 and before == width

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


def conv_bn(before, width, kernel, stride=1, groups=1):
    """A convolution, its batch norm and ReLU6."""
    convolution = nn.Conv2d(before, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU6(inplace=True))


class MobileNetV2(nn.Module):
    """MobileNetV2."""

    def __init__(self, classes=1000):
        super().__init__()
        features, before = [conv_bn(3, 32, 3, 2)], 32
        for expand, width, count, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
            (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for number in range(count):
                features.append(InvertedResidual(before, width, 1 if number else stride, expand))
                before = width
        self.features = nn.Sequential(*features, conv_bn(before, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def settled(model):
    """The model with statistics of batch norm as training leaves them, not 0 and 1."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.1)
    return model
