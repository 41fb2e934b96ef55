"""Train a network and keep its weights.

    python -m experiments.train --net=lenet --dataset=digits

trains LeNet-5 on scikit-learn's digits with AdamW (warm-up, then cosine decay), writes
weights/lenet_digits.safetensors and prints the accuracy on the test images: 97.8% after 5 s on 4
cores. The same on MNIST (`python -m experiments.data --help` says how to get it), 99.1% after a
minute:

    python -m experiments.train --dataset=mnist.npz --epochs=5 --batch_size=128 --learning_rate=3e-3

Beside the weights stand a model card (.md: data, command, accuracy, commit) and the loss and test
accuracy of every epoch (.csv). A run that was killed goes on after its last whole epoch when
started again with the same flags, and ends with the same weights as one that wasn't (on as many
cores: sums over threads differ in the last bits). Where the weights are there already, nothing is
trained; --overwrite trains again.

Colour images are cropped and flipped at random unless --augment says otherwise. With
--precision=bfloat16 training computes in 16 bits and keeps the weights in 32, for GPUs. The deep
networks take hours on a CPU:

    python -m experiments.train --net=resnet18 --dataset=cifar10 --epochs=30 --batch_size=128 \\
        --learning_rate=2e-3 --weight_decay=0.05 --precision=bfloat16

Spiking networks learn from the cross-entropy of their spike counts, by back-propagation through
time with a surrogate gradient (--surrogate; `nets.surrogate` has the formulas). With 1,000 training
recordings of N-MNIST, binned as `python -m experiments.data --help` says, 88 of 100 test recordings
after 10 s on one core:

    python -m experiments.train --net=snn_nmnist --dataset=nmnist.npz --epochs=20
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import nets
from experiments import card, checkpoint, cli, data
from jfi.campaign import records
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
    dataset: data.Dataset,
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
    steps = _check(net, dataset, recipe)
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


def _check(net: nets.Net, dataset: data.Dataset, recipe: Recipe) -> int:
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
    data.check_labels(dataset, net.num_classes)
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


class _Progress:
    """A bar of all steps with the last epoch's loss and accuracy, which only a terminal shows."""

    def __init__(self, epochs: int):
        from rich.console import Console
        from rich.progress import Progress, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (*Progress.get_default_columns()[:3], TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.epochs, self.task = epochs, self.bar.add_task("training", total=None)

    def report(self, done: int, steps: int) -> None:
        self.bar.update(self.task, completed=done, total=steps * self.epochs)

    def keep(self, training: Training) -> None:
        last = training.history[-1]
        text = f"loss {last.loss:.4f}, accuracy {last.accuracy:.2%}"
        epoch = f"epoch {len(training.history)} of {self.epochs}"
        self.bar.update(self.task, description=f"{epoch}: {text}")


def define_flags() -> None:
    """Flags of this script."""
    usual = Recipe()
    flags.DEFINE_string("net", "lenet", f"The network: {', '.join(nets.names())}.")
    flags.DEFINE_string("dataset", "digits", f"{', '.join(data.names())}, or a .npz file.")
    flags.DEFINE_string("data_dir", data.DATA_DIR, "Where tensorflow-datasets keeps its sets.")
    flags.DEFINE_string(
        "extra",
        None,
        "Train on the images train/<class>/*.jpg of this tar file too; the accuracy is on the "
        "data set's own test images.",
    )
    flags.DEFINE_integer("epochs", usual.epochs, "Passes over the training images.", 1)
    flags.DEFINE_integer("batch_size", usual.batch_size, "Images a step.", 1)
    flags.DEFINE_float("learning_rate", usual.learning_rate, "Its peak, after the warm-up.", 0)
    flags.DEFINE_float("weight_decay", usual.weight_decay, "Of AdamW.", 0)
    flags.DEFINE_enum(
        "augment",
        "auto",
        ("auto", *AUGMENTATIONS),
        "Random shifts of training images, and flips; auto is crop_flip for colour, else none.",
    )
    flags.DEFINE_enum("precision", usual.precision, PRECISIONS, "What training computes in.")
    flags.DEFINE_enum(
        "surrogate",
        usual.surrogate,
        list(surrogate.USUAL),
        "Of a spiking network: the gradient in place of a spike's. Default: the network's own.",
    )
    flags.DEFINE_integer("seed", usual.seed, "Seed of weights, order and augmentation.", 0)
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
        found = accuracy(net, variables, dataset.x_test, dataset.y_test)
    else:
        _check_writable(out)
        if args.extra is not None:
            dataset = data.add_jpegs(dataset, args.extra)
        found = _train_and_keep(net, dataset, _recipe(net), out)
    print(f"test accuracy: {found:.2%}")


def _recipe(net: nets.Net) -> Recipe:
    """The recipe that the flags give."""
    args = flags.FLAGS
    given = {field: getattr(args, field) for field in Recipe._fields}
    if args.augment == "auto":
        given["augment"] = "crop_flip" if net.input_shape[-1] == 3 else "none"
    return Recipe(**given)


def _train_and_keep(net: nets.Net, dataset: data.Dataset, recipe: Recipe, out: Path) -> float:
    """Train with a checkpoint after every epoch, and write weights, log and card; the accuracy."""
    steps, kept = _check(net, dataset, recipe), out.with_suffix(".checkpoint")
    run = {
        "net": net.name,
        "dataset": dataset.name,
        "images": records.hash_arrays([("x", dataset.x_train), ("y", dataset.y_train)]),
        **recipe._asdict(),
    }
    start, progress = _resume(kept, run, begin(net, recipe, steps)), _Progress(recipe.epochs)

    def keep(training: Training) -> None:
        checkpoint.save(kept, run, training.state, list(training.history))
        _log(out.with_suffix(".csv"), training.history)
        progress.keep(training)

    with progress.bar:
        state, history = train(net, dataset, recipe, start, keep=keep, report=progress.report)
    _publish(net, dataset, recipe, state, history[-1].accuracy, out)
    kept.unlink()
    print(f"weights: {out}")
    return history[-1].accuracy


def _resume(kept: Path, run: dict, start: Training) -> Training:
    """Where the checkpoint stands; `start` where there is none, or --overwrite puts it aside."""
    if not kept.exists():
        return start
    try:
        state, history = checkpoint.load(kept, run, start.state)
    except InputError:
        if flags.FLAGS.overwrite:
            return start
        raise
    print(f"going on after epoch {len(history)} of {run['epochs']} ({kept})")
    return Training(state, tuple(Epoch(*epoch) for epoch in history))


def _log(path: Path, history: tuple[Epoch, ...]) -> None:
    """Write the loss and the accuracy of each epoch, numbered from 1, as CSV."""
    rows = [f"{i},{e.loss:.6f},{e.accuracy:.6f}" for i, e in enumerate(history, start=1)]
    path.write_text("\n".join(["epoch,loss,test_accuracy", *rows, ""]))


def _publish(net, dataset: data.Dataset, recipe: Recipe, state: State, found: float, out: Path):
    """Write the weights, with what they are in the header, and the model card beside them."""
    trained = f"{len(dataset.y_train):,} training images"
    if flags.FLAGS.extra is not None:
        extra = Path(flags.FLAGS.extra).name
        trained += f", among them the JPEG images of {extra}, which are for training only"
    rows = {
        "net": f"{net.name}, images {net.input_shape}, {net.num_classes} classes",
        "dataset": f"{dataset.name}: {trained}",
        "test accuracy": f"{found:.2%} of {len(dataset.y_test):,} test images",
        **{key: str(value) for key, value in recipe._asdict().items()},
        **card.provenance("experiments.train"),
    }
    nets.save(out, state.variables, rows)
    card.write(out.with_suffix(".md"), f"{net.name} trained on {dataset.name}", rows)


def _check_writable(out: Path) -> None:
    """Raise InputError where `out` can't be written: before training, not after."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise InputError(f"--out={out}: can't be written there ({error.strerror})") from error


if __name__ == "__main__":
    define_flags()
    cli.run(main)
