"""What the paper shows, made again: Tables I to IV, Figures 1 to 3, and a comparison of choices."""

import csv
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

import nets
from experiments import campaign as campaign_script
from experiments import target
from experiments.data import sets
from experiments.papers import figures
from experiments.papers.tables import markdown
from jfi import select
from jfi.campaign import campaign, detection, records
from jfi.campaign.campaign import Plan
from jfi.campaign.detection import Curves, Verdicts
from jfi.engine.engine import Engine
from jfi.faults import take
from jfi.workload import expected, workload
from jfi.workload.embedding import embedding
from jfi.workload.workload import METRICS, Pass, Selection

CONFIG = "net weights dataset images error_margin confidence t fault_model".split()
OURS = 0.8  # of central mode's images: what our selection takes. Chosen on three LeNets.
RANDOM = 5  # random selections that are averaged, as in the paper
TIMED = 1000, 1 << 20  # times are measured on so many faults at least, and about so many pairs
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # images to compare at
SHOWN = ("deepgini", "cross_entropy", "el2n")  # of Figure 1
DAY = 24 * 60 * 60


class Printed(NamedTuple):
    """A network's rows of Tables I and IV: percent, faults, and percent of the samples."""

    clean: float
    faulty: float
    not_critical: float
    critical: float
    faults: int
    central_share: float
    central: int
    random: int
    plateau_share: float
    plateau: int


PAPER = {
    ("cifar10", "resnet18"): Printed(
        93.52, 91.24, 97.52, 2.46, 826, 2.11, 822, 496, 14.47, 826),
    ("cifar10", "resnet9"): Printed(
        92.17, 89.64, 97.97, 2.77, 1508, 2.20, 1338, 672, 16.27, 1508),
    ("cifar10", "lenet"): Printed(
        79.36, 79.07, 99.64, 0.34, 1158, 25.32, 1151, 742, 79.45, 1158),
    ("cifar10", "vgg11"): Printed(90.10, 88.15, 97.82, 2.18, 819, 1.77, 795, 518, 16.41, 819),
    ("cifar10", "vgg16"): Printed(91.61, 89.53, 97.71, 2.29, 894, 1.23, 891, 510, 13.33, 894),
    ("cifar10", "mobilenetv2"): Printed(
        91.72, 89.47, 97.51, 2.49, 1614, 14.21, 1122, 907, 53.39, 1614),
    ("mnist", "resnet18"): Printed(99.63, 97.08, 97.45, 2.55, 581, 0.29, 581, 483, 3.64, 581),
    ("mnist", "resnet9"): Printed(99.65, 96.87, 97.22, 2.78, 527, 0.36, 527, 518, 3.11, 527),
    ("mnist", "lenet"): Printed(99.25, 99.09, 99.85, 0.15, 484, 0.84, 346, 297, 9.01, 436),
    ("mnist", "vgg11"): Printed(99.68, 97.36, 97.67, 2.33, 661, 0.22, 659, 511, 3.61, 661),
    ("mnist", "vgg16"): Printed(99.58, 97.22, 97.64, 2.36, 555, 0.27, 551, 515, 3.28, 555),
}  # fmt: skip
CORRELATIONS = "0.99 of cross-entropy and DeepGini, 0.86 of cross-entropy and EL2N, 0.85 of both"


class Campaign(NamedTuple):
    """One list of faults on every image.

    correct: share of inferences whose faulty answer is the label. seconds: all of it took.
    """

    plan: Plan
    verdicts: Verdicts
    correct: float
    seconds: float

    @property
    def total(self) -> int:
        """Critical faults."""
        return int(self.verdicts.critical.any(axis=1).sum())


class Choices(NamedTuple):
    """The selections of Table IV.

    random: several of the size of `central`. ours: `expected`, of `OURS` of that.
    """

    central: Selection
    plateau: Selection
    random: tuple[Selection, ...]
    ours: Selection


class Subject(NamedTuple):
    """A network, the metrics of its images by name, and campaigns, one a seed."""

    net: str
    dataset: str
    engine: Engine
    values: dict[str, np.ndarray]
    chosen: Choices
    campaigns: tuple[Campaign, ...]

    @property
    def images(self) -> int:
        """Of the test set."""
        return len(self.engine.images)

    @property
    def pooled(self) -> Verdicts:
        """The verdicts of the critical faults of all campaigns: others are found by no image."""
        critical = np.concatenate([own.verdicts.critical for own in self.campaigns])
        return Verdicts(critical[critical.any(axis=1)], None, self.images)


