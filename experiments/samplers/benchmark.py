"""Compare ways of choosing faults on a network whose every fault is known.

    python -m experiments.bench_samplers --truth=lenet_mnist.npz --jobs=4

repeats campaigns of each method against an exhaustive truth (experiments.truth makes it), with no
inference: injections until every network, layer or bit has its error margin, the margin achieved,
and how often the interval holds the true share, with the lower end of that coverage's own 95%
Clopper-Pearson interval. Writes samplers.json, samplers.md and samplers.png to --out.

Methods: the fixed samples of DATE'23 with the papers' normal interval and with Clopper and
Pearson's, iterative SFI, and the adaptive sampler of `jfi.sampling.adaptive` with strata by (layer,
bit) and by |dw|. Where --weights and --dataset are given, those that the truth is of, also with
strata by |dw| times the sensitivity of the word (`jfi.networks.scores`), with and without the
faults that certified radii prove harmless, which need no injection:

    python -m experiments.bench_samplers --truth=lenet_mnist.npz --levels=network --repeats=1000 \\
        --methods=adaptive --weights=weights/lenet_mnist.safetensors --dataset=mnist.npz

A truth that knows some layers whole and a share of the rest is a truth of those layers. A campaign
takes 3 ms to 2 s, most for every bit and small margins. Rows are kept as they come: started again,
it goes on, and more methods or margins join the rows that are there. `scripts/samplers` makes all
that docs/samplers.md shows, with `experiments.sampler_table`, which puts several truths in one
figure.
--estimate=pairs and --estimate=accuracy compare margins of the share of critical (fault, image)
pairs and of mean accuracy under fault: rows of another estimate need another --out.
--smoke takes seconds: few campaigns on a small made-up truth.
"""

import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

import nets
from experiments import target
from experiments.data import sets
from jfi import bits
from jfi.campaign import records
from jfi.engine.engine import Engine
from jfi.errors import InputError
from jfi.faults import FAULT_MODELS, FaultSpace, Site
from jfi.networks import scores
from jfi.sampling import adaptive, estimands, estimates, methods, sfi, strata
from jfi.sampling.estimands import ACCURACY, CRITICAL, FAULTS, PAIRS, WORDS, Estimand
from jfi.sampling.methods import Result
from jfi.sampling.sampling import SAMPLERS, Request, Stratum
from jfi.sampling.strata import Split

SMOKE = {"repeats": 5, "margins": ["0.05"], "confidences": ["0.95"]}
ROWS, HINTS = "samplers.json", "hints.npz"
FIXED = ("network_wise", "layer_wise", "data_unaware", "data_aware")


class Hints(NamedTuple):
    """What a network tells of its faults without running one: a float32 [2, words], and a bool
    [words, width], of each site.

    sensitivity: of `jfi.networks.scores`. certified: flips proven harmless (`Engine.certified`).
    """

    sensitivity: list[np.ndarray]
    certified: list[np.ndarray]


class Truth(NamedTuple):
    """The known part of a network's faults.

    leaves: golden values of each site of `space`. outcome: [N], by fault id, bool of critical or
    not; cells: its sums over each (site, bit), [S, W]. hints: of the same words; None where there
    are none. estimand: what the outcomes are.
    """

    name: str
    space: FaultSpace
    leaves: list[np.ndarray]
    outcome: np.ndarray
    cells: np.ndarray
    hints: Hints | None = None
    estimand: Estimand = CRITICAL


class Case(NamedTuple):
    """What is asked of a method."""

    method: str
    level: str
    margin: float
    confidence: float


