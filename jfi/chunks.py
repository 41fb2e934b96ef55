"""Work cut into pieces of one size, so that nothing recompiles."""

from collections.abc import Iterator

import numpy as np

LIVE = 1 << 22  # bytes of the largest value of a chunk: more falls out of the caches
PAIRS = (64, 8192)  # fewest and most pairs of a chunk


def chunk_size(live: int) -> int:
    """Pairs of a chunk, a power of two: many, as long as the largest value stays in cache.

    Args:
      live: bytes of the largest value of one pair.
    """
    fewest, most = PAIRS
    return int(np.clip(1 << max(0, (LIVE // max(1, live)).bit_length() - 1), fewest, most))


def chunks(total: int, size: int) -> Iterator[slice]:
    """Rows 0 to `total` in chunks of `size`; the last may be shorter (see `filled_up`)."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def filled_up(rows: np.ndarray, size: int) -> np.ndarray:
    """`rows` [n <= size, ...] made `size` long by repeating the first."""
    return np.concatenate([rows, np.repeat(rows[:1], size - len(rows), axis=0)])


def blocks(images: int, most: int) -> list[slice]:
    """Images in equal blocks of at most `most`, at least one each; the last may be shorter."""
    count = -(-images // max(1, most))
    return list(chunks(images, -(-images // count)))
