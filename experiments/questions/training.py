"""Training the small networks, and how good each is on what it was not trained on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.questions import data
from experiments.questions.networks import LENGTH, MODULES, SPREAD

BATCH = 64
RATE = 5e-3  # of Adam, its peak
TRAINED = 2000  # scenes, or windows of the text, that a network is trained on


class Lesson(NamedTuple):
    """What a network learns, and is judged on.

    x, y: arrays [N, ...] to train on; y may be a tuple of them. x_test, y_test: of the campaign;
    y_test is None where the criterion takes no labels.
    loss: `(outputs, y) -> number`. quality: `outputs of x_test -> text`. steps: of training.
    """

    x: Any
    y: Any
    x_test: np.ndarray
    y_test: np.ndarray | None
    loss: Callable[[Any, Any], Any]
    quality: Callable[[Any], str]
    steps: int


def fit(name: str, lesson: Lesson, steps: int, seed: int = 0) -> Any:
    """The variables of a network after so many steps of Adam on random batches."""
    module = MODULES[name]
    variables = jax.jit(module.init)(jax.random.key(seed), lesson.x[:1])
    adam = optax.adam(optax.cosine_decay_schedule(RATE, steps))

    def loss(variables, x, y):
        return lesson.loss(module.apply(variables, x), y)

    @jax.jit
    def step(variables, moments, x, y):
        update, moments = adam.update(jax.grad(loss)(variables, x, y), moments)
        return optax.apply_updates(variables, update), moments

    moments, rng = jax.jit(adam.init)(variables), np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(0, len(lesson.x), BATCH)
        batch = jax.tree.map(lambda a, rows=rows: a[rows], (lesson.x, lesson.y))
        variables, moments = step(variables, moments, *batch)
    return variables


def outputs(name: str, variables: Any, x: np.ndarray) -> Any:
    """What a network returns for images, as NumPy."""
    return jax.tree.map(np.asarray, jax.jit(MODULES[name].apply)(variables, x))


def _chosen_log(chances, chosen):
    """Mean log of the chances that are chosen, [..., C] and int [...]."""
    taken = jnp.take_along_axis(chances, chosen[..., None], -1)
    return jnp.log(taken + 1e-7).mean()


def _bits(chances, there):
    """Cross-entropy of chances [...] and 0 or 1 [...]."""
    return -jnp.log(jnp.where(there > 0, chances, 1 - chances) + 1e-7).mean()


def detector() -> Lesson:
    """Kinds and boxes of the shapes of a scene."""
    train, test = data.scenes(TRAINED, 0), data.scenes(data.TEST, 1)

    def flat(scene):
        return scene.kind.reshape(len(scene.kind), -1), scene.boxes.reshape(len(scene.kind), -1, 4)

    def loss(found, wanted):
        kind, boxes = wanted
        there = kind[..., None] == jnp.arange(1, 1 + len(data.KINDS))
        off = optax.huber_loss(found["boxes"], boxes).mean(-1)
        return _bits(found["scores"], there) + 0.1 * (off * (kind > 0)).mean()

    def quality(found):
        kind, boxes = flat(test)
        score, told = found["scores"].max(-1), 1 + found["scores"].argmax(-1)
        right = (score >= 0.5) & (told == kind) & (_iou(found["boxes"], boxes) >= 0.5)
        recall = right[kind > 0].mean()
        return f"finds {recall:.1%} of objects, {right.sum() / (score >= 0.5).sum():.1%} right"

    return Lesson(train.images, flat(train), test.images, None, loss, quality, 600)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[...]: intersection over union of boxes [..., 4] of centre and size."""
    low = np.maximum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    high = np.minimum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    both = np.maximum(high - low, 0).prod(-1)
    return both / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - both)


def segmenter() -> Lesson:
    """The kind of shape at each pixel."""
    train, test = data.scenes(TRAINED, 0), data.scenes(data.TEST, 1)

    def quality(found):
        return f"{(found.argmax(-1) == test.mask).mean():.1%} of pixels"

    return Lesson(
        train.images, train.mask, test.images, test.mask,
        lambda found, wanted: -_chosen_log(found, wanted), quality, 250,
    )  # fmt: skip


def tagger() -> Lesson:
    """Which kinds of shape are there."""
    train, test = data.scenes(TRAINED, 0), data.scenes(data.TEST, 1)
    labels = data.present(test.kind)

    def quality(found):
        return f"{((found > 0.5) == labels).mean():.1%} of labels"

    return Lesson(
        train.images, data.present(train.kind), test.images, labels, _bits, quality, 600
    )  # fmt: skip


def regressor() -> Lesson:
    """How far diabetes goes."""
    x, y = data.diabetes()

    def loss(found, wanted):
        return (((found - wanted) / SPREAD) ** 2).mean()

    def quality(found):
        left = ((found - y[: data.TEST]) ** 2).mean() / y[: data.TEST].var()
        return f"R² {1 - left:.2f}"

    rest = slice(data.TEST, None)
    return Lesson(x[rest], y[rest], x[: data.TEST], y[: data.TEST], loss, quality, 100)


def gpt() -> Lesson:
    """The next character of Python's help."""
    letters = data.text()
    cut = int(0.9 * letters.size)
    x, y = data.windows(letters[:cut], LENGTH, TRAINED, 0)
    x_test, y_test = data.windows(letters[cut:], LENGTH, data.TEST, 1)

    def quality(found):
        return f"{(found.argmax(-1) == y_test).mean():.1%} of characters"

    def loss(found, wanted):
        return optax.softmax_cross_entropy_with_integer_labels(found, wanted).mean()

    return Lesson(x, y, x_test, y_test, loss, quality, 500)


LESSONS: dict[str, Callable[[], Lesson]] = {
    "detector": detector,
    "segmenter": segmenter,
    "tagger": tagger,
    "regressor": regressor,
    "gpt": gpt,
}
