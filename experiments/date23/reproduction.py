"""What the paper shows, made again: campaigns by four methods, Tables I to III, Figures 3 to 7."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from scipy import stats

import nets
from experiments import campaign as campaign_script
from experiments import target
from experiments.data import sets
from experiments.date23 import sizes
from experiments.date23.sizes import METHODS, PAPERS, PRINTED
from experiments.papers import figures
from experiments.papers.tables import markdown
from experiments.samplers import truth as truths
from experiments.samplers.truth import Truth
from experiments.train.training import smoke_weights
from jfi.campaign import campaign, records
from jfi.engine.engine import Engine
from jfi.faults import FAULT_MODELS, Faults, FaultSpace
from jfi.networks.sites import select
from jfi.report import tables as report
from jfi.sampling import estimates, sampling
from jfi.sampling.estimates import Estimate
from jfi.sampling.sampling import Request, Sample, Stratum

HEADER = tuple(field.replace("_", "-") for field in sizes.Row._fields)
SAMPLES = 10  # of the first layer, S0 to S9 of Figure 6
CONFIG = "net weights dataset images error_margin confidence t outliers".split()


class Counts(NamedTuple):
    """Faults injected and critical ones among them, int64 [S, W]."""

    injections: np.ndarray
    critical: np.ndarray


# A campaign under a name: its strata and seed to what it found.
Draw = Callable[[str, Sequence[Stratum], int], Counts]


class Subject(NamedTuple):
    """What campaigns are run on: faults, golden values by site, exact shares by unit (if known)."""

    name: str
    space: FaultSpace
    leaves: list[np.ndarray]
    shares: dict[str, float]
    draw: Draw


def drawn_from(truth: Truth) -> Draw:
    """Campaigns whose verdicts are looked up."""
    space = truth.space

    def draw(name: str, strata: Sequence[Stratum], seed: int) -> Counts:
        sample = Sample(space, strata, seed)
        ids = sample.ids(0, sample.size)
        return _counts(space, space.decode(ids), truths.is_critical(truth, ids))

    return draw


def injected_by(engine: Engine, space: FaultSpace, folder: Path, config: Mapping) -> Draw:
    """Campaigns that are run, each in a work directory of its own."""

    def draw(name: str, strata: Sequence[Stratum], seed: int) -> Counts:
        plan = campaign.Plan(space, Request(), tuple(strata), space.cells, seed)
        workdir = folder / f"{name}_{seed}"
        with campaign_script.LiveProgress() as progress:
            flagged = {**config, "campaign": name, "seed": seed}
            campaign.run(plan, engine, workdir, flagged, measure="detect", progress=progress)
        columns = ("site", "index", "bit", "polarity", "first_critical")
        shards = list(records.read_shards(workdir, columns))
        *faults, first = (np.concatenate([shard[c] for shard in shards]) for c in columns)
        return _counts(space, Faults(*faults), first >= 0)

    return draw


def _counts(space: FaultSpace, faults: Faults, critical: np.ndarray) -> Counts:
    counts = Counts(np.zeros_like(space.cells), np.zeros_like(space.cells))
    np.add.at(counts.injections, (faults.site, faults.bit), 1)
    np.add.at(counts.critical, (faults.site, faults.bit), critical)
    return counts


def plans(space: FaultSpace, request: Request, p: np.ndarray) -> dict[str, tuple[Stratum, ...]]:
    """The strata of each method; `p` [W] are the data-aware probabilities."""
    uniform = {name: sampling.SAMPLERS[name](space, None, request) for name in METHODS[:3]}
    return uniform | {METHODS[3]: sizes.aware_strata(space, request, p)}


def estimated(
    space: FaultSpace, strata: Sequence[Stratum], counts: Counts, request: Request, levels
) -> list[Estimate]:
    """The estimates of a campaign.

    Upper bounds count bits that were planned on a p below one half at that p at most, where no
    injection was critical: it is what the method rests on.
    """
    stratum = np.full(space.cells.shape, -1)
    assumed = np.ones(space.cells.shape)
    for number, part in enumerate(strata):
        where = tuple(slice(None) if at is None else at for at in (part.site, part.bit))
        stratum[where] = number
        assumed[where] = part.p if part.p < 0.5 else 1.0
    return estimates.estimate(
        [site.name for site in space.sites], space.cells, *counts, stratum,
        confidence=request.confidence, t=request.t, assumed_p=assumed, levels=levels,
    )  # fmt: skip


def first_layer(space: FaultSpace, strata: Sequence[Stratum]) -> tuple[Stratum, ...]:
    """What a method draws from the first site; of a sample of the network, the expected share."""
    if strata[0].site is not None:
        return tuple(s for s in strata if s.site == 0)
    size = int(space.site_sizes[0])
    return (Stratum(0, None, size, round(strata[0].injections * size / space.size), strata[0].p),)


class Coverage(NamedTuple):
    """What repeated campaigns of one method said of one unit.

    injections, margin: means; margin over the campaigns that have an injection in the unit.
    normal: share of campaigns whose estimate ± margin holds the truth, as in the paper; a
    campaign without an injection in the unit does not. exact: whose Clopper-Pearson interval does.
    """

    method: str
    level: str
    unit: str
    truth: float
    injections: float
    margin: float
    normal: float
    exact: float


def validate(
    subject: Subject, method: str, strata, request: Request, seeds: Sequence[int], levels
) -> list[Coverage]:
    """Campaigns of one method, a seed each, against the truth, unit by unit."""
    runs = [
        estimated(subject.space, strata, subject.draw(method, strata, seed), request, levels)
        for seed in seeds
    ]
    return [
        _coverage(method, unit, subject.shares[unit[0].unit]) for unit in zip(*runs, strict=True)
    ]


def _coverage(method: str, found: Sequence[Estimate], truth: float) -> Coverage:
    """`found` holds the estimates of one unit by each campaign."""
    margins = [e.margin for e in found if e.injections]
    return Coverage(
        method, found[0].level, found[0].unit, truth,
        float(np.mean([e.injections for e in found])),
        float(np.mean(margins)) if margins else float("nan"),
        float(np.mean([abs(e.estimate - truth) <= e.margin + 1e-12 for e in found])),
        float(np.mean([report.inside(e, truth) for e in found])),
    )  # fmt: skip


def average_margin(found: Sequence[Estimate]) -> float:
    """Mean achieved margin of the layers that have an injection (Table III)."""
    margins = [e.margin for e in found if e.level == "layer" and e.injections]
    return float(np.mean(margins)) if margins else float("nan")


def _size_section(name: str, space: FaultSpace, request: Request, p) -> list[str]:
    """Table I of a network."""
    return [f"## Sample sizes: {name}", markdown(HEADER, sizes.size_table(space, request, p))]


def paper_section(name: str, own: Subject | None, outliers) -> list[str]:
    """Table I or II as printed; data-aware of `own`, the paper's network with its weights."""
    paper = PAPERS[name]
    space = sizes.space_of(paper.words)
    columns, notes = _own_columns(name, own, outliers) if own else ({}, [])
    missing = [None] * len(paper.words)
    columns["data-aware, paper"] = [*(paper.aware or missing), paper.aware_total]
    header = (*HEADER[:-1], *columns)
    rows = [
        (*row[:-1], *more)
        for row, *more in zip(sizes.size_table(space, PRINTED), *columns.values(), strict=True)
    ]
    title = f"## Sample sizes: {name}, as DATE'23 prints them"
    return [title, markdown(header, rows), *notes]


