"""Transformers by component and bit: the critical share, and how many injections say it.

    python -m experiments.transformers --net=vit --dataset=mnist.npz
    python -m experiments.transformers --net=gpt --dataset=text --criterion=tokens:last

flip bits of every parameter (kernels, biases, norms, embeddings, positions) of a small ViT and a
small GPT, whose weights come with the project, and print, and write to --out:

    by component and bit    the critical share with its interval, of --per_bit flips of the sign and
                            of each exponent bit of each component, and --per_mantissa_bit of each
                            mantissa bit
    injections              how many faults network-wise, layer-wise, data-unaware and data-aware
                            sampling inject for --error_margin at --confidence, of each component
                            and of the network; and how many the adaptive sampler took, run
    one sample              what --few faults drawn from the whole network say of each component

Intervals are of single units, each at --confidence. They hold at any size and share: exact
(hypergeometric) for one bit of one component and for simple samples, `estimates.stratified` for
unions, `jfi.sampling.betting` for the adaptive sampler.

The question is that of SENTRY (P. K. Bhaduri, M. Taheri, S. Nazari et al., "SENTRY: Statistical
Reliability Analysis of Vision Transformers Under Soft Errors", arXiv 2606.07620, 2026): 1% at 99%
with a few thousand samples, 3% of the flips of FP32 fail, normalisation and exponent bits worst.

A run that was stopped goes on when started again with the same flags.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import campaign as campaign_script
from experiments import cli, target
from experiments.transformers import components, tables
from experiments.transformers.components import Share
from jfi.campaign import campaign, rounds
from jfi.engine.engine import Engine
from jfi.errors import InputError
from jfi.faults import FAULT_MODELS, Site
from jfi.sampling.sampling import SAMPLERS, Request, check

ADAPTIVE = "adaptive_distance"
PLANNED = ("network_wise", "layer_wise", "data_unaware", "data_aware")
IMAGES = 64
CONFIG = (
    "net weights dataset images criterion fault_model error_margin confidence t seed per_bit "
    "per_mantissa_bit few".split()
)


def define_flags() -> None:
    """Flags of this script."""
    target.define_network("vit")
    target.define_workload("mnist", images=str(IMAGES))
    target.define_criterion()
    flags.DEFINE_enum("fault_model", "flip", list(FAULT_MODELS), "Flips, or bits stuck.")
    target.define_request()
    flags.DEFINE_integer("per_bit", 96, "Faults of the sign and each exponent bit, a component.", 1)
    flags.DEFINE_integer("per_mantissa_bit", 32, "Faults of each mantissa bit, a component.", 1)
    flags.DEFINE_integer("few", 3000, "Faults of the one sample of the whole network.", 1)
    flags.DEFINE_integer("seed", 0, "Seed of the samples.", 0)
    flags.DEFINE_integer("verify", 100, "Random pairs of each campaign to run again naively.", 0)
    flags.DEFINE_string("out", "runs/transformers", "Folder for records and tables.")


class Found(NamedTuple):
    """Of one component, or of the network: what its campaigns found, and what others would take.

    sampled, adaptive: summaries of the sample and of the sampler in rounds.
    planned: faults that each of `PLANNED` injects.
    """

    sampled: dict[str, Any]
    adaptive: dict[str, Any]
    planned: dict[str, int]


def main() -> int | None:
    """Run the campaigns that the flags ask for, and print the tables."""
    args = flags.FLAGS
    request = check(target.request())
    under = target.load(most=IMAGES)
    parts = components.split(under.network)
    groups = components.fields(_dtype(under.network.parameters))
    name = f"{under.name}_{under.dataset}"
    if under.criterion.text != "top_1":
        name += "_" + under.criterion.text.replace(":", "_")
    out = Path(args.out)
    whole = {**parts, tables.ALL: under.network.parameters}
    found = {
        of: _run(under, of, sites, number + args.seed * len(whole), request, groups, out / name)
        for number, (of, sites) in enumerate(whole.items())
    }
    text, rows = _tables(under, parts, groups, found, request.confidence)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    (out / f"{name}.csv").write_text(rows, encoding="utf-8")
    print(text)
    print(f"written to {out}")
    wrong = [s["verify"]["worst"] for s in _summaries(found) if s["verify"]["disagreements"]]
    return cli.fail(f"verification failed: {wrong[0]}") if wrong else None


def _dtype(sites: tuple[Site, ...]) -> np.dtype:
    dtypes = {np.dtype(site.dtype) for site in sites}
    if len(dtypes) != 1:
        raise InputError(f"parameters are of {', '.join(map(str, dtypes))}; one type is needed")
    return dtypes.pop()


def _run(
    under: target.Target, name: str, sites, seed: int, request: Request, groups, out: Path
) -> Found:
    """The campaigns of one component, or of all. Each has a seed of its own: samples of one seed
    are of the same places in components of one size, and so not independent."""
    args = flags.FLAGS
    if name == tables.ALL:
        plan = components.simple(sites, args.fault_model, request, args.few, seed)
    else:
        sizes = {bit: args.per_bit for own in groups.values() for bit in own}
        sizes |= dict.fromkeys(groups["mantissa"], args.per_mantissa_bit)
        plan = components.by_bit(sites, args.fault_model, request, sizes, seed)
    engine = Engine(
        under.network, under.images, under.labels, plan.space.sites, criterion=under.criterion
    )
    config = {flag: getattr(args, flag) for flag in CONFIG}
    leaves = under.network.leaves_of(sites)
    planned = {
        sampler: sum(s.injections for s in SAMPLERS[sampler](plan.space, leaves, request))
        for sampler in PLANNED
    }
    with campaign_script.LiveProgress() as progress:
        options = {"measure": "critical", "verify_pairs": args.verify, "progress": progress}
        sampled = campaign_script.despite_wrong(
            campaign.run, plan, engine, out / name, config, **options
        )
        adaptive = campaign_script.despite_wrong(
            rounds.run, ADAPTIVE, plan.space, engine, out / f"{name}_{ADAPTIVE}", config,
            request=request, levels=("network",), seed=seed, **options,
        )  # fmt: skip
    return Found(sampled, adaptive, planned)


def _tables(under: target.Target, parts, groups, found: dict[str, Found], confidence: float):
    """The text and the CSV file."""
    args = flags.FLAGS
    width = sum(map(len, groups.values()))
    counts = components.counts([found[name].sampled for name in parts], width)
    shares = tables.shares(counts, [*parts], groups, confidence)
    one = found[tables.ALL].sampled
    every = {**parts, tables.ALL: under.network.parameters}
    few = {name: components.fallen(one, sites, confidence) for name, sites in every.items()}
    adaptive = {name: _whole(own.adaptive) for name, own in found.items()}
    planned = {name: own.planned for name, own in found.items()}
    words = sum(site.words for site in under.network.parameters)
    accuracy = f"{_accuracy(under):.2%}" if under.labels is not None else "not known"
    sections = [
        f"# {under.name} on {under.dataset}: {words:,} words, {args.fault_model} of each bit, "
        f"{len(under.images)} images, accuracy {accuracy}; critical is what "
        f"{under.criterion.meaning}",
        f"## By component, and by one sample of {one['injections']:,}",
        tables.by_component(shares, few),
        "## By component and bit: critical %",
        tables.by_bits(shares, groups),
        f"## Injections for {args.error_margin:.2%} at {confidence:.0%}",
        tables.injections(planned, adaptive),
        _verified(found),
    ]
    return "\n\n".join(sections) + "\n", tables.csv(shares)


def _accuracy(under: target.Target) -> float:
    site = under.network.parameters[:1]
    return Engine(
        under.network, under.images, under.labels, site, criterion=under.criterion
    ).accuracy


def _whole(summary: dict[str, Any]) -> Share:
    """What a campaign says of all its sites."""
    unit = next(unit for unit in summary["estimates"] if unit["level"] == "network")
    return Share(*(unit[name] for name in Share._fields))


def _summaries(found: dict[str, Found]) -> list[dict[str, Any]]:
    return [s for own in found.values() for s in (own.sampled, own.adaptive)]


def _verified(found: dict[str, Found]) -> str:
    keys = ("pairs", "agreements", "near_ties", "disagreements")
    pairs, agree, ties, wrong = (sum(s["verify"][key] for s in _summaries(found)) for key in keys)
    faults = sum(s["run"]["faults"] for s in _summaries(found))
    seconds = sum(s["run"]["seconds"] for s in _summaries(found))
    return (
        f"Of {pairs:,} pairs run again naively {agree:,} agree, {ties:,} are near-ties, {wrong:,} "
        f"disagree. This call ran {faults:,} faults in {seconds:,.0f} s."
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
