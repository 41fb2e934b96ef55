"""A campaign: plan which faults to inject, run them, record, estimate, verify.

The data's way: network and workload -> `plan` -> `run` -> work directory (`jfi.campaign.records`)
with a summary of estimates. A campaign killed at any moment goes on from its last whole shard.
"""

import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jfi import outcomes
from jfi.campaign import records
from jfi.engine.engine import Engine
from jfi.engine.verify import Verification, verify
from jfi.errors import InputError, VerificationError
from jfi.faults import FAULT_MODELS, Faults, FaultSpace, check_faults, take
from jfi.hardware import compiling
from jfi.hardware.chunks import chunks
from jfi.hardware.devices import host
from jfi.networks import program, sites, taps
from jfi.networks.sites import Network, golden_words
from jfi.sampling import bernstein, estimands, estimates
from jfi.sampling.bernstein import Sums
from jfi.sampling.estimands import CRITICAL, FAULTS, Estimand
from jfi.sampling.estimates import Estimate
from jfi.sampling.sampling import SAMPLERS, Request, Sample, Stratum, check, strata_cells
from jfi.workload.workload import Selection

# Pairs of a shard: at most so much work is lost to a kill.
SHARD_PAIRS = {"full": 1 << 19, "critical": 1 << 22, "detect": 1 << 22}
SHARD_FAULTS = (256, 1 << 16)  # fewest and most faults of a shard
# Where bounds of all images don't fit, a shard makes them anew: so many faults pay for them.
PAYING = 8192
# Counts of pairs that a measure tells.
TOLD = {
    "detect": (),
    "critical": ("critical", "non_finite", "correct"),
    "full": (*outcomes.CLASSES, "non_critical", "critical", "correct"),
}
COUNTED = 1 << 20  # faults whose sites are counted at a time
AUDIT = 2000  # pairs of a screened campaign that are run again at least
FORMAT = 2  # of manifest and shards
LISTED = "listed"  # the name under which an explicit fault list is run
PACKAGES = ("jfi", "jax", "jaxlib", "numpy", "scipy", "pyarrow")


class Plan(NamedTuple):
    """What to inject.

    strata: how many faults are drawn from which part of the space.
    population: int64 [S, W], faults each (site, bit) stands for.
    listed: ids of an explicit fault list, in its order; None where faults are drawn.
    estimate: what is estimated, a name of `jfi.sampling.estimands.WORDS`.
    """

    space: FaultSpace
    request: Request
    strata: tuple[Stratum, ...]
    population: np.ndarray
    seed: int = 0
    listed: np.ndarray | None = None
    estimate: str = FAULTS

    @property
    def injections(self) -> int:
        """Faults to inject in all."""
        return sum(stratum.injections for stratum in self.strata)


def plan(
    network: Network,
    sampler: str = "data_aware",
    *,
    sites_pattern: str | None = None,
    fault_model: str = "stuck_at",
    request: Request | None = None,
    seed: int = 0,
    estimate: str = FAULTS,
) -> Plan:
    """The sample that a named sampler takes of a network's faults; draws nothing yet.

    Args:
      sites_pattern: regular expression of the sites (`sites.select`).
      fault_model: a name of `FAULT_MODELS`.
      estimate: what margins are of: the share of critical `faults`, of critical `pairs`, or the
        mean `accuracy` under fault. Sizes are those of p = 0.5, safe for any of them.

    Raises:
      InputError: an unknown sampler, fault model or estimate, a pattern that matches nothing, or a
        request out of range.
    """
    check_name("sampler", sampler, SAMPLERS)
    check_name("fault model", fault_model, FAULT_MODELS)
    check_name("estimate", estimate, estimands.WORDS)
    request = check(request or Request())
    check_seed(seed)
    chosen = sites.select(network, sites_pattern, fault_model)
    space = FaultSpace(chosen, FAULT_MODELS[fault_model])
    # Values are looked up only by samplers that choose by them: run-time values have none.
    strata = SAMPLERS[sampler](space, (network.values(site) for site in chosen), request)
    if not sum(stratum.injections for stratum in strata):
        raise InputError(
            f"error margin {request.error_margin} asks for no injection at all; make it smaller"
        )
    return Plan(space, request, strata, space.cells, seed, estimate=estimate)


