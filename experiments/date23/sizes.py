"""Sample sizes of any network as Tables I and II of Ruospo et al., DATE 2023, print them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from jfi.faults import FAULT_MODELS, FaultSpace, Site
from jfi.sampling import sampling
from jfi.sampling.sampling import Request, Stratum, sample_size

PRINTED = Request(error_margin=0.01, confidence=0.99, t=2.58)  # the paper's e and t
METHODS = ("network_wise", "layer_wise", "data_unaware", "data_aware")


class Paper(NamedTuple):
    """What DATE'23 prints of a network.

    words: parameters of each layer. aware: data-aware injections of each layer, where printed.
    margins: Table III, average error margin in percent, in the order of METHODS.
    """

    words: tuple[int, ...]
    aware: tuple[int, ...]
    aware_total: int
    margins: tuple[float, ...]


def _mobilenetv2_words() -> tuple[int, ...]:
    """Weights of its 54 layers for 32x32 images: expansion, depth-wise, projection a block."""
    # Expansion, channels and number of blocks (Sandler et al., CVPR 2018, table 2).
    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    words, width = [27 * 32], 32
    for expansion, channels, repeats in stages:
        for _ in range(repeats):
            inner = expansion * width
            words += [width * inner, 9 * inner, inner * channels]
            width = channels
    return (*words, 320 * 1280, 1280 * 10)


PAPERS = {
    "resnet20": Paper(
        (432, *6 * (2304,), 4608, *3 * (9216,), 9226, 9216, 18432, *5 * (36864,), 640),
        (2732, *6 * (6258,), 8744, *3 * (11652,), 11656, 11652, 14425, *5 * (16563,), 3309),
        207_837,
        (1.57, 0.19, 0.06, 0.08),
    ),
    "mobilenetv2": Paper(_mobilenetv2_words(), (), 778_951, (3.28, 0.01, 0.001, 0.008)),
}


class Row(NamedTuple):
    """A layer of Table I. network_wise is its expected share of the one sample."""

    layer: str
    parameters: int
    exhaustive: int
    network_wise: int
    layer_wise: int
    data_unaware: int
    data_aware: int | None


def space_of(words: Sequence[int]) -> FaultSpace:
    """The stuck-at faults of float32 layers of so many words, named by their numbers."""
    float32 = np.dtype(np.float32)
    found = [Site(str(number), (size,), float32) for number, size in enumerate(words)]
    return FaultSpace(found, FAULT_MODELS["stuck_at"])


def size_table(space: FaultSpace, request: Request, p: np.ndarray | None = None) -> list[Row]:
    """Table I of a fault space; the last row is the total. Without p [W] nothing is data-aware."""
    (network,) = sampling.network_wise(space, None, request)
    layer = by_site(space, sampling.layer_wise(space, None, request))
    unaware = by_site(space, sampling.data_unaware(space, None, request))
    aware = by_site(space, aware_strata(space, request, p)) if p is not None else None
    rows = [
        Row(
            site.name, site.words, size, round(network.injections * size / space.size),
            layer[k], unaware[k], None if aware is None else aware[k],
        )
        for k, (site, size) in enumerate(zip(space.sites, space.site_sizes.tolist(), strict=True))
    ]  # fmt: skip
    total = Row(
        "total", sum(site.words for site in space.sites), space.size, network.injections,
        sum(layer), sum(unaware), None if aware is None else sum(aware),
    )  # fmt: skip
    return [*rows, total]


def by_site(space: FaultSpace, strata: Sequence[Stratum]) -> list[int]:
    """Injections of each site, of strata that tell sites apart."""
    return [sum(s.injections for s in strata if s.site == k) for k in range(len(space.sites))]


def aware_strata(space: FaultSpace, request: Request, p: np.ndarray) -> tuple[Stratum, ...]:
    """A sample of each bit of each site, sized with p [W] of its bit (equation 3)."""
    e, t = request.error_margin, request.quantile
    sized = (
        (site, bit, int(size), float(p[bit]))
        for (site, bit), size in np.ndenumerate(space.cells)
        if size
    )
    return tuple(Stratum(s, b, n, sample_size(n, e, t, q), q) for s, b, n, q in sized)


def scaled_p(distances: np.ndarray, largest: float, outliers) -> np.ndarray:
    """Equation 5, p [W], with `largest` in place of the largest distance of the ordinary bits."""
    low = ordinary(distances, outliers).min()
    with np.errstate(invalid="ignore", over="ignore"):
        p = np.clip(0.5 * (distances - low) / (largest - low), 0, 0.5)
    return np.where(np.isfinite(distances) & ~outliers(distances), p, 0.5)


class Fit(NamedTuple):
    """The largest distance that fits the paper best, and the largest relative error it leaves."""

    largest: float
    error: float


def fit(distances: np.ndarray, paper: Paper, outliers) -> Fit:
    """The largest distance that brings the data-aware sizes nearest to the paper's column.

    The paper prints no distances, and its column does not follow from ours. Nearest is where the
    relative error of the worst layer is least; of the total where the paper has no column.
    """
    space = space_of(paper.words)
    printed = np.array(paper.aware or (paper.aware_total,))

    def worst(log_largest: float) -> float:
        p = scaled_p(distances, np.exp(log_largest), outliers)
        found = by_site(space, aware_strata(space, PRINTED, p))
        found = np.array(found if paper.aware else [sum(found)])
        return float(np.max(np.abs(found / printed - 1)))

    top = np.log(ordinary(distances, outliers).max())
    found = optimize.minimize_scalar(worst, bounds=(top - 2, top + 6), method="bounded")
    return Fit(float(np.exp(found.x)), float(found.fun))


def ordinary(distances: np.ndarray, outliers) -> np.ndarray:
    """The finite distances of bits that are not outliers."""
    return distances[np.isfinite(distances) & ~outliers(distances)]
