"""Work cut into pieces of one size, so that nothing recompiles."""

from collections.abc import Iterator

import numpy as np

CHUNK_BYTES = 1 << 22  # bytes of the largest value of a chunk: more falls out of the caches
PAIRS = (64, 8192)  # fewest and most pairs of a chunk


def chunk_size(live: int, most: int = CHUNK_BYTES) -> int:
    """Pairs of a chunk, a power of two: many, as long as the largest value stays in cache.

    Args:
      live: bytes of the largest value of one pair.
      most: bytes it may take of all pairs.
    """
    fewest, largest = PAIRS
    return int(np.clip(1 << max(0, (most // max(1, live)).bit_length() - 1), fewest, largest))


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
