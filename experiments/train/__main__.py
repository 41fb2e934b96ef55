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

Images are normalised with --mean and --std, by default MNIST's for grey images and ImageNet's for
colour. The file of weights says which, and every script that takes the weights does the same.

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
from pathlib import Path

from absl import flags

import nets
from experiments import cli, target
from experiments.data import sets
from experiments.train import card, checkpoint
from experiments.train.training import (
    AUGMENTATIONS,
    PRECISIONS,
    Epoch,
    Recipe,
    State,
    Training,
    accuracy,
    begin,
    check,
    train,
)
from jfi.campaign import records
from jfi.errors import InputError
from nets import surrogate


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
    flags.DEFINE_string("dataset", "digits", f"{', '.join(sets.names())}, or a .npz file.")
    flags.DEFINE_string("data_dir", sets.DATA_DIR, "Where tensorflow-datasets keeps its sets.")
    target.define_pixels()
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
    dataset = target.dataset(train=True)
    net = target.normalising(nets.build(args.net, dataset.x_test.shape[1:]), None)
    sets.check_labels(dataset, net.num_classes)
    out = Path(args.out or Path("weights", f"{net.name}_{dataset.name}.safetensors"))
    if out.suffix != ".safetensors":
        raise InputError(f"--out={out}: a .safetensors file is right")
    if out.exists() and not args.overwrite:
        print(f"{out} is there: not trained again (--overwrite trains again)")
        net, variables = target.normalising(net, out), nets.load(net, out)
        found = accuracy(net, variables, dataset.x_test, dataset.y_test)
    else:
        _check_writable(out)
        if args.extra is not None:
            dataset = sets.add_jpegs(dataset, args.extra)
        found = _train_and_keep(net, dataset, _recipe(net), out)
    print(f"test accuracy: {found:.2%}")


def _recipe(net: nets.Net) -> Recipe:
    """The recipe that the flags give."""
    args = flags.FLAGS
    given = {field: getattr(args, field) for field in Recipe._fields}
    if args.augment == "auto":
        given["augment"] = "crop_flip" if net.input_shape[-1] == 3 else "none"
    return Recipe(**given)


def _train_and_keep(net: nets.Net, dataset: sets.Dataset, recipe: Recipe, out: Path) -> float:
    """Train with a checkpoint after every epoch, and write weights, log and card; the accuracy."""
    steps, kept = check(net, dataset, recipe), out.with_suffix(".checkpoint")
    run = {
        "net": net.name,
        "dataset": dataset.name,
        "images": records.hash_arrays([("x", dataset.x_train), ("y", dataset.y_train)]),
        **target.recorded(net),
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


def _publish(net, dataset: sets.Dataset, recipe: Recipe, state: State, found: float, out: Path):
    """Write the weights, with what they are in the header, and the model card beside them."""
    trained = f"{len(dataset.y_train):,} training images"
    if flags.FLAGS.extra is not None:
        extra = Path(flags.FLAGS.extra).name
        trained += f", among them the JPEG images of {extra}, which are for training only"
    rows = {
        "net": f"{net.name}, images {net.input_shape}, {net.num_classes} classes",
        "dataset": f"{dataset.name}: {trained}",
        "test accuracy": f"{found:.2%} of {len(dataset.y_test):,} test images",
        **nets.statistics_header(net),
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
