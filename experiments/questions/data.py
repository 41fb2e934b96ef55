"""What the networks are trained and judged on: scenes of shapes, diabetes, and a text.

All of it is made here, or comes with scikit-learn and Python.
"""

from typing import NamedTuple

import numpy as np

GRID, CELL = 3, 8  # cells a side of a scene; pixels a side of a cell
SIDE = GRID * CELL
KINDS = ("square", "disc", "cross")
CHARACTERS = "\n !'(),-.:;_`abcdefghijklmnopqrstuvwxyz"  # the first stands for all others
TEST = 64  # images that are kept for the campaign
TOPICS = ("assert", "class", "for", "function", "if", "import", "try", "while", "with", "yield")


class Scenes(NamedTuple):
    """Images of shapes, at most one a cell.

    images: float32 [B, SIDE, SIDE, 1]. kind: int32 [B, GRID, GRID], of KINDS from 1 on, 0 for none.
    boxes: float32 [B, GRID, GRID, 4], centre and size in pixels, x first; 0 where there is none.
    mask: int32 [B, SIDE, SIDE], the kind at each pixel.
    """

    images: np.ndarray
    kind: np.ndarray
    boxes: np.ndarray
    mask: np.ndarray


def scenes(count: int, seed: int) -> Scenes:
    """So many scenes, half of the cells empty."""
    rng = np.random.default_rng(seed)
    shape = (count, GRID, GRID)
    kind = rng.integers(1, 1 + len(KINDS), shape) * (rng.random(shape) < 0.5)
    radius = rng.uniform(2.5, 4, shape)
    corner = np.arange(GRID) * CELL + CELL / 2
    x, y = (at + rng.uniform(-1, 1, shape) for at in np.meshgrid(corner, corner))
    grey = rng.uniform(0.5, 1, shape)
    pixel = np.arange(SIDE) + 0.5
    # [B, row, column of a cell, row, column of a pixel].
    dx, dy = np.abs(pixel - x[..., None, None]), np.abs(pixel[:, None] - y[..., None, None])
    r, far, near = radius[..., None, None], np.maximum(dx, dy), np.minimum(dx, dy)
    inside = np.stack([far <= r, dx**2 + dy**2 <= r**2, (far <= r) & (near <= r / 3)])
    here = np.take_along_axis(
        inside, np.maximum(kind - 1, 0)[None, ..., None, None], axis=0
    )[0] & (kind > 0)[..., None, None]  # fmt: skip
    mask = (here * kind[..., None, None]).max((1, 2))
    images = (here * grey[..., None, None]).max((1, 2)) + rng.normal(0, 0.1, mask.shape)
    boxes = np.stack([x, y, 2 * radius, 2 * radius], -1) * (kind > 0)[..., None]
    return Scenes(
        images[..., None].astype(np.float32),
        kind.astype(np.int32),
        boxes.astype(np.float32),
        mask.astype(np.int32),
    )


def present(kind: np.ndarray) -> np.ndarray:
    """int32 [B, len(KINDS)]: which kinds of shape each scene has."""
    return np.stack([(kind == k).any((1, 2)) for k in range(1, 1 + len(KINDS))], 1).astype(np.int32)


def diabetes() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's diabetes, in a fixed order: float32 [442, 10] of mean 0, and [442, 1]."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    order = np.argsort(np.random.Philox(0).random_raw(len(y)))
    return (x / x.std(0)).astype(np.float32)[order], y.astype(np.float32)[order, None]


def text() -> np.ndarray:
    """int32: characters of Python's help on its statements, by their place in CHARACTERS."""
    from pydoc_data.topics import topics

    code = {letter: number for number, letter in enumerate(CHARACTERS)}
    letters = "".join(topics[name] for name in TOPICS).lower()
    return np.array([code.get(letter, 0) for letter in letters], np.int32)


def windows(letters: np.ndarray, length: int, count: int, seed: int) -> tuple[np.ndarray, ...]:
    """int32 [count, length] of a text, and the letters that come next, [count, length]."""
    start = np.random.default_rng(seed).integers(0, letters.size - length, count)
    at = start[:, None] + np.arange(length + 1)
    return letters[at[:, :-1]], letters[at[:, 1:]]
