"""VGG with batch normalisation: K. Simonyan, A. Zisserman, Very deep convolutional networks for
large-scale image recognition, ICLR 2015, Table 1, columns A (VGG-11) and D (VGG-16), in the
CIFAR-10 form of github.com/kuangliu/pytorch-cifar: BN after each convolution, and one dense layer
in place of three. Parameters are named as there (features.0.weight), so its checkpoints load.

Pooling rounds odd sides up, so that five of them fit 28x28 images too; at 32x32 nothing is odd.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from nets.layers import batch_norm, conv, types_of
from nets.net import Net, NetError, pixel_statistics

# Channels of the 3x3 convolutions; a pooling follows each tuple.
STAGES = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}


class VGG(nn.Module):
    """Images [B, H, W, C], H and W at most 32 -> logits [B, num_classes]."""

    stages: tuple[tuple[int, ...], ...]
    num_classes: int = 10
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        types = types_of(self)
        layer = 0  # PyTorch counts convolution, BN, ReLU and pooling alike
        for stage in self.stages:
            for channels in stage:
                x = conv(channels, 3, f"features_{layer}", types, use_bias=True)(x)
                x = nn.relu(batch_norm(train, f"features_{layer + 1}", types)(x))
                layer += 3
            x = nn.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
            layer += 1
        return nn.Dense(self.num_classes, name="classifier", **types)(x.reshape(x.shape[0], -1))


def build(depth: int, input_shape: tuple[int, int, int], num_classes: int, dtype) -> Net:
    """VGG of `depth` layers for grey or colour images of at most 32x32.

    Raises NetError for larger ones: the dense layer reads one pixel.
    """
    name, (height, width, channels) = f"vgg{depth}", input_shape
    if max(height, width) > 32:
        raise NetError(f"{name}: images of {height}x{width}; 32x32 is the largest")
    mean, std = pixel_statistics(name, channels)
    module = VGG(STAGES[depth], num_classes, dtype, dtype)
    return Net(name, module, input_shape, num_classes, mean, std)
