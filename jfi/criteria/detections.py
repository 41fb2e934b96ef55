"""Objects that a detector loses, invents or moves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfi.criteria.criterion import Criterion, Judgement
from jfi.errors import InputError, kind
from jfi.forms import Output, Outputs

FORMS = ("xyxy", "xywh", "cxcywh")  # corners; corner and size; centre and size
_WORDS = {"boxes": "box", "scores": "scor", "labels": "label"}  # within names of outputs


def detections(iou: float = 0.5, score: float = 0.5, boxes: str = "xyxy") -> Criterion:
    """Critical where a detector loses, invents or moves an object.

    The network returns boxes [B, D, 4], scores [B, D], or [B, D, C] of C classes, and where it has
    them labels [B, D] of integers: by name (`boxes`, `scores`, `labels`), or in this order. An
    object is a box whose score, the highest of its classes, is `score` or more. Faulty objects are
    matched with golden ones as COCO does (pycocotools' `COCOeval.evaluateImg`): the highest score
    first, each takes the free golden object of its class with the largest IoU, at least `iou`. All
    must be matched. Suppression of overlapping boxes is the network's own.

    Args:
      boxes: of FORMS.

    Raises:
      InputError: one of these is out of range; when judged, outputs that are no such arrays.
    """
    for name, value in (("iou", iou), ("score", score)):
        known = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not known or not 0 < value <= 1:
            raise InputError(f"{name} is {kind(value)}; it must be in (0, 1]")
    if boxes not in FORMS:
        raise InputError(f"boxes are {kind(boxes)}; they must be of {', '.join(FORMS)}")
    text = f"detections:iou={iou:g},score={score:g}"
    if boxes != FORMS[0]:
        text += f",boxes={boxes}"

    def judge(outputs: Outputs) -> Judgement:
        places = _places(outputs, text)

        def seen(row):
            """Corners [D, 4], scores [D], classes [D] and which are objects [D]."""
            found = {name: outputs.array(k, row) for name, k in places.items()}
            scores = found["scores"]
            label = jnp.zeros(len(scores), jnp.int32)
            if scores.ndim == 2:
                scores, label = scores.max(axis=1), scores.argmax(axis=1)
            label = found.get("labels", label)
            return _corners(found["boxes"], boxes), scores, label, scores >= score

        def matched(golden, faulty):
            return _match(seen(golden), seen(faulty), iou)

        def critical(golden, faulty):
            of = matched(golden, faulty)
            lost = seen(golden)[3] & (of < 0)
            return lost.any() | (seen(faulty)[3].sum() > (of >= 0).sum())

        def confidences(golden, faulty):
            of, (_, scores, _, there) = matched(golden, faulty), seen(golden)
            now = jnp.where(of >= 0, seen(faulty)[1][jnp.maximum(of, 0)], 0)
            pair = jnp.where(there, scores, 1), jnp.where(there, now, 1)
            return tuple(x.astype(jnp.float32) for x in pair)

        return Judgement(critical, confidences)

    return Criterion(
        text, judge, f"loses, invents or moves an object (IoU {iou:g}, score {score:g})"
    )


def _places(outputs: Outputs, asked: str) -> dict[str, int]:
    """The number of the output that is each of boxes, scores and labels."""
    names = [array.name.lower() for array in outputs.arrays]
    found = {
        what: next((k for k, name in enumerate(names) if word in name), None)
        for what, word in _WORDS.items()
    }
    if all(k is None for k in found.values()):
        found = dict(zip(_WORDS, range(len(names)), strict=False))
    found = {what: k for what, k in found.items() if k is not None}
    forms = {what: outputs.arrays[k] for what, k in found.items()}
    if not _are_detections(forms):
        each = ", ".join(f"{array.name} {list(array.shape)}" for array in outputs.arrays)
        raise InputError(
            f"criterion {asked}: the network returns {each} for an image; boxes [D, 4], scores [D] "
            "or [D, C] and, if there are any, labels [D] are needed, by these names or in this "
            "order"
        )
    return found


def _are_detections(forms: dict[str, Output]) -> bool:
    if "boxes" not in forms or "scores" not in forms:
        return False
    count = forms["boxes"].shape[:1]
    labels = forms.get("labels")
    return (
        forms["boxes"].shape == (*count, 4)
        and forms["scores"].shape[:1] == count
        and len(forms["scores"].shape) in (1, 2)
        and (labels is None or (labels.shape == count and labels.dtype.kind in "iu"))
    )


def _corners(boxes: Any, form: str) -> Any:
    """[D, 4] of the least and the most of x and y."""
    first, second = boxes[:, :2], boxes[:, 2:]
    if form == "cxcywh":
        first, second = first - second / 2, first + second / 2
    elif form == "xywh":
        second = first + second
    return jnp.concatenate([first, second], axis=1)


def _iou(box: Any, others: Any) -> Any:
    """[D]: intersection over union of a box [4] with others [D, 4]; 1 of equal ones, if empty."""
    low = jnp.maximum(box[:2], others[:, :2])
    high = jnp.minimum(box[2:], others[:, 2:])
    both = jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    sizes = (jnp.maximum(x[..., 2:] - x[..., :2], 0) for x in (box, others))
    area, other = (jnp.prod(size, axis=-1) for size in sizes)
    union = area + other - both
    same = (box == others).all(axis=-1)
    return jnp.where(same, 1.0, jnp.where(union == 0, 0.0, both / union))


def _match(golden, faulty, iou: float) -> Any:
    """int [D]: the faulty object that each golden one is matched with, or -1."""
    boxes, _, label, there = golden
    theirs, scores, found, objects = map(jnp.asarray, faulty)
    order = jnp.argsort(-jnp.where(objects, scores, -jnp.inf), stable=True)

    def one(k, taken):
        own = order[k]
        # One row of overlaps at a time: of all at once a detector of many anchors makes millions.
        overlap = _iou(theirs[own], boxes)
        # What is no golden object of the class is never taken; NaN overlaps nothing.
        fits = (found[own] == label) & there & (overlap >= iou) & (taken < 0)
        free = jnp.where(fits, overlap, -1.0)
        # Of equal overlaps the last, as COCO's loop has it.
        best = free.size - 1 - jnp.argmax(free[::-1])
        return taken.at[best].set(jnp.where(free[best] >= 0, own, taken[best]))

    # Objects come first.
    return jax.lax.fori_loop(0, objects.sum(), one, jnp.full(label.shape, -1))
