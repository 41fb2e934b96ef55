"""What a campaign costs: by site and stage, and as faults and images grow."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np

from experiments import machine
from jfi import bits
from jfi.campaign import records
from jfi.engine.engine import MEMORY, Engine
from jfi.engine.golden import golden_run
from jfi.engine.prune import Pruner
from jfi.engine.radii import GROUP
from jfi.faults import Faults, take
from jfi.hardware.chunks import chunks, filled_up

REPEATS = 3
LONG = 3.0  # seconds after which a piece of work is not repeated

SITE_SECONDS = 1.0  # of one measurement at one site
CHUNKS = 8  # that a suffix is timed on
BLOCK = 64  # images that pieces are timed on
FLIPPED = 22  # the bit that is flipped for it: the mantissa's highest in float32
PROFILED = 2048  # faults of the sample that is run and recorded as a whole

FAULTS = (1_000, 10_000, 100_000)  # at the fewest images
IMAGES = (64, 128, 256, 512, 932)  # at the fewest faults
PATIENCE = 20  # seconds: after a row that took longer, no larger one is tried
WARM = 2  # faults a site run before, to compile: their flips get through to the logits


def at_every_site(runner: Engine, n: int) -> Faults:
    """n flips in each site, of words spread over it, from the top bit down."""
    site, k = np.divmod(np.arange(len(runner.sites) * n), n)
    words, widths = np.array([(site.words, site.width) for site in runner.sites]).T
    return Faults(
        site=site.astype(np.int32),
        index=k * words[site] // n,
        bit=(widths[site] - 1 - k % widths[site]).astype(np.int16),
        polarity=np.full(site.size, bits.FLIP, np.int8),
    )


def median_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of a piece of work; of a long one, its only time."""
    spent: list[float] = []
    while len(spent) < repeats and sum(spent) < LONG:
        started = time.perf_counter()
        work()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


# --- Profile


def profile(runner: Engine, faults: Faults, measure: str) -> dict:
    """Where the time of a campaign goes.

    By site, fitted to whole runs: `load_ms`, what taking up the site costs, and `ms_per_1000`
    verdicts from then on; `certified`, the share of verdicts by certificate; `share`, of the site
    in an exhaustive campaign. Beside them the pieces that loading and running are made of, as in
    `_full_pieces` and `_pruned_pieces`.

    `stages`: seconds of the golden run, of a sample of `faults` and of its record.
    """
    runner.run(at_every_site(runner, WARM), measure)
    parts = [_enough(runner, faults, number, measure) for number in range(len(runner.sites))]
    # Sites take turns, so that none finds its golden values still loaded.
    long = [_spent(runner, part, measure) for part in parts]
    short = [_spent(runner, _quarter(part), measure) for part in parts]
    rows = [_site(runner, *of, measure) for of in zip(parts, long, short, strict=True)]
    whole = sum(row["exhaustive_s"] for row in rows)
    sample = take(faults, np.arange(PROFILED))
    stages = _stages(runner, sample, measure)
    if measure == "full":
        pieces = _full_pieces(runner)
    else:
        network = runner.network
        leaves = {n: network.positions[site.name] for n, site in enumerate(runner.sites)}
        pruner = Pruner(
            network.program,
            network.leaves,
            leaves,
            runner.images,
            runner.by,
            network.scores,
            runner.hardware,
            MEMORY,
        )
        pieces = _pruned_pieces(runner, pruner)
        stages["golden values and bound maps"] = median_seconds(_maps(runner, pruner))
    rows = [
        row | {"share": row["exhaustive_s"] / whole} | piece
        for row, piece in zip(rows, pieces, strict=True)
    ]
    return {"measure": measure, "rows": rows, "stages": stages}


def _spent(runner: Engine, faults: Faults, measure: str) -> float:
    return median_seconds(lambda: runner.run(faults, measure), 1)


def _enough(runner: Engine, faults: Faults, site: int, measure: str) -> Faults:
    """Faults of a site that take long enough to be timed; over again where there are too few."""
    own, n = np.flatnonzero(faults.site == site), 16
    while True:
        part = take(faults, np.resize(own, n))
        if _spent(runner, part, measure) > SITE_SECONDS:
            return part
        n *= 2