def judged(
    engine: Engine, plan: Plan, folder: Path, config: Mapping, measure: str, verify_pairs: int = 0
) -> Campaign:
    """The campaign of a plan, run with its verdicts kept, or read where it was run before.

    Raises:
      VerificationError: a pair that was run again naively came out otherwise.
    """
    flagged = {**config, "seed": plan.seed, "measure": measure}
    own = campaign.identity(plan, engine, measure)
    path = records.open_workdir(folder, campaign.manifest(plan, engine, flagged, own))
    summary = _finished(path)
    if summary is None:
        with campaign_script.LiveProgress() as progress:
            options = {"measure": measure, "keep_bits": True, "verify_pairs": verify_pairs}
            summary = campaign.run(plan, engine, path, flagged, progress=progress, **options)
    campaign.check_verified(summary)
    verdicts = detection.read_verdicts(path)
    inferences = plan.injections * verdicts.images
    # Of a campaign that was stopped, the last run stands for all of it.
    run = summary["run"]
    seconds = run["seconds"] * plan.injections / max(run["faults"], 1)
    return Campaign(plan, verdicts, summary["pairs"]["correct"] / inferences, seconds)


def _finished(path: Path) -> dict | None:
    """The summary of a campaign that was run to its end."""
    return records.read_summary(path) if (path / records.SUMMARY).exists() else None


def choices(seen: Pass, epsilon: float, slope: float) -> Choices:
    """EL2N in central mode and before its plateau, random ones, and ours."""
    central = workload.select(f"el2n:central:{epsilon}", seen)
    plateau = workload.select(f"el2n:pre_plateau:{slope}", seen)
    size = central.indices.size
    ours = workload.select(f"expected:top:{math.ceil(OURS * size)}", seen)
    return Choices(central, plateau, randoms(central.of, size), ours)


def randoms(images: int, n: int) -> tuple[Selection, ...]:
    """Random selections of n images, `RANDOM` of them."""
    return tuple(workload.random(images, n, seed) for seed in range(RANDOM))


def found(verdicts: Verdicts, chosen: Selection) -> int:
    """Critical faults that a selection finds."""
    return int(critical(verdicts, chosen.indices)[-1])


def critical(verdicts: Verdicts, order: np.ndarray) -> np.ndarray:
    """int [n + 1]: critical faults found by 0 to n images."""
    return detection.curves(verdicts._replace(masked=None), order).critical


def mean(curves: Sequence[Curves]) -> Curves:
    """The mean curve of each class."""
    return Curves(
        *(None if c[0] is None else np.mean(c, axis=0) for c in zip(*curves, strict=True))
    )