def plan_listed(
    network: Network, faults: Faults, request: Request | None = None, estimate: str = FAULTS
) -> Plan:
    """A plan that injects exactly `faults`; their `site` is a position in `sites.listable`.

    The list is its own population: its shares are exact for it and say nothing beyond.

    Raises:
      InputError: no fault, or one that is none of the sites' (`jfi.faults.check_faults`); an
        unknown estimate.
    """
    check_name("estimate", estimate, estimands.WORDS)
    polarities = sorted({p for model in FAULT_MODELS.values() for p in model})
    space = FaultSpace(sites.listable(network), polarities)
    faults = check_faults(faults, space.sites)
    if not faults.site.size:
        raise InputError("faults are none; list at least one")
    ids = space.encode(faults)
    population = np.zeros_like(space.cells)
    np.add.at(population, (faults.site, faults.bit), 1)
    strata = (Stratum(None, None, ids.size, ids.size, 0.5),)
    request = check(request or Request())
    return Plan(space, request, strata, population, listed=ids, estimate=estimate)


def drawn(plan: Plan) -> Callable[[int, int], np.ndarray]:
    """`ids(lo, hi)` -> int64 [hi - lo], the planned faults number lo to hi."""
    if plan.listed is not None:
        return lambda lo, hi: plan.listed[lo:hi]
    return Sample(plan.space, plan.strata, plan.seed).ids


class Progress(NamedTuple):
    """Where a campaign stands, reported after every shard."""

    done: int  # faults
    total: int | None  # None where a method decides as it goes
    resumed: int  # of `done`, those found in the work directory
    estimate: Estimate | None  # of the network, so far; None where a method gives it at its end
    estimand: Estimand = CRITICAL  # what it is of


def identity(plan: Plan, engine: Engine, measure: str, sampler: str | None = None, **options):
    """All that decides the outcomes of a campaign, and which shard they are in; a flat dict.

    Golden answers stand for golden outputs, whose last bits differ between machines.

    Args:
      sampler, options: of a method that chooses in rounds, its name and what else it is given.

    Raises:
      InputError: the engine has other sites than the plan: faults name them by position.
    """
    network, space = engine.network, plan.space
    if engine.sites != space.sites:
        raise InputError(
            f"the engine has {_shown(engine.sites)} and the plan {_shown(space.sites)}; make it "
            "with the sites plan.space.sites"
        )
    arrays = {
        "leaves": enumerate(map(host, network.leaves)),
        "golden_answers": [("top1", engine.answers.astype(np.int64))],
        "population": [("population", plan.population)],
        "listed": [] if plan.listed is None else [("listed", plan.listed)],
        "constants": enumerate(map(host, network.program.consts.values())),
    }
    if engine.is_ordered:  # where `detect` ends for a fault depends on it
        arrays["order"] = [("order", engine.order)]
    return {
        "format": FORMAT,
        "measure": measure,
        "criterion": engine.criterion.text,
        "screen": engine.screen,
        "rounding": compiling.ROUNDING,
        "shard_faults": shard_size(len(engine.images), measure),
        "sampler": sampler,
        # Records made before there were others hold none.
        **({} if plan.estimate == FAULTS else {"estimate": plan.estimate}),
        **options,
        "strata": records.hash_json({"strata": plan.strata}),
        "seed": plan.seed,
        "request": list(plan.request),
        "sites": [site.name for site in space.sites],
        "polarities": list(space.polarities),
        "bits": list(space.bits),
        "program": records.hash_json({"program": program.text(network.program)}),
        **{
            name: records.hash_arrays((str(key), value) for key, value in named)
            for name, named in arrays.items()
        },
    }


def _forms(space: FaultSpace, network: Network) -> list[dict[str, Any]]:
    """What a site's words are; only those of parameters are stored, and have golden words."""
    return [
        {
            "dtype": np.dtype(site.dtype).name,
            "shape": list(site.shape),
            "stored": site.name in network.positions,
        }
        for site in space.sites
    ]


def _hashes(engine: Engine) -> dict[str, str]:
    network = engine.network
    return {
        "parameters": records.hash_arrays(
            (site.name, network.values(site)) for site in network.parameters
        ),
        "images": records.hash_arrays([("images", engine.images)]),
        "labels": records.hash_arrays([("labels", engine.labels)]),
    }


