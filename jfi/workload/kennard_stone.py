"""Kennard-Stone: points far from each other first (Kennard and Stone, Technometrics 1969)."""

from collections.abc import Callable

import numpy as np

from jfi.errors import InputError

_BLOCK = 1 << 22  # distances held at a time in the search for the first pair

# From all points [B, D] to some of them [b, D]: distances [b, B].
Distances = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _euclidean(points: np.ndarray) -> tuple[np.ndarray, Distances]:
    from scipy.spatial.distance import cdist

    return points, lambda every, some: cdist(some, every)


def _correlation(points: np.ndarray) -> tuple[np.ndarray, Distances]:
    """1 - Pearson's r; a point of equal numbers has r = 0 with all."""
    centred = points - points.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)
    return unit, lambda every, some: 1 - some @ every.T


DISTANCES = {"euclidean": _euclidean, "correlation": _correlation}


def chosen_at(embedding: np.ndarray, distance: str = "euclidean") -> np.ndarray:
    """[B]: how far each point was from the nearest of those chosen before it.

    The two points farthest apart are chosen first, at their distance; then always the one whose
    nearest chosen point is farthest. Values never rise from one choice to the next, so the highest
    first is the order of choice, but for ties, which go to the lowest number.

    Args:
      embedding: [B, D], finite.
      distance: a name of `DISTANCES`.

    Raises:
      InputError: an unknown distance.
    """
    if distance not in DISTANCES:
        raise InputError(f"distance {distance!r} is unknown; choose from {', '.join(DISTANCES)}")
    points, distances = DISTANCES[distance](np.asarray(embedding, np.float64))
    if len(points) < 2:
        return np.zeros(len(points))
    first, second, apart = _farthest(points, distances)
    found = np.zeros(len(points))
    nearest = distances(points, points[[first, second]]).min(axis=0)
    found[[first, second]], nearest[[first, second]] = apart, -np.inf
    for _ in range(len(points) - 2):
        chosen = int(nearest.argmax())
        found[chosen], nearest[chosen] = nearest[chosen], -np.inf
        np.minimum(nearest, distances(points, points[[chosen]])[0], out=nearest)
    return np.maximum(found, 0)


def _farthest(points: np.ndarray, distances: Distances) -> tuple[int, int, float]:
    """The first two points that are farthest apart, and their distance."""
    best, size = (0, 1, -np.inf), max(1, _BLOCK // len(points))
    for start in range(0, len(points), size):
        apart = distances(points, points[start : start + size])
        apart[np.arange(len(apart)), start + np.arange(len(apart))] = -np.inf
        row, column = np.unravel_index(apart.argmax(), apart.shape)
        if apart[row, column] > best[2]:
            best = start + int(row), int(column), float(apart[row, column])
    return best
