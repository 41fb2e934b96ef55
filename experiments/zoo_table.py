"""The table of `experiments.bench --zoo`: each network by each way, in a process of its own.

A way is timed from an empty process on, without programs kept from before: to its first verdict,
through a campaign of 1,000 faults, and then at the rate it keeps. The naive ways know as the
engine does which faults change nothing, and do not run them: `loop` writes the word into the leaf
and runs the network on all images, fault by fault; `map` does it in one program, for many faults;
`vmap` for many at once. Rates are medians over rounds, in which the ways take turns.
"""

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jfi
from experiments import machine, turns, zoo
from jfi import bits
from jfi.compiling import jit
from jfi.engine import MEASURES, Engine, take
from jfi.faults import FAULT_MODELS, Faults, FaultSpace, Site
from jfi.sites import Network

CAMPAIGN = 1000  # faults
MAPPED = {"map": 32, "vmap": 8}  # faults of one call
NAIVE = ("loop", *MAPPED)
WAYS = (*NAIVE, *MEASURES)

Judge = Callable[[Faults], np.ndarray]  # faults -> which are critical for any image, bool [F]


def table(names: Sequence[str], rounds: int, patience: float, tell) -> list[dict]:
    """A row a network."""
    rows = []
    for name in names:
        zoo.sample(name)
        found: dict[str, list[dict]] = {way: [] for way in WAYS}
        for number in range(rounds):
            for way in WAYS[:: (-1) ** number]:
                tell(f"{name}: {way}")
                found[way].append(_apart(name, way, patience))
        rows.append(_row(name, found))
        tell(json.dumps(rows[-1]))
    return rows


def _apart(name: str, way: str, patience: float) -> dict:
    """`measure` in a process of its own, that keeps nothing and finds nothing kept."""
    command = machine.again(
        "experiments.bench", f"--networks={name}", f"--way={way}", "--allocator=as_installed",
        "--json", "--out=",
    )  # fmt: skip
    env = {**machine.untuned(), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    try:
        done = subprocess.run(command, capture_output=True, env=env, text=True, timeout=patience)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {patience:g} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])["rows"][0]


def _row(name: str, found: dict[str, list[dict]]) -> dict:
    """The figures of one network, medians over rounds; of a way that failed, why."""

    def middle(way: str, what: str) -> float | None:
        values = [one[what] for one in found[way] if what in one]
        return statistics.median(values) if values else None

    rates = {way: middle(way, "rate") for way in WAYS}
    naive = {way: rates[way] for way in NAIVE if rates[way]}
    best = max(naive, key=naive.get, default=None)
    soonest = [t for way in NAIVE if (t := middle(way, "campaign_s"))]
    row = {"network": name, "golden": middle("loop", "golden"), **rates, "naive": best}
    for measure in MEASURES:
        if rates[measure] and best:
            row[f"{measure}_ratio"] = rates[measure] / naive[best]
        row[f"{measure}_first_s"] = middle(measure, "first_s")
        row[f"{measure}_campaign_s"] = middle(measure, "campaign_s")
    row["naive_campaign_s"] = min(soonest, default=None)
    row["certified"] = middle("critical", "certified")
    row["peak_mib"] = middle("critical", "peak_mib")
    failed = {way: one["failed"] for way in WAYS for one in found[way] if "failed" in one}
    return row | ({"failed": "; ".join(f"{k}: {v}" for k, v in failed.items())} if failed else {})