def define_flags() -> None:
    """Flags of this script."""
    flags.DEFINE_string("truth", None, "The truth, a .npz file of experiments.truth.")
    flags.DEFINE_string("weights", None, "The weights it is of, for the predictor.")
    flags.DEFINE_string("dataset", None, "The data set it is of, for the predictor.")
    flags.DEFINE_string("data_dir", sets.DATA_DIR, "Where tensorflow-datasets keeps its sets.")
    flags.DEFINE_enum(
        "estimate",
        "faults",
        list(WORDS),
        "What margins are of: critical faults, critical (fault, image) pairs, or accuracy under "
        "fault, of a truth that holds it.",
    )
    flags.DEFINE_list("margins", ["0.01", "0.005", "0.001"], "Error margins to reach.")
    flags.DEFINE_list("confidences", ["0.95", "0.99"], "Confidences to reach them at.")
    flags.DEFINE_list("levels", list(methods.LEVELS), "Units that must have the margin.")
    flags.DEFINE_list("methods", None, "Methods to compare. Default: all.")
    flags.DEFINE_integer("repeats", 200, "Campaigns of each method.", 1)
    flags.DEFINE_integer("jobs", 1, "Processes.", 1)
    flags.DEFINE_string("out", "runs/samplers", "Folder for the results.")
    flags.DEFINE_bool("smoke", False, "A run of seconds on a made-up truth.")


def read(path: str | Path, hints: Hints | None = None, estimate: str = "faults") -> Truth:
    """A truth from its file: words with every bit known are its population.

    Args:
        hints: of all words of the file's sites.
        estimate: a name of `jfi.sampling.estimands.WORDS`.

    Raises:
        InputError: a file that is no truth, or knows no word whole, or not the accuracy.
    """
    try:
        with np.load(path) as file:
            arrays = dict(file)
        meta = json.loads(str(arrays["meta"]))
        if estimate == ACCURACY and "golden_correct" not in meta:
            raise InputError(
                f"truth {path} does not hold which images are answered right; make it again with "
                "experiments.truth, on images with labels"
            )
        estimand = estimands.estimand(
            estimate, meta["images"], meta.get("golden_correct", 0) / meta["images"]
        )
        known = [_known(arrays, n, site, estimand) for n, site in enumerate(meta["sites"])]
        polarities = FAULT_MODELS[meta["fault_model"]]
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"truth {path} cannot be read: {error}") from None
    wholes = [(outcome >= 0).all(axis=1) for _, _, outcome in known]
    if hints:
        pairs = [(*own, w) for *own, w in zip(*hints, wholes, strict=True) if w.any()]
        hints = Hints([x[:, w] for x, _, w in pairs], [y[w] for _, y, w in pairs])
    chosen = [(n, x[w], y[w]) for (n, x, y), w in zip(known, wholes, strict=True) if w.any()]
    return truth(Path(path).stem, chosen, polarities, estimand)._replace(hints=hints)


def _known(
    arrays: Mapping, number: int, site: Mapping, estimand: Estimand
) -> tuple[str, np.ndarray, np.ndarray]:
    """(name, golden values [words], the outcome of a flip [words, width], or less than 0)."""
    words = bits.from_bits(arrays[f"words_{number}"], site["dtype"])
    images = arrays[f"critical_{number}"]
    if estimand.name == ACCURACY:
        return site["name"], words, arrays[f"correct_{number}"] / np.float64(estimand.parts)
    outcome = np.minimum(images, 1) if estimand.name == FAULTS else images / estimand.parts
    return site["name"], words, outcome


def truth(name: str, known, polarities, estimand: Estimand = CRITICAL) -> Truth:
    """The truth of (site name, values [words], outcomes of flips [words, width]) of each site."""
    if not known:
        raise InputError(f"truth {name} knows no word whole; run more of it")
    space = FaultSpace([Site(n, x.shape, x.dtype) for n, x, _ in known], polarities)
    outcome = np.concatenate([_by_fault(space, *own, estimand.unchanged) for _, *own in known])
    faults = space.decode(np.arange(space.size))
    cell = np.ravel_multi_index((faults.site, faults.bit), space.cells.shape)
    cells = np.bincount(cell, outcome, space.cells.size).reshape(space.cells.shape)
    if estimand == CRITICAL:
        outcome, cells = outcome > 0, cells.astype(np.int64)
    return Truth(name, space, [x for _, x, _ in known], outcome, cells, None, estimand)


