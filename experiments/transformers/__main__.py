"""Transformers by component and bit: the critical share, and how many injections say it.

    python -m experiments.transformers --net=vit --dataset=digits
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

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import campaign as campaign_script
from experiments import cli, target
from experiments.transformers import components, tables
from experiments.transformers.components import Share
from jfi.campaign import campaign, rounds
from jfi.campaign.campaign import Plan
from jfi.engine.engine import Engine
from jfi.errors import InputError
from jfi.faults import FAULT_MODELS, FaultSpace, Site
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
    target.define_workload(images=str(IMAGES))
    target.define_criterion()
    flags.DEFINE_enum("fault_model", "flip", list(FAULT_MODELS), "Flips, or bits stuck.")
    target.define_request()
    flags.DEFINE_integer("per_bit", 64, "Faults of the sign and each exponent bit, a component.", 1)
    flags.DEFINE_integer("per_mantissa_bit", 16, "Faults of each mantissa bit, a component.", 1)
    flags.DEFINE_integer("few", 3000, "Faults of the one sample of the whole network.", 1)
    flags.DEFINE_bool("each", True, "Run the adaptive sampler on each component alone, too.")
    flags.DEFINE_integer("seed", 0, "Seed of the samples.", 0)
    flags.DEFINE_integer("verify", 100, "Random pairs of each campaign to run again naively.", 0)
    flags.DEFINE_string("out", "runs/transformers", "Folder for records and tables.")


class Adaptive(NamedTuple):
    """What the adaptive sampler took of a component, or of all, and what others would inject."""

    summary: dict[str, Any]
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
    runs = Runs(under, under.network.parameters, request, out / name)
    sizes = {bit: args.per_bit for own in groups.values() for bit in own}
    sizes |= dict.fromkeys(groups["mantissa"], args.per_mantissa_bit)
    ids = components.by_bit(runs.space, parts, sizes, args.seed)
    by_bit = runs.planned("by_bit", components.listed(runs.space, request, ids))
    one = runs.planned("few", components.simple(runs.space, request, args.few, args.seed))
    adaptive = {tables.ALL: runs.adaptive(ADAPTIVE)}
    if args.each:
        for part, sites in parts.items():
            alone = Runs(under, sites, request, out / name)
            adaptive[part] = alone.adaptive(f"{ADAPTIVE}_{part}")
    shares = tables.shares(
        components.counts(by_bit, runs.space, parts), [*parts], groups, request.confidence
    )
    summaries = [by_bit, one, *(own.summary for own in adaptive.values())]
    text = "\n\n".join(
        [
            _title(under, runs),
            f"## By component, and by one sample of {one['injections']:,}",
            tables.by_component(shares, _few(one, runs, parts, request.confidence)),
            "## By component and bit: critical %",
            tables.by_bits(shares, groups),
            f"## Injections for {request.error_margin:.2%} at {request.confidence:.0%}",
            tables.injections(
                {part: own.planned for part, own in adaptive.items()},
                {part: _whole(own.summary) for part, own in adaptive.items()},
            ),
            _verified(summaries),
        ]
    )
    (out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    (out / f"{name}.csv").write_text(tables.csv(shares), encoding="utf-8")
    print(text)
    print(f"written to {out}")
    wrong = [s["verify"]["worst"] for s in summaries if s["verify"]["disagreements"]]
    return cli.fail(f"verification failed: {wrong[0]}") if wrong else None


class Runs:
    """Campaigns on some sites of what is under test, recorded in a folder; they share an engine."""

    def __init__(self, under: target.Target, sites, request: Request, out: Path):
        self.space = FaultSpace(sites, FAULT_MODELS[flags.FLAGS.fault_model])
        self.network, self.request, self.out = under.network, request, out
        self.engine = Engine(
            under.network, under.images, under.labels, self.space.sites, criterion=under.criterion
        )

    def planned(self, name: str, plan: Plan) -> dict[str, Any]:
        """The summary of a plan's campaign."""
        return self._run(campaign.run, plan, self.engine, self.out / name)

    def adaptive(self, name: str) -> Adaptive:
        """The adaptive sampler's campaign, and what samples drawn at once are of."""
        leaves = self.network.leaves_of(self.space.sites)
        planned = {
            sampler: sum(s.injections for s in SAMPLERS[sampler](self.space, leaves, self.request))
            for sampler in PLANNED
        }
        summary = self._run(
            rounds.run, ADAPTIVE, self.space, self.engine, self.out / name,
            request=self.request, levels=("network",), seed=flags.FLAGS.seed,
        )  # fmt: skip
        return Adaptive(summary, planned)

    def _run(self, run, *args, **options) -> dict[str, Any]:
        config = {flag: getattr(flags.FLAGS, flag) for flag in CONFIG}
        with campaign_script.LiveProgress() as progress:
            return campaign_script.despite_wrong(
                run, *args, config=config, measure="critical",
                verify_pairs=flags.FLAGS.verify, progress=progress, **options,
            )  # fmt: skip


def _dtype(sites: Sequence[Site]) -> np.dtype:
    dtypes = {np.dtype(site.dtype) for site in sites}
    if len(dtypes) != 1:
        raise InputError(f"parameters are of {', '.join(map(str, dtypes))}; one type is needed")
    return dtypes.pop()


def _title(under: target.Target, runs: Runs) -> str:
    words = sum(site.words for site in runs.space.sites)
    accuracy = "" if under.labels is None else f", accuracy {runs.engine.accuracy:.2%}"
    return (
        f"# {under.name} on {under.dataset}: {words:,} words, {runs.space.size:,} faults "
        f"({flags.FLAGS.fault_model}), {len(under.images)} images{accuracy}\n\n"
        f"A critical fault {under.criterion.meaning} of an image."
    )


def _few(summary, runs: Runs, parts, confidence: float) -> dict[str, Share | None]:
    every = {**parts, tables.ALL: runs.space.sites}
    return {name: components.fallen(summary, own, confidence) for name, own in every.items()}


def _whole(summary: dict[str, Any]) -> Share:
    """What a campaign says of all its sites."""
    unit = next(unit for unit in summary["estimates"] if unit["level"] == "network")
    return Share(*(unit[name] for name in Share._fields))


def _verified(summaries: Sequence[dict[str, Any]]) -> str:
    keys = ("pairs", "agreements", "near_ties", "disagreements")
    pairs, agree, ties, wrong = (sum(s["verify"][key] for s in summaries) for key in keys)
    faults, seconds = (sum(s["run"][key] for s in summaries) for key in ("faults", "seconds"))
    return (
        f"Of {pairs:,} pairs run again naively {agree:,} agree, {ties:,} are near-ties, {wrong:,} "
        f"disagree. This call ran {faults:,} faults in {seconds:,.0f} s."
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
