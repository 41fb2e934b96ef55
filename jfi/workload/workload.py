"""Which images to judge faults on: metrics of one golden pass, and selections by them.

Challenging images, those near another answer, show most critical faults (Bellarmino et al.,
"DEAR-CNN", DDECS 2025). A metric is a number per image; `METRICS` holds what there is, with the
side on which images are challenging. A selection picks images by a metric and says why. What a
selection finds of the critical faults is for `jfi.campaign.detection`.

Ties are broken by the image's number, the lowest first, and every reason says how many there are.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jfi.errors import InputError
from jfi.workload.expected import found_at
from jfi.workload.kennard_stone import chosen_at

EPSILON = 0.3  # of central mode, as in the paper
SLOPE = 5e-5  # of the plateau, as in the paper
_SUM = 1e-3  # how far probabilities may be from a sum of one
_TINY = np.finfo(np.float64).tiny


class Pass(NamedTuple):
    """What one golden pass says of B images.

    probabilities: [B, C], each row sums to one.
    labels: int [B], or None where they are not known.
    embedding: [B, D] of some layer (`jfi.workload.embedding`), or None.
    chances: [F, B], those of some faults to be critical (`jfi.workload.expected`), or None.
    """

    probabilities: np.ndarray
    labels: np.ndarray | None = None
    embedding: np.ndarray | None = None
    chances: np.ndarray | None = None


class Selection(NamedTuple):
    """Images in the order to present them: int [n] of numbers below `of`, and why these."""

    indices: np.ndarray
    reason: str
    of: int


def golden_pass(logits, labels=None, embedding=None, chances=None) -> Pass:
    """The pass of golden logits [B, C]; softmax in float64.

    Raises:
      InputError: shapes that don't fit, or an embedding that is not finite.
    """
    wide = np.asarray(logits, np.float64)
    if wide.ndim != 2 or not len(wide):
        raise InputError(f"logits have shape {wide.shape}; [B, C] is needed, with an image or more")
    exps = np.exp(wide - wide.max(axis=1, keepdims=True))
    return check(Pass(exps / exps.sum(axis=1, keepdims=True), labels, embedding, chances))


def check(seen: Pass) -> Pass:
    """The pass, whole and in range.

    Raises:
      InputError: probabilities that are negative or don't sum to one; labels, an embedding or
        chances that don't fit them.
    """
    p = np.asarray(seen.probabilities, np.float64)
    if p.ndim != 2 or not len(p) or p.shape[1] < 2:
        raise InputError(f"probabilities have shape {p.shape}; [B, C] with two classes is needed")
    off = ~((p >= 0).all(axis=1) & (abs(p.sum(axis=1) - 1) < _SUM))
    if off.any():
        bad = int(off.argmax())
        raise InputError(
            f"probabilities of image {bad} are {p[bad]}, sum {p[bad].sum():g}; they must be 0 or "
            "more and sum to one (are these logits? golden_pass takes them)"
        )
    labels = None if seen.labels is None else _check_labels(seen.labels, p.shape)
    embedding = None if seen.embedding is None else _check_embedding(seen.embedding, len(p))
    if seen.chances is not None and seen.chances.shape[1:] != (len(p),):
        raise InputError(f"chances have shape {seen.chances.shape}; [F, {len(p)}] is needed")
    return Pass(p, labels, embedding, seen.chances)


def _check_labels(labels, shape: tuple[int, int]) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
        raise InputError(f"labels have shape {labels.shape}; {shape[0]} integers are needed")
    if labels.min() < 0 or labels.max() >= shape[1]:
        raise InputError(
            f"labels are {labels.min()} to {labels.max()}; the classes are 0 to {shape[1] - 1}"
        )
    return labels


def _check_embedding(embedding, images: int) -> np.ndarray:
    embedding = np.asarray(embedding, np.float64).reshape(len(embedding), -1)
    if len(embedding) != images or not np.isfinite(embedding).all():
        raise InputError(
            f"embedding has shape {embedding.shape}; [{images}, D] of finite numbers is needed"
        )
    return embedding


def el2n(seen: Pass) -> np.ndarray:
    """[B] in [0, sqrt 2]: |p - e_y|, the norm of the error (Paul et al., NeurIPS 2021)."""
    right = np.eye(seen.probabilities.shape[1])[_labels(seen, "el2n")]
    return np.linalg.norm(seen.probabilities - right, axis=1)


def deep_gini(seen: Pass) -> np.ndarray:
    """[B] in [0, 1 - 1/C]: 1 - sum p^2, the impurity (Feng et al., DeepGini, ISSTA 2020)."""
    return 1 - (seen.probabilities**2).sum(axis=1)


def cross_entropy(seen: Pass) -> np.ndarray:
    """[B] from 0: -log p_y, natural; at most 708.4, as p_y is taken to be 2.2e-308 at least."""
    labels = _labels(seen, "cross_entropy")
    right = seen.probabilities[np.arange(labels.size), labels]
    return -np.log(np.maximum(right, _TINY))


def margin(seen: Pass) -> np.ndarray:
    """[B] from 0: log p1 - log p2, which is the largest logit less the second; at most 708.4.

    It is what `jfi.engine.engine` orders images by, and what its certificates are measured in.
    """
    second, first = _top2(seen)
    return np.log(first) - np.log(np.maximum(second, _TINY))


def ratio(seen: Pass) -> np.ndarray:
    """[B] from 1: p1 / p2 (El-Sayed et al., TCAD 2023), e to the margin: the same order."""
    return np.exp(margin(seen))


def expected(seen: Pass) -> np.ndarray:
    """[B] in [0, 1]: critical faults an image is expected to add to earlier ones
    (`jfi.workload.expected`).

    Ours. It takes one backward pass an image, and no labels.
    """
    if seen.chances is None:
        raise InputError("metric expected needs chances [F, B]; give them (jfi.expected)")
    return found_at(seen.chances)


def kennard_stone(seen: Pass) -> np.ndarray:
    """[B] from 0: how far an image is from those chosen before it (`workload.kennard_stone`)."""
    return chosen_at(_embedding(seen, "kennard_stone"), "euclidean")


def kennard_stone_correlation(seen: Pass) -> np.ndarray:
    """[B] in [0, 2]: the same with the distance 1 - Pearson's r."""
    return chosen_at(_embedding(seen, "kennard_stone_correlation"), "correlation")


