"""Work cut into pieces of one size, so that nothing recompiles."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import lax

CHUNK_BYTES = 1 << 22  # bytes of the largest value of a chunk: more falls out of the caches
PAIRS = (64, 8192)  # fewest and most pairs of a chunk
ENOUGH = 512, 1 << 29  # pairs and operations of a chunk from which on more gain nothing


def chunk_size(live: int, most: int = CHUNK_BYTES, work: int = 1) -> int:
    """Pairs of a chunk, a power of two: many, as long as the largest value stays in cache.

    The last chunk of a site is filled up, so that one with work enough is better short.

    Args:
      live: bytes of the largest value of one pair.
      most: bytes it may take of all pairs.
      work: operations of one pair.
    """
    fewest, largest = PAIRS
    largest = min(largest, max(ENOUGH[0], _power(ENOUGH[1], work)))
    return int(np.clip(_power(most, live), fewest, largest))


def _power(whole: int, part: int) -> int:
    """The largest power of two of such parts that there is room for; one at least."""
    return 1 << max(0, (whole // max(1, part)).bit_length() - 1)


def mapped(function: Callable[[Any], Any], rows: Any, size: int) -> Any:
    """`function` of every row of a pytree, traced: at most `size` rows are under way at a time."""
    if size >= len(jax.tree.leaves(rows)[0]):
        return jax.vmap(function)(rows)
    return lax.map(function, rows, batch_size=size)


def chunks(total: int, size: int) -> Iterator[slice]:
    """Rows 0 to `total` in chunks of `size`; the last may be shorter (see `filled_up`)."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def dealt(owner: np.ndarray, owners: int, size: int) -> Iterator[np.ndarray]:
    """Positions in `owner` [n], in chunks [owners * size] of `size` for each owner in turn.

    Where an owner has too few left, -1.
    """
    own = [np.flatnonzero(owner == number) for number in range(owners)]
    for part in chunks(max(map(len, own)), size):
        yield np.concatenate([filled_up(rows[part], size, -1) for rows in own])


def filled_up(rows: np.ndarray, size: int, fill: int | None = None) -> np.ndarray:
    """`rows` [n <= size, ...] made `size` long by repeating `fill`, by default the first."""
    extra = rows[:1] if fill is None else np.full((1, *rows.shape[1:]), fill, rows.dtype)
    return np.concatenate([rows, np.repeat(extra, size - len(rows), axis=0)])


def blocks(images: int, most: int) -> list[slice]:
    """Images in equal blocks of at most `most`, at least one each; the last may be shorter."""
    count = -(-images // max(1, most))
    return list(chunks(images, -(-images // count)))