def _by_fault(
    space: FaultSpace, values: np.ndarray, flips: np.ndarray, unchanged: float
) -> np.ndarray:
    """The outcome of each fault of a site, in the order of ids: one that changes its word is the
    flip."""
    words = bits.to_bits(values)[:, None, None]
    bit = np.arange(flips.shape[1])[:, None]
    changes = bits.set_bit(words, bit, np.array(space.polarities)) != words
    return np.where(changes, flips[:, :, None], unchanged).ravel()


def made_up(
    seed: int = 0, words: tuple[int, ...] = (60, 400, 900), estimate: str = "faults"
) -> Truth:
    """A small truth like the real ones: rare, growing with |dw|, most in high exponent bits.

    Of 20 images a critical fault changes any number, most often few; golden accuracy is 95%.
    """
    estimand = estimands.estimand(estimate, 20, 0.95)
    rng = np.random.default_rng(seed)
    known = []
    for number, size in enumerate(words):
        values = rng.normal(scale=0.1, size=size).astype(np.float32)
        moves = np.stack([strata.distances(values, bit) for bit in range(32)], axis=1)
        with np.errstate(divide="ignore"):
            threshold = np.exp(rng.normal(1.0 + number, 1.0, size))[:, None]
        critical = ~(moves < threshold)
        if estimand != CRITICAL:
            changed = critical * np.ceil(20 * rng.beta(0.5, 1.0, critical.shape)) / 20
            # Of answers that change, one in twenty was wrong, and may come out right.
            mended = np.minimum(changed, rng.random(critical.shape) < 0.05) / 20
            critical = changed if estimand.name == PAIRS else 0.95 * (1 - changed) + mended
        known.append((f"layer{number}", values, critical))
    return truth("made-up", known, FAULT_MODELS["stuck_at"], estimand)


def _meta(path: str | Path) -> dict:
    with np.load(path) as file:
        return json.loads(str(file["meta"]))


def hints_of(path: str | Path, weights: str, dataset: str) -> Hints:
    """The hints of a truth's words, from the weights and images that it is of.

    Raises:
        InputError: other weights, or other images.
    """
    meta = _meta(path)
    with np.load(path) as file:
        words = [file[f"words_{number}"] for number in range(len(meta["sites"]))]
    data_dir, pixel_max = flags.FLAGS.data_dir, meta.get("pixel_max")
    images = sets.load(dataset, data_dir, train=False, pixel_max=pixel_max)
    net = nets.build(meta["net"], images.x_test.shape[1:])
    if meta.get("mean"):  # those made earlier are of the net's usual ones
        net = nets.normalising(net, meta["mean"], meta["std"])
    network = target.load_network(net, weights)
    by_name = {site.name: site for site in network.sites}
    sites = tuple(by_name[site["name"]] for site in meta["sites"])
    for site, own in zip(sites, words, strict=True):
        if not np.array_equal(bits.to_bits(network.values(site)).ravel(), own):
            raise InputError(f"truth {path} is of other values of {site.name} than {weights}")
    x, y = target.workload(net, images, meta["images"])
    engine = Engine(network, x, y, sites)
    if records.hash_arrays([("images", engine.images)]) != meta["images_hash"]:
        raise InputError(f"truth {path} is of other images than the first {len(x)} of {dataset}")
    certified = [
        np.stack([engine.certified(number, bit) for bit in range(site.width)], axis=1)
        for number, site in enumerate(sites)
    ]
    return Hints(scores.sensitivity(network, x, sites, engine.by), certified)


def names(found: Truth) -> list[str]:
    """The methods that the truth lets compare."""
    proven = "clopper_pearson" if found.estimand == CRITICAL else "bernstein"
    fixed = [f"{name}, {kind}" for name in FIXED for kind in ("normal", proven)]
    more = ["iterative", "adaptive by cell", "adaptive by |dw|"]
    hinted = ["adaptive by score", "adaptive certified"] if found.hints else []
    return [*fixed, *more, *hinted]


