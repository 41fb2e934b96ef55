"""The table of `experiments.bench --zoo`: each network by each way, in a process of its own.

A way is timed from nothing on, without programs kept from before: to its first verdict, through a
campaign of 1,000 faults (of 50 on the largest networks), and, anew, through one of ten times as
many. Of that one, what is left after some seconds is taken to go on at the rate of the last tenth.
The naive ways know as the engine does which faults change nothing, and do not run them: `loop`
writes the word into the leaf and runs the network on all images, fault by fault; `map` does so
within a program of each leaf; `vmap` for many faults at once. Figures are medians over rounds, in
which the ways take turns.
"""

import json
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jfi
from experiments import machine
from experiments.bench import turns, zoo
from jfi import bits
from jfi.engine.engine import Engine
from jfi.engine.inputs import MEASURES
from jfi.faults import FAULT_MODELS, Faults, FaultSpace, Site, by_site, take
from jfi.hardware.chunks import chunks, filled_up
from jfi.hardware.compiling import jit
from jfi.networks.sites import Network, unchanged

LONGER = 10  # times as many faults as in a short campaign
MAPPED, VMAPPED = 256, 8  # faults of one call

Judge = Callable[[Faults], np.ndarray]  # faults -> which are critical for any image, bool [F]


def table(names: Sequence[str], rounds: int, patience: float, tell) -> list[dict]:
    """A row a network."""
    rows = []
    for name in names:
        found: dict[str, list[dict]] = {way: [] for way in (*WAYS, TORCH)}
        for number in range(rounds):
            for way in (*WAYS, TORCH)[:: (-1) ** number]:
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
        values = [one[what] for one in found[way] if one.get(what) is not None]
        return statistics.median(values) if values else None

    long = {way: middle(way, "long_s") for way in WAYS}
    naive = {way: long[way] for way in NAIVE if long[way]}
    best = min(naive, key=naive.get, default=None)
    golden = {"golden": middle("loop", "golden"), "golden_torch": middle(TORCH, "golden")}
    row = {"network": name, **golden, "naive": best}
    row |= {f"{way}_rate": middle(way, "rate") for way in WAYS}
    for way in WAYS:
        row |= {f"{way}_{what}": middle(way, what) for what in ("first_s", "short_s", "long_s")}
    for measure in MEASURES:
        if long[measure] and best:
            row[f"{measure}_ratio"] = naive[best] / long[measure]
    row["certified"] = middle("critical", "certified")
    row["peak_mib"] = middle("critical", "peak_mib")
    failed = {way: one["failed"] for way in found for one in found[way] if "failed" in one}
    return row | ({"failed": "; ".join(f"{k}: {v}" for k, v in failed.items())} if failed else {})


def measure(name: str, way: str, seconds: float, seed: int) -> dict:
    """One way on one network, from nothing on; `seconds` are what a long campaign may take."""
    sample = zoo.sample(name)
    found: dict[str, Any] = {"network": name, "way": way}
    if way == TORCH:
        from experiments.bench import zoo_torch

        return found | {"golden": zoo_torch.golden_rate(name, sample.images)}
    network = jfi.network(sample.apply, sample.params, sample.images[0])
    sites = _sites(network)
    faults = turns.draw(FaultSpace(sites, FAULT_MODELS["stuck_at"]), seed, LONGER * sample.campaign)
    jax.block_until_ready(jnp.zeros(1) + 1)  # JAX itself has started
    short = take(faults, slice(0, sample.campaign))
    found |= _campaign(way, network, sites, sample.images, short, seconds, 1)
    found["short_s"] = found.pop("whole_s")
    first = found["first_s"]
    found |= _campaign(way, network, sites, sample.images, faults, seconds, LONGER)
    found |= {"long_s": found.pop("whole_s"), "first_s": first, "peak_mib": machine.peak_mib()}
    if way == "loop":
        found["golden"] = _golden_rate(network, sample.images)
    return found


