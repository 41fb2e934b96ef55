"""ResNet-18: K. He, X. Zhang, S. Ren, J. Sun, Deep residual learning for image recognition,
CVPR 2016, Table 1, with shortcuts of option B (a 1x1 convolution where the shape changes), in the
CIFAR-10 form of github.com/kuangliu/pytorch-cifar: the first layer is a 3x3 convolution of stride
1, without pooling. 11,173,962 parameters, named as there, so its checkpoints load.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from nets.layers import batch_norm, conv, types_of
from nets.net import Net, pixel_statistics


class Block(nn.Module):
    """Basic block: conv, BN, ReLU, conv, BN, plus the shortcut, ReLU. [B, H, W, C] -> the same,
    with H and W divided by `stride` and `channels` channels."""

    channels: int
    stride: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, train: bool):
        types = types_of(self)
        y = conv(self.channels, 3, "conv1", types, self.stride)(x)
        y = nn.relu(batch_norm(train, "bn1", types)(y))
        y = batch_norm(train, "bn2", types)(conv(self.channels, 3, "conv2", types)(y))
        if x.shape != y.shape:
            x = conv(self.channels, 1, "shortcut_0", types, self.stride)(x)
            x = batch_norm(train, "shortcut_1", types)(x)
        return nn.relu(y + x)


class ResNet18(nn.Module):
    """Images [B, H, W, C] -> logits [B, num_classes]: four stages of two blocks, each twice as
    wide as the one before; `width` channels in the first."""

    width: int = 64
    num_classes: int = 10
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        types = types_of(self)
        x = nn.relu(batch_norm(train, "bn1", types)(conv(self.width, 3, "conv1", types)(x)))
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"layer{stage + 1}_{block}"
                x = Block(self.width << stage, stride, name=name, **types)(x, train)
        return nn.Dense(self.num_classes, name="linear", **types)(jnp.mean(x, axis=(1, 2)))


def build(input_shape: tuple[int, int, int], num_classes: int, dtype) -> Net:
    """ResNet-18 for images of any size, grey or colour."""
    mean, std = pixel_statistics("resnet18", input_shape[-1])
    module = ResNet18(num_classes=num_classes, dtype=dtype, param_dtype=dtype)
    return Net("resnet18", module, input_shape, num_classes, mean, std)
