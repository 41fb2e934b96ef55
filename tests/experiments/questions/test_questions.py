"""Each criterion on a small network of its own, from the library and the command line."""

import json
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest

import jfi
from experiments import campaign
from experiments.questions import __main__ as questions
from experiments.questions import data, networks, training
from jfi import bits
from jfi.campaign import records
from jfi.engine import golden

FILE = networks.__file__
IMAGES = 4  # of the exhaustive part, judged naively
WORDS = {"detector": 2, "segmenter": 2, "tagger": 4, "regressor": 4, "gpt": 2}  # of each site
STEPS = {"detector": 120, "segmenter": 25, "tagger": 250, "regressor": 60, "gpt": 40}


class Trained(NamedTuple):
    module: object
    variables: dict
    x: np.ndarray
    y: np.ndarray | None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Tiny versions of the networks, in a folder as the script makes it; one at a time."""
    folder, made = tmp_path_factory.mktemp("home"), {}

    def of(name: str) -> Trained:
        if name not in made:
            out = folder / networks.FOLDER
            out.mkdir(parents=True, exist_ok=True)
            lesson = training.LESSONS[name]()
            networks.save(out / f"{name}_weights.npz", training.fit(name, lesson, STEPS[name]))
            labels = {} if lesson.y_test is None else {"y_test": lesson.y_test}
            np.savez(out / f"{name}.npz", x_test=lesson.x_test, **labels)
            made[name] = Trained(*networks.trained(name, out), lesson.x_test, lesson.y_test)
        return made[name]

    of.folder = folder
    return of


@pytest.fixture(autouse=True)
def quick(monkeypatch, trained):
    monkeypatch.chdir(trained.folder)
    monkeypatch.setattr(golden, "golden_rate", lambda network, images: 1e4)


# --- The criteria once more, in NumPy, of one image


def objects(found):
    """Corners, scores and kinds of what a detector says is there, the surest first."""
    boxes, scores = found["boxes"], found["scores"]
    with np.errstate(invalid="ignore", over="ignore"):
        corners = np.concatenate(
            [boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1
        )
        there = scores.max(1) >= 0.5
    order = [k for k in np.argsort(-scores.max(1), kind="stable") if there[k]]
    return [(corners[k], int(scores[k].argmax())) for k in order]


def iou(a, b):
    if (a == b).all():
        return 1.0
    with np.errstate(all="ignore"):
        sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        both = np.prod(np.where(sides < 0, 0, sides))
        union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both
        return both / union if union else 0.0


def objects_differ(before, after):
    left = objects(before)
    told = objects(after)
    if len(left) != len(told):
        return True
    for box, label in told:
        fits = [(iou(box, b), k) for k, (b, name) in enumerate(left) if name == label]
        fits = [one for one in fits if one[0] >= 0.5]
        if not fits:
            return True
        del left[max(fits)[1]]
    return False


def pixels_differ(share):
    return lambda before, after: (before.argmax(-1) != after.argmax(-1)).mean() > share


def labels_differ(before, after):
    return ((before > 0.5) != (after > 0.5)).any() or np.isnan(after).any()


def too_far(before, after):
    return not (np.abs(after.astype(float) - before) <= 10).all()


ASKED = {
    "detections:boxes=cxcywh": ("detector", objects_differ),
    "pixels": ("segmenter", pixels_differ(0)),
    "pixels:0.01": ("segmenter", pixels_differ(0.01)),
    "threshold": ("tagger", labels_differ),
    "tolerance:10": ("regressor", too_far),
    "tokens:any": ("gpt", lambda a, b: (a.argmax(-1) != b.argmax(-1)).any()),
    "tokens:last": ("gpt", lambda a, b: a[-1].argmax() != b[-1].argmax()),
}


def one(tree, k):
    return jax.tree.map(lambda x: x[k], tree)


def exhaustive(found: Trained, critical, sites, words_each: int):
    """All flips of a few words of each site: faults, verdicts [F, IMAGES], and which are sure.

    Where moving outputs by 1e-5 of their largest may tell otherwise, rounding decides.
    """
    run = jax.jit(found.module.apply)
    flat = {"/".join(key): key for key in _paths(found.variables["params"])}
    before = jax.tree.map(np.asarray, run(found.variables, found.x[:IMAGES]))
    rows, verdicts, sure = [], [], []
    rng = np.random.default_rng(0)
    for number, site in enumerate(sites):
        golden_words = np.asarray(_get(found.variables["params"], flat[site.name]))
        for index in rng.choice(golden_words.size, words_each, replace=False):
            for bit in range(bits.width(golden_words.dtype)):
                words = golden_words.copy()
                words.flat[index] = bits.faulty(words.ravel()[index : index + 1], bit, bits.FLIP)[0]
                params = _set(found.variables["params"], flat[site.name], words)
                after = jax.tree.map(np.asarray, run({"params": params}, found.x[:IMAGES]))
                rows.append((number, index, bit, bits.FLIP))
                told = [critical(one(before, k), one(after, k)) for k in range(IMAGES)]
                verdicts.append(told)
                same = np.ones(IMAGES, bool)
                for sign in (-1, 1):
                    near = jax.tree.map(lambda x, s=sign: _moved(x, s, rng), after)
                    again = [critical(one(before, k), one(near, k)) for k in range(IMAGES)]
                    same &= np.array(again) == told
                sure.append(same)
    faults = jfi.Faults(*(np.array(column) for column in zip(*rows, strict=True)))
    return faults, np.array(verdicts), np.array(sure)


def _moved(x, sign, rng):
    with np.errstate(over="ignore", invalid="ignore"):
        size = np.abs(np.where(np.isfinite(x), x, 0)).max()
        return x + sign * rng.choice([-1, 1], x.shape).astype(x.dtype) * x.dtype.type(1e-5 * size)


def _paths(tree, start=()):
    for key, value in tree.items():
        yield from _paths(value, (*start, key)) if isinstance(value, dict) else [(*start, key)]


def _get(tree, path):
    return tree if not path else _get(tree[path[0]], path[1:])


def _set(tree, path, value):
    if not path:
        return value
    return {**tree, path[0]: _set(tree[path[0]], path[1:], value)}


@pytest.mark.parametrize("criterion", ASKED)
def test_verdicts_are_those_of_numpy(trained, criterion):
    name, critical = ASKED[criterion]
    found = trained(name)
    study = jfi.study((found.module, found.variables), found.x[:IMAGES], criterion=criterion)
    engine = study.engine(jfi.select(study.network))
    faults, wanted, sure = exhaustive(found, critical, engine.sites, WORDS[name])
    assert 0.002 < wanted.mean() < 0.9 and sure.mean() > 0.9
    for measure in ("full", "critical"):
        told = engine.run(faults, measure, keep_bits=True)
        said = np.unpackbits(told.critical_bits, axis=1, count=IMAGES).astype(bool)
        assert (said == wanted)[sure].all(), measure
    if engine.by.constraints is not None:
        row, image = np.nonzero(np.ones_like(wanted))
        pairs = jfi.Faults(*(column[row] for column in faults))
        _, proven = engine.critical_pairs(pairs, image)
        assert not (proven & (wanted & sure)[row, image]).any()


@pytest.mark.parametrize("criterion", ASKED)
def test_it_runs_from_the_command_line(script, trained, tmp_path, criterion):
    name, _ = ASKED[criterion]
    found = trained(name)
    workdir = tmp_path / "run"
    flags = [f"--net={FILE}:{name}", f"--dataset={networks.FOLDER / name}.npz"]
    flags += [f"--criterion={criterion}", "--sampler=network_wise", "--error_margin=0.1"]
    flags += ["--images=6", "--measure=critical", "--verify=40"]
    ended = script(campaign, *flags, f"--workdir={workdir}")
    assert ended.status == 0, ended.err
    summary, manifest = records.read_summary(workdir), records.read_manifest(workdir)
    assert summary["verify"]["pairs"] == 40 and not summary["verify"]["disagreements"]
    assert manifest["config"]["criterion"] == criterion
    page = (workdir / "report.html").read_text()
    meaning = jfi.study((found.module, found.variables), found.x[:2], criterion=criterion).criterion
    assert meaning.meaning in page.replace("&#39;", "'") and f"--criterion={criterion}" in page
    assert "top-1 answer" not in page
    # The library says the same of the same faults.
    labels = None if found.y is None else found.y[:6]
    study = jfi.study((found.module, found.variables), found.x[:6], labels, criterion=criterion)
    options = {"error_margin": 0.1, "verify": 40, "progress": False}
    other = study.run("network_wise", workdir=tmp_path / "library", **options).summary
    assert other["estimates"] == summary["estimates"] and other["pairs"] == summary["pairs"]


def test_the_script_trains_asks_and_prints_one_table(script, trained, tmp_path):
    flags = ["--nets=regressor,lenet", "--effort=0.2", "--images=8", "--error_margin=0.1"]
    flags += ["--verify=20", f"--out={tmp_path}"]
    ended = script(questions, *flags)
    assert ended.status == 0, ended.err
    text = (tmp_path / "questions.md").read_text()
    assert text in ended.out
    rows = [line.split(" | ") for line in text.splitlines()[2:]]
    assert [row[2].strip("`") for row in rows] == [
        *questions.ASKED["regressor"], *questions.ASKED["lenet"]
    ]  # fmt: skip
    for row in rows:
        share, low, high = map(float, re.findall(r"([\d.]+)%", row[3]))
        assert low <= share <= high
    summary = json.loads((tmp_path / "regressor_tolerance_10" / "summary.json").read_text())
    assert rows[0][6] == f"{summary['estimates'][0]['injections']:,}"
    # What is done is not done again.
    ended = script(questions, *flags)
    assert ended.status == 0 and text in ended.out and "steps in" not in ended.out
    ended = script(questions, "--nets=vgg", f"--out={tmp_path}")
    assert ended.status == 2 and "nets 'vgg' is unknown; choose from detector" in ended.err


def test_untrained_networks_say_how_they_are_made(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", x_test=np.zeros((2, 10), np.float32))
    ended = script(campaign, f"--net={FILE}:regressor", "--dataset=x.npz")
    assert ended.status == 2
    assert "regressor_weights.npz is not there; make it: python -m experiments.q" in ended.err


def test_scenes_are_what_they_say():
    """Boxes hold their shapes, and no pixel of another's; kinds are those of the mask."""
    scene = data.scenes(20, 0)
    at = np.arange(data.SIDE) + 0.5
    assert scene.mask.max() == len(data.KINDS) and 0.3 < (scene.kind > 0).mean() < 0.7
    for k, row, column in np.argwhere(scene.kind > 0):
        x, y, w, h = scene.boxes[k, row, column]
        inside = (np.abs(at[:, None] - y) <= h / 2) & (np.abs(at - x) <= w / 2)
        cell = np.zeros_like(inside)
        top, left = max(0, row * 8 - 2), max(0, column * 8 - 2)
        cell[top : row * 8 + 10, left : column * 8 + 10] = True
        own = (scene.mask[k] == scene.kind[k, row, column]) & inside
        assert own.any() and (inside <= cell).all()
        assert own.sum() > 0.25 * inside.sum()
        assert scene.images[k, ..., 0][own].mean() > 0.35
    labels = data.present(scene.kind)
    assert (labels.sum(1) == [len(set(one.ravel()) - {0}) for one in scene.kind]).all()
    x, wanted = data.windows(data.text(), 24, 5, 0)
    assert (x[:, 1:] == wanted[:, :-1]).all() and x.max() < len(data.CHARACTERS)
