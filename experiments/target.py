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
    config: what a record keeps in place of flags, of a network that the user brought.
    """

    name: str
    dataset: str
    network: Network
    images: np.ndarray
    labels: np.ndarray | None
    source: nets.Net | own.Own
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
        "Default: the kernels of all convolution and dense layers, by whatever name (what enters "
        "a convolution or a matrix product as its weight), or where neurons have what the fault "
        "model breaks.",
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
    dataset = sets.load(args.dataset, args.data_dir, train=False)
    net = nets.build(args.net, dataset.x_test.shape[1:])
    images, labels = workload(net, dataset, first(len(dataset.x_test), most))
    network = load_network(net, weights_path(net, dataset.name), activations)
    return Target(net.name, dataset.name, network, images, labels, net)


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
    if args.dataset is None or not args["dataset"].present:
        raise InputError(
            f"net {args.net}: your own network needs images that it takes; name them with "
            f"--dataset: a .npz file with x_test, or {', '.join(sets.names())}"
        )
    inputs = sets.inputs(args.dataset, args.data_dir)
    check_images(args.images, len(inputs.x), inputs.name)
    number = first(len(inputs.x), most)
    found = own.load(args.net)
    network, images = own.adopt(found, inputs.x[:number], args.dt, activations)
    labels = inputs.y if inputs.y is None else inputs.y[:number]
    if labels is not None:
        try:
            labels = check_labels(labels, (len(images), network.program.out.aval.shape[1]))
        except InputError as error:
            raise InputError(f"dataset {inputs.name}: y_test: {error}") from error
    config = found.config
    if args.dataset.endswith(".npz"):
        config |= {"dataset": os.path.abspath(args.dataset)}
    return Target(found.name, inputs.name, network, images, labels, found, config)


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
    network: Network, images: np.ndarray, labels: np.ndarray | None
) -> workloads.Selection | None:
    """The images that the flag asks for, by one golden pass; None where it asks for none.

    Raises:
      InputError: a workload that is unknown or empty.
    """
    args = flags.FLAGS
    if args.workload is None:
        return None
    seen = workloads.golden_pass(golden_run(network, images).logits, labels)
    if args.workload.startswith("kennard_stone"):
        seen = seen._replace(embedding=embedding(network, images, args.workload_layer))
    if args.workload.startswith("expected"):
        seen = seen._replace(chances=chances(network, images, jfi.select(network, args.sites)))
    return workloads.select(args.workload, seen)
