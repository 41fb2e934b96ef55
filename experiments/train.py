"""Train a network and keep its weights.

    python -m experiments.train --net=lenet --dataset=digits

trains LeNet-5 on scikit-learn's digits with AdamW (warm-up, then cosine decay), writes
weights/lenet_digits.safetensors and prints the accuracy on the test images: 97.8% after 5 s on 4
cores. The same on MNIST (`python -m experiments.data --help` says how to get it), 99.1% after a
minute:

    python -m experiments.train --dataset=mnist.npz --epochs=5 --batch_size=128 --learning_rate=3e-3

Where the weights are there already, nothing is trained; --overwrite trains again. The CIFAR
ResNets train too, without augmentation and slowly on a CPU.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from absl import flags

import nets
from experiments import cli, data
from jfi.errors import InputError

EVALUATION_BATCH = 500


class Recipe(NamedTuple):
    """How to train: epochs, images a step, peak learning rate, seed of weights and order."""

    epochs: int = 40
    batch_size: int = 32
    learning_rate: float = 1e-2
    seed: int = 0


class State(NamedTuple):
    """What a step of training changes."""

    params: dict
    statistics: dict  # {"batch_stats": ...} of a net with BN, else empty
    optimiser: optax.OptState


def train(
    net: nets.Net,
    dataset: data.Dataset,
    recipe: Recipe,
    report: Callable[[int, float], None] = lambda epoch, loss: None,
) -> dict:
    """Variables of `net` trained on the training half; `report(epoch, mean loss)` each epoch.

    Raises InputError where the data set has no training half or fewer images than one batch,
    or where a label is out of the net's range.
    """
    _check(net, dataset, recipe)
    images, labels = nets.normalise(net, dataset.x_train), dataset.y_train
    optimiser = _optimiser(recipe, len(labels) // recipe.batch_size)
    # One step a call: inside a lax.scan the convolutions of XLA ran 2.5 times slower on CPU.
    step = jax.jit(partial(_step, net, optimiser), donate_argnums=0)
    variables = nets.init(net, recipe.seed)
    params = variables.pop("params")
    state = State(params, variables, optimiser.init(params))
    for epoch in range(recipe.epochs):
        losses = []
        for batch in _batches(recipe, epoch, len(labels)):
            state, loss = step(state, images[batch], labels[batch])
            losses.append(loss)
        report(epoch, float(np.mean(losses)))
    return {"params": state.params, **state.statistics}


def accuracy(net: nets.Net, variables: dict, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images [B, H, W, C] in [0, 1] whose largest logit is the label's."""
    predict = jax.jit(lambda v, x: nets.apply(net, v, x).argmax(-1))
    x = nets.normalise(net, images)
    batches = np.split(x, range(EVALUATION_BATCH, len(x), EVALUATION_BATCH))
    found = np.concatenate([predict(variables, batch) for batch in batches])
    return float((found == labels).mean())


def _check(net: nets.Net, dataset: data.Dataset, recipe: Recipe) -> None:
    if dataset.x_train is None:
        raise InputError(f"dataset {dataset.name}: no x_train and y_train to train on")
    if len(dataset.y_train) < recipe.batch_size:
        raise InputError(
            f"batch_size {recipe.batch_size}: dataset {dataset.name} has only "
            f"{len(dataset.y_train)} training images"
        )
    data.check_labels(dataset, net.num_classes)


def _optimiser(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """AdamW; the learning rate rises over a twentieth of the steps, then falls as a cosine."""
    total = steps * recipe.epochs
    rate = optax.warmup_cosine_decay_schedule(0, recipe.learning_rate, total // 20, total)
    return optax.adamw(rate)


def _batches(recipe: Recipe, epoch: int, images: int) -> np.ndarray:
    """Image indices [steps, batch_size] of an epoch in random order; the last few stay out."""
    order = np.random.default_rng((recipe.seed, epoch)).permutation(images)
    steps = images // recipe.batch_size
    return order[: steps * recipe.batch_size].reshape(steps, recipe.batch_size)


def _step(net, optimiser, state: State, x, y) -> tuple[State, jax.Array]:
    """One step down the mean cross-entropy of a batch."""
    loss = partial(_loss, net, state.statistics, x, y)
    (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, memory = optimiser.update(gradient, state.optimiser, state.params)
    return State(optax.apply_updates(state.params, updates), statistics, memory), value


def _loss(net, statistics: dict, x, y, params: dict) -> tuple[jax.Array, dict]:
    """Mean cross-entropy with BN normalising by the batch, and the new running statistics."""
    logits, statistics = net.module.apply(
        {"params": params, **statistics}, x, train=True, mutable=["batch_stats"]
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), statistics


def _with_progress(train_net: Callable, epochs: int) -> dict:
    """Call `train_net(report)` under a progress bar, which only a terminal shows."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=epochs)
        return train_net(
            lambda epoch, loss: progress.update(
                task, completed=epoch + 1, description=f"training, loss {loss:.4f}"
            )
        )


def define_flags() -> None:
    """Flags of this script."""
    usual = Recipe()
    flags.DEFINE_string("net", "lenet", f"The network: {', '.join(nets.names())}.")
    flags.DEFINE_string("dataset", "digits", f"{', '.join(data.names())}, or a .npz file.")
    flags.DEFINE_string("data_dir", data.DATA_DIR, "Where tensorflow-datasets keeps its sets.")
    flags.DEFINE_integer("epochs", usual.epochs, "Passes over the training images.", 1)
    flags.DEFINE_integer("batch_size", usual.batch_size, "Images a step.", 1)
    flags.DEFINE_float("learning_rate", usual.learning_rate, "Its peak, after the warm-up.", 0)
    flags.DEFINE_integer("seed", usual.seed, "Seed of the first weights and the order.", 0)
    flags.DEFINE_string("out", None, "Weights (default: weights/<net>_<dataset>.safetensors).")
    flags.DEFINE_bool("overwrite", False, "Train even where the weights are there already.")


def main() -> None:
    """Train, or find trained, the network that the flags name."""
    args = flags.FLAGS
    dataset = data.load(args.dataset, args.data_dir)
    net = nets.build(args.net, dataset.x_test.shape[1:])
    data.check_labels(dataset, net.num_classes)
    out = Path(args.out or Path("weights", f"{net.name}_{dataset.name}.safetensors"))
    if out.suffix != ".safetensors":
        raise InputError(f"--out={out}: a .safetensors file is right")
    if out.exists() and not args.overwrite:
        print(f"{out} is there: not trained again (--overwrite trains again)")
        variables = nets.load(net, out)
    else:
        _check_writable(out)
        recipe = Recipe(args.epochs, args.batch_size, args.learning_rate, args.seed)
        variables = _with_progress(partial(train, net, dataset, recipe), recipe.epochs)
        nets.save(out, variables, {"net": net.name, "dataset": dataset.name, **_text(recipe)})
        print(f"weights: {out}")
    print(f"test accuracy: {accuracy(net, variables, dataset.x_test, dataset.y_test):.2%}")


def _check_writable(out: Path) -> None:
    """Raise InputError where `out` can't be written: before training, not after."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise InputError(f"--out={out}: can't be written there ({error.strerror})") from error


def _text(recipe: Recipe) -> dict[str, str]:
    """The recipe as safetensors metadata."""
    return {key: str(value) for key, value in recipe._asdict().items()}


if __name__ == "__main__":
    define_flags()
    cli.run(main)
