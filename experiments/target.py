"""What is under test, from the flags that scripts share: network, weights, workload.

`load` is where plan, campaign, truth and bench get it from: a network of `nets` with weights from
a file, or one that the user brings (`own`).
"""

import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import jfi
import nets
from experiments import own
from experiments.data import sets
from jfi.campaign import rounds
from jfi.campaign.campaign import Plan
from jfi.campaign.rounds import METHODS
from jfi.criteria import built_in, names
from jfi.criteria.criterion import Criterion
from jfi.engine.golden import golden_run
from jfi.engine.inputs import check_labels
from jfi.errors import InputError
from jfi.faults import FAULT_MODELS
from jfi.networks.sites import Network
from jfi.sampling.estimands import WORDS
from jfi.sampling.methods import LEVELS
from jfi.sampling.sampling import SAMPLERS, Request
from jfi.workload import workload as workloads
from jfi.workload.embedding import embedding
from jfi.workload.expected import chances

WEIGHTS = Path("weights")
KEPT = Path(__file__).parent / "weights"  # those that come with the project


class Target(NamedTuple):
    """A network with its workload.

    name, dataset: in words and in names of files.
    images: [B, ...] as the network takes them. labels: int32 [B], or None where there are none.
    source: the net of `nets`, or the network that the user brought: what peers are made of.
    criterion: what makes a fault critical.
    config: what a record keeps beside flags: of a network of `nets` what its images are normalised
      with, of one that the user brought what names it.
    """

    name: str
    dataset: str
    network: Network
    images: np.ndarray
    labels: np.ndarray | None
    source: nets.Net | own.Own
    criterion: Criterion
    config: dict[str, Any] = {}  # noqa: RUF012 - never changed


def define_network(net: str = "lenet", own_too: bool = False) -> None:
    """Flags of the network and its weights; with `own_too`, users may bring their own."""
    others = (
        ". Or your own: FILE.py:FUNCTION, a function without arguments that returns anything "
        "jfi.adopt takes (a PyTorch, Keras, Flax or Equinox model, (apply, params), ...), or a "
        "pair (that, preprocess): a pair whose second value can be called. preprocess takes images "
        "as --dataset has them, NumPy [B, ...], and returns what the network takes. FUNCTION is "
        "build where it is left out. Or FILE.onnx, FILE.nir. Paths are from the current folder."
    )
    flags.DEFINE_string(
        "net", net, f"The network: {', '.join(nets.names())}{others if own_too else '.'}"
    )
    if own_too:
        flags.DEFINE_float(
            "dt", None, "Of a NIR graph: its time step in seconds. Default: snnTorch's, 1e-4.", 0
        )
    flags.DEFINE_string(
        "weights",
        None,
        "Its weights: .safetensors, or a PyTorch checkpoint (.th, .pt, .pth). Default: what "
        "experiments.train wrote, weights/<net>_<dataset>.safetensors, or experiments/weights has."
        + (" Your own network brings its own." if own_too else ""),
    )
    define_pixels()


def define_pixels() -> None:
    """Flags of how pixels become what a network of `nets` takes (`normalising`, `dataset`)."""
    flags.DEFINE_list(
        "mean",
        None,
        "With --std: what images in [0, 1] are normalised with, (image - mean) / std, a number a "
        "channel, as --mean=0.4914,0.4822,0.4465 --std=0.2023,0.1994,0.2010. Default: what the "
        "weights were trained with where their file says so, else MNIST's for grey images "
        "(0.1307; 0.3081) and ImageNet's for colour (0.485,0.456,0.406; 0.229,0.224,0.225). "
        "For networks of the project; your own brings its preprocess.",
    )
    flags.DEFINE_list("std", None, "With --mean: the standard deviation, a number a channel.")
    flags.DEFINE_integer(
        "pixel_max",
        None,
        "What white is in uint8 images of a .npz file, which are divided by it. Default: 255; it "
        "has to be said of images of 0 and 1 alone, 1 for masks.",
        1,
        255,
    )


