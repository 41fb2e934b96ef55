"""Training, epoch by epoch: the same recipe and seed give the same weights."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nets
from experiments.data import sets
from jfi.errors import InputError
from nets import surrogate

EVALUATION_BATCH = 500
AUGMENTATIONS = ("none", "crop", "crop_flip")
PRECISIONS = ("float32", "bfloat16")
SHIFT = 4  # pixels that a random crop moves an image by, at most


class Recipe(NamedTuple):
    """How to train.

    epochs: passes over the training images. batch_size: images a step.
    learning_rate: of AdamW, its peak. weight_decay: of AdamW, of all parameters.
    augment: one of AUGMENTATIONS. precision: one of PRECISIONS, of what is computed; parameters
    and running statistics stay as the net has them.
    surrogate: of a spiking net, one of surrogate.USUAL in place of the net's own; else None.
    seed: of first weights, order and augmentation.
    """

    epochs: int = 40
    batch_size: int = 32
    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    augment: str = "none"
    precision: str = "float32"
    surrogate: str | None = None
    seed: int = 0


class State(NamedTuple):
    """What a step of training changes."""

    params: dict
    statistics: dict  # {"batch_stats": ...} of a net with BN, else empty
    optimiser: optax.OptState

    @property
    def variables(self) -> dict:
        """The variables of the net."""
        return {"params": self.params, **self.statistics}


class Epoch(NamedTuple):
    """Mean loss over the steps of an epoch, accuracy on the test images after it."""

    loss: float
    accuracy: float


class Training(NamedTuple):
    """Where training stands: the state after the epochs of the history.

    Random numbers come from the recipe's seed, the epoch and the step: they need no state.
    """

    state: State
    history: tuple[Epoch, ...] = ()


def begin(net: nets.Net, recipe: Recipe, steps: int) -> Training:
    """Training of `steps` steps an epoch, before the first."""
    variables = nets.init(net, recipe.seed)
    params = variables.pop("params")
    return Training(State(params, variables, _optimiser(recipe, steps).init(params)))


def train(
    net: nets.Net,
    dataset: sets.Dataset,
    recipe: Recipe,
    start: Training | None = None,
    *,
    keep: Callable[[Training], None] = lambda training: None,
    report: Callable[[int, int], None] = lambda done, steps: None,
) -> Training:
    """Train `net` on the training half, from the beginning or from where `start` stands.

    `keep(training)` is called after every epoch, `report(done, steps)` after every step, `done`
    being the steps of all epochs so far. The arrays of `start` are used up.
    Raises InputError where the data set has no training half or fewer images than one batch,
    or where a label is out of the net's range.
    """
    steps = check(net, dataset, recipe)
    state, history = start or begin(net, recipe, steps)
    images, labels = nets.normalise(net, dataset.x_train), dataset.y_train
    # One step a call: inside a lax.scan the convolutions of XLA ran 2.5 times slower on CPU.
    step = jax.jit(partial(_step, net, recipe, _optimiser(recipe, steps)), donate_argnums=0)
    for epoch in range(len(history), recipe.epochs):
        losses = []
        for done, batch in enumerate(_batches(recipe, epoch, len(labels)), start=epoch * steps):
            state, loss = step(state, done, images[batch], labels[batch])
            losses.append(loss)
            report(done + 1, steps)
        found = accuracy(net, state.variables, dataset.x_test, dataset.y_test)
        history = (*history, Epoch(float(np.mean(losses)), found))
        keep(Training(state, history))
    return Training(state, history)


def accuracy(net: nets.Net, variables: dict, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images [B, H, W, C] in [0, 1] whose largest logit is the label's."""
    x = nets.normalise(net, images)
    batches, net = np.split(x, range(EVALUATION_BATCH, len(x), EVALUATION_BATCH)), nets.fast(net)
    found = np.concatenate([_predict(net, variables, batch) for batch in batches])
    return float((found == labels).mean())


@partial(jax.jit, static_argnums=0)
def _predict(net: nets.Net, variables: dict, x) -> jax.Array:
    return nets.apply(net, variables, x).argmax(-1)


