"""Golden rates in PyTorch of networks like those of `experiments.bench.zoo`.

Each is of the same layers and sizes, out of PyTorch's own modules, with random weights: only its
time is asked for. Imports torch, so it is imported where it is used.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

import nets
from experiments.bench import models, peers, zoo

LAYOUTS = peers.LAYOUTS


def golden_rate(name: str, images: np.ndarray, seconds: float = 1.0) -> float | None:
    """Images a second of all images [B, ...] at once, in the better layout; None without a twin."""
    if name not in TWINS:
        return None
    model = TWINS[name]().eval()
    if images.ndim != 4:
        return _rate(model, torch.from_numpy(images), seconds)
    turned = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    each = ((model.to(memory_format=way), turned.to(memory_format=way)) for way in LAYOUTS.values())
    return max(_rate(*pair, seconds) for pair in each)


def _rate(model: nn.Module, images: torch.Tensor, seconds: float) -> float:
    with torch.inference_mode():
        model(images)
        begun, count = time.perf_counter(), 0
        while (spent := time.perf_counter() - begun) < seconds:
            model(images)
            count += len(images)
    return count / spent


class _Then(nn.Module):
    """Modules one after another, with functions between."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = parts
        for number, part in enumerate(parts):
            if isinstance(part, nn.Module):
                self.add_module(str(number), part)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class _Residual(nn.Module):
    """ReLU of a branch and what came in, through a convolution where the shape changes."""

    def __init__(self, branch: nn.Module, short: nn.Module):
        super().__init__()
        self.branch, self.short = branch, short

    def forward(self, x):
        return torch.relu(self.branch(x) + self.short(x))


def _mean(*axes: int):
    return partial(torch.mean, dim=axes)


def _conv(before: int, after: int, side: int, stride: int = 1, norm: bool = False, groups: int = 1):
    own = nn.Conv2d(before, after, side, stride, side // 2, groups=groups, bias=not norm)
    return nn.Sequential(own, nn.BatchNorm2d(after)) if norm else own


def _mlp() -> nn.Module:
    sizes = (zoo.HIDDEN, 128, 128)
    inner = [nn.Sequential(nn.Linear(a, 128, bias=False), nn.ReLU()) for a in sizes[:2]]
    return nn.Sequential(*inner, nn.Linear(128, zoo.CLASSES, bias=False))


def _embedding() -> nn.Module:
    own = (nn.Linear(zoo.HIDDEN, n, bias=False) for n in (zoo.HIDDEN, zoo.CLASSES))
    return _Then(nn.EmbeddingBag(1000, zoo.HIDDEN), next(own), torch.relu, next(own))


class _Masked(nn.Module):
    """A transformer whose tokens see those before them alone, if so asked."""

    def __init__(self, body: nn.Module, mask: torch.Tensor | None):
        super().__init__()
        self.body, self.mask = body, mask

    def forward(self, x):
        return self.body(x, mask=self.mask, is_causal=self.mask is not None)


def _encoder(width: int, heads: int, layers: int, classes: int, before=(), pick=None, mask=None):
    """Blocks normalised first; `pick` takes a vector of all tokens, by default their mean."""
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, 0.0, "gelu", norm_first=True, batch_first=True
    )
    body = _Masked(nn.TransformerEncoder(layer, layers, enable_nested_tensor=False), mask)
    last = nn.LayerNorm(width), pick or _mean(1), nn.Linear(width, classes, bias=False)
    return _Then(*before, body, *last)


def _tokens(width: int, side: int, first: bool, size: int) -> list:
    """Patches as a convolution takes them, with their places and, if asked for, a class token."""
    places = (size // side) ** 2 + first
    place, token = torch.zeros(places, width), torch.zeros(1, 1, width)

    def lay(x):
        x = x.flatten(2).transpose(1, 2)
        return (torch.cat([token.expand(len(x), 1, width), x], 1) if first else x) + place

    return [nn.Conv2d(3, width, side, side, bias=False), lay]


def _vit() -> nn.Module:
    return _encoder(96, zoo.HEADS, 4, zoo.CLASSES, _tokens(96, 8, False, 32))


def _vit_b16() -> nn.Module:
    before = _tokens(768, 16, True, zoo.SIDE)
    return _encoder(768, 12, 12, zoo.THOUSAND, before, lambda x: x[:, 0])


def _gpt() -> nn.Module:
    mask = nn.Transformer.generate_square_subsequent_mask(16)
    before = [nn.Embedding(zoo.TOKENS, zoo.HIDDEN)]
    return _encoder(zoo.HIDDEN, zoo.HEADS, 2, zoo.TOKENS, before, lambda x: x[:, -1], mask)


def _recurrent(kind: type[nn.Module]) -> nn.Module:
    own = kind(zoo.FEATURES, zoo.HIDDEN, batch_first=True)
    return _Then(own, lambda found: found[0][:, -1], nn.Linear(zoo.HIDDEN, zoo.CLASSES, bias=False))


def _vgg(stages, norm: bool, *last: nn.Module) -> nn.Module:
    width, parts = 3, []
    for stage in stages:
        for channels in stage:
            parts += [_conv(width, channels, 3, norm=norm), nn.ReLU()]
            width = channels
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, nn.Flatten(), *last)