def split_of(found: Truth, method: str) -> Split:
    """What an adaptive method splits by."""
    space, leaves, hints = found.space, found.leaves, found.hints
    if method == "adaptive by cell":
        return strata.by_cell(space, leaves)
    if method == "adaptive by |dw|":
        return strata.by_distance(space, leaves)
    by_score = strata.by_score(leaves, hints.sensitivity)
    if method == "adaptive by score":
        return by_score
    return strata.without(by_score, lambda site, bit: hints.certified[site][:, bit])


def campaigns(found: Truth, case: Case) -> Callable[[int], Result]:
    """The campaigns of a method, by seed."""
    request, levels = Request(case.margin, case.confidence), (case.level,)
    name, _, kind = case.method.partition(", ")
    if name in FIXED and found.estimand != CRITICAL:
        method = sfi.fixed(name, kind)
    elif name in FIXED:
        parts = SAMPLERS[name](found.space, found.leaves, request)
        return partial(fixed, found, case, request, parts)
    elif case.method == "iterative":
        method = sfi.iterative()
    else:
        parts = strata.strata(found.space, found.leaves, split_of(found, case.method))
        method = adaptive.over(lambda space, leaves: parts)
    of = {"oracle": found.outcome.__getitem__, "estimand": found.estimand}
    asked = found.space, found.leaves, request, levels
    return lambda seed: method(*asked, seed=seed, **of)


def fixed(
    found: Truth, case: Case, request: Request, parts: Sequence[Stratum], seed: int
) -> Result:
    """`sfi.fixed`, of which only the counts of cells matter: those are drawn, not the faults."""
    _, kind = case.method.split(", ")
    asked = methods.units(found.space, (case.level,))
    population, critical = found.space.cells, found.cells
    counts = np.zeros((2, *population.shape), np.int64)
    rng = np.random.default_rng(seed)
    for part in parts:
        where = tuple(slice(None) if at is None else [at] for at in (part.site, part.bit))
        where = np.ix_(*(np.arange(n)[w] for n, w in zip(population.shape, where, strict=True)))
        own = population[where]
        drawn = rng.multivariate_hypergeometric(own.ravel(), part.injections, method="marginals")
        counts[0][where] = drawn.reshape(own.shape)
        hits = critical[where]
        counts[1][where] = rng.hypergeometric(hits, own - hits, counts[0][where])
    units = sfi.intervals(found.space, parts, counts, request, asked, kind)
    return Result(units, (int(counts[0].sum()),))


def shares(found: Truth, level: str) -> np.ndarray:
    """The true mean outcome of each unit of a level."""
    total, population = found.cells, found.space.cells
    units = methods.units(found.space, (level,))
    where = [tuple(slice(None) if a is None else a for a in (u.site, u.bit)) for u in units]
    return np.array([total[w].sum() / population[w].sum() for w in where])


def row(found: Truth, case: Case, repeats: int) -> dict:
    """Injections, margins and coverage of repeated campaigns.

    `margin` is the mean over campaigns and units, `widest` that of each campaign's worst unit;
    `coverage` counts units of campaigns, `worst_unit` the unit least often covered.
    """
    truths = shares(found, case.level)
    results = list(map(campaigns(found, case), range(repeats)))
    low, high = (np.array([[getattr(u, x) for u in r.units] for r in results]) for x in ENDS)
    held = (low <= truths + TINY) & (truths - TINY <= high)
    injections = [r.injections for r in results]
    return {
        "method": case.method,
        "level": case.level,
        "asked": case.margin,
        "confidence": case.confidence,
        "injections": float(np.mean(injections)),
        "injections_95": float(np.quantile(injections, 0.95)),
        "rounds": float(np.mean([len(r.rounds) for r in results])),
        "margin": float((high - low).mean() / 2),
        "widest": float((high - low).max(axis=1).mean() / 2),
        "coverage": float(held.mean()),
        "coverage_low": float(estimates.clopper_pearson(held.sum(), held.size, 0.95)[0]),
        "worst_unit": float(held.mean(axis=0).min()),
        "repeats": repeats,
        "units": len(truths),
    }