def check(net: nets.Net, dataset: sets.Dataset, recipe: Recipe) -> int:
    """Steps of an epoch."""
    if dataset.x_train is None:
        raise InputError(f"dataset {dataset.name}: no x_train and y_train to train on")
    if len(dataset.y_train) < recipe.batch_size:
        raise InputError(
            f"batch_size {recipe.batch_size}: dataset {dataset.name} has only "
            f"{len(dataset.y_train)} training images"
        )
    if recipe.surrogate is not None and not hasattr(net.module, "surrogate"):
        raise InputError(f"surrogate {recipe.surrogate}: {net.name} is no spiking network")
    if recipe.augment != "none" and len(net.input_shape) != 3:
        raise InputError(f"augment {recipe.augment}: {net.name} takes no images; none is right")
    sets.check_labels(dataset, net.num_classes)
    return len(dataset.y_train) // recipe.batch_size


def _optimiser(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """AdamW; the learning rate rises over a twentieth of the steps, then falls as a cosine."""
    total = steps * recipe.epochs
    rate = optax.warmup_cosine_decay_schedule(0, recipe.learning_rate, total // 20, total)
    return optax.adamw(rate, weight_decay=recipe.weight_decay)


def _batches(recipe: Recipe, epoch: int, images: int) -> np.ndarray:
    """Image indices [steps, batch_size] of an epoch in random order; the last few stay out."""
    order = np.random.default_rng((recipe.seed, epoch)).permutation(images)
    steps = images // recipe.batch_size
    return order[: steps * recipe.batch_size].reshape(steps, recipe.batch_size)


def _step(net, recipe: Recipe, optimiser, state: State, number, x, y) -> tuple[State, jax.Array]:
    """One step, the `number`-th, down the mean cross-entropy of a batch."""
    if recipe.augment != "none":
        key = jax.random.fold_in(jax.random.key(recipe.seed), number)
        x = augmented(key, x, flip=recipe.augment == "crop_flip")
    loss = partial(_loss, _learner(net, recipe), state.statistics, x, y)
    (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, memory = optimiser.update(gradient, state.optimiser, state.params)
    return State(optax.apply_updates(state.params, updates), statistics, memory), value


def _learner(net: nets.Net, recipe: Recipe) -> nets.Net:
    """The net as a step of training runs it."""
    net = computing_in(net, recipe.precision)
    if recipe.surrogate is None:
        return net
    chosen = surrogate.named(recipe.surrogate)
    return net._replace(module=net.module.clone(surrogate=chosen))


def augmented(key: jax.Array, x: jax.Array, *, flip: bool) -> jax.Array:
    """Normalised images [B, H, W, C], each shifted by up to SHIFT pixels either way (what comes in
    is 0, the mean pixel) and, with `flip`, mirrored left to right with probability 1/2: He et al.,
    CVPR 2016, section 4.2."""
    corner_key, flip_key = jax.random.split(key)
    wide = jnp.pad(x, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))
    corners = jax.random.randint(corner_key, (len(x), 2), 0, 2 * SHIFT + 1)
    x = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), x.shape[1:]))(
        wide, corners
    )
    mirrored = jax.random.bernoulli(flip_key, shape=(len(x), 1, 1, 1)) & flip
    return jnp.where(mirrored, x[:, :, ::-1], x)


def computing_in(net: nets.Net, precision: str) -> nets.Net:
    """The net computing in a narrower type, fast on this machine; its parameters keep theirs."""
    net = nets.fast(net)
    if precision == "float32":
        return net
    return net._replace(module=net.module.clone(dtype=jnp.dtype(precision)))


def _loss(net, statistics: dict, x, y, params: dict) -> tuple[jax.Array, dict]:
    """Mean cross-entropy with BN normalising by the batch, and the new running statistics."""
    logits, statistics = net.module.apply(
        {"params": params, **statistics}, x, train=True, mutable=["batch_stats"]
    )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), statistics


def smoke_weights(net: nets.Net, dataset: sets.Dataset, out: Path) -> Path:
    """Weights of a network in a folder, trained where they are not there yet."""
    path = out / f"{net.name}_{dataset.name}.safetensors"
    if not path.exists():
        variables = train(net, dataset, Recipe()).state.variables
        nets.save(path, variables, nets.statistics_header(net))
    return path