# What --dataset is of networks that users bring.
OWN_DATASET = (
    " Your own network gets x_test exactly as the .npz file holds it, [B, ...] of any rank and "
    "type (uint8 is not scaled); of a set known by name, floats in [0, 1], [B, H, W, C]. y_test "
    "may be absent."
)


def define_workload(dataset: str = "digits", images: str = "all", own_too: bool = False) -> None:
    """Flags of the data set and of how many of its test images are taken."""
    flags.DEFINE_string(
        "dataset",
        dataset,
        f"{', '.join(sets.names())}, or a .npz file.{OWN_DATASET if own_too else ''}",
    )
    flags.DEFINE_string(
        "data_dir", sets.DATA_DIR, "Where tensorflow-datasets keeps its sets, or recordings are."
    )
    flags.DEFINE_integer("images", None, f"The first so many test images. Default: {images}.", 1)


def define_criterion() -> None:
    """Flags of what makes a fault critical."""
    flags.DEFINE_string(
        "criterion",
        None,
        f"What makes a fault critical for an image: {', '.join(names.CRITERIA)}, with arguments "
        "after a colon, as top_k:5, tolerance:relative=0.1, tokens:last, pixels:0.01, "
        "detections:iou=0.5,score=0.3, accuracy_drop:1; or FILE.py:FUNCTION of (golden, faulty), "
        "the outputs for one image, in JAX, that returns a bool. Default: that the top-1 of scores "
        "[B, C] changes; of one score an image with labels 0 and 1, that it passes the threshold.",
    )
    flags.DEFINE_string(
        "output",
        None,
        "Of a network that returns several arrays: the name of the one to judge faults by, as "
        "logits or heads/0. Default: all.",
    )


def define_flags() -> None:
    """Flags of the network and of the plan."""
    define_network(own_too=True)
    flags.DEFINE_enum(
        "sampler",
        "data_aware",
        [*SAMPLERS, *METHODS],
        "Which faults: all (exhaustive); a sample of the network (network_wise), of each layer "
        "(layer_wise), of each bit of each layer with p = 0.5 (data_unaware) or with p from the "
        "weights (data_aware); or in rounds, as earlier ones show is needed: the published "
        "iterative, or adaptive with strata by (layer, bit), by how far a bit moves its word "
        "(adaptive_distance), or by that times the word's gradient (adaptive_score); "
        "adaptive_certified is adaptive_score on faults not proven harmless.",
    )
    flags.DEFINE_list(
        "levels",
        ["network", "layer"],
        f"Units that samplers in rounds reach the margin for: {', '.join(LEVELS)}.",
    )
    flags.DEFINE_enum(
        "estimate",
        "faults",
        list(WORDS),
        "What margins and intervals are of: the share of faults critical on at least one image "
        "(faults), the share of (fault, image) pairs that are critical (pairs), or the mean "
        "accuracy under fault (accuracy), which needs labels.",
    )
    flags.DEFINE_enum(
        "fault_model",
        "stuck_at",
        list(FAULT_MODELS),
        "Bits stuck at 0 and at 1, or flipped; spiking neurons that never fire (dead), fire at "
        "every step (saturated), or have bits of beta, threshold and potential stuck (byzantine).",
    )
    flags.DEFINE_string(
        "sites",
        None,
        "Where to put faults: a regular expression that matches whole names of parameter leaves, "
        "as '.*/bias' or 'layer1_.*', and of run-time values, as 'lif1/spike' (broken at every "
        "time step), 'lif1/spike@37' (at step 37) or 'lif1/spike@step' (at one that is drawn). "
        "Default: the kernels of all convolution, dense, recurrent and attention layers, by "
        "whatever name (what enters a convolution or a matrix product as its weight or a part of "
        "it), or where neurons have what the fault model breaks. What that leaves aside is listed.",
    )
    flags.DEFINE_bool(
        "activations", False, "Make the output of every layer a site, as 'conv1/output'."
    )
    flags.DEFINE_string(
        "workload",
        None,
        "Of these images, those to judge faults on: METRIC:top:N, the N most challenging; "
        "METRIC:central:EPSILON, within EPSILON of the border of two classes; "
        "METRIC:pre_plateau:SLOPE; random:N:SEED; METRIC alone: all, the most challenging first, "
        f"for --measure=detect. METRIC is of {', '.join(workloads.METRICS)}. Default: all.",
    )
    flags.DEFINE_string(
        "workload_layer",
        None,
        "With the metrics kennard_stone: the kernel (fc2/kernel) of the layer whose output images "
        "are told apart by. Default: what the last one takes in.",
    )
    define_request()