def _own_columns(name: str, own: Subject, outliers) -> tuple[dict, list[str]]:
    """Data-aware sizes with p of our weights, and with the scale that fits the paper best."""
    paper = PAPERS[name]
    space = sizes.space_of(paper.words)
    distances = sampling.bit_distances(own.leaves)
    largest, error = sizes.fit(distances, paper, outliers)
    ps = {
        "data-aware": sampling.data_aware_p(own.leaves, outliers),
        "data-aware, fitted": sizes.scaled_p(distances, largest, outliers),
    }
    columns = {
        title: sizes.by_site(space, sizes.aware_strata(space, PRINTED, p))
        for title, p in ps.items()
    }
    note = (
        f"Ours divides distances by the largest of the bits that are not outliers, "
        f"{sizes.ordinary(distances, outliers).max():.3g}. The paper's column comes out to within "
        f"{100 * error:.1f}% with {largest:.3g} in its place (fitted)."
    )
    return {title: [*column, sum(column)] for title, column in columns.items()}, [note]


def _title(method: str) -> str:
    return method.replace("_", "-")


def _comparison_section(subject: Subject, strata: Mapping, found: Mapping, paper) -> list[str]:
    """Table III; `paper` is what DATE'23 prints of the network, or None."""
    rows = [("exhaustive", subject.space.size, "100", None, None)]
    for number, method in enumerate(METHODS):
        n = sum(s.injections for s in strata[method])
        share = f"{100 * n / subject.space.size:.2f}"
        margin = report.percent(average_margin(found[method]))
        printed = f"{paper.margins[number]:g}" if paper else None
        rows.append((_title(method), n, share, margin, printed))
    header = ("method", "injections", "injected %", "average margin %", "paper's margin %")
    return [f"## The methods compared: {subject.name}", markdown(header, rows)]


