"""Plan a campaign: how many faults, where, and how long it would take. Runs no fault.

    python -m experiments.plan --net=resnet20 --sampler=layer_wise --t=2.58

prints, for the stuck-at faults in the kernels of ResNet-20, a population of 17,173,504 and the
sample of each layer, 307,649 in all (Table I of Ruospo et al., DATE 2023, whose total of 307,650
books ten biases under layer 11). Sample sizes follow from the shapes alone, except those of
data_aware, which needs weights: --weights, or --dataset for those that training wrote. Your own
network (--net=my_model.py:build, or FILE.onnx) is planned on the images of --dataset. Takes
seconds; the run time it expects is a rough one, from the network's own speed on this machine and
the operations that are left after each fault.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

import nets
from experiments import cli, own, target
from experiments.data import sets
from jfi.campaign import campaign
from jfi.campaign.campaign import Plan
from jfi.campaign.rounds import METHODS
from jfi.criteria.criterion import Criterion
from jfi.engine import golden, split
from jfi.errors import InputError
from jfi.networks.program import flops
from jfi.networks.sites import Network, beside, told, told_beside
from jfi.sampling import estimands

COMPILE_SECONDS = 1.5  # of one site's programs, on a few cores
IMAGES = 1000  # of a workload that is not said
TIMED = 64  # images that the network is timed on
FROM_WEIGHTS = ("data_aware", "adaptive_distance")  # samplers


def define_flags() -> None:
    """Flags of this script."""
    target.define_flags()
    flags.DEFINE_string(
        "dataset",
        None,
        f"Plan for the images of this data set ({', '.join(sets.names())}, or a .npz file) and the "
        f"weights trained on it. Default: the network's usual images.{target.OWN_DATASET}",
    )
    flags.DEFINE_string("data_dir", sets.DATA_DIR, "Where tensorflow-datasets keeps its sets.")
    flags.DEFINE_integer(
        "images",
        None,
        "Images that the run time is for, or that --workload chooses from. Default: 1,000, or all.",
        1,
    )
    flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")


def layers(plan: Plan) -> list[dict]:
    """Population and injections of each site; by bit too where a sampler tells bits apart.

    A network-wise sample falls on layers by chance: its expected share is given.
    """
    found = []
    for number, site in enumerate(plan.space.sites):
        own = [s for s in plan.strata if s.site == number]
        row = {"site": site.name, "population": int(plan.space.site_sizes[number])}
        if own:
            row["injections"] = sum(s.injections for s in own)
            if own[0].bit is not None:
                row["bits"] = {str(s.bit): s.injections for s in own}
        else:
            (stratum,) = plan.strata
            row["injections"] = round(stratum.injections * row["population"] / stratum.population)
        found.append(row)
    return found


def seconds(network: Network, plan: Plan, images: int, golden_rate: float) -> float:
    """Expected run time: inferences of each site, in golden inferences, at the golden rate."""
    whole = flops(network.program.eqns)
    total = 0.0
    for row, site in zip(layers(plan), plan.space.sites, strict=True):
        parts = split.split(network.program, network.source(site))
        # Of stuck-at-0 and stuck-at-1, one leaves a parameter as it is and costs nothing.
        share = 1 / len(plan.space.polarities) if site.name in network.positions else 1
        inferences = share * row["injections"] * images
        total += inferences * parts.flops / whole / golden_rate + COMPILE_SECONDS
    return total


def main() -> None:
    """Print the plan that the flags ask for."""
    args = flags.FLAGS
    subject = _subject()
    network = subject.network
    if network.left_out and not args.json:
        print(f"left out: {told(network.left_out)}")
    if args.sampler in METHODS:
        return _print_rounds(target.open_plan(network), network)
    plan = campaign.plan(
        network,
        args.sampler,
        sites_pattern=args.sites,
        fault_model=args.fault_model,
        request=target.request(),
        estimate=args.estimate,
    )
    count = _images(subject)
    expected = seconds(network, plan, count, golden.golden_rate(network, subject.images))
    (_print_json if args.json else _print_tables)(plan, network, count, expected)


class Subject(NamedTuple):
    """What is planned for: a network, images to time it on, how many the workload has where the
    flags do not say, and the workload itself."""

    network: Network
    images: np.ndarray
    usual: int
    workload: Callable[[], tuple[np.ndarray, np.ndarray | None]]
    criterion: Criterion


def _subject() -> Subject:
    """What the flags name: the network, with its weights where named or needed, and its images."""
    args = flags.FLAGS
    if own.is_own(args.net):
        under = target.load(args.activations)
        images = under.images
        workload = images, under.labels
        return Subject(
            under.network, images[:TIMED], len(images), lambda: workload, under.criterion
        )
    target.check_net()
    dataset = target.dataset() if args.dataset else None
    if args.workload is not None and dataset is None:
        raise InputError(f"workload {args.workload} chooses from images; name them with --dataset")
    net = nets.build(args.net, dataset.x_test.shape[1:] if dataset else None)
    weights = _weights(net, dataset)
    net = target.normalising(net, weights)
    if weights is None:
        network = target.read(net, nets.init(net, 0), args.activations)
    else:
        network = target.load_network(net, weights, args.activations)
    images = np.random.default_rng(0).normal(size=(TIMED, *net.input_shape)).astype(np.float32)
    workload = partial(target.workload, net, dataset, args.images)
    return Subject(network, images, IMAGES, workload, target.criterion(network, None))


def _weights(net: nets.Net, dataset: sets.Dataset | None) -> Path | None:
    """Where the weights are, if they are named or needed."""
    args = flags.FLAGS
    if args.weights is None and args.workload is None and args.sampler not in FROM_WEIGHTS:
        return None
    if args.weights is None and dataset is None:
        raise InputError(
            f"sampler {args.sampler} plans from weights, and none are named; give --weights, or "
            "--dataset for those that training wrote"
        )
    return target.weights_path(net, dataset.name if dataset else None)


def _images(subject: Subject) -> int:
    """How many images the workload has; chosen by a golden pass where the flags say so."""
    args = flags.FLAGS
    if args.workload is None:
        return args.images or subject.usual
    chosen = target.choose(subject.network, *subject.workload(), subject.criterion)
    if not args.json:
        print(f"workload: {chosen.indices.size:,} of {chosen.of:,} images, {chosen.reason}")
    return chosen.indices.size


def _print_rounds(plan: Plan, network: Network) -> None:
    """How many faults a sampler in rounds takes, if no fault and if one in ten is critical."""
    args = flags.FLAGS
    if args.sampler in ("adaptive_score", "adaptive_certified"):
        raise InputError(
            f"sampler {args.sampler} chooses by the images; plan with adaptive instead"
        )
    leaves = network.leaves_of(plan.space.sites)
    method = METHODS[args.sampler](None)
    # Without images: as if each answer were right, and no fault or one in ten changed all of them.
    known = estimands.estimand(plan.estimate, IMAGES, 1.0)
    far = 1 - known.unchanged
    few, many = (
        method(plan.space, leaves, plan.request, args.levels, oracle, 0, known).injections
        for oracle in (
            lambda ids: np.full(ids.size, known.unchanged),
            lambda ids: np.where(ids % 10 == 0, far, known.unchanged),
        )
    )
    if args.json:
        found = {
            "population": plan.space.size,
            "estimate": plan.estimate,
            "none_critical": few,
            "tenth_critical": many,
        }
        return print(json.dumps(found | _beside(plan, network)))
    print(
        f"{plan.space.size:,} faults; {args.sampler} decides as it goes: {few:,} injections if "
        f"none is critical, {many:,} if one in ten is, wherever it is"
    )
    return _print_beside(plan, network)


def _beside(plan: Plan, network: Network) -> dict[str, list[dict]]:
    return {"beside": [group._asdict() for group in beside(network, plan.space.sites)]}


def _print_beside(plan: Plan, network: Network) -> None:
    found = beside(network, plan.space.sites)
    if found:
        print(f"no faults in {told_beside(found)}")


def _print_json(plan: Plan, network: Network, images: int, expected: float) -> None:
    print(
        json.dumps(
            {
                "population": plan.space.size,
                "estimate": plan.estimate,
                "injections": plan.injections,
                "images": images,
                "seconds": round(expected, 1),
                "layers": layers(plan),
                **_beside(plan, network),
            }
        )
    )


def _print_tables(plan: Plan, network: Network, images: int, expected: float) -> None:
    rows = layers(plan)
    width = max(len("site"), *(len(row["site"]) for row in rows))
    print(f"{'site':{width}} {'population':>15} {'injections':>12}")
    total = {"site": "total", "population": plan.space.size, "injections": plan.injections}
    for row in [*rows, total]:
        print(f"{row['site']:{width}} {row['population']:>15,} {row['injections']:>12,}")
    if any(len(set(row.get("bits", {}).values())) > 1 for row in rows):
        _print_bits(plan)
    _print_beside(plan, network)
    print(f"\nmargin of: {estimands.WORDS[plan.estimate]}")
    print(f"expected on this machine for {images:,} images: {_duration(expected)}")


def _print_bits(plan: Plan) -> None:
    print(f"\n{'bit':>3} {'population':>15} {'injections':>12}")
    for bit in sorted({s.bit for s in plan.strata}, reverse=True):
        own = [s for s in plan.strata if s.bit == bit]
        population, injections = (
            sum(column) for column in zip(*(s[2:4] for s in own), strict=True)
        )
        print(f"{bit:>3} {population:>15,} {injections:>12,}")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    define_flags()
    cli.run(main)