def _quarter(faults: Faults) -> Faults:
    return take(faults, np.arange(faults.site.size // 4))


def _site(runner: Engine, part: Faults, long: float, short: float, measure: str) -> dict:
    """A row of the profile, from the times of all of `part` and of a quarter of it."""
    site, n, images = runner.sites[part.site[0]], part.site.size, len(runner.images)
    marginal = max(long - short, 0) / (n - n // 4) / images
    load = max(long - marginal * n * images, 0)
    certified = runner.run(part, measure).certified.mean() / images
    return {
        "site": site.name,
        "words": site.words,
        "load_ms": load * 1e3,
        "ms_per_1000": marginal * 1e6,
        "certified": float(certified),
        "exhaustive_s": load + marginal * 2 * site.width * site.words * images,
    }


def _full_pieces(runner: Engine) -> Iterator[dict]:
    """By site: pairs of a chunk, operations left a pair, and the time of the prefix for 1,000
    images and of the suffix for 1,000 pairs that are run."""
    images, labels = runner.images[:BLOCK], runner.labels[:BLOCK]
    for number, site in enumerate(runner.sites):
        program = runner.program(number)
        load = partial(program.load, runner.network.leaves, images, labels)
        pairs = CHUNKS * program.chunk
        index = np.random.default_rng(number).integers(0, site.words, pairs)
        at = np.stack(np.unravel_index(index, site.shape), axis=1).astype(np.int32)
        value = bits.faulty(runner.network.values(site).ravel()[index], FLIPPED, bits.FLIP)
        image = np.arange(pairs) % len(images)
        run = partial(program.run, load(), at, value, image)
        suffix = median_seconds(run) / pairs
        yield {
            "chunk": program.chunk,
            "mflop": program.parts.flops / 1e6,
            "prefix_ms": median_seconds(load) / len(images) * 1e6,
            "suffix_ms": suffix * 1e6,
            "gflop_per_s": program.parts.flops / suffix / 1e9,
        }


def _pruned_pieces(runner: Engine, pruner: Pruner) -> Iterator[dict]:
    """By site: the first cut after it, pairs of a chunk and operations a pair up to there, and the
    time of certified radii for 1,000 images."""
    images = runner.images[:GROUP]
    for start in pruner.starts.values():
        start.radii.codes(images)  # compiles
        spent = median_seconds(partial(start.radii.codes, images)) / GROUP
        yield {
            "cut": start.cut,
            "chunk": start.chunk,
            "mflop": start.parts.flops / 1e6,
            "radii_ms": spent * 1e6,
        }


def _stages(runner: Engine, faults: Faults, measure: str) -> dict[str, float]:
    """Seconds of a sample of faults by stage; what is timed alone is also part of the run."""
    outcomes, ids = runner.run(faults, measure), np.arange(faults.site.size)
    stages: dict[str, Callable[[], object]] = {
        "golden run": lambda: golden_run(runner.network, runner.images),
        "run": lambda: runner.run(faults, measure),
        "of it identities": lambda: runner.identity(faults),
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / records.SHARDS).mkdir()
        stages["record"] = lambda: records.write_shard(folder, 0, ids, faults, outcomes)
        spent = {name: median_seconds(stage) for name, stage in stages.items()}
    return {"faults": faults.site.size, "images": len(runner.images), **spent}


def _maps(runner: Engine, pruner: Pruner) -> Callable[[], object]:
    """Making golden values of cuts and sites and bound maps of all images, block by block."""

    def load(part: slice):
        rows = filled_up(np.arange(part.start, part.stop), min(BLOCK, len(runner.images)))
        pixels, logits, labels = (
            x[rows] for x in (runner.images, runner.golden.logits, runner.labels)
        )
        block = pruner.load(pixels, logits, labels)
        jax.block_until_ready([block.cuts, block.golden])

    parts = list(chunks(len(runner.images), BLOCK))
    load(parts[0])  # compiles
    return lambda: [load(part) for part in parts]


# --- Growth


def growth(row: Callable[[int, int], dict], images: int) -> list[dict]:
    """Rows of `growth_row` over faults, then over images.

    Args:
      row: (faults, images) -> the row, measured in a process of its own: what a process held once
        would count for all later ones.
      images: how many there are.
    """
    fewest, *more = sorted({min(size, images) for size in IMAGES})
    over_faults = _until_slow(row, [(n, fewest) for n in FAULTS])
    return over_faults + _until_slow(row, [(FAULTS[0], size) for size in more])


def _until_slow(row: Callable[[int, int], dict], cells: Iterable[tuple[int, int]]) -> list[dict]:
    rows = []
    for cell in cells:
        rows.append(row(*cell))
        if rows[-1]["seconds"] > PATIENCE:
            break
    return rows


def growth_row(runner: Engine, faults: Faults, measure: str) -> dict:
    """Time of running `faults`, compiling left out, and peak host memory of this process."""
    runner.run(at_every_site(runner, WARM), measure)
    n, images = faults.site.size, len(runner.images)
    spent = median_seconds(lambda: runner.run(faults, measure))
    return {
        "faults": n,
        "images": images,
        "seconds": spent,
        "us_per_verdict": spent / (n * images) * 1e6,
        "peak_mib": machine.peak_mib(),
    }
