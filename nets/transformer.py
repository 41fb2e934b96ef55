"""Small transformers: a ViT for images and a GPT for text, of the same blocks.

Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021, and Radford et al., "Language models
are unsupervised multitask learners", 2019: blocks with the normalisation before each half, GELU,
learned positions. What differs: sizes far below theirs, no dropout, and q, k and v are three layers
instead of one, so that each is told by its name.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nets.layers import types_of
from nets.net import UNCHANGED, Net, NetError, pixel_statistics

# The printable characters of ASCII and the newline; what a GPT here reads and writes.
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
GRID = 4  # patches along each side of an image


class Sizes(NamedTuple):
    """Width of a token, number of blocks, heads of each, and how much wider its MLP is."""

    width: int = 64
    depth: int = 3
    heads: int = 4
    wider: int = 4


def _norm(module: nn.Module, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(use_fast_variance=False, name=name, **types_of(module))


def _position(module: nn.Module, tokens: int) -> jax.Array:
    shape = (tokens, module.sizes.width)
    return module.param("position", nn.initializers.normal(0.02), shape, module.param_dtype)


class Attention(nn.Module):
    """Self-attention of [B, T, width]; `causal`: each token sees those before it and itself."""

    sizes: Sizes
    causal: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        batch, tokens, width = x.shape
        heads = batch, tokens, self.sizes.heads, width // self.sizes.heads
        types = types_of(self)
        q, k, v = (nn.Dense(width, name=name, **types)(x).reshape(heads) for name in "qkv")
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) / jnp.sqrt(heads[-1]).astype(q.dtype)
        if self.causal:
            seen = jnp.tril(jnp.ones((tokens, tokens), bool))
            scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum("bhij,bjhd->bihd", nn.softmax(scores), v).reshape(x.shape)
        return nn.Dense(width, name="projection", **types)(mixed)


class MLP(nn.Module):
    """Two layers with GELU between them, [B, T, width] -> [B, T, width]."""

    sizes: Sizes
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = self.sizes.width
        x = nn.gelu(nn.Dense(self.sizes.wider * width, name="fc1", **types_of(self))(x))
        return nn.Dense(width, name="fc2", **types_of(self))(x)


class Block(nn.Module):
    """Attention, then an MLP, each added to what it reads."""

    sizes: Sizes
    causal: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        types = types_of(self)
        attention = Attention(self.sizes, self.causal, name="attention", **types)
        x = x + attention(_norm(self, "norm1")(x))
        return x + MLP(self.sizes, name="mlp", **types)(_norm(self, "norm2")(x))


def _blocks(module: nn.Module, x: jax.Array, causal: bool) -> jax.Array:
    """All blocks of a module, and the norm after them."""
    for i in range(1, module.sizes.depth + 1):
        x = Block(module.sizes, causal, name=f"block{i}", **types_of(module))(x)
    return _norm(module, "norm")(x)


class ViT(nn.Module):
    """Images [B, H, W, C] -> logits [B, num_classes], read from a token of its own."""

    sizes: Sizes = Sizes()
    num_classes: int = 10
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        del train  # no layer acts otherwise in training
        types, width = types_of(self), self.sizes.width
        patch = (x.shape[1] // GRID, x.shape[2] // GRID)
        x = nn.Conv(width, patch, strides=patch, name="embedding", **types)(x.astype(self.dtype))
        x = x.reshape(len(x), -1, width)
        first = self.param("cls", nn.initializers.zeros, (width,), self.param_dtype)
        first = jnp.broadcast_to(first, (len(x), 1, width)).astype(x.dtype)
        x = jnp.concatenate([first, x], axis=1)
        x = x + _position(self, x.shape[1]).astype(x.dtype)
        return nn.Dense(self.num_classes, name="head", **types)(_blocks(self, x, False)[:, 0])


class GPT(nn.Module):
    """Characters [B, T], numbers below num_classes -> logits [B, T, num_classes] of the next."""

    sizes: Sizes = Sizes(depth=2)
    num_classes: int = len(CHARACTERS)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        del train
        types = types_of(self)
        tokens = nn.Embed(self.num_classes, self.sizes.width, name="tokens", **types)
        x = tokens(x.astype(jnp.int32))
        x = x + _position(self, x.shape[1]).astype(x.dtype)
        return nn.Dense(self.num_classes, name="head", **types)(_blocks(self, x, True))


def build_vit(input_shape: tuple[int, int, int], num_classes: int, dtype) -> Net:
    """A ViT of 4x4 patches, 3 blocks and a width of 64, for grey or colour images.

    Raises NetError where the sides of the images are no multiples of 4.
    """
    height, width, channels = input_shape
    if height % GRID or width % GRID:
        raise NetError(f"vit: images of {height}x{width}; sides that are multiples of 4 are right")
    mean, std = pixel_statistics("vit", channels)
    return Net("vit", ViT(Sizes(), num_classes, dtype, dtype), input_shape, num_classes, mean, std)


def build_gpt(input_shape: tuple[int], num_classes: int, dtype) -> Net:
    """A GPT of 2 blocks and a width of 64 that reads texts of any one length, as `CHARACTERS`."""
    module = GPT(Sizes(depth=2), num_classes, dtype, dtype)
    return Net("gpt", module, input_shape, num_classes, *UNCHANGED)