ENDS, TINY = ("low", "high"), 1e-12


def identity(found: Truth) -> dict:
    """What rows say of their truth."""
    about = {"truth": found.name, "faults": found.space.size}
    if found.estimand == CRITICAL:
        return about | {"critical": int(found.outcome.sum())}
    return about | {"estimate": found.estimand.name, "mean": float(found.outcome.mean())}


def known_rows(path: Path, found: Truth) -> list[dict]:
    """The rows of earlier runs on this truth.

    Raises:
        InputError: the file can't be read, or holds rows of another truth.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
        own = all(identity(found).items() <= row.items() for row in rows)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"rows {path} cannot be read: {error}; name another --out") from None
    if not own:
        raise InputError(
            f"{path} holds rows of another truth than {found.name}; name another --out"
        )
    return rows


def _case(row: Mapping) -> Case:
    return Case(row["method"], row["level"], row["asked"], row["confidence"])


def write(out: Path, found: Truth, rows: list[dict]) -> None:
    """The rows and their table; an earlier file stays whole until the new one is."""
    part = out / f"{ROWS}.part"
    part.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(part, out / ROWS)
    (out / "samplers.md").write_text(table(found, rows))


def compare(found: Truth, cases: list[Case], repeats: int, jobs: int) -> Iterator[dict]:
    """The row of each case, in order."""
    if jobs == 1:
        yield from (row(found, case, repeats) for case in cases)
        return
    # Every process has a core: threads of its linear algebra would only be in the way.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Not forked: JAX has threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _hold, (found,)) as pool:
        yield from pool.map(partial(_held_row, repeats=repeats), cases)


_HELD: list[Truth] = []


def _hold(found: Truth) -> None:
    _HELD[:] = [found]


def _held_row(case: Case, repeats: int) -> dict:
    return row(_HELD[0], case, repeats)


def table(found: Truth, rows: list[dict]) -> str:
    """The comparison as markdown."""
    size, share = found.space.size, found.outcome.mean()
    what = "critical" if found.estimand == CRITICAL else WORDS[found.estimand.name]
    lines = [
        f"{found.name}: {size:,} stuck-at faults, {share:.3%} {what}.",
        "",
        "| method | units | e | confidence | injections | margin | widest | coverage | its low "
        "| campaigns |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        lines.append(
            f"| {r['method']} | {r['level']} | {100 * r['asked']:.3g}% | {r['confidence']:.0%} "
            f"| {r['injections']:,.0f} | {r['margin']:.3%} | {r['widest']:.3%} "
            f"| {r['coverage']:.1%} | {r['coverage_low']:.1%} | {r['repeats']} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    """A figure: injections against the margin achieved, a panel for each level and truth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    confidence = max(r["confidence"] for r in rows)
    levels, truths = (list(dict.fromkeys(r[key] for r in rows)) for key in ("level", "truth"))
    colours = {m: f"C{k}" for k, m in enumerate(dict.fromkeys(r["method"] for r in rows))}
    size = (3.4 * len(truths), 3.1 * len(levels))
    figure, axes = plt.subplots(len(levels), len(truths), figsize=size, squeeze=False)
    for (level, name), axis in zip(itertools.product(levels, truths), axes.flat, strict=True):
        asked = {"level": level, "truth": name, "confidence": confidence}
        own = [r for r in rows if asked.items() <= r.items()]
        for method in dict.fromkeys(r["method"] for r in own):
            points = sorted((r["widest"], r["injections"]) for r in own if r["method"] == method)
            style = {"color": colours[method], "label": method, "markersize": 4}
            axis.loglog(*zip(*points, strict=True), _line(method), **style)
        axis.set_title(f"{name}: every {level}" if level != "network" else name, fontsize=9)
        axis.grid(alpha=0.3, which="both")
    for axis in axes[-1]:
        axis.set_xlabel(f"half the widest unit's interval, {confidence:.0%}")
    for axis in axes[:, 0]:
        axis.set_ylabel("injections")
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})
    plt.close(figure)


