"""The criteria that have names.

A tie is decided as argmax does: the first of equal outputs is the answer, and a NaN is above all
numbers. `sdc` in the literature is `top1` (Li et al., SC 2017: SDC-1), and SDC-5 is `top_k(5)`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfi.criteria.criterion import Constraints, Criterion, Judgement, integers, of_each, of_size
from jfi.errors import InputError, kind
from jfi.forms import Output, Outputs

CERTAIN = 0.01  # least and most probability that a threshold of scores is proven for

# --- Probabilities


def _exponentials(scores: Any) -> tuple[Any, Any]:
    """float32 exponentials over the largest of the last axis, and their sum."""
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    # The maximum is taken off in the wider type, so that no finite logit overflows.
    shifted = (wide - jnp.max(wide, axis=-1, keepdims=True)).astype(jnp.float32)
    exps = jnp.exp(shifted)
    return exps, jnp.sum(exps, axis=-1)


def _chances(rows, link: str):
    """float32 probabilities [..., C] of rows [..., C], taken as the network gives them."""
    if link == "softmax":
        return rows.astype(jnp.float32)
    exps, total = _exponentials(rows)
    return exps / total[..., None]


def _confidence(rows, top, link: str):
    """float32 [...] of the class `top` [...] of rows [..., C]."""

    def at(values):
        return jnp.take_along_axis(values, top[..., None], axis=-1)[..., 0]

    if link == "softmax":
        return at(rows).astype(jnp.float32)
    exps, total = _exponentials(rows)
    return at(exps) / total


# --- Classes


def _above(rows, top):
    """Constraints that the class `top` [R] of each row [R, C] stays above all others of its row:
    [R, C, 2] and [R, C], with no end of slack to itself."""
    count, classes = rows.shape
    start = (jnp.arange(count) * classes)[:, None]
    index = jnp.stack(
        [
            jnp.broadcast_to(start + top[:, None], rows.shape),
            start + jnp.broadcast_to(jnp.arange(classes), rows.shape),
        ],
        axis=-1,
    )
    weight = jnp.broadcast_to(jnp.asarray([1, -1], rows.dtype), index.shape)
    slack = jnp.take_along_axis(rows, top[:, None], axis=1) - rows
    itself = jnp.arange(classes) == top[:, None]
    return index, weight, jnp.where(itself, jnp.inf, slack)


def _classes(array: Output, asked: str, axes: int | None = None) -> tuple[int, int]:
    """How many answers an array is, and of how many classes each."""
    if len(array.shape) < 1 or array.shape[-1] < 2 or (axes and len(array.shape) != axes):
        wanted = {None: "[B, ..., C]", 1: "[B, C]", 2: "[B, T, C]", 3: "[B, H, W, C]"}[axes]
        raise InputError(
            f"criterion {asked}: output {array.name} is {_form(array)}; scores {wanted} of two "
            "classes or more are needed"
        )
    if not jnp.issubdtype(array.dtype, np.floating):
        raise InputError(f"criterion {asked}: output {array.name} is {_form(array)}, not of floats")
    return int(np.prod(array.shape[:-1])), array.shape[-1]


def _form(array: Output) -> str:
    return f"{array.dtype}[B{''.join(f', {n}' for n in array.shape)}]"


def _answers(
    array: Output,
    link: str,
    asked: str,
    axes: int | None,
    seen: Callable[[Any], Any] = lambda rows: rows,
    differ: Callable[[Any, Any], Any] = lambda golden, faulty: (golden != faulty).any(),
    needed: Callable[[Any, Any, Any], tuple] = lambda index, weight, slack: (index, weight, slack),
) -> Judgement:
    """The answers of an array of scores, each the highest of its classes.

    Args:
      seen: of the rows [R, C], those that count.
      differ: `(golden, faulty)` answers int [R] -> bool, critical.
      needed: those of the constraints [R, C] that prove it is not.
    """
    count, classes = _classes(array, asked, axes)

    def rows(row):
        return seen(row.reshape(count, classes))

    def answer(row):
        return jnp.argmax(rows(row), axis=-1).astype(jnp.int32)

    def critical(golden, faulty):
        return differ(answer(golden), answer(faulty))

    def confidences(golden, faulty):
        top = answer(golden)
        return _confidence(rows(golden), top, link), _confidence(rows(faulty), top, link)

    def constraints(scores):
        every = scores.reshape(count, classes)
        index, weight, slack = _above(every, jnp.argmax(every, axis=-1))
        found = (seen(x.reshape(count, -1)) for x in (index, weight, slack))
        index, weight, slack = needed(*found)
        return Constraints(index.reshape(-1, 2), weight.reshape(-1, 2), slack.reshape(-1))

    def chances(row):
        each = _chances(rows(row), link)
        second, first = jnp.sort(each, axis=-1)[:, -2:].T
        return each[jnp.argmin(first - second)]

    counted = jax.eval_shape(seen, jax.ShapeDtypeStruct((count, classes), np.float32)).shape[0]
    lead = array.shape[:-1] if counted == count else ()

    def shaped(row):
        return answer(row).reshape(lead)

    def check_labels(labels, images):
        return integers(labels, (images, *lead), classes, "a class for each answer")

    def correct(row, label):
        return (shaped(row) == label).all()

    return Judgement(critical, confidences, shaped, correct, check_labels, constraints, chances)


TOP1 = of_each(
    "top_1", lambda array, link: _answers(array, link, "top1", 1), "changes the top-1 answer"
)


def top1() -> Criterion:
    """Critical where the highest of the scores [B, C] is another class: the default."""
    return TOP1


def top_k(k: int) -> Criterion:
    """Critical where the golden top-1 class is not among the k highest (Li et al., SC 2017: SDC-5).

    Of equal scores the first classes are the higher ones. Correct is a label among the k highest.
    A certificate proves that the golden class stays above all but the k - 1 strongest others, which
    is enough.

    Raises:
      InputError: k is not 1 or more; when judged, not below the number of classes.
    """
    _check_integer("k", k)
    if k == 1:
        return TOP1

    def judge(array: Output, link: str) -> Judgement:
        own = _answers(array, link, f"top_k:{k}", 1)
        classes = array.shape[-1]
        if k >= classes:
            raise InputError(f"criterion top_k:{k}: there are {classes} classes; k must be below")

        def among(row, label):
            score, number = row[label], jnp.arange(classes)
            same = (row == score) | (jnp.isnan(row) & jnp.isnan(score))
            higher = (row > score) | (jnp.isnan(row) & ~jnp.isnan(score))
            return (higher | (same & (number < label))).sum() < k

        def constraints(scores):
            found = own.constraints(scores)
            rank = jnp.argsort(jnp.argsort(found.slack))
            return found._replace(slack=jnp.where(rank < k - 1, jnp.inf, found.slack))

        def critical(golden, faulty):
            return ~among(faulty, jnp.argmax(golden))

        return own._replace(
            critical=critical,
            correct=lambda row, label: among(row, label),
            constraints=constraints,
        )

    return of_each(f"top_k:{k}", judge, f"takes the top-1 answer out of the {k} highest")


def tokens(position: str = "any") -> Criterion:
    """Critical where the highest of the scores [B, T, V] is another token at a position.

    Args:
      position: `any` of them, or the `last`. Labels are [B, T]; of the last one [B] too.

    Raises:
      InputError: another position.
    """
    if position not in ("any", "last"):
        raise InputError(f"position is {kind(position)}; it must be 'any' or 'last'")
    text = f"tokens:{position}"
    if position == "any":
        meaning = "changes the top-1 token at a position"
        return of_each(text, lambda array, link: _answers(array, link, text, 2), meaning)

    def judge(array: Output, link: str) -> Judgement:
        own = _answers(array, link, text, 2, lambda rows: rows[-1:])

        def check_labels(labels, images):
            every = labels.shape == (images, *array.shape[:-1])
            return own.check_labels(labels[:, -1] if every else labels, images)

        return own._replace(check_labels=check_labels)

    return of_each(text, judge, "changes the top-1 token at the last position")


def pixels(share: float = 0.0) -> Criterion:
    """Critical where more than a share of the pixels of scores [B, H, W, C] change their class.

    A certificate proves that the pixels of the largest margins keep theirs, as many as are needed.

    Raises:
      InputError: the share is not in [0, 1).
    """
    _check_number("share", share, 0, 1)
    text = f"pixels:{share:g}"

    def judge(array: Output, link: str) -> Judgement:
        count = int(np.prod(array.shape[:-1]))
        lost = int(np.floor(share * count * (1 + 1e-12)))  # that many may change

        def differ(golden, faulty):
            return (golden != faulty).sum() > lost

        def needed(index, weight, slack):
            least = slack.min(axis=1)
            rank = jnp.argsort(jnp.argsort(least))
            return index, weight, jnp.where((rank < lost)[:, None], jnp.inf, slack)

        return _answers(array, link, text, 3, differ=differ, needed=needed)

    return of_each(text, judge, f"changes the class of more than {100 * share:g}% of the pixels")


# --- Outputs that are answers by themselves


def threshold(t: float | None = None) -> Criterion:
    """Critical where an output passes to the other side of a threshold, or is NaN.

    Each output is the score of a label of its own; a label is said where the output is above `t`.

    Args:
      t: by default 0.5 where the network ends in a sigmoid, else 0.

    Raises:
      InputError: t is not a finite number; when judged, not in (0, 1) of probabilities.
    """
    if t is not None:
        _check_number("t", t)
    text = "threshold" if t is None else f"threshold:{t:g}"

    def judge(array: Output, link: str) -> Judgement:
        _check_floats(array, text)
        is_chance = link == "sigmoid"
        border = (0.5 if is_chance else 0.0) if t is None else t
        if is_chance and not 0 < border < 1:
            raise InputError(
                f"criterion {text}: the network ends in a sigmoid; t must be in (0, 1)"
            )
        before = float(np.log(border / (1 - border))) if is_chance else border

        def critical(golden, faulty):
            return ((golden > border) != (faulty > border)).any() | jnp.isnan(faulty).any()

        def said(row):
            chance = row.astype(jnp.float32)
            return chance if is_chance else jax.nn.sigmoid(chance - border)

        def confidences(golden, faulty):
            above = golden > border
            return tuple(jnp.where(above, p, 1 - p) for p in (said(golden), said(faulty)))

        def constraints(scores):
            number = jnp.arange(scores.size)[:, None]
            weight = jnp.where(scores > before, 1, -1).astype(scores.dtype)
            return Constraints(number, weight[:, None], jnp.abs(scores - before))

        def answer(row):
            return (row > border).astype(jnp.int32).reshape(array.shape)

        def chances(row):
            chance = said(row)
            least = chance[jnp.argmin(jnp.abs(row - border))]
            return jnp.stack([1 - least, least])

        def check_labels(labels, images):
            labels = np.asarray(labels)
            if array.size == 1 and labels.shape == (images,):
                labels = labels.reshape(images, *array.shape)
            return integers(labels, (images, *array.shape), 2, "0 or 1 for each output")

        def correct(row, label):
            return (answer(row) == label).all()

        # Nearer to 0 or 1 rounding of the sigmoid is more than what scores are off.
        proven = not is_chance or CERTAIN <= border <= 1 - CERTAIN
        return Judgement(
            critical, confidences, answer, correct, check_labels,
            constraints if proven else None, chances,
        )  # fmt: skip

    border = "the threshold" if t is None else f"{t:g}"
    return of_each(text, judge, f"takes an output to the other side of {border}")


def tolerance(absolute: float = 0.0, relative: float = 0.0) -> Criterion:
    """Critical where an output moves by more than absolute + relative * |golden|, or is NaN.

    Labels are targets: correct is within the tolerance of them.

    Raises:
      InputError: one of them is negative, or not finite.
    """
    _check_number("absolute", absolute, 0)
    _check_number("relative", relative, 0)
    parts = [f"absolute={absolute:g}"] * (absolute > 0) + [f"relative={relative:g}"] * (
        relative > 0
    )
    text = f"tolerance:{','.join(parts) or 'absolute=0'}"

    def judge(array: Output, link: str) -> Judgement:
        exact = jnp.issubdtype(array.dtype, np.floating)

        def wide(row):
            return row if exact else row.astype(jnp.float32)

        def room(golden):
            return absolute + relative * jnp.abs(golden)

        def within(row, golden):
            row, golden = wide(row), wide(golden)
            return (jnp.abs(row - golden) <= room(golden)).all()

        def constraints(scores):
            number, slack = jnp.arange(scores.size), room(scores)
            weight = jnp.repeat(jnp.asarray([1, -1], scores.dtype), scores.size)
            return Constraints(jnp.tile(number, 2)[:, None], weight[:, None], jnp.tile(slack, 2))

        def check_labels(labels, images):
            labels = np.asarray(labels)
            if array.size == 1 and labels.shape == (images,):
                labels = labels.reshape(images, *array.shape)
            if labels.shape != (images, *array.shape) or labels.dtype.kind not in "iuf":
                raise InputError(
                    f"labels have shape {labels.shape} and dtype {labels.dtype}; targets are "
                    f"needed, numbers {[images, *array.shape]}"
                )
            if not np.isfinite(labels.astype(np.float64)).all():
                raise InputError("labels are not all finite; targets must be")
            return labels.astype(np.float32)

        return Judgement(
            critical=lambda golden, faulty: ~within(faulty, golden),
            confidences=lambda golden, faulty: of_size(wide(golden), wide(faulty)),
            correct=lambda row, label: within(row, label.reshape(-1).astype(wide(row).dtype)),
            check_labels=check_labels,
            constraints=constraints if exact else None,
            on_outputs=True,
        )

    room = " + ".join(f"{x:g}{of}" for x, of in ((absolute, ""), (relative, " of itself")) if x)
    return of_each(text, judge, f"moves an output by more than {room or '0'}")


def accuracy_drop(points: float) -> Criterion:
    """Critical is a fault that costs more than so many points of accuracy on the workload.

    Accuracy is the share of images whose top-1 is the label, or the golden answer where there are
    no labels, in percent; images that a fault makes right are counted against those it makes wrong.
    For one image a fault counts as critical where its top-1 changes, if the fault is critical.

    Raises:
      InputError: points are not in [0, 100).
    """
    _check_number("points", points, 0, 100)

    def judge(outputs: Outputs) -> Judgement:
        if len(outputs.arrays) > 1:
            raise InputError(
                f"criterion accuracy_drop: the network returns {len(outputs.arrays)} arrays; name "
                "the one that labels are of (output)"
            )
        return TOP1.judge(outputs)._replace(points=float(points))

    meaning = f"costs more than {points:g} points of accuracy"
    return Criterion(f"accuracy_drop:{points:g}", judge, meaning)


def _check_floats(array: Output, asked: str) -> None:
    if not jnp.issubdtype(array.dtype, np.floating):
        raise InputError(f"criterion {asked}: output {array.name} is {_form(array)}, not of floats")


def _check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name} is {kind(value)}; it must be a whole number from 1 on")


def _check_number(name: str, value: Any, low: float = -np.inf, high: float = np.inf) -> None:
    known = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not known or not np.isfinite(value) or not low <= value < high:
        wanted = "a finite number"
        if np.isfinite(low):
            wanted = f"from {low:g} on" if np.isinf(high) else f"in [{low:g}, {high:g})"
        raise InputError(f"{name} is {kind(value)}; it must be {wanted}")