VGG16 = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)


def _vgg16() -> nn.Module:
    return _vgg(VGG16, True, nn.Linear(512, zoo.CLASSES))


def _vgg16_224() -> nn.Module:
    sizes = ((49 * 512, 4096), (4096, 4096), (4096, zoo.THOUSAND))
    first, second, third = (nn.Linear(*size, bias=False) for size in sizes)
    return _vgg(VGG16, False, first, nn.ReLU(), second, nn.ReLU(), third)


def _resnet18() -> nn.Module:
    width, parts = 64, [_conv(3, 64, 3, norm=True), nn.ReLU()]
    for stage in range(4):
        for stride in (2 if stage else 1, 1):
            after = 64 << stage
            ends = (_conv(width, after, 3, stride, True), _conv(after, after, 3, norm=True))
            same = stride == 1 and width == after
            short = nn.Identity() if same else _conv(width, after, 1, stride, True)
            parts.append(_Residual(nn.Sequential(ends[0], nn.ReLU(), ends[1]), short))
            width = after
    return _Then(*parts, _mean(2, 3), nn.Linear(width, zoo.CLASSES))


def _resnet50() -> nn.Module:
    width, parts = 64, [_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for stage, count in enumerate((3, 4, 6, 3)):
        for k in range(count):
            planes, stride = 64 << stage, 2 if stage and not k else 1
            branch = nn.Sequential(
                _conv(width, planes, 1), nn.ReLU(), _conv(planes, planes, 3, stride), nn.ReLU(),
                _conv(planes, 4 * planes, 1),
            )  # fmt: skip
            short = nn.Identity() if k else _conv(width, 4 * planes, 1, stride)
            parts.append(_Residual(branch, short))
            width = 4 * planes
    return _Then(*parts, _mean(2, 3), nn.Linear(width, zoo.THOUSAND, bias=False))


class _Inverted(nn.Module):
    def __init__(self, before: int, factor: int, after: int, stride: int):
        super().__init__()
        wide = factor * before
        first = [_conv(before, wide, 1), nn.ReLU6()] if factor > 1 else []
        rest = (_conv(wide, wide, 3, stride, groups=wide), nn.ReLU6(), _conv(wide, after, 1))
        self.branch, self.adds = nn.Sequential(*first, *rest), stride == 1 and before == after

    def forward(self, x):
        return x + self.branch(x) if self.adds else self.branch(x)


def _mobilenetv2_224() -> nn.Module:
    width, parts = 32, [_conv(3, 32, 3, 2), nn.ReLU6()]
    for factor, after, count, stride in zoo.MOBILE:
        for k in range(count):
            parts.append(_Inverted(width, factor, after, 1 if k else stride))
            width = after
    parts += [_conv(width, 1280, 1), nn.ReLU6()]
    return _Then(*parts, _mean(2, 3), nn.Linear(1280, zoo.THOUSAND, bias=False))


TWINS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp,
    "embedding": _embedding,
    "encoder": partial(_encoder, zoo.HIDDEN, zoo.HEADS, 2, zoo.CLASSES),
    "vit": _vit,
    "gpt": _gpt,
    **{f"lstm_{way}": partial(_recurrent, nn.LSTM) for way in ("unrolled", "scanned")},
    **{f"gru_{way}": partial(_recurrent, nn.GRU) for way in ("unrolled", "scanned")},
    **{
        name: lambda name=name: models.blank(nets.build(name))
        for name in ("lenet", "resnet20", "mobilenetv2")
    },
    "vgg16": _vgg16,
    "resnet18": _resnet18,
    "resnet18_64": _resnet18,
    "resnet50_224": _resnet50,
    "vgg16_224": _vgg16_224,
    "mobilenetv2_224": _mobilenetv2_224,
    "vit_b16_224": _vit_b16,
}
