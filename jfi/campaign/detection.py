"""What a selection of images finds of a campaign's critical faults, without new inference.

A campaign that kept its bits knows for which images each fault is critical and masked. Algorithm 1
of DEAR-CNN (Bellarmino et al., DDECS 2025) gives a fault its gravest class over the images seen so
far; the number of faults in each class, as images are added in an order, are detection curves.
Any number of orders is judged on the same verdicts.
"""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jfi.campaign import records
from jfi.errors import InputError
from jfi.hardware.chunks import chunks
from jfi.workload.workload import Selection

SHARES = (0.9, 0.95, 0.99, 1.0)  # of the critical faults
_BLOCK = 1 << 26  # verdicts unpacked at a time


class Verdicts(NamedTuple):
    """Verdicts of F faults on B images, packed over images by `np.packbits`.

    critical: uint8 [F, ceil(B / 8)]; masked: the same, or None where the measure tells no masked.
    """

    critical: np.ndarray
    masked: np.ndarray | None
    images: int


class Curves(NamedTuple):
    """Faults by their gravest class after 0 to n images, [n + 1] each.

    Before the first image all are masked. `masked` and `non_critical` are None together.
    """

    critical: np.ndarray
    masked: np.ndarray | None
    non_critical: np.ndarray | None


def read_verdicts(workdir: str | os.PathLike) -> Verdicts:
    """The verdicts of a campaign that kept its bits, from its work directory.

    Raises:
      InputError: no such directory, a damaged one, or one without bits.
    """
    images = records.read_manifest(workdir)["images"]
    shards = list(records.read_shards(workdir))
    if not shards or "critical_bits" not in shards[0]:
        raise InputError(f"work directory {workdir} holds no bits by image; run with keep_bits")
    critical, masked = (
        np.concatenate([shard[name] for shard in shards]) if name in shards[0] else None
        for name in records.BITS
    )
    return Verdicts(critical, masked, images)


def curves(verdicts: Verdicts, order: np.ndarray) -> Curves:
    """Algorithm 1 over n images in an order, int [n] of image numbers, with every count kept.

    Raises:
      InputError: no image, one out of range, or one that comes twice.
    """
    order = _check_order(order, verdicts.images)
    critical = _counts_up(first_hits(verdicts.critical, order), order.size)
    if verdicts.masked is None:
        return Curves(critical, None, None)
    touched = _counts_up(first_hits(~verdicts.masked, order), order.size)
    return Curves(critical, len(verdicts.masked) - touched, touched - critical)


def first_hits(bits: np.ndarray, order: np.ndarray) -> np.ndarray:
    """int [F]: the place in `order` [n] of the first image whose bit is set, n where none is.

    Args:
      bits: uint8 [F, ceil(B / 8)], packed over images.
    """
    found = np.full(len(bits), order.size)
    for part, flags in _unpacked(bits, order):
        hit = flags.any(axis=1)
        found[part][hit] = flags[hit].argmax(axis=1)
    return found


def by_image(bits: np.ndarray, images: int) -> np.ndarray:
    """int [B]: faults whose bit is set for each image, of packed bits [F, ceil(B / 8)]."""
    parts = (flags.sum(axis=0) for _, flags in _unpacked(bits, np.arange(images)))
    return sum(parts, np.zeros(images, np.int64))


def shares(verdicts: Verdicts, order: np.ndarray) -> Curves:
    """The share of inferences, in [0, 1], in each class after 0 to n images (Figure 3).

    Before the first image all are masked.
    """
    order = _check_order(order, verdicts.images)
    inferences = np.maximum(len(verdicts.critical) * np.arange(1, order.size + 1), 1)

    def share(bits):
        return by_image(bits, verdicts.images)[order].cumsum() / inferences

    critical = np.concatenate([[0], share(verdicts.critical)])
    if verdicts.masked is None:
        return Curves(critical, None, None)
    masked = np.concatenate([[1], share(verdicts.masked)])
    return Curves(critical, masked, 1 - masked - critical)


def images_needed(
    critical: np.ndarray, total: int, shares: Sequence[float] = SHARES
) -> tuple[int | None, ...]:
    """Images until a curve [n + 1] has each share of `total` critical faults; None where never.

    Of no critical faults at all, any share is there before the first image.
    """
    wanted = [int(np.ceil(share * total - 1e-9)) for share in shares]
    found = np.searchsorted(critical, wanted)
    return tuple(int(n) if n < critical.size else None for n in found)


def set_cover(verdicts: Verdicts) -> Selection:
    """Images that together find every critical fault, greedily: the one that finds most first.

    It needs the verdicts, so it is no way to choose a workload, but what one may be judged by:
    after any number of images it has found at least 63% (1 - 1/e) of what so many can (Nemhauser
    et al., Mathematical Programming 1978). `cover_bound` says what they can at most.

    Raises:
      InputError: no fault is critical.
    """
    flags = _critical_rows(verdicts)
    if not len(flags):
        raise InputError(f"no fault is critical for any of {verdicts.images} images to cover")
    chosen = np.array([image for image, _ in _greedy(flags)])
    reason = f"greedy cover of {len(flags):,} critical faults, their verdicts known"
    return Selection(chosen, reason, verdicts.images)


def cover_bound(verdicts: Verdicts) -> np.ndarray:
    """int [B + 1]: critical faults that no choice of 0 to B images exceeds.

    Whatever images were taken, n others add at most the n largest of what each would add alone
    (submodularity); the least of this over the steps of the greedy cover.
    """
    flags = _critical_rows(verdicts)
    bound = np.full(verdicts.images + 1, len(flags))
    bound[0], covered = 0, 0
    for _, gains in _greedy(flags):
        most = covered + np.sort(gains)[::-1].cumsum()
        bound[1:] = np.minimum(bound[1:], most)
        covered += gains.max()
    return bound


def _greedy(flags: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(image, what each image [B] adds before it is taken) until every row of `flags` is hit."""
    left = np.ones(len(flags), bool)
    gains = flags.sum(axis=0, dtype=np.int64)
    while left.any():
        image = int(gains.argmax())
        yield image, gains
        new = left & flags[:, image]
        gains = gains - flags[new].sum(axis=0, dtype=np.int64)
        left &= ~new


def _critical_rows(verdicts: Verdicts) -> np.ndarray:
    """bool [those critical for any image, B]."""
    some = verdicts.critical[verdicts.critical.any(axis=1)]
    return np.unpackbits(some, axis=1, count=verdicts.images).astype(bool)


def _unpacked(bits: np.ndarray, order: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, bool [rows, n], images in order), some rows at a time."""
    for part in chunks(len(bits), max(1, _BLOCK // max(1, 8 * bits.shape[1]))):
        yield part, np.unpackbits(bits[part], axis=1)[:, order].astype(bool)


def _counts_up(first: np.ndarray, n: int) -> np.ndarray:
    """int [n + 1]: how many of `first` lie below 0 to n."""
    return np.concatenate([[0], np.bincount(first, minlength=n + 1)[:n].cumsum()])


def _check_order(order, images: int) -> np.ndarray:
    order = np.asarray(order)
    if order.ndim != 1 or not order.size or order.dtype.kind not in "iu":
        raise InputError(f"order has shape {order.shape}; the numbers of one image or more needed")
    if order.min() < 0 or order.max() >= images:
        bad = order[(order < 0) | (order >= images)][0]
        raise InputError(f"image {bad} is out of range; there are 0 to {images - 1}")
    if np.unique(order).size < order.size:
        values, counts = np.unique(order, return_counts=True)
        raise InputError(f"image {values[counts.argmax()]} comes twice in the order")
    return order
