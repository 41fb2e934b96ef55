"""Criteria by name, as on the command line and on record: `top_k:5`, `tolerance:relative=0.1`."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from jfi.criteria import built_in
from jfi.criteria.criterion import Criterion
from jfi.criteria.detections import detections
from jfi.errors import InputError, kind
from jfi.forms import Outputs

CRITERIA: dict[str, Callable[..., Criterion]] = {
    "top1": built_in.top1,
    "top_k": built_in.top_k,
    "threshold": built_in.threshold,
    "tolerance": built_in.tolerance,
    "tokens": built_in.tokens,
    "pixels": built_in.pixels,
    "detections": detections,
    "accuracy_drop": built_in.accuracy_drop,
}


def parse(text: str) -> Criterion:
    """The criterion of a text: a name, and after a colon its arguments, in order or by name.

    Raises:
      InputError: no such name, or arguments that it does not take.
    """
    name, _, rest = text.partition(":")
    make = CRITERIA.get("top1" if name == "top_1" else name)
    if make is None:
        raise InputError(f"criterion {text!r} is unknown; choose from {', '.join(CRITERIA)}")
    names = [*inspect.signature(make).parameters]
    given: dict[str, Any] = {}
    for number, part in enumerate(rest.split(",") if rest else []):
        key, equals, value = part.partition("=")
        if not equals:
            key, value = (names[number] if number < len(names) else part), part
        if key not in names or key in given:
            takes = ", ".join(names) or "no argument"
            raise InputError(
                f"criterion {text!r}: {part!r} is not understood; {name} takes {takes}"
            )
        given[key] = _value(value)
    try:
        return make(**given)
    except InputError as error:
        raise InputError(f"criterion {text!r}: {error}") from error
    except TypeError:
        raise InputError(f"criterion {text!r} lacks an argument: {', '.join(names)}") from None


def _value(text: str) -> Any:
    for of in (int, float):
        try:
            return of(text)
        except ValueError:
            continue
    return text.strip()


def meaning(text: str) -> str:
    """What a critical fault does, in words, by the text of a criterion on record."""
    try:
        return parse(text).meaning
    except InputError:  # of a user's own
        return f"is critical by {text.removeprefix('own:')}"


def check(criterion: Any) -> Criterion | None:
    """A criterion, given as one or by name; None where none is given.

    Raises:
      InputError: it is neither.
    """
    if criterion is None or isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        return parse(criterion)
    if callable(criterion):
        raise InputError(
            f"criterion is the function {kind(criterion)}; make it one with jfi.criteria.own"
        )
    raise InputError(
        f"criterion is {kind(criterion)}; it must be a name ({', '.join(CRITERIA)}) or a Criterion"
    )


def usual(outputs: Outputs, labels: Any = None) -> Criterion:
    """What is meant where no criterion is given: by the form of the outputs.

    That is top1 of scores [B, C], and a threshold of one score an image with labels 0 and 1.

    Raises:
      InputError: outputs that may mean many things.
    """
    shapes = [array.shape for array in outputs.arrays]
    if len(shapes) == 1 and outputs.is_plain:
        (shape,) = shapes
        if len(shape) == 1 and shape[0] > 1:
            return built_in.TOP1
        if shape in ((), (1,)) and labels is not None and _are_bits(labels):
            return built_in.threshold()
    fitting = ", ".join(_fitting(outputs))
    each = ", ".join(
        f"{array.dtype}[B{''.join(f', {n}' for n in array.shape)}]"
        + (f" as {array.name}" if len(shapes) > 1 else "")
        for array in outputs.arrays
    )
    raise InputError(
        f"the network returns {each}: say what is critical there with a criterion: {fitting}, or "
        "one of your own (jfi.criteria.own)" + ("; or name one output" if len(shapes) > 1 else "")
    )


def _are_bits(labels: Any) -> bool:
    labels = np.asarray(labels)
    return labels.dtype.kind in "iub" and bool(np.isin(labels, (0, 1)).all())


def _fitting(outputs: Outputs) -> list[str]:
    """Names of criteria that may be meant."""
    shapes = [array.shape for array in outputs.arrays]
    if len(shapes) > 1:
        return ["detections", "tolerance"]
    by_rank = {2: ["tokens:any", "tokens:last"], 3: ["pixels:SHARE"]}
    return [*by_rank.get(len(shapes[0]), ["threshold"]), "tolerance:ABSOLUTE"]
