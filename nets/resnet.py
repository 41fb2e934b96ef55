"""The CIFAR ResNets: K. He, X. Zhang, S. Ren, J. Sun, Deep residual learning for image recognition,
CVPR 2016, section 4.2: 6n + 2 layers, 16-32-64 channels, shortcuts of option A (no parameters).

Layer for layer the networks of github.com/akamaster/pytorch_resnet_cifar10, whose checkpoints
load: PyTorch's padding, BN with epsilon 1e-5.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from nets.layers import batch_norm, conv, types_of
from nets.net import Net, pixel_statistics

DEPTHS = (20, 32, 44, 56)


def _shortcut(x, channels: int, stride: int):
    """Option A: every `stride`-th pixel, new channels zero, half of them on either side."""
    pad = (channels - x.shape[-1]) // 2
    return jnp.pad(x[:, ::stride, ::stride, :], ((0, 0), (0, 0), (0, 0), (pad, pad)))


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
            x = _shortcut(x, self.channels, self.stride)
        return nn.relu(y + x)


class ResNet(nn.Module):
    """Images [B, H, W, C] -> logits [B, num_classes]. `blocks` per stage; 3 stages.

    `apply(variables, x)` is inference; for training, `apply(variables, x, train=True,
    mutable=["batch_stats"])` normalises by the batch and returns the new running statistics.
    """

    blocks: int
    num_classes: int = 10
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        types = types_of(self)
        x = nn.relu(batch_norm(train, "bn1", types)(conv(16, 3, "conv1", types)(x)))
        for stage, channels in enumerate((16, 32, 64), start=1):
            for block in range(self.blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                x = Block(channels, stride, name=f"layer{stage}_{block}", **types)(x, train)
        return nn.Dense(self.num_classes, name="linear", **types)(jnp.mean(x, axis=(1, 2)))


def build(depth: int, input_shape: tuple[int, int, int], num_classes: int, dtype) -> Net:
    """ResNet of `depth` = 6n + 2 layers for images of any size, grey or colour."""
    name = f"resnet{depth}"
    mean, std = pixel_statistics(name, input_shape[-1])
    module = ResNet((depth - 2) // 6, num_classes, dtype, dtype)
    return Net(name, module, input_shape, num_classes, mean, std)
