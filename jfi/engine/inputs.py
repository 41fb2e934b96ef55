"""What an engine is given, checked before anything runs: images, labels, order, a measure."""

import numpy as np

from jfi.engine import screen as screening
from jfi.engine.golden import Golden
from jfi.errors import InputError, kind
from jfi.networks.sites import Network

# What is asked of every fault: its outcome class on every image; whether it is critical for each
# image; or only whether it is critical for any.
MEASURES = ("full", "critical", "detect")


def check_measure(measure: str, screen: str | None = None) -> None:
    """Raises InputError for an unknown measure, or one that can't be screened."""
    if measure not in MEASURES:
        raise InputError(f"measure {measure!r} is unknown; choose from {', '.join(MEASURES)}")
    if screen and measure == "full":
        raise InputError(f"screen {screen!r} tells critical or not; measure 'full' tells more")


def check_screen(screen: str | None) -> str | None:
    """Raises InputError for a precision to screen in that is unknown."""
    if screen is not None and screen not in screening.REDUCED:
        known = ", ".join(screening.REDUCED)
        raise InputError(f"screen {screen!r} is unknown; choose from {known}, or None for none")
    return screen


def check_order(order, golden: Golden) -> np.ndarray:
    """Images as `detect` presents them: as told, or those nearest to another answer first."""
    if order is None:
        return np.argsort(golden.margin, kind="stable")
    order, images = np.asarray(order), len(golden.top1)
    if not np.array_equal(np.sort(order, axis=None), np.arange(images)):
        raise InputError(
            f"order is {kind(order)}; it must name each of the {images} images once, from 0 on"
        )
    return order


def _array(what: str, values) -> np.ndarray:
    """`values` as NumPy, where they are an array or make one."""
    try:
        found = np.asarray(values)
    except (TypeError, ValueError):  # random keys, rows of unequal length
        found = np.array(None)
    if found.dtype == object:
        raise InputError(f"{what} are {kind(values)}; they must be one array, a row an image")
    return found


def check_images(network: Network, images) -> np.ndarray:
    """The images [B, ...] as the network takes them. Raises InputError if it does not."""
    images, wanted = _array("images", images), network.program.x.aval
    if images.shape[1:] != wanted.shape[1:] or images.dtype != wanted.dtype or not len(images):
        raise InputError(
            f"images have shape {images.shape} and dtype {images.dtype}; "
            f"the network takes [B, {', '.join(map(str, wanted.shape[1:]))}] of {wanted.dtype}"
        )
    return images


def check_labels(labels, logits_shape: tuple[int, int]) -> np.ndarray:
    """The labels as int32 [B], for logits [B, C].

    Raises:
      InputError: not one integer an image, or one that is not in [0, C).
    """
    labels, (images, classes) = _array("labels", labels), logits_shape
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        raise InputError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}; "
            f"{images} integers are needed, one an image"
        )
    bad = labels[(labels < 0) | (labels >= classes)]
    if bad.size:
        raise InputError(f"label {bad[0]} is out of range; the classes are 0 to {classes - 1}")
    return labels.astype(np.int32)