def orders(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every image in the orders that are compared, by name."""
    ranked = {name: workload.order(column, METRICS[name].high) for name, column in values.items()}
    nearest = {
        f"{name}, central first": workload.central(column, METRICS[name].hot_spot, np.inf).indices
        for name, column in values.items()
        if METRICS[name].hot_spot is not None
    }
    # One order each, of margin, of ratio, and of both from the border of two classes on.
    same = ("ratio", "ratio, central first", "margin, central first")
    return {name: order for name, order in (ranked | nearest).items() if name not in same}


def compared(subject: Subject) -> dict[str, np.ndarray]:
    """Critical faults of all lists found by 0 to B images, [B + 1], in each order, and beyond."""
    verdicts, images = subject.pooled, subject.images
    curves = {name: critical(verdicts, order) for name, order in orders(subject.values).items()}
    by_chance = [critical(verdicts, one.indices) for one in randoms(images, images)]
    curves["random, mean"] = np.mean(by_chance, axis=0)
    cover = critical(verdicts, detection.set_cover(verdicts).indices)
    curves["set cover, verdicts known"] = np.pad(cover, (0, images + 1 - cover.size), mode="edge")
    curves["no choice exceeds"] = detection.cover_bound(verdicts)
    return curves


def timed(subject: Subject, path: Path) -> dict[str, float]:
    """Seconds to find the critical ones of all faults by each selection, kept in a file.

    With the measure `detect`, compiled before; on a part of the faults where they are many.
    """
    chosen = subject.chosen
    selections = {
        "central": chosen.central,
        "random": chosen.random[0],
        "pre-plateau": chosen.plateau,
        "all": workload.top(subject.values["margin"], subject.images, high=False),
        f"ours, {OURS:.0%} of central": chosen.ours,
    }
    known = json.loads(path.read_text()) if path.exists() else {}
    for name, selection in selections.items():
        if name not in known:
            known[name] = _seconds(subject, selection)
            path.write_text(json.dumps(known))
    return known


def _seconds(subject: Subject, selection: Selection) -> float:
    whole, plan = subject.engine, subject.campaigns[0].plan
    engine = Engine(
        whole.network, whole.images[selection.indices], whole.labels[selection.indices],
        plan.space.sites, hardware=whole.hardware, order=np.arange(selection.indices.size),
    )  # fmt: skip
    ids = campaign.drawn(plan)(0, plan.injections)
    least, pairs = TIMED
    size = min(ids.size, max(least, pairs // selection.indices.size))
    some = np.random.default_rng(0).choice(ids, size, replace=False)
    faults = plan.space.decode(np.sort(some))
    engine.expect(Counter(faults.site.tolist()))
    _, first = np.unique(faults.site, return_index=True)
    engine.run(take(faults, first), "detect")
    started = time.perf_counter()
    engine.run(faults, "detect")
    return (time.perf_counter() - started) * ids.size / some.size


def days(images: int, faults: int) -> float:
    """The time of the paper's model: a millisecond an inference."""
    return images * faults / 1000 / DAY


def paper_row(subject: Subject) -> Printed | None:
    """What the paper prints of this network and data set; None where it has it not."""
    return next(
        (
            row
            for (dataset, net), row in PAPER.items()
            if net == subject.net and subject.dataset.startswith(dataset)
        ),
        None,
    )


def table_1(subject: Subject) -> list[str]:
    """Accuracies, inferences and critical faults."""
    own, paper = subject.campaigns[0], paper_row(subject)
    share = detection.shares(own.verdicts, np.arange(subject.images)).critical[-1]
    clean = subject.engine.accuracy
    rows = [("ours", *_percents(clean, own.correct, 1 - share, share), own.total)]
    if paper:
        rows.append(("paper, 10,000 images", *paper[:5]))
    header = (
        "", "clean accuracy %", "faulty accuracy %", "not critical inferences %",
        "critical inferences %", "critical faults",
    )  # fmt: skip
    return [
        "## Table I: accuracy, inferences, critical faults",
        markdown(header, rows),
        f"{own.plan.injections:,} faults of {own.plan.space.size:,}, each on {subject.images:,} "
        f"images; the campaign took {own.seconds:,.0f} s.",
    ]


def table_2(subject: Subject) -> list[str]:
    """Spearman's correlations between metrics; of one that is constant, none."""
    some = {name: column for name, column in subject.values.items() if np.ptp(column) > 0}
    rows = [
        (name, *(f"{r:.2f}" for r in row))
        for name, row in zip(some, workload.spearman(some), strict=True)
    ]
    left_out = [
        f"{name} is the same for every image." for name in subject.values if name not in some
    ]
    return [
        "## Table II: Spearman's rank correlation of the metrics",
        markdown(("", *some), rows),
        f"The paper, ResNet-18 on CIFAR-10: {CORRELATIONS}.",
        *left_out,
    ]


def table_3(subject: Subject) -> list[str]:
    """Central mode against random selections of its size, by seed of the fault list."""
    chosen, counts = subject.chosen, {}
    for seed, own in enumerate(subject.campaigns):
        random = np.mean([found(own.verdicts, one) for one in chosen.random])
        ours, central = (found(own.verdicts, one) for one in (chosen.ours, chosen.central))
        counts[seed] = own.total, central, random, ours
    if len(counts) > 1:
        counts["all"] = np.sum(list(counts.values()), axis=0)
    rows = [
        (seed, f"{total:,.0f}", f"{central:,.0f}", f"{random:,.1f}", f"{ours:,.0f}")
        for seed, (total, central, random, ours) in counts.items()
    ]
    header = (
        "seed", "critical faults", "EL2N central", f"random, mean of {RANDOM}",
        f"ours, {chosen.ours.indices.size:,} images",
    )  # fmt: skip
    return [
        f"## Table III: EL2N against random, {chosen.central.indices.size:,} images",
        markdown(header, rows),
    ]


def table_4(subject: Subject, seconds: Mapping[str, float]) -> list[str]:
    """Share of samples, faults found, and time by each selection."""
    own, chosen, paper = subject.campaigns[0], subject.chosen, paper_row(subject)
    random = np.mean([found(own.verdicts, one) for one in chosen.random])
    counts = {
        "central": (chosen.central.indices.size, found(own.verdicts, chosen.central)),
        "random": (chosen.central.indices.size, round(random)),
        "pre-plateau": (chosen.plateau.indices.size, found(own.verdicts, chosen.plateau)),
        "all": (subject.images, own.total),
        f"ours, {OURS:.0%} of central": (
            chosen.ours.indices.size,
            found(own.verdicts, chosen.ours),
        ),
    }
    printed = _printed_selections(paper)
    rows = [
        (
            name, n, *_percents(n / subject.images), faults,
            *_percents(faults / max(own.total, 1)), *printed.get(name, (None, None)),
            f"{days(n, own.plan.injections):.3f}",
            f"{seconds[name]:,.1f}" if name in seconds else None,
        )
        for name, (n, faults) in counts.items()
    ]  # fmt: skip
    header = (
        "selection", "images", "% of samples", "critical faults found", "% of them",
        "paper: % of samples", "% of them", "model, days", "measured, s",
    )  # fmt: skip
    return [
        "## Table IV: EL2N against random",
        markdown(header, rows),
        f"Central: {chosen.central.reason}. Pre-plateau: {chosen.plateau.reason}. The model is the "
        "paper's, 1 ms an inference. Measured is finding the critical faults of the list with the "
        f"measure `detect`, compiled before; where that is long, on {TIMED[0]:,} faults or more, "
        "and scaled.",
    ]


def _printed_selections(paper: Printed | None) -> dict[str, tuple]:
    """Percent of samples and of critical faults found, as printed."""
    if paper is None:
        return {}
    return {
        "central": (paper.central_share, f"{100 * paper.central / paper.faults:.1f}"),
        "random": (paper.central_share, f"{100 * paper.random / paper.faults:.1f}"),
        "pre-plateau": (paper.plateau_share, f"{100 * paper.plateau / paper.faults:.1f}"),
        "all": (100, "100.0"),
    }


def comparison(subject: Subject, curves: Mapping[str, np.ndarray]) -> tuple[tuple, list[tuple]]:
    """(header, rows) of all orders: faults found at equal counts, and images needed."""
    central = subject.chosen.central
    aim, total = found(subject.pooled, central), _total(subject)
    counts = sorted({n for n in COUNTS if n < subject.images} | {central.indices.size})
    rows = [
        (
            name, *(f"{curve[n]:,.0f}" for n in counts),
            *detection.images_needed(curve, total),
            *detection.images_needed(curve, aim, (1.0,)),
        )
        for name, curve in curves.items()
    ]  # fmt: skip
    header = (
        "order", *(f"{n:,}" for n in counts),
        *(f"for {share:.0%}" for share in detection.SHARES), "as central mode",
    )  # fmt: skip
    return header, rows


def _total(subject: Subject) -> int:
    return sum(own.total for own in subject.campaigns)


def compare_section(subject: Subject, header: tuple, rows: Sequence[tuple]) -> list[str]:
    """The comparison, and whether our selection needs fewer images than central mode."""
    chosen, verdicts, lists = subject.chosen, subject.pooled, len(subject.campaigns)
    size = chosen.central.indices.size
    needed = {row[0]: row[-1] for row in rows}
    ours, best = needed["expected"], needed["set cover, verdicts known"]
    fewer = "fewer" if ours < size else "not fewer"
    own, central = (found(verdicts, one) for one in (chosen.ours, chosen.central))
    return [
        "## All metrics and selections",
        f"Critical faults found, of {_total(subject):,} of {'all ' * (lists > 1)}{lists} "
        f"list{'s' * (lists > 1)}, by so many images; images that 90 to 100% of them take; and "
        "images until as many are found as by central mode.",
        markdown(header, rows),
        f"Central mode takes {size:,} images. To find as many faults, our selection `expected` "
        f"takes {ours:,}, {fewer}; the golden margin {needed['margin']:,}; a greedy cover that "
        f"knows every verdict {best:,}. With {OURS:.0%} of central mode's images, "
        f"{chosen.ours.indices.size:,}, `expected` finds {own:,}, central mode {central:,}. It is "
        f"chosen by {expected.FAULTS:,} flips of its own, none of which was run. `ratio` is in the "
        "order of `margin`.",
    ]


def draw(subject: Subject, curves: Mapping, out: Path) -> list[str]:
    """Figures 1 to 3 and that of the comparison."""
    verdicts, images = subject.campaigns[0].verdicts, subject.images
    by_image = detection.by_image(verdicts.critical, images)
    figures.metrics(out / "figure1.png", {name: subject.values[name] for name in SHOWN}, by_image)
    el2n = subject.values["el2n"]
    ranked, random = workload.order(el2n), [one.indices for one in randoms(images, images)]
    for name, way, unit, metric in (
        ("figure2", detection.curves, "faults", el2n[ranked]),
        ("figure3", detection.shares, "share of inferences", None),
    ):
        by_chance = mean([way(verdicts, order) for order in random])
        figures.classes(out / f"{name}.png", way(verdicts, ranked), by_chance, unit, metric)
    figures.detection(out / "comparison.png", curves, _total(subject))
    return [
        "## Figures",
        "![Figure 1: metrics against faults by image](figure1.png)",
        "![Figure 2: faults by class, images ranked by EL2N](figure2.png)",
        "![Figure 3: inferences by class, images ranked by EL2N](figure3.png)",
        "![All orders](comparison.png)",
    ]


def reproduce(subject: Subject, times: bool, out: Path) -> str:
    """Every table and figure, written to `out`; the text of dear_cnn.md."""
    curves = compared(subject)
    header, rows = comparison(subject, curves)
    seconds = timed(subject, out / "times.json") if times else {}
    with (out / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    parts = [
        f"# DEAR-CNN: {subject.net} on {subject.dataset}",
        *table_1(subject),
        *table_2(subject),
        *table_3(subject),
        *table_4(subject, seconds),
        *compare_section(subject, header, rows),
        *draw(subject, curves, out),
    ]
    text = "\n\n".join(parts) + "\n"
    (out / "dear_cnn.md").write_text(text, encoding="utf-8")
    return text


def _percents(*shares: float) -> tuple[str, ...]:
    return tuple(f"{100 * share:.2f}" for share in shares)


def subject_of(net: nets.Net, dataset: sets.Dataset, weights: Path, out: Path) -> Subject:
    """The network that the flags name, its campaigns run or read."""
    args = flags.FLAGS
    network = target.load_network(net, weights)
    images, labels = target.workload(net, dataset, args.images)
    engine = Engine(network, images, labels, select(network))
    seen = golden_pass(engine)
    chosen = choices(seen, args.epsilon, args.slope)
    campaigns = _campaigns(engine, out / "campaigns", target.recorded(net))
    values = {name: metric.values(seen) for name, metric in METRICS.items()}
    return Subject(net.name, dataset.name, engine, values, chosen, campaigns)


def golden_pass(engine: Engine) -> Pass:
    """All that metrics are made of, of the images of an engine."""
    network, images = engine.network, engine.images
    foreseen = expected.chances(network, images, engine.sites, engine.by)
    layer = embedding(network, images)
    return workload.golden_pass(engine.golden.logits, engine.labels, layer, foreseen)


def _campaigns(engine: Engine, folder: Path, recorded: dict) -> tuple[Campaign, ...]:
    """A campaign a seed, as the flags ask; the first may tell more."""
    args = flags.FLAGS
    config = {name: getattr(args, name) for name in CONFIG} | recorded
    options = {"fault_model": args.fault_model, "request": target.request()}
    found = []
    for seed in range(args.seeds):
        plan = campaign.plan(engine.network, "network_wise", **options, seed=seed)
        measure = "critical" if seed else args.measure
        own = folder / f"seed_{seed}"
        found.append(judged(engine, plan, own, config, measure, args.verify))
    return tuple(found)
