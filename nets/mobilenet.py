"""MobileNetV2: M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen, MobileNetV2: inverted
residuals and linear bottlenecks, CVPR 2018, Table 2, in the CIFAR-10 form of
github.com/kuangliu/pytorch-cifar: strides of 1 in the first two stages that halve in the paper,
and a 1x1 expansion in the first block too. Without that repository's convolutions on shortcuts,
as in the paper: a block whose input and output differ in shape has no shortcut.

These are the 54 layers and 2,203,584 weights of Ruospo et al., DATE 2023, Table II. Parameters are
named as in that repository (layers.0.conv1.weight), so its checkpoints load where they were trained
without the convolutions on shortcuts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from nets.layers import batch_norm, conv, types_of
from nets.net import Net, pixel_statistics


class Stage(NamedTuple):
    """Blocks alike: factor of their expansion, output channels, number, stride of the first."""

    expansion: int
    channels: int
    blocks: int
    stride: int


STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 1),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


class Block(nn.Module):
    """Inverted residual: 1x1 expansion, 3x3 depthwise, 1x1 projection without activation; the
    input is added where the shapes are the same. [B, H, W, C] -> [B, H/stride, W/stride, channels].
    """

    expansion: int
    channels: int
    stride: int
    depthwise: Callable
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, train: bool):
        types, wide = types_of(self), self.expansion * x.shape[-1]
        y = conv(wide, 1, "conv1", types)(x)
        y = nn.relu6(batch_norm(train, "bn1", types)(y))
        each = {"feature_group_count": wide, "conv_general_dilated": self.depthwise}
        y = conv(wide, 3, "conv2", types, self.stride, **each)(y)
        y = nn.relu6(batch_norm(train, "bn2", types)(y))
        y = batch_norm(train, "bn3", types)(conv(self.channels, 1, "conv3", types)(y))
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """Images [B, H, W, C] -> logits [B, num_classes]. `head` channels before the dense layer;
    `depthwise` is what computes depthwise convolutions (`nets.fast` sets it)."""

    stages: tuple[Stage, ...] = STAGES
    stem: int = 32
    head: int = 1280
    num_classes: int = 10
    depthwise: Callable = lax.conv_general_dilated
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        types = types_of(self)
        x = conv(self.stem, 3, "conv1", types)(x)
        x = nn.relu6(batch_norm(train, "bn1", types)(x))
        for i, block in enumerate(_blocks(self.stages)):
            x = Block(*block, self.depthwise, name=f"layers_{i}", **types)(x, train)
        x = conv(self.head, 1, "conv2", types)(x)
        x = nn.relu6(batch_norm(train, "bn2", types)(x))
        return nn.Dense(self.num_classes, name="linear", **types)(jnp.mean(x, axis=(1, 2)))


def _blocks(stages: tuple[Stage, ...]) -> list[tuple[int, int, int]]:
    """(expansion, channels, stride) of every block; only the first of a stage strides."""
    return [
        (stage.expansion, stage.channels, stage.stride if i == 0 else 1)
        for stage in stages
        for i in range(stage.blocks)
    ]


def build(input_shape: tuple[int, int, int], num_classes: int, dtype) -> Net:
    """MobileNetV2 for images of any size, grey or colour."""
    mean, std = pixel_statistics("mobilenetv2", input_shape[-1])
    module = MobileNetV2(num_classes=num_classes, dtype=dtype, param_dtype=dtype)
    return Net("mobilenetv2", module, input_shape, num_classes, mean, std)
