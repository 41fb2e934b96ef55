"""ResNet-9, the small and wide ResNet of fast CIFAR-10 training: D. Page, How to train your ResNet
(DAWNBench, 2018), as widely taught for PyTorch: eight 3x3 convolutions with bias and BN, two
residual blocks that add after the ReLU, max pooling, one dense layer; 6,575,370 parameters.

Parameters are named as there (res1.0.0.weight; classifier.3 after pooling, flattening and
dropout), so such checkpoints load. The dropout, which acts in training only, is left out, and the
last pooling takes the whole map where that one takes 4x4, the same at 32x32.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from nets.layers import batch_norm, conv, types_of
from nets.net import Net, NetError, pixel_statistics

SMALLEST = 8  # three poolings leave one pixel


class ResNet9(nn.Module):
    """Images [B, H, W, C] -> logits [B, num_classes]. `width` channels of the first layer."""

    width: int = 64
    num_classes: int = 10
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        types, width = types_of(self), self.width
        x = _layer(x, width, "conv1", train, types)
        x = _pool(_layer(x, 2 * width, "conv2", train, types))
        x = x + _pair(x, "res1", train, types)
        x = _pool(_layer(x, 4 * width, "conv3", train, types))
        x = _pool(_layer(x, 8 * width, "conv4", train, types))
        x = x + _pair(x, "res2", train, types)
        return nn.Dense(self.num_classes, name="classifier_3", **types)(jnp.max(x, axis=(1, 2)))


def _layer(x, channels: int, name: str, train: bool, types: dict):
    """Convolution, BN and ReLU, numbered 0 and 1 as in a Sequential of PyTorch."""
    x = conv(channels, 3, f"{name}_0", types, use_bias=True)(x)
    return nn.relu(batch_norm(train, f"{name}_1", types)(x))


def _pair(x, name: str, train: bool, types: dict):
    """Two layers that keep the shape."""
    for i in range(2):
        x = _layer(x, x.shape[-1], f"{name}_{i}", train, types)
    return x


def _pool(x):
    return nn.max_pool(x, (2, 2), strides=(2, 2))


def build(input_shape: tuple[int, int, int], num_classes: int, dtype) -> Net:
    """ResNet-9 for grey or colour images of at least 8x8; NetError for smaller ones."""
    height, width, channels = input_shape
    if min(height, width) < SMALLEST:
        raise NetError(f"resnet9: images of {height}x{width}; {SMALLEST}x{SMALLEST} is smallest")
    mean, std = pixel_statistics("resnet9", channels)
    module = ResNet9(num_classes=num_classes, dtype=dtype, param_dtype=dtype)
    return Net("resnet9", module, input_shape, num_classes, mean, std)
