"""Objects lost, invented and moved, against pycocotools' own matching."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfi
from jfi import forms
from jfi.criteria import names
from jfi.faults import FAULT_MODELS

OBJECTS, CLASSES = 7, 3


def scene(rng, golden=None):
    """Boxes in corners [D, 4] and scores [D, C]; some moved, rescored or relabelled."""
    if golden is None:
        low = rng.uniform(0, 50, (OBJECTS, 2))
        boxes = np.concatenate([low, low + rng.uniform(5, 40, (OBJECTS, 2))], 1)
        return boxes.astype(np.float32), rng.random((OBJECTS, CLASSES)).astype(np.float32)
    boxes, scores = (x.copy() for x in golden)
    boxes += rng.normal(size=boxes.shape).astype(np.float32) * rng.choice(
        [0, 0.5, 1, 8], (OBJECTS, 1)
    )
    changed = rng.random(OBJECTS) < 0.15
    scores[changed] = rng.random((changed.sum(), CLASSES))
    order = rng.permutation(OBJECTS)
    return boxes[order].astype(np.float32), scores[order].astype(np.float32)


def by_coco(golden, faulty, iou, score):
    """Whether pycocotools leaves an object of either side unmatched."""
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    def objects(scene):
        boxes, scores = scene
        kept = scores.max(1) >= score
        wide = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).astype(float)
        return [
            dict(image_id=1, bbox=b.tolist(), category_id=int(s.argmax()) + 1,
                 area=float(b[2] * b[3]), iscrowd=0, score=float(s.max()))
            for b, s in zip(wide[kept], scores[kept], strict=True)
        ]  # fmt: skip

    def made(found):
        base = coco.COCO()
        base.dataset = {
            "images": [{"id": 1}],
            "categories": [{"id": k + 1} for k in range(CLASSES)],
            "annotations": [dict(one, id=k + 1) for k, one in enumerate(found)],
        }
        base.createIndex()
        return base

    truth, found = objects(golden), objects(faulty)
    run = COCOeval(made(truth), made(found), "bbox")
    run.params.iouThrs, run.params.maxDets = np.array([iou]), [100]
    run.params.areaRng = [[0, 1e10]]
    run.evaluate()
    matched = sum(int((one["dtMatches"] > 0).sum()) for one in run.evalImgs if one is not None)
    return matched < len(truth) or matched < len(found)


@pytest.mark.parametrize(("iou", "score"), [(0.5, 0.6), (0.3, 0.8), (0.75, 0.5)])
def test_matching_is_that_of_coco(iou, score):
    rng = np.random.default_rng(0)
    form = forms.outputs(
        {"boxes": jnp.zeros((1, OBJECTS, 4)), "scores": jnp.zeros((1, OBJECTS, CLASSES))}
    )
    judge = names.parse(f"detections:iou={iou},score={score}").judge(form)
    critical = jax.jit(judge.critical)
    told, wanted = [], []
    for _ in range(150):
        golden = scene(rng)
        faulty = scene(rng, golden)
        rows = (jnp.concatenate([x.ravel() for x in one]) for one in (golden, faulty))
        told.append(bool(critical(*rows)))
        wanted.append(by_coco(golden, faulty, iou, score))
    assert told == wanted and 0.1 < np.mean(wanted) < 1


@pytest.mark.parametrize("form", ["xywh", "cxcywh"])
def test_boxes_of_other_forms(form):
    rng = np.random.default_rng(1)
    outputs = forms.outputs((jnp.zeros((1, OBJECTS, 4)), jnp.zeros((1, OBJECTS))))
    usual, other = (
        names.parse(f"detections:iou=0.5,score=0.3,boxes={f}").judge(outputs)
        for f in ("xyxy", form)
    )

    def changed(boxes):
        low, high = boxes[:, :2], boxes[:, 2:]
        first = low if form == "xywh" else (low + high) / 2
        return np.concatenate([first, high - low], 1)

    seen = []
    for _ in range(40):
        golden = scene(rng)
        faulty = scene(rng, golden)
        pair = [(boxes, scores.max(1)) for boxes, scores in (golden, faulty)]
        rows = [np.concatenate([b.ravel(), s]) for b, s in pair]
        seen.append(bool(usual.critical(*rows)))
        rows = [np.concatenate([changed(b).ravel(), s]) for b, s in pair]
        assert bool(other.critical(*rows)) == seen[-1]
    assert 0 < np.mean(seen) < 1


def test_a_detector_from_the_engine():
    """An SSD-like head: boxes that are NaN, or scores that are, are lost objects."""
    rng = np.random.default_rng(2)
    params = {
        "body": rng.normal(size=(6, 12)), "boxes": rng.normal(size=(12, 5 * 4)) * 0.3,
        "scores": rng.normal(size=(12, 5 * 2)),
    }  # fmt: skip
    params = {name: value.astype(np.float32) for name, value in params.items()}
    anchors = np.concatenate([rng.uniform(0, 50, (5, 2)), np.full((5, 2), 20)], 1).astype("f4")

    def apply(params, x):
        y = jax.nn.relu(x @ params["body"])
        boxes = anchors + (y @ params["boxes"]).reshape(-1, 5, 4)
        return {"boxes": boxes, "scores": jax.nn.sigmoid((y @ params["scores"]).reshape(-1, 5, 2))}

    images = rng.normal(size=(4, 6)).astype(np.float32)
    study = jfi.study(
        (apply, params), images, criterion="detections:iou=0.5,score=0.4,boxes=cxcywh", name="ssd"
    )
    engine = study.engine(study.network.sites)
    faults = jfi.FaultSpace(engine.sites, FAULT_MODELS["flip"])
    faults = faults.decode(np.arange(0, faults.size, 37))
    told = engine.run(faults, "full")
    assert 0.02 < (told.critical > 0).mean() < 0.95
    assert (told.non_finite <= told.critical).all()  # what is not finite is no object


def test_many_anchors_take_little_memory():
    """As many as SSD300 has, without suppression: no overlaps of all with all."""
    anchors = 8732
    form = forms.outputs({"boxes": jnp.zeros((1, anchors, 4)), "scores": jnp.zeros((1, anchors))})
    critical = names.parse("detections").judge(form).critical
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 50, (anchors, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 40, (anchors, 2))], 1)
    scores = np.where(np.arange(anchors) % 1000 == 7, 0.9, 0.1)
    golden = np.concatenate([boxes.ravel(), scores]).astype(np.float32)
    faulty = np.stack([golden] * 3)
    faulty[1, 4 * 7 + 2 * np.arange(2)] += 60  # the box of an object, moved away
    faulty[2, 4 * anchors + 8] = 0.8  # a new one
    run = jax.jit(jax.vmap(critical, (None, 0))).lower(golden, faulty).compile()
    assert run.memory_analysis().temp_size_in_bytes < 16 << 20
    assert run(golden, faulty).tolist() == [False, True, True]