def define_request(t: float | None = None) -> None:
    """Flags of the precision asked for (`request`)."""
    flags.DEFINE_float("error_margin", 0.01, "Error margin e wanted, in (0, 1).")
    flags.DEFINE_float("confidence", 0.99, "Confidence of margins and intervals, in (0, 1).")
    flags.DEFINE_float(
        "t",
        t,
        "Normal quantile to use in place of the exact one of the confidence; the literature "
        "takes 2.58 for 99%.",
    )


def open_plan(network: Network, seed: int = 0) -> Plan:
    """The faults that a sampler in rounds is to choose from, by the flags."""
    args = flags.FLAGS
    return rounds.open_plan(
        network, sites_pattern=args.sites, fault_model=args.fault_model, request=request(),
        levels=tuple(args.levels), seed=seed, estimate=args.estimate,
    )  # fmt: skip


def request() -> Request:
    """The precision that the flags ask for."""
    args = flags.FLAGS
    return Request(args.error_margin, args.confidence, args.t)


def load(activations: bool = False, most: int | None = None) -> Target:
    """The network, images and labels that the flags name.

    Args:
      activations: make the outputs of layers sites.
      most: images taken where the flags do not say how many; all for None.

    Raises:
      InputError, nets.NetError: a flag that names none; as of `own`, of a network of the user's.
    """
    args = flags.FLAGS
    if own.is_own(args.net):
        return _own(activations, most)
    check_net()
    data = dataset()
    net = nets.build(args.net, data.x_test.shape[1:])
    weights = weights_path(net, data.name)
    net = normalising(net, weights)
    images, labels = workload(net, data, first(len(data.x_test), most))
    network = load_network(net, weights, activations)
    if _flag("output") is not None:
        raise InputError(f"output {_flag('output')}: {net.name} returns one array; leave it out")
    asked = criterion(network, labels)
    return Target(net.name, data.name, network, images, labels, net, asked, recorded(net))


def dataset(train: bool = False) -> sets.Dataset:
    """The data set that the flags name, for networks of `nets`."""
    args = flags.FLAGS
    return sets.load(args.dataset, args.data_dir, train=train, pixel_max=args.pixel_max)


def normalising(net: nets.Net, weights: str | Path | None) -> nets.Net:
    """The net, its images normalised as --mean and --std say, or as in training of its weights.

    Where neither says anything the net keeps its usual normalisation (`nets.net.PIXELS`).

    Raises:
      InputError: one of --mean and --std without the other; no numbers; others than the weights
        were trained with. NetError: as of `nets.normalising` and `nets.statistics`.
    """
    asked = _statistics()
    if asked is not None:
        net = nets.normalising(net, *asked)
    known = None if weights is None else nets.statistics(weights)
    if known is None:
        return net
    try:
        trained = nets.normalising(net, *known)
    except nets.NetError as error:
        raise InputError(f"weights {weights}: its header tells of another net: {error}") from error
    if asked is not None and (trained.mean, trained.std) != (net.mean, net.std):
        raise InputError(
            f"mean {_told(net.mean)} and std {_told(net.std)}: weights {weights} were trained with "
            f"{_told(trained.mean)} and {_told(trained.std)}; leave --mean and --std out"
        )
    return trained


