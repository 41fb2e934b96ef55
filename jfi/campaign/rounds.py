"""A campaign of a method that chooses its faults in rounds (`jfi.sampling.methods`), run and
recorded.

The method asks for the outcomes of faults, the engine answers, and every answer is a shard on
record. What a method asks depends on its seed and on earlier answers alone: a campaign that was
killed asks the same again, and finds the answers on record.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jfi import bits
from jfi.campaign import campaign, records
from jfi.campaign.campaign import Plan, Progress, Tally
from jfi.engine.engine import Engine
from jfi.errors import InputError
from jfi.faults import FAULT_MODELS, FaultSpace
from jfi.hardware.chunks import chunks
from jfi.networks import scores, sites
from jfi.networks.sites import Network
from jfi.sampling import adaptive, estimands, methods, sfi, strata
from jfi.sampling.estimands import FAULTS
from jfi.sampling.estimates import Estimate
from jfi.sampling.methods import Interval, Method
from jfi.sampling.sampling import Request, check
from jfi.workload.workload import Selection

NEAREST = 512  # images that scores are taken on


def _by_score(engine: Engine, space: FaultSpace, leaves) -> strata.Split:
    # The largest of a move over a margin: it is found where margins are small.
    if engine.by.constraints is None:
        raise InputError(
            f"criterion {engine.criterion.text} has no constraints to take gradients of; choose "
            "the sampler adaptive_distance"
        )
    near = np.argsort(engine.golden.margin(engine.by), kind="stable")[:NEAREST]
    sensitivity = scores.sensitivity(engine.network, engine.images[near], space.sites, engine.by)
    return strata.by_score(leaves, sensitivity)


def _certified(engine: Engine, space: FaultSpace, leaves) -> strata.Split:
    # What changes a word is a flip of its bit, or dead or saturated, a fault of all of it.
    whole = space.polarities[0] in bits.WHOLE_WORD
    polarity = space.polarities[0] if whole else bits.FLIP
    harmless = partial(engine.certified, polarity=polarity)
    return strata.without(_by_score(engine, space, leaves), harmless)


# By name, what makes the method for the engine of a campaign.
METHODS: dict[str, Callable[[Engine], Method]] = {
    "adaptive": lambda engine: adaptive.adaptive(strata.by_cell),
    "adaptive_distance": lambda engine: adaptive.adaptive(strata.by_distance),
    "adaptive_score": lambda engine: adaptive.adaptive(partial(_by_score, engine)),
    "adaptive_certified": lambda engine: adaptive.adaptive(partial(_certified, engine)),
    "iterative": lambda engine: sfi.iterative("clopper_pearson"),
}


def open_plan(
    network: Network,
    *,
    sites_pattern: str | None = None,
    fault_model: str = "stuck_at",
    request: Request | None = None,
    levels: tuple[str, ...] = ("network",),
    seed: int = 0,
    estimate: str = FAULTS,
) -> Plan:
    """The faults that a method is to choose from, as `campaign.plan` has those of a sampler.

    Raises:
      InputError: an unknown fault model, level or estimate, a pattern that matches nothing, a
        request out of range, or a negative seed.
    """
    campaign.check_name("fault model", fault_model, FAULT_MODELS)
    campaign.check_name("estimate", estimate, estimands.WORDS)
    request = check(request or Request())
    campaign.check_seed(seed)
    chosen = sites.select(network, sites_pattern, fault_model)
    space = FaultSpace(chosen, FAULT_MODELS[fault_model])
    methods.units(space, levels)
    return Plan(space, request, (), space.cells, seed, estimate=estimate)


def run(
    name: str,
    space: FaultSpace,
    engine: Engine,
    workdir: str | Path,
    config: Mapping[str, Any],
    *,
    request: Request | None = None,
    levels: tuple[str, ...] = ("network",),
    seed: int = 0,
    estimate: str = FAULTS,
    measure: str = "critical",
    verify_pairs: int = 0,
    keep_bits: bool = False,
    workload: Selection | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Inject in rounds until every unit of `levels` has its margin; returns the summary.

    Args:
      name: a name of `METHODS`.
      space: faults of `engine.sites`.
      request: the margin wanted of every unit, and the confidence.
      levels: of `jfi.sampling.methods.LEVELS`.
      estimate: what margins are of, as of `jfi.campaign.campaign.plan`.
      config, measure, verify_pairs, keep_bits, workload, progress: as of
        `jfi.campaign.campaign.run`.

    Returns:
      What `jfi.campaign.campaign.run` does, with estimates of the units asked for, whose intervals
      are the method's, `rounds`: faults injected in each, and `narrowed`: the network's interval
      after each, where the method tells it.

    Raises:
      InputError: an unknown method, level, estimate or measure, or a request out of range; a
        measure that does not tell the estimate, or accuracy without labels; a work directory that
        can't be used, or holds another campaign.
      VerificationError: a naive run contradicts a verdict; everything is on record by then.
      OSError: a write failed; what was recorded before stays.
    """
    campaign.check_name("sampler", name, METHODS)
    engine.check_measure(measure)
    campaign.check_estimate(estimate, measure, engine)
    methods.units(space, levels)
    plan = Plan(space, check(request or Request()), (), space.cells, seed, estimate=estimate)
    own = campaign.identity(plan, engine, measure, name, levels=list(levels))
    path = records.open_workdir(workdir, campaign.manifest(plan, engine, config, own, workload))
    made_by = records.hash_json(own)
    answers = _Answers(path, plan, engine, measure, made_by, keep_bits, progress)
    leaves = engine.network.leaves_of(space.sites)
    started = time.perf_counter()
    found = METHODS[name](engine)(
        space, leaves, plan.request, levels, answers, seed, answers.tally.estimand
    )
    seconds = time.perf_counter() - started
    records.check_count(path, len(answers.ids))
    # None at all, where what is known beforehand bounds every unit.
    ids = np.concatenate([np.empty(0, np.int64), *answers.ids])
    ends = np.cumsum([part.size for part in answers.ids], dtype=np.int64)
    checked = campaign.verified(
        plan, engine, path, lambda lo, hi: ids[lo:hi], ends, verify_pairs, measure, answers.identity
    )
    asked = methods.units(space, levels)
    critical = [int(sfi.of_unit(unit, answers.tally.critical)) for unit in asked]
    units = [_estimate(*pair) for pair in zip(found.units, critical, strict=True)]
    summary = campaign.summary(answers.tally, units, checked, answers.ran, seconds)
    summary["rounds"] = found.rounds
    # The first unit asked for is the network's, where that level is asked for at all.
    summary["narrowed"] = found.narrowed if units[0].level == "network" else ()
    return campaign.concluded(path, summary, engine)