def manifest(
    plan: Plan,
    engine: Engine,
    config: Mapping[str, Any],
    identity: Mapping[str, Any],
    workload: Selection | None = None,
) -> dict[str, Any]:
    """Everything needed to repeat a campaign.

    Args:
      config: whatever the caller was asked for.
      workload: how the images were chosen.

    Raises:
      InputError: the workload is not of as many images as the engine has.
    """
    if workload is not None and workload.indices.size != len(engine.images):
        raise InputError(
            f"workload has {workload.indices.size} images; the engine has {len(engine.images)}"
        )
    device = jax.devices()[0]
    return {
        "config": dict(config),
        "identity": dict(identity),
        "hashes": _hashes(engine),
        "population": int(plan.population.sum()),
        "injections": plan.injections,
        "sites": [site.name for site in plan.space.sites],
        "forms": _forms(plan.space, engine.network),
        "left_out": engine.network.left_out,
        "beside": [g._asdict() for g in sites.beside(engine.network, plan.space.sites)],
        "strata": [stratum._asdict() for stratum in plan.strata],
        "images": len(engine.images),
        "golden_accuracy": golden_accuracy(engine),
        "workload": workload,
        "quantile": plan.request.quantile,
        "precision": "float32 products in full (no TF32)",
        "screen": engine.screen,
        "device": {"platform": device.platform, "kind": device.device_kind},
        "versions": {"python": platform.python_version(), **_versions()},
    }