def _campaign(way, network, sites, images, faults: Faults, seconds: float, parts: int) -> dict:
    """Seconds to the first verdict and the end, verdicts a second at the end, share certified."""
    begun = time.perf_counter()
    engine, judge = _judge(way, network, sites, images)
    if engine is not None:  # as `jfi.run` does
        engine.expect(Counter(faults.site.tolist()))
    judge(take(faults, slice(0, 1)))
    found = {"first_s": time.perf_counter() - begun}
    rows = np.array_split(np.arange(1, faults.site.size), parts)
    for number, part in enumerate(rows):
        started = time.perf_counter()
        judge(take(faults, part))
        spent = time.perf_counter() - started
        if number and time.perf_counter() - begun > seconds:  # the first part compiles
            break
    left = sum(part.size for part in rows[number + 1 :])
    found["whole_s"] = time.perf_counter() - begun + left * spent / part.size
    found["rate"] = part.size * len(images) / spent
    if way == "critical":
        found["certified"] = float(engine.run(take(faults, part), way).certified.mean()) / len(
            images
        )
    return found


def _sites(network: Network) -> tuple[Site, ...]:
    """Weights: kernels, and tables that are looked up."""
    return tuple(site for site in network.parameters if len(site.shape) > 1)


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


class _Naive(NamedTuple):
    """The network as it stands, on all images [B, ...]."""

    network: Network
    positions: list[int]  # of the leaves of the sites
    images: Any

    def top1(self, leaves) -> Any:
        """int [B]: the answers with these leaves."""
        tree = jax.tree.structure(self.network.params)
        return self.network.apply(jax.tree.unflatten(tree, leaves), self.images).argmax(-1)


def _loop(naive: _Naive) -> Judge:
    """Word by word from Python, one program for the network."""
    leaves, top1, inject = [*naive.network.leaves], jit(naive.top1), jit(bits.inject)

    def tops(faults: Faults) -> Iterator[Any]:
        for number, *rest in zip(*faults, strict=True):
            at, faulty = naive.positions[number], list(leaves)
            faulty[at] = inject(leaves[at], *(np.int32(x) for x in rest))
            yield top1(faulty)

    return lambda faults: np.array([*tops(faults)])


def _map(naive: _Naive) -> Judge:
    """A loop in a program a leaf: XLA takes what comes before the leaf out of it."""

    def run(at, leaves, count, index, bit, polarity):
        def one(k, found):
            broken = bits.inject(leaves[at], index[k], bit[k], polarity[k])
            return found.at[k].set(naive.top1([*leaves[:at], broken, *leaves[at + 1 :]]))

        blank = jnp.zeros((index.size, len(naive.images)), int)
        return jax.lax.fori_loop(0, count, one, blank)

    of_leaf, leaves = jit(run, static_argnums=0), [*naive.network.leaves]

    def tops(faults: Faults) -> np.ndarray:
        found = np.empty((faults.site.size, len(naive.images)), int)
        for number, rows in by_site(faults, np.arange(faults.site.size)):
            for part in chunks(rows.size, MAPPED):
                some = rows[part]
                columns = (filled_up(x[some].astype(np.int32), MAPPED) for x in faults[1:])
                done = of_leaf(naive.positions[number], leaves, some.size, *columns)
                found[some] = done[: some.size]
        return found

    return tops


def _vmap(naive: _Naive) -> Judge:
    """Many whole trees of parameters at once."""

    def one(fault):
        faulty = [*naive.network.leaves]
        for number, at in enumerate(naive.positions):
            broken = bits.inject(faulty[at], fault.index, fault.bit, fault.polarity)
            faulty[at] = jnp.where(fault.site == number, broken, faulty[at])
        return naive.top1(faulty)

    many = jit(jax.vmap(one))

    def tops(faults: Faults) -> np.ndarray:
        found = []
        for part in chunks(faults.site.size, VMAPPED):
            some = Faults(*(filled_up(x[part].astype(np.int32), VMAPPED) for x in faults))
            found.append(np.asarray(many(some)))
        return np.concatenate(found)[: faults.site.size]

    return tops


NAIVE: dict[str, Callable[[_Naive], Judge]] = {"loop": _loop, "map": _map, "vmap": _vmap}
WAYS = (*NAIVE, *MEASURES)
TORCH = "torch"  # the golden run alone, in PyTorch


def _naive(way: str, network: Network, sites, images) -> Judge:
    """What anyone would write, of the faults that change their word."""
    positions = [network.positions[site.name] for site in sites]
    naive = _Naive(network, positions, jnp.asarray(images))
    golden = np.asarray(jit(naive.top1)([*network.leaves]))
    tops = NAIVE[way](naive)

    def judge(faults: Faults) -> np.ndarray:
        found = np.zeros(faults.site.size, bool)
        change = np.flatnonzero(~unchanged(network, sites, faults))
        if change.size:
            found[change] = (tops(take(faults, change)) != golden).any(axis=1)
        return found

    return judge
