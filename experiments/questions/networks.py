"""Five small networks, and functions of no argument that give them with the weights of a run.

    python -m experiments.questions
    python -m experiments.campaign --net=experiments/questions/networks.py:detector \\
        --dataset=runs/questions/detector.npz --criterion=detections:boxes=cxcywh

The first trains them and writes FOLDER/NAME_weights.npz, and FOLDER/NAME.npz with x_test and, where
labels are of use, y_test.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.questions import data
from jfi.errors import InputError

FOLDER = Path("runs", "questions")
LENGTH = 24  # characters that the language model reads
MEAN, SPREAD = 152.0, 77.0  # of what the regressor tells


class Detector(nn.Module):
    """A single-shot detector: images [B, SIDE, SIDE, 1] -> boxes [B, D, 4], scores [B, D, C].

    There is one anchor a cell; boxes are centre and size in pixels. (W. Liu et al., "SSD: Single
    Shot MultiBox Detector", ECCV 2016.)
    """

    @nn.compact
    def __call__(self, x):
        """Boxes and scores."""
        for name, width in (("conv1", 8), ("conv2", 16), ("conv3", 32)):
            x = nn.relu(nn.Conv(width, (3, 3), 2, name=name)(x))
        move = nn.Conv(4, (1, 1), name="boxes")(x).reshape(len(x), -1, 4)
        scores = nn.Conv(len(data.KINDS), (1, 1), name="scores")(x)
        boxes = [anchors() + data.CELL * move[..., :2], data.CELL * jnp.exp(move[..., 2:])]
        return {
            "boxes": jnp.concatenate(boxes, -1),
            "scores": nn.sigmoid(scores.reshape(len(x), -1, len(data.KINDS))),
        }


def anchors() -> np.ndarray:
    """float32 [D, 2]: the centres of the cells, x first."""
    at = np.arange(data.GRID) * data.CELL + data.CELL / 2
    x, y = np.meshgrid(at, at)
    return np.stack([x.ravel(), y.ravel()], 1).astype(np.float32)


class Segmenter(nn.Module):
    """Images [B, H, W, 1] -> chances of each pixel [B, H, W, C], by softmax; the class 0 is none.

    A U-Net of one step down and up (O. Ronneberger et al., MICCAI 2015).
    """

    @nn.compact
    def __call__(self, x):
        """Chances."""
        fine = nn.relu(nn.Conv(8, (3, 3), name="fine")(x))
        x = nn.relu(nn.Conv(16, (3, 3), 2, name="down")(fine))
        x = nn.relu(nn.Conv(16, (3, 3), name="coarse")(x))
        x = jnp.concatenate([fine, x.repeat(2, axis=1).repeat(2, axis=2)], -1)
        return nn.softmax(nn.Conv(1 + len(data.KINDS), (3, 3), name="out")(x))


class Tagger(nn.Module):
    """Images [B, H, W, 1] -> chances [B, C] that each kind of shape is there, by sigmoid."""

    @nn.compact
    def __call__(self, x):
        """Chances."""
        for name, width in (("conv1", 8), ("conv2", 16), ("conv3", 32)):
            x = nn.relu(nn.Conv(width, (3, 3), 2, name=name)(x))
        return nn.sigmoid(nn.Dense(len(data.KINDS), name="out")(x.max((1, 2))))


class Regressor(nn.Module):
    """Ten numbers of a patient [B, 10] -> how far diabetes goes in a year [B, 1], 25 to 346."""

    @nn.compact
    def __call__(self, x):
        """How far."""
        x = nn.relu(nn.Dense(32, name="hidden")(x))
        return MEAN + SPREAD * nn.Dense(1, name="out")(nn.relu(nn.Dense(16, name="hidden2")(x)))


class Gpt(nn.Module):
    """Characters int32 [B, T] -> scores [B, T, V] of the one after each, from those up to it.

    (A. Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018.)
    """

    layers: int = 1
    width: int = 32
    heads: int = 2

    @nn.compact
    def __call__(self, tokens):
        """Scores."""
        vocabulary = len(data.CHARACTERS)
        place = self.param("place", nn.initializers.normal(0.02), (LENGTH, self.width))
        x = nn.Embed(vocabulary, self.width, name="embed")(tokens) + place
        mask = nn.make_causal_mask(tokens)
        for k in range(self.layers):
            y = nn.LayerNorm(name=f"norm{k}a")(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads, name=f"attention{k}")(y, mask=mask)
            y = nn.LayerNorm(name=f"norm{k}b")(x)
            y = nn.gelu(nn.Dense(4 * self.width, name=f"up{k}")(y))
            x = x + nn.Dense(self.width, name=f"down{k}")(y)
        return nn.Dense(vocabulary, name="out")(nn.LayerNorm(name="norm")(x))


MODULES: dict[str, nn.Module] = {
    "detector": Detector(),
    "segmenter": Segmenter(),
    "tagger": Tagger(),
    "regressor": Regressor(),
    "gpt": Gpt(),
}


def save(path: Path, variables: Any) -> None:
    """Write the weights of a network as a .npz file, an array a parameter."""
    np.savez(path, **jax.tree.map(np.asarray, flatten_dict(variables, sep="/")))


def trained(name: str, folder: Path = FOLDER) -> tuple[nn.Module, Any]:
    """A network and its weights, as `jfi.adopt` takes them.

    Raises:
      InputError: it is not trained yet.
    """
    path = Path(folder, f"{name}_weights.npz")
    if not path.is_file():
        raise InputError(f"{path} is not there; make it: python -m experiments.questions")
    with np.load(path) as arrays:
        return MODULES[name], unflatten_dict(dict(arrays), sep="/")


def detector():
    """The detector; `detections:boxes=cxcywh` is what to ask of it."""
    return trained("detector")


def segmenter():
    """The segmenter; `pixels:0.01` is what to ask of it."""
    return trained("segmenter")


def tagger():
    """The tagger; `threshold` is what to ask of it."""
    return trained("tagger")


def regressor():
    """The regressor; `tolerance:10` is what to ask of it."""
    return trained("regressor")


def gpt():
    """The language model; `tokens:any` or `tokens:last` is what to ask of it."""
    return trained("gpt")
