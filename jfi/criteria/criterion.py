"""What a criterion is: when outputs are critical, and what proves that they are not."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jfi.errors import InputError, kind
from jfi.forms import Output, Outputs


class Constraints(NamedTuple):
    """K linear functionals of the outputs; a fault that keeps all of them is not critical.

    The k-th is kept while sum over m of weight[k, m] * d[index[k, m]] > -slack[k], where d is
    faulty less golden. A slack that is not positive is never kept.

    index: int [K, M], positions in the row of outputs. weight: [K, M]. slack: [K].
    """

    index: Any
    weight: Any
    slack: Any


class Judgement(NamedTuple):
    """A criterion on rows of outputs [N] of one image: pure functions, traceable by JAX.

    critical: `(golden, faulty) -> bool`.
    confidences: `(golden, faulty) -> ([M], [M])`, from 0: what the bins of silent data corruption
      are of. They compare each with its own golden one, and the worst counts.
    answer: `row -> int32`, the network's answer, in the form of a label; None where it has none.
    correct: `(row, label) -> bool`; None where there are no labels.
    check_labels: `(labels, images) -> array [B, ...]`, raises InputError.
    constraints: `scores [N] -> Constraints`; None where nothing proves that a fault is not
      critical. Scores are the outputs before the network's own softmax or sigmoid
      (`jfi.networks.links`); the outputs where there is none, and where `on_outputs`.
    chances: `row -> [C]`, the probabilities of its least certain answer; None for none.
    points: a fault is critical when it costs more than so many points of accuracy; None where it is
      critical as it is for one image.
    keeps_answer: while all constraints are kept, `correct` says what it says of golden outputs.
    """

    critical: Callable[[Any, Any], Any]
    confidences: Callable[[Any, Any], tuple[Any, Any]]
    answer: Callable[[Any], Any] | None = None
    correct: Callable[[Any, Any], Any] | None = None
    check_labels: Callable[[Any, int], np.ndarray] | None = None
    constraints: Callable[[Any], Constraints] | None = None
    chances: Callable[[Any], Any] | None = None
    points: float | None = None
    on_outputs: bool = False
    keeps_answer: bool = True


class Criterion(NamedTuple):
    """What makes a fault critical for an image, whatever the network.

    text: how it is spelled on the command line and on record.
    judge: what it is for a network that returns these outputs; raises InputError where it is none.
    meaning: what a critical fault does, in words.
    """

    text: str
    judge: Callable[[Outputs], Judgement]
    meaning: str


def of_each(text: str, judge: Callable[[Output, str], Judgement], meaning: str) -> Criterion:
    """A criterion of one array, asked of every array that a network returns.

    A fault is critical where it is for any of them. Labels are known of one array alone.

    Args:
      judge: `(array, link) -> Judgement` on the array, in one axis.
    """

    def whole(outputs: Outputs) -> Judgement:
        if len(outputs.arrays) == 1:
            own = judge(outputs.arrays[0], outputs.link)
            return own if outputs.is_plain else _on_row(outputs, 0, own)
        each = [_on_row(outputs, k, judge(array, "")) for k, array in enumerate(outputs.arrays)]
        return _any(each)

    return Criterion(text, whole, meaning)


def _on_row(outputs: Outputs, number: int, own: Judgement) -> Judgement:
    """A judgement of one array, on the row that it lies in."""
    start, array = outputs.starts[number], outputs.arrays[number]

    def part(row):
        return outputs.array(number, row).reshape(-1)

    def constraints(scores):
        found = own.constraints(part(scores))
        return found._replace(index=found.index + start)

    of_one = {
        name: _of_row(given, part)
        for name in ("answer", "chances")
        if (given := getattr(own, name)) is not None
    }
    return own._replace(
        critical=lambda golden, faulty: own.critical(part(golden), part(faulty)),
        confidences=lambda golden, faulty: own.confidences(part(golden), part(faulty)),
        correct=own.correct and (lambda row, label: own.correct(part(row), label)),
        # Columns of integers are no outputs that a bound is known of.
        constraints=constraints if own.constraints and array.dtype == outputs.dtype else None,
        **of_one,
    )


def _of_row(function, part):
    return lambda row: function(part(row))


def _any(each: Sequence[Judgement]) -> Judgement:
    """Critical where one of several judgements is."""

    def critical(golden, faulty):
        return jnp.stack([own.critical(golden, faulty) for own in each]).any()

    def confidences(golden, faulty):
        pairs = [own.confidences(golden, faulty) for own in each]
        return tuple(jnp.concatenate(column) for column in zip(*pairs, strict=True))

    def answer(row):
        return jnp.concatenate([own.answer(row).reshape(-1) for own in each])

    def constraints(scores):
        return joined([own.constraints(scores) for own in each])

    return Judgement(
        critical,
        confidences,
        answer=answer if all(own.answer for own in each) else None,
        constraints=constraints if all(own.constraints for own in each) else None,
    )


def joined(each: Sequence[Constraints]) -> Constraints:
    """All functionals of several."""
    most = max(found.index.shape[1] for found in each)

    def filled(x):
        return jnp.pad(x, ((0, 0), (0, most - x.shape[1])))

    return Constraints(
        jnp.concatenate([filled(found.index) for found in each]),
        jnp.concatenate([filled(found.weight) for found in each]),
        jnp.concatenate([found.slack for found in each]),
    )


def integers(labels: Any, shape: tuple[int, ...], classes: int, called: str) -> np.ndarray:
    """The labels as int32 of this shape, in [0, classes).

    Raises:
      InputError: they are not.
    """
    if labels.shape != shape or labels.dtype.kind not in "iu":
        count, form = (shape[0], "one an image") if len(shape) == 1 else (list(shape), called)
        raise InputError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}; "
            f"{count} integers are needed, {form}"
        )
    bad = labels[(labels < 0) | (labels >= classes)]
    if bad.size:
        raise InputError(f"label {bad[0]} is out of range; the classes are 0 to {classes - 1}")
    return labels.astype(np.int32)


def own(critical: Callable[[Any, Any], Any], constraints: Callable | None = None) -> Criterion:
    """A criterion of one's own.

    Args:
      critical: `(golden, faulty) -> bool`, of one image: what the network returns, without the
        axis of images; in JAX.
      constraints: `golden -> (matrix [K, N], slack [K])`, or None. A fault is not critical while
        matrix @ (faulty - golden) > -slack in every row, where outputs are one row [N], array by
        array, each in C order. That is what certificates prove; it must be true.

    Raises:
      InputError: what is no function.
    """
    for name, value in (("critical", critical), ("constraints", constraints)):
        if not callable(value) and (name == "critical" or value is not None):
            raise InputError(f"{name} is {kind(value)}; it must be a function")
    text = f"own:{getattr(critical, '__name__', 'function')}"

    def judge(outputs: Outputs) -> Judgement:
        def whole(golden, faulty):
            found = critical(outputs.of_row(golden), outputs.of_row(faulty))
            return _one_bool(jnp.asarray(found))

        def proven(scores):
            found = constraints(outputs.of_row(scores))
            matrix, slack = (jnp.asarray(x, scores.dtype) for x in found)
            wanted = (*slack.shape, outputs.size)
            if slack.ndim != 1 or matrix.shape != wanted:
                raise InputError(
                    f"constraints return {matrix.shape} and {slack.shape}; a matrix "
                    f"[K, {outputs.size}] and a slack [K] are needed"
                )
            index = jnp.broadcast_to(jnp.arange(outputs.size), matrix.shape)
            return Constraints(index, matrix, slack)

        exact = all(array.dtype == outputs.dtype for array in outputs.arrays)
        if constraints is not None and not exact:
            raise InputError("constraints are of outputs of one type of floats alone")
        return Judgement(
            whole, of_size, constraints=proven if constraints else None, on_outputs=True
        )

    return Criterion(text, judge, f"is critical by the function {text.partition(':')[2]}")


def _one_bool(found):
    if found.shape or found.dtype != bool:
        raise InputError(f"critical returns {kind(found)}; it must return one bool")
    return found


def of_size(golden, faulty) -> tuple[Any, Any]:
    """The confidences of outputs that are no answers: how far they move, of the largest golden."""
    size = jnp.abs(golden).max(initial=0).astype(jnp.float32)
    moved = jnp.abs(faulty.astype(jnp.float32) - golden.astype(jnp.float32)).max(initial=0)
    return size[None], (size + moved)[None]
