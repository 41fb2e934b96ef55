"""Run a fault-injection campaign: the main job.

    python -m experiments.campaign --net=resnet20 --weights=resnet20.th --dataset=cifar10 \\
        --images=128 --sampler=data_aware --verify=2000

injects the faults that the sampler draws, judges each on every image, and writes to --workdir:
manifest.json (what was run), outcomes/*.parquet (one row a fault), summary.json and estimates.csv
(estimates with margins and intervals), report.html, report.md with figures. A fault is
critical when it changes the top-1 answer, against the fault-free network, of at least one image;
--estimate=pairs and --estimate=accuracy estimate the share of critical (fault, image) pairs and the
mean accuracy under fault in place of the share of critical faults.

A campaign that was stopped, in whatever way, goes on when started again with the same flags; with
other flags on the same work directory it refuses. --verify, --truth and --memory change no
outcome and may differ.
"""

from pathlib import Path

from absl import flags

from experiments import cli, report, target
from jfi.campaign import campaign, records, rounds
from jfi.campaign.rounds import METHODS
from jfi.engine import golden
from jfi.engine.engine import Engine
from jfi.engine.inputs import MEASURES, check_measure
from jfi.engine.screen import REDUCED
from jfi.errors import InputError, VerificationError
from jfi.faults import read_fault_list
from jfi.networks import sites
from jfi.report import tables, tally
from jfi.sampling import estimands
from jfi.sampling.estimates import Estimate
from jfi.study.live import LiveProgress, stoppable

CONFIG = (
    "net weights dataset images sampler fault_model sites error_margin confidence t seed faults "
    "keep_bits measure criterion output screen levels workload workload_layer activations dt "
    "estimate".split()
)
MEBIBYTE = 1 << 20


def define_flags() -> None:
    """Flags of this script."""
    target.define_flags()
    target.define_workload(own_too=True)
    target.define_criterion()
    flags.DEFINE_string(
        "faults",
        None,
        "Inject exactly the faults of this CSV file (columns site, index, bit, polarity) in place "
        "of a sampler's.",
    )
    flags.DEFINE_integer("seed", 0, "Seed of the sample: the same faults on any machine.", 0)
    flags.DEFINE_string(
        "workdir", None, "Where records go. Default: runs/<net>_<dataset>_<sampler>."
    )
    flags.DEFINE_integer("verify", 200, "Random pairs to run again naively at the end.", 0)
    flags.DEFINE_enum(
        "measure",
        "full",
        list(MEASURES),
        "What is asked of a fault: its outcome class on every image (full); whether it is critical "
        "for each image, with proofs in place of inference where they hold (critical); only "
        "whether it is critical for any image (detect).",
    )
    flags.DEFINE_enum(
        "screen",
        None,
        list(REDUCED),
        "With the measures critical and detect: run pairs in this precision first, and in full "
        "where it leaves a doubt; random pairs are run again to bound what is wrong. For GPUs.",
    )
    flags.DEFINE_bool("keep_bits", False, "Record for which images each fault is critical.")
    flags.DEFINE_string(
        "truth", None, "Work directory of an exhaustive campaign to compare the estimates with."
    )
    flags.DEFINE_integer("memory", 1024, "MiB of golden values kept on the device at a time.", 1)


def config(under: target.Target) -> dict:
    """The flags that decide the outcomes, and what else names a network of the user's."""
    args = flags.FLAGS
    return {name: getattr(args, name) for name in CONFIG} | under.config