def _validation_section(coverage: Sequence[Coverage], repeats: int, request: Request) -> list[str]:
    """Means over the units of each method and level, and the unit that is covered least."""
    rows = [
        _level_row(own)
        for method in METHODS
        for level in estimates.LEVELS
        if (own := [c for c in coverage if (c.method, c.level) == (method, level)])
    ]
    header = (
        "method", "level", "units", "injections a unit", "mean margin %",
        "normal holds %", "least", "exact holds %", "least",
    )  # fmt: skip
    by_chance = stats.binom.ppf(0.025, repeats, request.confidence) / repeats
    return [
        "## How often the interval holds the truth",
        f"{repeats} campaigns a method; {100 * request.confidence:g}% is wanted, and down to "
        f"{100 * by_chance:.1f}% is within the chance of so many. Normal is estimate ± margin, as "
        "in the paper; a campaign without an injection in a unit misses it. Exact is "
        "Clopper-Pearson's interval. `least` is the worst unit. By unit: `validation.csv`.",
        markdown(header, rows),
    ]


def _level_row(own: Sequence[Coverage]) -> tuple:
    """The row of units of one method and level."""
    margins = [c.margin for c in own if not np.isnan(c.margin)]
    normal, exact = ([getattr(c, kind) for c in own] for kind in ("normal", "exact"))
    held = (np.mean(normal), min(normal), np.mean(exact), min(exact))
    return (
        _title(own[0].method), own[0].level, len(own),
        round(np.mean([c.injections for c in own])),
        report.percent(float(np.mean(margins)) if margins else float("nan")),
        *(f"{100 * share:.1f}" for share in held),
    )  # fmt: skip


