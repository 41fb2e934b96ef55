"""The CIFAR ResNets: K. He, X. Zhang, S. Ren, J. Sun, Deep residual learning for image recognition,
CVPR 2016, section 4.2: 6n + 2 layers, 16-32-64 channels, shortcuts of option A (no parameters).

Layer for layer the networks of github.com/akamaster/pytorch_resnet_cifar10, whose checkpoints
load: PyTorch's padding, BN with epsilon 1e-5.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from nets.net import Net, pixel_statistics

DEPTHS = (20, 32, 44, 56)


def _conv(channels: int, stride: int, name: str, types: dict) -> nn.Conv:
    """3x3 convolution without bias; padding by 1 on both sides, also where the stride is 2."""
    init = nn.initializers.kaiming_normal()
    sizes = {"kernel_size": (3, 3), "strides": (stride, stride), "padding": 1}
    return nn.Conv(channels, use_bias=False, kernel_init=init, name=name, **sizes, **types)


def _batch_norm(train: bool, types: dict):
    """Batch normalisation as PyTorch does it; its momentum of 0.1 is 0.9 in Flax."""
    return partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, **types)


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
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = _batch_norm(train, types)
        y = norm(name="bn1")(_conv(self.channels, self.stride, "conv1", types)(x))
        y = norm(name="bn2")(_conv(self.channels, 1, "conv2", types)(nn.relu(y)))
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
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.relu(_batch_norm(train, types)(name="bn1")(_conv(16, 1, "conv1", types)(x)))
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