def _statistics() -> tuple[list[float], list[float]] | None:
    """The numbers of --mean and --std; None where they are not given."""
    args = flags.FLAGS
    if args.mean is None and args.std is None:
        return None
    for name, other in (("mean", "std"), ("std", "mean")):
        if getattr(args, name) is None:
            given = ",".join(getattr(args, other))
            raise InputError(f"{other} {given}: --{name} is missing; the two go together")
    return _numbers("mean", args.mean), _numbers("std", args.std)


def _numbers(name: str, values: list[str]) -> list[float]:
    try:
        return [float(value) for value in values]
    except ValueError:
        raise InputError(
            f"{name} {','.join(values)!r} is no list of numbers; a number a channel is right, as "
            f"--{name}=0.5,0.5,0.5"
        ) from None


def _told(values: tuple[float, ...]) -> str:
    return ",".join(map(str, values))


def recorded(net: nets.Net) -> dict[str, Any]:
    """What a record keeps of how pixels became numbers; nothing of a net that takes events."""
    if len(net.input_shape) != 3:
        return {}
    pixel_max = flags.FLAGS.pixel_max
    return {"mean": list(net.mean), "std": list(net.std), "pixel_max": pixel_max}


def check_net() -> None:
    """Raise InputError where the flag names neither a network of the project nor a file."""
    net = flags.FLAGS.net
    if net not in nets.names():
        raise InputError(
            f"net {net!r} is unknown; known are {', '.join(nets.names())}, and your own as "
            f"{own.FORMS}"
        )


def first(there: int, most: int | None) -> int | None:
    """How many of the images there are: as the flag says, or at most so many, or all (None)."""
    wanted = flags.FLAGS.images
    return wanted if wanted is not None or most is None else min(most, there)


def _own(activations: bool, most: int | None) -> Target:
    """A network that the user brings, on the data set of the flags."""
    args = flags.FLAGS
    if args.weights is not None:
        raise InputError(
            f"weights {args.weights}: your own network {args.net} brings its weights; leave "
            "--weights out"
        )
    given = [name for name in ("mean", "std", "pixel_max") if getattr(args, name) is not None]
    if given:
        raise InputError(
            f"net {args.net}: your own network gets its images as they are; leave --{given[0]} out "
            "and normalise in preprocess: let the function of a FILE.py return (model, preprocess)"
        )
    if args.dataset is None or not args["dataset"].present:
        raise InputError(
            f"net {args.net}: your own network needs images that it takes; name them with "
            f"--dataset: a .npz file with x_test, or {', '.join(sets.names())}"
        )
    inputs = sets.inputs(args.dataset, args.data_dir)
    check_images(args.images, len(inputs.x), inputs.name)
    number = first(len(inputs.x), most)
    found = own.load(args.net)
    network, images = own.adopt(found, inputs.x[:number], args.dt, activations, _flag("output"))
    labels = inputs.y if inputs.y is None else inputs.y[:number]
    asked = criterion(network, labels)
    if labels is not None:
        try:
            by = asked.judge(network.outputs)
            labels = check_labels(labels, len(images), by, asked.text)
        except InputError as error:
            raise InputError(f"dataset {inputs.name}: y_test: {error}") from error
    config = found.config
    if args.dataset.endswith(".npz"):
        config |= {"dataset": os.path.abspath(args.dataset)}
    return Target(found.name, inputs.name, network, images, labels, found, asked, config)


def criterion(network: Network, labels: np.ndarray | None) -> Criterion:
    """What the flag says is critical, or what is usual for the network.

    Raises:
      InputError: a criterion that is unknown, or not for what the network returns.
    """
    asked = _flag("criterion")
    if asked is None:
        return names.usual(network.outputs, labels)
    found = own.criterion(asked) if own.is_python(asked) else names.parse(asked)
    found.judge(network.outputs)
    return found