def _labels(seen: Pass, metric: str) -> np.ndarray:
    if seen.labels is None:
        raise InputError(
            f"metric {metric} is supervised and there are no labels; give them, or choose "
            + ", ".join(name for name, found in METRICS.items() if not found.supervised)
        )
    return seen.labels


def _embedding(seen: Pass, metric: str) -> np.ndarray:
    if seen.embedding is None:
        raise InputError(f"metric {metric} needs an embedding [B, D]; give one (jfi.embedding)")
    return seen.embedding


def _top2(seen: Pass) -> np.ndarray:
    """[2, B]: the second and the first of the probabilities."""
    return np.sort(seen.probabilities, axis=1)[:, -2:].T


class Metric(NamedTuple):
    """A number per image.

    values: of a checked pass, [B].
    supervised: it needs labels.
    high: images are challenging where it is high, else where it is low.
    hot_spot: its value on the border of two classes, p = (1/2, 1/2), where critical faults
      cluster in the paper; None where it has none.
    """

    values: Callable[[Pass], np.ndarray]
    supervised: bool
    high: bool
    hot_spot: float | None


METRICS: dict[str, Metric] = {
    "el2n": Metric(el2n, True, True, 0.5**0.5),
    "deepgini": Metric(deep_gini, False, True, 0.5),
    "cross_entropy": Metric(cross_entropy, True, True, float(np.log(2))),
    "margin": Metric(margin, False, False, 0.0),
    "ratio": Metric(ratio, False, False, 1.0),
    "expected": Metric(expected, False, True, None),
    "kennard_stone": Metric(kennard_stone, False, True, None),
    "kennard_stone_correlation": Metric(kennard_stone_correlation, False, True, None),
}


def order(values: np.ndarray, high: bool = True) -> np.ndarray:
    """int [B]: images by a metric's values [B], the highest (or lowest) first."""
    return np.argsort(-values if high else values, kind="stable")


def top(values: np.ndarray, n: int, high: bool = True) -> Selection:
    """The n most challenging images, the most challenging first.

    Raises:
      InputError: n is not 1 to B.
    """
    _check_count(n, values.size)
    side = "highest" if high else "lowest"
    return Selection(order(values, high)[:n], f"the {n:,} {side}" + _ties(values), values.size)


def central(values: np.ndarray, centre: float, epsilon: float = EPSILON) -> Selection:
    """Images whose value is within `epsilon` of `centre` (Section VI-A), the nearest first.

    An epsilon that takes in every image selects all of them, and the reason says so.

    Raises:
      InputError: no image is, or epsilon is negative or no number.
    """
    if not epsilon >= 0 or not np.isfinite(centre):
        raise InputError(f"centre {centre} or epsilon {epsilon} is no number, or epsilon negative")
    off = np.abs(values - centre)
    found = order(off, high=False)[: np.count_nonzero(off <= epsilon)]
    if not found.size:
        raise InputError(
            f"no image is within {epsilon:g} of {centre:g}; values are {values.min():g} to "
            f"{values.max():g}"
        )
    every = ", which is every image" if found.size == values.size else ""
    reason = f"within {epsilon:g} of {centre:g}{every}" + _ties(values)
    return Selection(found, reason, values.size)