def _write_coverage(path: Path, coverage: Sequence[Coverage]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([Coverage._fields, *coverage])


def _draw_weights(out: Path, subject: Subject, p: np.ndarray) -> list[str]:
    """Figures 3 and 4."""
    figures.bit_frequencies(out / "figure3.png", *sampling.bit_frequencies(subject.leaves))
    figures.bit_p(out / "figure4.png", p)
    return [
        "## What data-aware p is made of",
        "![Figure 3: how often each bit is 0 and 1](figure3.png)",
        "![Figure 4: p of each bit](figure4.png)",
    ]


def _draw_layers(out: Path, subject: Subject, found: Mapping) -> list[str]:
    """Figures 5 and 7."""
    for name, methods in (("figure5", METHODS[1::2]), ("figure7", METHODS[::3])):
        points = {_title(m): [e for e in found[m] if e.level == "layer"] for m in methods}
        figures.layers(out / f"{name}.png", points, subject.shares)
    return [
        "## Layers",
        "![Figure 5: layer-wise and data-aware](figure5.png)",
        "![Figure 7: network-wise and data-aware](figure7.png)",
    ]


def _draw_samples(out: Path, subject: Subject, strata: Mapping, request: Request) -> list[str]:
    """Figure 6."""
    samples = {}
    for method in METHODS:
        own = first_layer(subject.space, strata[method])
        counts = [subject.draw(f"first_layer_{method}", own, seed) for seed in range(SAMPLES)]
        samples[_title(method)] = [
            estimated(subject.space, own, count, request, ("layer",))[0] for count in counts
        ]
    name = subject.space.sites[0].name
    figures.samples(out / "figure6.png", name, samples, subject.shares.get(name))
    return ["## The first layer", f"![Figure 6: ten samples of {name}](figure6.png)"]


def reproduce(
    subject: Subject, whole: Subject, request: Request, outliers, repeats: int, levels, out: Path
) -> str:
    """Every table and figure of a network, written to `out`; the text of date23.md.

    Args:
      subject: what campaigns are run on; whole: the same network with all of its kernels.
      outliers: a rule of `sampling.OUTLIERS`.
      repeats: campaigns a method that are compared with the truth, where it is known.
      levels: of the units that are compared.
    """
    p = sampling.data_aware_p(whole.leaves, outliers)
    strata = plans(subject.space, request, p)
    found = {
        m: estimated(subject.space, strata[m], subject.draw(m, strata[m], 0), request,
                     ("network", "layer"))
        for m in METHODS
    }  # fmt: skip
    parts = [f"# DATE'23: {subject.name}", *_scope(subject, whole)]
    for name in PAPERS:
        own = whole if whole.name == name else None
        parts += paper_section(name, own, outliers)
    parts += _size_section(whole.name, whole.space, request, p)
    paper = PAPERS.get(whole.name) if subject.space.size == whole.space.size else None
    parts += _comparison_section(subject, strata, found, paper)
    parts += _draw_weights(out, whole, p)
    parts += _draw_layers(out, subject, found)
    parts += _draw_samples(out, subject, strata, request)
    if subject.shares and repeats:
        coverage = [
            row
            for m in METHODS
            for row in validate(subject, m, strata[m], request, range(repeats), levels)
        ]
        _write_coverage(out / "validation.csv", coverage)
        parts += _validation_section(coverage, repeats, request)
    text = "\n\n".join(parts) + "\n"
    (out / "date23.md").write_text(text, encoding="utf-8")
    return text


def _scope(subject: Subject, whole: Subject) -> list[str]:
    """What the campaigns are about, in a few words."""
    count, layers = len(subject.space.sites), len(whole.space.sites)
    known = ""
    if subject.shares:
        known = f", exactly {report.percent(subject.shares['network'])}% of them critical"
    lines = [f"{subject.space.size:,} stuck-at faults in {count} of {layers} layers{known}."]
    if count < layers:
        lines.append(
            "The truth knows no more layers in full. Campaigns are run on these as if they were "
            "the network; the tables of sample sizes, and p, are of the whole network."
        )
    return lines


def of_truth(truth: Truth) -> tuple[Subject, Subject]:
    """The layers that the truth knows in full, and the whole network."""
    full = truths.complete(truth)
    name = truth.meta["net"]
    subject = Subject(name, full.space, full.values, truths.shares(full), drawn_from(full))
    return subject, Subject(name, truth.space, truth.values, {}, subject.draw)


def of_network(net: nets.Net, dataset: sets.Dataset, out: Path) -> Subject:
    """The network that the flags name, its campaigns to be run."""
    args = flags.FLAGS
    weights = target.weights_path(net, dataset.name)
    net = target.normalising(net, weights)
    images, labels = target.workload(net, dataset, args.images)
    network = target.load_network(net, weights)
    space = FaultSpace(select(network), FAULT_MODELS["stuck_at"])
    engine = Engine(network, images, labels, space.sites)
    config = {name: getattr(args, name) for name in CONFIG} | target.recorded(net)
    draw = injected_by(engine, space, out / "campaigns", config)
    return Subject(net.name, space, [network.values(site) for site in space.sites], {}, draw)


def smoke_truth(out: Path) -> Truth:
    """LeNet on digits, trained, and its truth: made once, then read."""
    path = out / "truth.npz"
    if path.exists():
        return truths.load(path)
    dataset = sets.load("digits")
    net = nets.build("lenet", dataset.x_test.shape[1:])
    weights = smoke_weights(net, dataset, out)
    network = target.load_network(net, weights)
    work = truths.plan(network)
    workload = target.workload(net, dataset, None)
    engine = Engine(network, *workload, work.space.sites)
    config = {"net": net.name, "dataset": dataset.name, "weights": str(weights), "seed": 0}
    with campaign_script.LiveProgress() as progress:
        return truths.write(path, work, engine, config, verify_pairs=200, progress=progress)