def _flag(name: str) -> Any:
    """The value of a flag that not all scripts have; None where this one has not."""
    return getattr(flags.FLAGS, name) if name in flags.FLAGS else None


def check_images(images: int | None, there: int, dataset: str) -> None:
    """Raise InputError where a data set has not so many images."""
    if images is not None and not 1 <= images <= there:
        raise InputError(f"images {images} is out of range; {dataset} has 1 to {there}")


def load_network(net: nets.Net, weights: str | Path, activations: bool = False) -> Network:
    """The network with its weights from a file."""
    return read(net, nets.load(net, weights), activations)


def read(net: nets.Net, variables: dict, activations: bool = False) -> Network:
    """A network of `nets` as the engine takes it; with `activations`, layers' outputs are sites."""
    image = jax.ShapeDtypeStruct(net.input_shape, jnp.float32)
    apply = nets.apply_named if activations else nets.apply
    return jfi.network(partial(apply, net), variables, image)


def weights_path(net: nets.Net, dataset: str | None) -> Path:
    """The flag's weights, or what training wrote, or those that come with the project.

    Raises:
      InputError: no weights were named and there are none of this network and data set.
    """
    if flags.FLAGS.weights is not None:
        return Path(flags.FLAGS.weights)
    trained, kept = (folder / f"{net.name}_{dataset}.safetensors" for folder in (WEIGHTS, KEPT))
    if not trained.exists() and not kept.exists():
        raise InputError(
            f"no --weights given and {trained} is not there; name a file, or train it: "
            f"python -m experiments.train --net={net.name} --dataset={dataset}"
        )
    return trained if trained.exists() else kept


def workload(net: nets.Net, dataset: sets.Dataset, images: int | None) -> tuple[np.ndarray, ...]:
    """The first `images` test images, normalised, and their labels; all of them for None.

    Raises:
      InputError: fewer test images than asked for, or a label the network has no class for.
    """
    sets.check_labels(dataset, net.num_classes)
    check_images(images, len(dataset.x_test), dataset.name)
    return (
        np.asarray(nets.normalise(net, dataset.x_test[:images])),
        dataset.y_test[:images],
    )


def given(chosen: workloads.Selection | None) -> np.ndarray | None:
    """The order of chosen images for an engine: as they were chosen; None where none were."""
    return None if chosen is None else np.arange(chosen.indices.size)


def choose(
    network: Network, images: np.ndarray, labels: np.ndarray | None, criterion: Criterion
) -> workloads.Selection | None:
    """The images that the flag asks for, by one golden pass; None where it asks for none.

    Raises:
      InputError: a workload that is unknown or empty.
    """
    args = flags.FLAGS
    if args.workload is None:
        return None
    by = criterion.judge(network.outputs)
    seen = _pass(network, images, labels, criterion)
    if args.workload.startswith("kennard_stone"):
        seen = seen._replace(embedding=embedding(network, images, args.workload_layer))
    if args.workload.startswith("expected"):
        seen = seen._replace(chances=chances(network, images, jfi.select(network, args.sites), by))
    return workloads.select(args.workload, seen)


def _pass(
    network: Network, images: np.ndarray, labels: np.ndarray | None, criterion: Criterion
) -> workloads.Pass:
    """What the golden run says of the images: of each its least certain answer."""
    by, logits = criterion.judge(network.outputs), golden_run(network, images).logits
    if by.chances is None:
        raise InputError(
            f"criterion {criterion.text} has no probabilities for workload metrics; choose "
            "random:N:SEED, or leave --workload out"
        )
    # Of many answers an image, metrics take no label.
    one = labels is not None and labels.size == len(images)
    labels = labels.ravel() if one else None
    if not network.outputs.link and criterion == built_in.TOP1:
        return workloads.golden_pass(logits, labels)  # in float64
    return workloads.check(workloads.Pass(jax.vmap(by.chances)(logits), labels))
