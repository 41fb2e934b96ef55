"""LeNet-5: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document
recognition, Proc. IEEE 86(11), 1998, section II.B.

What differs from the paper, as in today's common re-implementations: ReLU in place of the scaled
tanh, max pooling without trained coefficients in place of sub-sampling, C3 connected to all maps
of S2, and a dense layer with softmax in place of the RBF output. The paper pads 28x28 digits to
32x32; here conv1 pads by 2, which is the same.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from nets.net import Net, NetError, pixel_statistics


class Widths(NamedTuple):
    """Channels and padding of conv1 and conv2, units of fc1 and fc2, side of the kernels."""

    channels: tuple[int, int]
    hidden: tuple[int, int]
    kernel: int
    padding: tuple[int, int]


# By image side. The one for 8x8 digits is small on purpose: its exhaustive campaign is short.
WIDTHS = {
    8: Widths(channels=(6, 12), hidden=(32, 24), kernel=3, padding=(1, 1)),
    28: Widths(channels=(6, 16), hidden=(120, 84), kernel=5, padding=(2, 0)),
    32: Widths(channels=(6, 16), hidden=(120, 84), kernel=5, padding=(0, 0)),
}


class LeNet(nn.Module):
    """Images [B, H, W, C] -> logits [B, num_classes]."""

    widths: Widths
    num_classes: int = 10
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        del train  # no layer acts otherwise in training
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        side = (self.widths.kernel, self.widths.kernel)
        for i, (channels, padding) in enumerate(
            zip(self.widths.channels, self.widths.padding, strict=True), start=1
        ):
            x = nn.Conv(channels, side, padding=padding, name=f"conv{i}", **types)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, units in enumerate(self.widths.hidden, start=1):
            x = nn.relu(nn.Dense(units, name=f"fc{i}", **types)(x))
        return nn.Dense(self.num_classes, name="fc3", **types)(x)


def build(input_shape: tuple[int, int, int], num_classes: int, dtype) -> Net:
    """LeNet-5 for images of 28x28, 32x32 or (smaller layers) 8x8, grey or colour.

    Raises NetError for any other shape.
    """
    height, width, channels = input_shape
    if height != width or height not in WIDTHS:
        known = ", ".join(f"{side}x{side}" for side in WIDTHS)
        raise NetError(f"lenet: images of {height}x{width}; known are {known}")
    widths = WIDTHS[height]
    mean, std = pixel_statistics("lenet", channels)
    module = LeNet(widths, num_classes, dtype, dtype)
    flattened = (("params/fc1/kernel", _feature_map(height, widths)),)
    return Net("lenet", module, input_shape, num_classes, mean, std, flattened)


def _feature_map(side: int, widths: Widths) -> tuple[int, int, int]:
    """(H, W, C) of what fc1 reads: two convolutions of stride 1, each pooled by 2."""
    for padding in widths.padding:
        side = (side + 2 * padding - widths.kernel + 1) // 2
    return side, side, widths.channels[1]