class _Answers:
    """The oracle of a method: from the records where they hold the faults, else by the engine."""

    def __init__(
        self,
        path: Path,
        plan: Plan,
        engine: Engine,
        measure: str,
        identity: str,
        keep_bits: bool,
        progress: Callable[[Progress], None],
    ):
        self.identity = identity
        self.path, self.plan, self.engine = path, plan, engine
        self.measure, self.keep_bits, self.progress = measure, keep_bits, progress
        self.tally = Tally(plan, engine, measure)
        self.ids: list[np.ndarray] = []
        self.sites = Counter[int]()
        self.ran = 0

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """float64 [n]: the outcome of each fault."""
        size = campaign.shard_size(len(self.engine.images), self.measure)
        parts = [self._answer(ids[part]) for part in chunks(ids.size, size)]
        return np.concatenate([np.empty(0), *parts])

    def _answer(self, ids: np.ndarray) -> np.ndarray:
        number = len(self.ids)
        self.sites.update(self.plan.space.decode(ids).site.tolist())
        self.engine.expect(self.sites)  # of what comes nothing is known
        if not records.has_shard(self.path, number):
            campaign.run_shard(
                self.path, number, ids, self.plan.space, self.engine, self.measure, self.identity,
                self.keep_bits,
            )  # fmt: skip
            self.ran += ids.size
        shard = records.recorded(self.path, number, ids, self.tally.columns, self.identity)
        self.tally.add(shard)
        self.ids.append(ids)
        done = sum(part.size for part in self.ids)
        estimand = self.tally.estimand
        self.progress(Progress(done, None, done - self.ran, None, estimand))
        return estimand.counts(shard) / max(estimand.parts, 1)


def _estimate(unit: Interval, critical: int) -> Estimate:
    """The interval of a method, in both places of an estimate's intervals."""
    label = unit.unit, unit.level, unit.site, unit.bit
    counts = unit.population, unit.injections, critical
    ends = unit.low, unit.high
    return Estimate(*label, *counts, unit.estimate, unit.margin, *ends, *ends, 0.0)