def pre_plateau(values: np.ndarray, epsilon: float = SLOPE, high: bool = True) -> Selection:
    """Images before the plateau (Section VI-B), the most challenging first.

    The plateau is where, the values sorted, every further step from one image to the next is
    below `epsilon`. Steps are per image: of fewer images than the paper's 10,000 they are larger,
    and more images are before it. For metrics that level off, as those that end at 0.

    Raises:
      InputError: the values are flat from the start.
    """
    ranked = order(values, high)
    steps = np.abs(np.diff(values[ranked]))
    before = np.flatnonzero(steps >= epsilon)
    if not before.size:
        raise InputError(
            f"no step between sorted values is as large as {epsilon:g}: all {values.size:,} "
            "images are on the plateau"
        )
    n = int(before[-1]) + 1
    every = ", which is every image but the last" if n == values.size - 1 else ""
    reason = f"before the plateau of steps below {epsilon:g}{every}" + _ties(values)
    return Selection(ranked[:n], reason, values.size)


def random(images: int, n: int, seed: int = 0) -> Selection:
    """n of B images by chance, in random order; a smaller n takes the first of them.

    Raises:
      InputError: n is not 1 to B.
    """
    _check_count(n, images)
    shuffled = np.random.default_rng(seed).permutation(images)
    return Selection(shuffled[:n], f"{n:,} at random, seed {seed}", images)


def _check_count(n: int, images: int) -> None:
    if not 1 <= n <= images:
        raise InputError(f"a selection of {n} images is out of range; there are 1 to {images}")


def _ties(values: np.ndarray) -> str:
    """How many values are not unique, for a reason; nothing where none is."""
    _, counts = np.unique(values, return_counts=True)
    tied = int(counts[counts > 1].sum())
    if not tied:
        return ""
    which = "every image is tied" if counts.size == 1 else f"{tied:,} images are tied"
    return f"; {which}, ordered by number"


def select(spec: str, seen: Pass) -> Selection:
    """The images that a text names, `METRIC[:WAY[:NUMBER...]]` or `random:N[:SEED]`.

    `el2n:top:500`, `el2n:central` (epsilon, centre: `el2n:central:0.3:0.7`), `el2n:pre_plateau`
    (slope), and `el2n` alone: every image, the most challenging first.

    Raises:
      InputError: a text that says none of these, a metric that lacks what it needs, or a
        selection that is empty.
    """
    name, *rest = spec.split(":")
    images = len(seen.probabilities)
    if name == "random":
        n, seed = _numbers(spec, rest, (int, int), (None, 0))
        return random(images, n, seed)
    if name not in METRICS:
        raise _unknown(spec, f"metric {name!r} is unknown")
    way, *rest = rest or ["top", str(images)]
    metric = METRICS[name]
    if way not in WAYS:
        raise _unknown(spec, f"way {way!r} is unknown")
    found = WAYS[way](spec, rest, metric, metric.values(check(seen)))
    return found._replace(reason=f"{name} {found.reason}")


def _top(spec: str, rest: list[str], metric: Metric, values: np.ndarray) -> Selection:
    (n,) = _numbers(spec, rest, (int,), (None,))
    return top(values, n, metric.high)


def _central(spec: str, rest: list[str], metric: Metric, values: np.ndarray) -> Selection:
    epsilon, centre = _numbers(spec, rest, (float, float), (EPSILON, metric.hot_spot))
    return central(values, centre, epsilon)


def _pre_plateau(spec: str, rest: list[str], metric: Metric, values: np.ndarray) -> Selection:
    (slope,) = _numbers(spec, rest, (float,), (SLOPE,))
    return pre_plateau(values, slope, metric.high)


# How a metric selects, in the texts of `select`.
WAYS = {"top": _top, "central": _central, "pre_plateau": _pre_plateau}


def _numbers(spec: str, texts: list[str], kinds, defaults) -> list:
    """The numbers of a text, with the defaults of those not given; None must be."""
    if len(texts) > len(kinds):
        raise _unknown(spec, f"{texts[len(kinds)]!r} is one number too many")
    try:
        given = [kind(text) for kind, text in zip(kinds, texts, strict=False)]
    except ValueError:
        raise _unknown(spec, f"{':'.join(texts)!r} is not {kinds[0].__name__}") from None
    found = [*given, *defaults[len(given) :]]
    if None in found:
        raise _unknown(spec, "a number is missing")
    return found


def _unknown(spec: str, what: str) -> InputError:
    return InputError(
        f"workload {spec!r}: {what}; it is METRIC, METRIC:top:N, METRIC:central[:EPSILON[:CENTRE]],"
        f" METRIC:pre_plateau[:SLOPE] or random:N[:SEED] with METRIC of {', '.join(METRICS)}"
    )


def spearman(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Spearman's rank correlation [M, M] of M metrics' values [B] (Table II).

    Raises:
      InputError: a metric that is the same for all images: it has no ranks.
    """
    from scipy import stats

    for name, column in values.items():
        if np.ptp(column) == 0:
            raise InputError(f"metric {name} is {column[0]:g} for every image: it has no ranks")
    ranks = [stats.rankdata(column) for column in values.values()]
    return np.atleast_2d(np.corrcoef(ranks))