def main() -> int | None:
    """Run the campaign that the flags ask for."""
    args = flags.FLAGS
    if args.keep_bits and args.measure == "detect":
        raise InputError("keep_bits needs the measure critical or full; detect tells no images")
    check_measure(args.measure, args.screen)
    # Before anything is read; labels, once they are there or not.
    estimands.check(args.estimate, args.measure, labelled=True)
    under = target.load(args.activations)
    network, images, labels = under.network, under.images, under.labels
    estimands.check(args.estimate, args.measure, labels is not None)
    plan = _plan(network)
    chosen = target.choose(network, images, labels, under.criterion)
    if chosen is not None:
        images = images[chosen.indices]
        labels = None if labels is None else labels[chosen.indices]
    runner = Engine(
        network, images, labels, plan.space.sites, memory=args.memory * MEBIBYTE,
        screen=args.screen, order=target.given(chosen), criterion=under.criterion,
    )  # fmt: skip
    manifest = campaign.manifest(plan, runner, config(under), {}, chosen)
    truth = report.truth_of(args.truth, manifest) if args.truth else None
    sampler = campaign.LISTED if args.faults else args.sampler
    workdir = Path(args.workdir or Path("runs", f"{under.name}_{under.dataset}_{sampler}"))
    accuracy = None if labels is None else runner.accuracy
    known = "no labels" if accuracy is None else f"golden accuracy {accuracy:.2%}"
    planned = "as many as it takes" if sampler in METHODS else f"{plan.injections:,}"
    print(
        f"{under.name}: {known} on {len(images):,} images; "
        f"{planned} of {int(plan.population.sum()):,} faults ({sampler}) for the "
        f"{estimands.WORDS[args.estimate]}"
    )
    if network.left_out:
        print(f"left out: {sites.told(network.left_out)}")
    if chosen is not None:
        print(f"workload: {len(images):,} of {chosen.of:,} images, {chosen.reason}")
    earlier = _earlier(workdir)
    go_on = f"stopped; {workdir} has what was done, and the same command goes on from there"
    asked = config(under)
    with LiveProgress() as live, stoppable(live, go_on) as progress:
        options = {
            "measure": args.measure, "verify_pairs": args.verify, "keep_bits": args.keep_bits,
            "workload": chosen, "progress": progress,
        }  # fmt: skip
        if sampler in METHODS:
            summary = despite_wrong(
                rounds.run, sampler, plan.space, runner, workdir, asked, request=plan.request,
                levels=tuple(args.levels), seed=plan.seed, estimate=plan.estimate, **options,
            )  # fmt: skip
        else:
            summary = despite_wrong(campaign.run, plan, runner, workdir, asked, **options)
    measured = {**earlier, **_measured(summary, network, images, accuracy)}
    worst = tally.worst(workdir, network)
    if labels is None:  # nothing is correct or not
        summary["pairs"].pop("correct", None)
    records.write_summary(workdir, {**summary, "measured": measured, "worst": worst})
    return _conclude(workdir, summary, measured, truth)


def despite_wrong(run, *args, **options) -> dict:
    """The summary of a campaign, to be reported though its verification failed."""
    try:
        return run(*args, **options)
    except VerificationError as error:
        return dict(error.summary)


def _plan(network) -> campaign.Plan:
    args = flags.FLAGS
    if args.faults:
        return campaign.plan_listed(
            network, read_fault_list(args.faults, sites.listable(network)), target.request(),
            args.estimate,
        )  # fmt: skip
    if args.sampler in METHODS:
        return target.open_plan(network, args.seed)
    return campaign.plan(
        network,
        args.sampler,
        sites_pattern=args.sites,
        fault_model=args.fault_model,
        request=target.request(),
        seed=args.seed,
        estimate=args.estimate,
    )


def _earlier(workdir: Path) -> dict:
    """What the run that finished this campaign before measured; empty where none did."""
    try:
        return records.read_summary(workdir).get("measured", {})
    except InputError:
        return {}


def _measured(summary: dict, network, images, accuracy: float | None) -> dict:
    """What this run measured; the rates only where it ran any fault itself."""
    measured = {"images": summary["images"]}
    if accuracy is not None:
        measured["golden_accuracy"] = round(accuracy, 4)
    if summary["subnormal"]:
        measured["faults_of_subnormal_words"] = summary["subnormal"]
    if summary["run"]["faults"]:
        rate = summary["run"]["verdicts_per_second"]
        golden_rate = golden.golden_rate(network, images)
        measured |= {
            "seconds": round(summary["run"]["seconds"], 1),
            "verdicts_per_second": round(rate),
            "golden_images_per_second": round(golden_rate),
            "verdicts_per_golden_inference": round(rate / golden_rate, 2),
        }
    return measured


def _conclude(workdir: Path, summary: dict, measured: dict, truth: dict | None) -> int | None:
    """Print the table and the report's place; exit status 1 for a failed verification."""
    estimates = [Estimate(**unit) for unit in summary["estimates"]]
    shown = [e for e in estimates if e.level in ("network", "layer")]
    verify = summary["verify"]
    manifest = records.read_manifest(workdir)
    print(tables.table(shown, truth, tables.planned(manifest["config"])))
    paths = report.write(workdir, truth=truth)
    for name, value in measured.items():
        print(f"{name}: {value:,}")
    print(
        f"verify: {verify['pairs']:,} pairs, {verify['agreements']:,} agree, "
        f"{verify['near_ties']:,} near-ties, {verify['disagreements']:,} disagree; with 95% "
        f"confidence less than {verify['bound']:.2%} of verdicts are wrong"
    )
    print(f"report: {', '.join(map(str, paths))}")
    if verify["disagreements"] and not manifest["screen"]:
        return cli.fail(f"verification failed: {verify['worst']}")
    return None


if __name__ == "__main__":
    define_flags()
    cli.run(main)
