"""What an engine is given, checked before anything runs: images, labels, order, a measure."""

import numpy as np

from jfi.criteria.criterion import Judgement
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


def check_order(order, golden: Golden, by: Judgement) -> np.ndarray:
    """Images as `detect` presents them: as told, or those nearest to another answer first, where
    constraints tell."""
    images = len(golden.logits)
    if order is None:
        if by.constraints is None:
            return np.arange(images)
        return np.argsort(golden.margin(by), kind="stable")
    order = np.asarray(order)
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
    """The images [B, ...] as the network takes them; several arrays as their bytes.

    Raises:
      InputError: it does not take them.
    """
    if network.inputs is not None and not _are_packed(images, network.inputs.size):
        return network.inputs.pack(images)
    images, wanted = _array("images", images), network.program.x.aval
    if images.shape[1:] != wanted.shape[1:] or images.dtype != wanted.dtype or not len(images):
        raise InputError(
            f"images have shape {images.shape} and dtype {images.dtype}; "
            f"the network takes [B, {', '.join(map(str, wanted.shape[1:]))}] of {wanted.dtype}"
        )
    return images


def _are_packed(images, size: int) -> bool:
    """Whether these are the bytes of images already."""
    known = isinstance(images, np.ndarray) and images.dtype == np.uint8
    return known and images.ndim == 2 and images.shape[1] == size


def check_labels(labels, images: int, by: Judgement, criterion: str = "") -> np.ndarray:
    """The labels [B, ...] of so many images, as the criterion takes them.

    Raises:
      InputError: they are not; the criterion takes none.
    """
    if by.check_labels is None:
        raise InputError(
            f"labels {kind(labels)} say nothing to the criterion {criterion}; leave them out"
        )
    return by.check_labels(_array("labels", labels), images)