def _line(method: str) -> str:
    return "o-" if method.startswith("adaptive") else "s--"


def main() -> None:
    """Compare the methods and write the results."""
    args = flags.FLAGS
    out, known = Path(args.out), _truth()
    rows = {_case(row): row for row in known_rows(out / ROWS, known)}
    found = _hinted(known)
    chosen = _chosen(args.methods, names(found))
    margins, confidences = (_shares(name) for name in ("margins", "confidences"))
    methods.units(found.space, args.levels)
    repeats = SMOKE["repeats"] if args.smoke else args.repeats
    cases = [
        Case(method, level, margin, confidence)
        for confidence in confidences
        for level in args.levels
        for margin in margins
        for method in chosen
    ]
    todo = [case for case in cases if rows.get(case, {}).get("repeats", 0) < repeats]
    out.mkdir(parents=True, exist_ok=True)
    for case, new in zip(todo, compare(found, todo, repeats, args.jobs), strict=True):
        rows[case] = {**identity(found), **new}
        # Now, not at the end: hours of rows outlive a kill.
        write(out, found, list(rows.values()))
        print(
            f"{case.method}, {case.level}, e = {100 * case.margin:.3g}%, {case.confidence:.0%}: "
            f"{new['injections']:,.0f} injections, coverage {new['coverage']:.1%}",
            flush=True,
        )
    draw(list(rows.values()), out / "samplers.png")
    print(f"{out}: {ROWS}, samplers.md, samplers.png")


def _truth() -> Truth:
    args = flags.FLAGS
    if args.smoke:
        return made_up(estimate=args.estimate)
    if args.truth is None:
        raise InputError("no --truth given; name a .npz file of experiments.truth, or --smoke")
    if (args.weights is None) != (args.dataset is None):
        raise InputError("the predictor needs both --weights and --dataset; give both or none")
    return read(args.truth, estimate=args.estimate)


def _hinted(known: Truth) -> Truth:
    """The truth with the hints of the network that the flags name, if they name one."""
    args = flags.FLAGS
    if args.smoke or args.weights is None:
        return known
    return read(args.truth, _kept_hints(Path(args.out) / HINTS), args.estimate)


def _kept_hints(path: Path) -> Hints:
    """`hints_of` what the flags name, kept for the next run: they take minutes."""
    args = flags.FLAGS
    meta = _meta(args.truth)
    of = [meta["weights_hash"], meta["images_hash"]]
    if path.exists():
        with np.load(path) as file:
            if file["of"].tolist() == of:
                sites = range((len(file.files) - 1) // 2)
                return Hints(*([file[f"{name}_{k}"] for k in sites] for name in Hints._fields))
    hints = hints_of(args.truth, args.weights, args.dataset)
    arrays = {
        f"{name}_{k}": array
        for name, arrays in zip(Hints._fields, hints, strict=True)
        for k, array in enumerate(arrays)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez_compressed(file, of=np.array(of), **arrays)
    os.replace(part, path)
    return hints


def _chosen(asked: list[str] | None, known: list[str]) -> list[str]:
    """The methods whose names start with one of those asked for."""
    if not asked:
        return known
    for name in asked:
        if not any(method.startswith(name) for method in known):
            raise InputError(f"method {name!r} is unknown; choose from {'; '.join(known)}")
    return [method for method in known if method.startswith(tuple(asked))]


def _shares(name: str) -> list[float]:
    texts = SMOKE[name] if flags.FLAGS.smoke else flags.FLAGS[name].value
    try:
        found = [float(text) for text in texts]
    except ValueError:
        found = []
    if not found or not all(0 < x < 1 for x in found):
        raise InputError(f"{name} {','.join(texts)} must be numbers between 0 and 1, as 0.01,0.005")
    return found