def run(
    plan: Plan,
    engine: Engine,
    workdir: str | Path,
    config: Mapping[str, Any],
    *,
    measure: str = "full",
    verify_pairs: int = 0,
    keep_bits: bool = False,
    workload: Selection | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Run a plan, or go on with it, in a work directory; returns the summary it writes there.

    Args:
      config: the flags of the campaign; one that differs from the directory's is refused.
      measure: what is asked of every fault (`Engine.run`).
      verify_pairs: pairs to run again naively at the end (`jfi.engine.verify`); where the engine
        screens, at least `AUDIT`.
      keep_bits: record which images each fault is critical for, and masked if told.
      workload: how the engine's images were chosen, for the record.

    Returns:
      `population`, `injections`, `estimate` (of what), `estimates` (one object a unit), `verify`,
      `decided` (pairs by identity, certificate, inference, or never asked for as the fault was
      known critical), `pairs` (of the sample, by outcome), `subnormal` (faults that make a word
      subnormal, which XLA's code for CPUs takes for zero) and `run` (seconds and verdicts of this
      call).

    Raises:
      InputError: the work directory can't be used, or holds another campaign; a measure that is
        unknown or can't be screened, or does not tell the plan's estimate; an engine of other sites
        than the plan, or without labels where the estimate is accuracy.
      VerificationError: a naive run contradicts a verdict; everything is on record by then.
      OSError: a write failed; what was recorded before stays.
    """
    engine.check_measure(measure)
    check_estimate(plan.estimate, measure, engine)
    own = identity(plan, engine, measure)
    path = records.open_workdir(workdir, manifest(plan, engine, config, own, workload))
    made_by = records.hash_json(own)
    ids, size = drawn(plan), shard_size(len(engine.images), measure)
    records.check_count(path, -(-plan.injections // size))
    tally = Tally(plan, engine, measure)
    engine.expect(_by_site(plan, ids))
    started, ran, resumed = time.perf_counter(), 0, 0
    # Shards follow the order of layers; in random order the estimate so far speaks for all.
    for number in np.random.default_rng(plan.seed).permutation(-(-plan.injections // size)):
        lo, hi = number * size, min((number + 1) * size, plan.injections)
        if records.has_shard(path, number):
            resumed += hi - lo
        else:
            run_shard(path, number, ids(lo, hi), plan.space, engine, measure, made_by, keep_bits)
            ran += hi - lo
        tally.add(records.recorded(path, number, ids(lo, hi), tally.columns, made_by))
        so_far = tally.estimate(("network",))[0]
        progress(Progress(ran + resumed, plan.injections, resumed, so_far, tally.estimand))
    seconds = time.perf_counter() - started
    ends = np.minimum(np.arange(size, plan.injections + size, size), plan.injections)
    checked = verified(plan, engine, path, ids, ends, verify_pairs, measure, made_by)
    found = summary(tally, tally.estimate(), checked, ran, seconds)
    return concluded(path, found, engine)


def _by_site(plan: Plan, ids: Callable[[int, int], np.ndarray]) -> Counter[int]:
    """How many faults of a plan are of each site."""
    found = np.zeros(len(plan.space.sites), np.int64)
    for part in chunks(plan.injections, COUNTED):
        sites = plan.space.decode(ids(part.start, part.stop)).site
        found += np.bincount(sites, minlength=found.size)
    return Counter(dict(enumerate(found.tolist())))


def concluded(path: Path, found: dict[str, Any], engine: Engine) -> dict[str, Any]:
    """Write a summary and return it.

    Raises:
      VerificationError: its verification found verdicts that are wrong. Where the engine screens
        they are expected, and bounded.
    """
    found = records.plain(found)  # of what JSON takes
    records.write_summary(path, found)
    if not engine.screen:
        check_verified(found)
    return found


def check_verified(summary: dict[str, Any]) -> None:
    """Raises VerificationError where the verification of a summary found a wrong verdict."""
    if summary["verify"]["disagreements"]:
        raise VerificationError(f"verification failed: {summary['verify']['worst']}", summary)


def summary(
    tally: "Tally", found: Sequence[Estimate], checked: Verification, ran: int, seconds: float
) -> dict[str, Any]:
    """What `run` returns, of a campaign that injected `ran` faults in this call."""
    return {
        "population": int(tally.plan.population.sum()),
        "injections": int(tally.injections.sum()),
        "images": tally.images,
        "estimate": tally.estimand.name,
        "estimates": [estimate._asdict() for estimate in found],
        "verify": {**checked._asdict(), "bound": checked.bound},
        "decided": tally.decided,
        "pairs": tally.pairs,
        "subnormal": tally.subnormal,
        "run": {
            "faults": ran,
            "seconds": seconds,
            "verdicts_per_second": ran * tally.images / seconds,
        },
    }


def run_shard(path, number, ids, space, engine, measure, identity, keep_bits=False) -> None:
    """Run the faults `ids` and record them as shard `number` of a campaign of this identity."""
    faults = space.decode(ids)
    done = engine.run(faults, measure, keep_bits=keep_bits)
    decided = np.where(engine.identity(faults), records.IDENTITY, records.INFERENCE)
    step = taps.steps_of(space.sites, faults)
    word = golden_words(engine.network, space.sites, faults)
    records.write_shard(path, number, ids, faults, done, decided, step, identity, word)


class Tally:
    """Counts over the shards read so far."""

    def __init__(self, plan: Plan, engine: Engine, measure: str):
        self.plan, self.engine, self.images = plan, engine, len(engine.images)
        told = TOLD[measure] if engine.tells_correct(measure) else set(TOLD[measure]) - {"correct"}
        self.classes = [name for name in TOLD[measure] if name in told]
        how = "decided", "inferred", "certified", "first_critical"
        self.columns = (*Faults._fields, *how, *self.classes)
        self.estimand = estimands.estimand(plan.estimate, self.images, golden_accuracy(engine))
        self.sums = np.zeros((3, bernstein.PARTS, *plan.population.shape), np.int64)
        self.injections = np.zeros_like(plan.population)
        self.critical = np.zeros_like(plan.population)
        self.pairs, self.subnormal = dict.fromkeys(self.classes, 0), 0
        self.decided = dict.fromkeys(("identity", "certificate", "inference", "not_asked"), 0)

    def add(self, shard: Mapping[str, np.ndarray]) -> None:
        cell = shard["site"], shard["bit"]
        np.add.at(self.injections, cell, 1)
        np.add.at(self.critical, cell, shard["first_critical"] >= 0)
        if self.estimand.name != FAULTS:
            part, count = bernstein.part(shard["id"], self.plan.seed), self.estimand.counts(shard)
            for sums, x in zip(self.sums, (1, count, count**2), strict=True):
                np.add.at(sums, (part, *cell), x)
        for name in self.classes:
            self.pairs[name] += int(shard[name].sum(dtype=np.int64))
        faults = Faults(*(shard[name] for name in Faults._fields))
        broken = shard["decided"] != records.IDENTITY
        self.subnormal += int((self.engine.subnormal(faults) & broken).sum())
        same = int((shard["decided"] == records.IDENTITY).sum()) * self.images
        inferred, certified = (int(shard[n].sum(dtype=np.int64)) for n in ("inferred", "certified"))
        rest = len(shard["site"]) * self.images - same - inferred - certified
        for name, pairs in zip(self.decided, (same, certified, inferred, rest), strict=True):
            self.decided[name] += pairs

    def estimate(self, levels=estimates.LEVELS) -> list[Estimate]:
        stratum, assumed = strata_cells(self.plan.population.shape, self.plan.strata)
        return estimates.estimate(
            [site.name for site in self.plan.space.sites],
            self.plan.population,
            self.injections,
            self.critical,
            stratum,
            confidence=self.plan.request.confidence,
            t=self.plan.request.t,
            assumed_p=assumed,
            levels=levels,
            outcomes=self.outcomes(),
        )

    def outcomes(self) -> Sums | None:
        """The sums of outcomes in [0, 1]; None of those that are critical or not."""
        if self.estimand.name == FAULTS:
            return None
        injections, total, squares = self.sums
        parts = self.estimand.parts
        return Sums(injections, total / parts, squares / parts**2, self.estimand.unchanged)


def check_estimate(name: str, measure: str, engine: Engine) -> None:
    """Raises InputError for an estimate that the measure does not tell of this engine."""
    estimands.check(name, measure, engine.is_labelled)
    if name == estimands.ACCURACY and not engine.tells_correct(measure):
        told = engine.by.correct is not None
        raise InputError(
            f"estimate 'accuracy': with criterion {engine.criterion.text} the measure {measure!r} "
            "does not tell which answers are right; "
            + ("take the measure 'full'" if told else "estimate 'pairs'")
        )


def golden_accuracy(engine: Engine) -> float | None:
    """The share of images that the golden network answers right; None without labels."""
    return engine.accuracy if engine.is_labelled else None


def verified(
    plan: Plan, engine: Engine, path: Path, ids, ends: np.ndarray, pairs: int, measure: str, made_by
) -> Verification:
    """The `Verification` of random pairs of a campaign: what the engine says, and the record.

    Faults that leave their word as it is are passed over; an engine that screens is audited.

    Args:
      ids: `ids(lo, hi)` of the faults that were injected.
      ends: int64 [N], how many they were when each shard was done.
    """
    pairs = max(pairs, AUDIT if engine.screen else 0) if ends.size else 0
    rng = np.random.default_rng(plan.seed)
    picked = np.sort(rng.integers(0, ends[-1] if ends.size else 1, 4 * pairs))
    faults = plan.space.decode(np.concatenate([ids(k, k + 1) for k in picked] or [ids(0, 0)]))
    inferred = np.sort(rng.permutation(np.flatnonzero(~engine.identity(faults)))[:pairs])
    image = rng.integers(0, len(engine.images), inferred.size)
    first = _first_critical(path, picked[inferred], ids, ends, made_by)
    return verify(
        engine, take(faults, inferred), image, measure, engine.told(first, image, measure)
    )


def _first_critical(path: Path, rows: np.ndarray, ids, ends: np.ndarray, made_by) -> np.ndarray:
    """int32 [P]: the first critical image on record, or -1, of the faults number `rows`."""
    first, shard = np.empty(rows.size, np.int32), np.searchsorted(ends, rows, side="right")
    for number in np.unique(shard):
        lo, own = ends[number - 1] if number else 0, shard == number
        there = records.recorded(path, number, ids(lo, ends[number]), ("first_critical",), made_by)
        first[own] = there["first_critical"][rows[own] - lo]
    return first


def shard_size(images: int, measure: str) -> int:
    """Faults of a shard."""
    paying = 0 if measure == "full" else PAYING
    return int(np.clip(max(SHARD_PAIRS[measure] // images, paying), *SHARD_FAULTS))


def _shown(found: Sequence[sites.Site]) -> str:
    return f"{len(found)} sites ({found[0].name}, ...)" if found else "no sites"


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def check_seed(seed: int) -> None:
    """Raises InputError where no sample can be drawn by this seed."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed {seed!r} is no seed; it must be an integer, 0 or more")


def check_name(what: str, name: str, known) -> None:
    """Raises InputError where `name` is not `known`."""
    if name not in known:
        raise InputError(f"{what} {name!r} is unknown; choose from {', '.join(known)}")