def measure(name: str, way: str, seconds: float, seed: int) -> dict:
    """One way on one network, from an empty process on."""
    sample = zoo.sample(name)
    network = jfi.network(sample.apply, sample.params, sample.images[0])
    sites = _sites(network)
    faults = turns.draw(FaultSpace(sites, FAULT_MODELS["stuck_at"]), seed, 1 << 16)
    begun = time.perf_counter()
    engine, judge = _judge(way, network, sites, sample.images)
    judge(turns.block(faults, 0, 1))
    first = time.perf_counter() - begun
    judge(turns.block(faults, 1, CAMPAIGN - 1))
    found = {"first_s": first, "campaign_s": time.perf_counter() - begun}
    row = turns.Row(judge, len(sample.images), {})
    paced = turns.pace(row, faults, seconds, CAMPAIGN)
    found["rate"] = turns.turn(row, turns.block(faults, 0, paced.faults)).rate
    found["peak_mib"] = machine.peak_mib()
    if way == "critical":
        told = engine.run(turns.block(faults, 0, CAMPAIGN), "critical")
        found["certified"] = float(told.certified.mean() / len(sample.images))
    if way == "loop":
        found["golden"] = _golden_rate(network, sample.images)
    return {"network": name, "way": way, **found}


def _sites(network: Network) -> tuple[Site, ...]:
    """Kernels, or where a network has none that are known as such, all floats."""
    if network.kernels:
        return jfi.select(network)
    return tuple(s for s in network.parameters if np.issubdtype(s.dtype, np.floating))


def _golden_rate(network: Network, images: np.ndarray) -> float:
    run, here, count = jit(network.apply), jnp.asarray(images), 0
    jax.block_until_ready(run(network.params, here))
    begun = time.perf_counter()
    while (spent := time.perf_counter() - begun) < 1:
        jax.block_until_ready(run(network.params, here))
        count += len(images)
    return count / spent


def _judge(way: str, network: Network, sites, images) -> tuple[Engine | None, Judge]:
    """A way to judge faults, with its engine if it is ours."""
    if way in NAIVE:
        return None, _naive(way, network, sites, images)
    engine = Engine(network, images, np.zeros(len(images), int), sites)
    return engine, lambda faults: engine.run(faults, way).critical > 0


def _naive(way: str, network: Network, sites, images) -> Judge:
    """What anyone would write."""
    leaves, tree = [jnp.asarray(x) for x in network.leaves], jax.tree.structure(network.params)
    positions = [network.positions[site.name] for site in sites]
    here = jnp.asarray(images)

    @jit
    def top1(leaves):
        return network.apply(jax.tree.unflatten(tree, leaves), here).argmax(-1)

    golden = np.asarray(top1(leaves))
    inject = jit(bits.inject)

    def looped(faults: Faults) -> Iterator[Any]:
        for number, index, bit, polarity in zip(*faults, strict=True):
            at, faulty = positions[number], list(leaves)
            faulty[at] = inject(leaves[at], np.int32(index), np.int32(bit), np.int32(polarity))
            yield top1(faulty)

    def one(fault):
        faulty = list(leaves)
        for number, at in enumerate(positions):
            broken = bits.inject(leaves[at], fault.index, fault.bit, fault.polarity)
            faulty[at] = jnp.where(fault.site == number, broken, leaves[at])
        return network.apply(jax.tree.unflatten(tree, faulty), here).argmax(-1)

    size = MAPPED.get(way, 1)
    many = jit((lambda f: jax.lax.map(one, f)) if way == "map" else jax.vmap(one))

    def mapped(faults: Faults) -> Iterator[Any]:
        for start in range(0, faults.site.size, size):
            rows = np.minimum(np.arange(start, start + size), faults.site.size - 1)
            some = take(faults, rows)
            yield from many(some._replace(index=some.index.astype(np.int32)))

    def judge(faults: Faults) -> np.ndarray:
        change = np.flatnonzero(_changes(network, sites, faults))
        run = looped if way == "loop" else mapped
        tops = list(run(take(faults, change)))[: change.size]
        found = np.zeros(faults.site.size, bool)
        found[change] = [bool((np.asarray(top) != golden).any()) for top in tops]
        return found

    return judge


def _changes(network: Network, sites, faults: Faults) -> np.ndarray:
    """bool [F]: the fault changes its word."""
    found = np.zeros(faults.site.size, bool)
    for number, site in enumerate(sites):
        own = faults.site == number
        word = network.values(site).ravel()[faults.index[own]]
        faulty = bits.faulty(word, faults.bit[own], faults.polarity[own])
        found[own] = bits.to_bits(word) != bits.to_bits(faulty)
    return found
