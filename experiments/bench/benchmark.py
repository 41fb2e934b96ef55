"""The rows of the benchmark, what they are compared on, and the ratios between them."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import nets
from experiments import machine
from experiments.bench import costs
from experiments.bench.turns import Paced, Row, Turn, block, fastest, ratio, take_turns
from experiments.own import Own
from jfi import bits
from jfi.engine.engine import Engine
from jfi.engine.inputs import MEASURES
from jfi.faults import Faults
from jfi.hardware.compiling import jit

MEBIBYTE = 1 << 20

LISTED = 1 << 18  # faults in the list, taken from its start again when it is through
ENGINE_BLOCK = 5  # times longer blocks: a campaign stays at a site for long, a block should too
ENGINE_STEP = 256
BATCHES = (32, 4096)  # smallest and largest batch tried
VMAP_IMAGES, VMAP_FAULTS = 32, (2, 8, 32)
CHECKED = 16  # flips that every row decides before timing
CHECKED_BITS = (30, 29, 27, 26, 25, 24, 23, 31)  # of float32: often critical, sometimes not
PROJECTED = 10_000  # images of the exhaustive campaign whose hours are given
SKIPPING = 2  # of stuck-at-0 and stuck-at-1, one leaves the bit as it is


class Workbench(NamedTuple):
    """What all rows share."""

    source: nets.Net | Own  # what peers are made of
    engine: Engine
    faults: Faults  # in random order


class LeftOut(Exception):
    """A row can't be had here; the message says why."""


def checked_flips(bench: Workbench) -> Faults:
    """The flips that every row decides before timing."""
    drawn = block(bench.faults, 0, CHECKED)
    bit = np.resize(np.array(CHECKED_BITS, drawn.bit.dtype), CHECKED)
    return drawn._replace(bit=bit, polarity=np.full_like(drawn.polarity, bits.FLIP))


# --- The rows, each as candidates: one for every setting worth trying


def batches(images: int) -> list[int]:
    """Batch sizes to try: the workload in 1, 2, 4, ... equal parts, so that one shape is run."""
    parts = (2**k for k in range(images.bit_length()))
    found = [images // p for p in parts if images % p == 0]
    return [b for b in found if BATCHES[0] <= b <= BATCHES[1]] or [images]


def golden_rows(bench: Workbench) -> list[Row]:
    """The network as the user wrote it, compiled, on all devices."""
    network, images = bench.engine.network, bench.engine.images
    mesh = Mesh(np.array(jax.local_devices()), ("batch",))
    params = jax.device_put(network.params, NamedSharding(mesh, PartitionSpec()))
    forward = jit(network.apply)

    def run(parts, faults):
        for _ in range(faults.site.size):
            jax.block_until_ready([forward(params, part) for part in parts])

    def row(batch):
        axes = "batch" if batch % mesh.size == 0 else None
        parts = np.split(images, len(images) // batch)
        placed = jax.device_put(parts, NamedSharding(mesh, PartitionSpec(axes)))
        return Row(partial(run, placed), len(images), {"batch": batch})

    return [row(batch) for batch in batches(len(images))]


def vmap_rows(bench: Workbench) -> list[Row]:
    """What JAX offers unaided: vmap over a faulty parameter tree for each fault.

    On few images: it is slow, and the rate does not depend on their number.
    """
    runner, tree = bench.engine, jax.tree.structure(bench.engine.network.params)
    images = runner.images[:VMAP_IMAGES]
    positions = [runner.network.positions[site.name] for site in runner.sites]

    def faulty(fault: Faults):
        leaves = list(runner.network.leaves)
        for number, at in enumerate(positions):
            broken = bits.inject(leaves[at], fault.index, fault.bit, fault.polarity)
            leaves[at] = jnp.where(fault.site == number, broken, leaves[at])
        return jax.tree.unflatten(tree, leaves)

    @jit
    def top1(faults: Faults):
        trees = jax.vmap(faulty)(faults)
        return jax.vmap(runner.network.apply, (0, None))(trees, images).argmax(-1)

    def run(size, faults):
        parts = [block(faults, k, size) for k in range(0, faults.site.size, size)]
        found = [top1(part._replace(index=part.index.astype(np.int32))) for part in parts]
        changed = np.concatenate(found) != runner.answers[: len(images)]
        return changed.any(axis=1)[: faults.site.size]

    return [
        Row(partial(run, size), len(images), {"faults": size, "batch": len(images)}, size)
        for size in VMAP_FAULTS
    ]


def engine_rows(measure: str, bench: Workbench) -> list[Row]:
    """This engine as in the midst of an exhaustive campaign: the programs of every site compiled;
    for `critical` with certified radii made (`setup_s` says how long it took)."""
    runner, started = bench.engine, time.perf_counter()
    runner.run(costs.at_every_site(runner, costs.WARM), measure)
    if measure == "critical":
        runner.make_radii()
    settings = {"setup_s": round(time.perf_counter() - started, 1)}

    def run(faults):
        return runner.run(faults, measure).critical > 0

    return [Row(run, len(runner.images), settings, ENGINE_STEP)]


def peer_rows(job: str, compiled: bool, bench: Workbench) -> list[Row]:
    """A job of `experiments.bench.peers` at every batch size, and eager in every layout."""
    peers, images = _peers(), len(bench.engine.images)
    make, layouts = partial(peers.peer, bench.source), peers.LAYOUTS
    if isinstance(bench.source, Own):
        # torchax, which adopted the module, makes torch.compile look for devices of JAX in vain.
        if not peers.is_module(bench.source.model) or job == "pytorchfi" or compiled:
            raise LeftOut(f"there is no such peer of your own network {bench.source.shown}")
        make = partial(peers.own_peer, bench.source.model)
        # The axes of the user's images are not known; only of four can one be the channels.
        layouts = peers.LAYOUTS if bench.engine.images.ndim == 4 else ("channels_first",)

    def row(**settings):
        peer = make(bench.engine, **settings, compiled=compiled)
        return Row(partial(getattr(peers, job), peer), images, settings)

    layouts = tuple(layouts)[-1:] if compiled else layouts
    return [row(batch=b, layout=layout) for layout in layouts for b in batches(images)]


def snntorch_rows(bench: Workbench) -> list[Row]:
    """A loop over faults in snnTorch, on one core and on all."""
    if isinstance(bench.source, Own):
        raise LeftOut(f"there is no such peer of your own network {bench.source.shown}")
    if not bench.engine.network.taps:
        raise LeftOut(f"{bench.source.name} has no spiking neurons")
    _peers()
    try:
        import torch

        from experiments.bench import spiking_peer
    except ImportError as error:
        raise LeftOut("snnTorch is not installed: pip install snntorch==1.0.0") from error
    runner = bench.engine
    peer = spiking_peer.peer(bench.source, runner.network, runner.images, runner.sites)

    def run(threads, faults):
        torch.set_num_threads(threads)
        return spiking_peer.loop(peer, faults)

    threads = sorted({1, machine.cores()})
    return [Row(partial(run, n), len(runner.images), {"threads": n}) for n in threads]


def _peers():
    """The module of the peers, with every core at PyTorch's service, as at JAX's."""
    try:
        import torch

        from experiments.bench import peers
    except ImportError as error:
        raise LeftOut("PyTorch is not installed: pip install 'jfi[torch]'") from error
    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        raise LeftOut("this PyTorch has no such device as JAX runs on")
    torch.set_num_threads(machine.cores())
    return peers


ROWS: dict[str, Callable[[Workbench], list[Row]]] = {
    "golden": golden_rows,
    "vmap": vmap_rows,
    **{measure: partial(engine_rows, measure) for measure in MEASURES},
    "pytorch_golden": partial(peer_rows, "golden", False),
    "pytorch_golden_compiled": partial(peer_rows, "golden", True),
    "pytorch_loop": partial(peer_rows, "loop", False),
    "pytorch_loop_compiled": partial(peer_rows, "loop", True),
    "pytorchfi": partial(peer_rows, "pytorchfi", False),
    "pytorchfi_compiled": partial(peer_rows, "pytorchfi", True),
    "snntorch_loop": snntorch_rows,
}
USUAL = tuple(name for name in ROWS if name != "snntorch_loop")
SPIKING = ("golden", "full", "snntorch_loop")  # rows of a spiking network, unless others are asked
GOLDEN = ("golden", "pytorch_golden", "pytorch_golden_compiled")  # no verdicts: images/s

# name -> (row, what the other side is granted, rows of the other side: its best counts)
RATIOS = {
    "critical_over_golden": ("critical", 1, ("golden",)),
    "critical_over_pytorchfi": ("critical", 1, ("pytorchfi", "pytorchfi_compiled")),
    "critical_over_pytorch_golden": (
        "critical", 1, ("pytorch_golden", "pytorch_golden_compiled"),
    ),
    "critical_over_pytorch_compiled_skipping": (
        "critical", SKIPPING, ("pytorch_loop_compiled",),
    ),
    "full_over_golden": ("full", 1, ("golden",)),
    "full_over_snntorch": ("full", 1, ("snntorch_loop",)),
}  # fmt: skip


# --- The benchmark


def benchmark(bench: Workbench, names: list[str], seconds: float, rounds: int) -> dict:
    """Rates of the named rows and their ratios."""
    paced, agree, left_out = {}, {}, {}
    reference = bench.engine.run(checked_flips(bench)).first_critical
    for name in names:
        length = seconds * (ENGINE_BLOCK if name in MEASURES else 1)
        try:
            paced[name] = fastest(ROWS[name](bench), bench.faults, length)
        except (LeftOut, ImportError) as error:
            left_out[name] = str(error)
            tell(f"{name} left out: {error}")
            continue
        agree[name] = agreement(bench, paced[name].row, reference)
        tell(f"{name}: blocks of {paced[name].faults:,} faults, {dict(paced[name].row.settings)}")
    taken = take_turns(paced, bench.faults, rounds, tell)
    rates = {name: [turn.rate for turn in taken[name]] for name in taken}
    return {
        "rows": [_row(bench, name, paced[name], taken[name], agree[name]) for name in paced],
        "left_out": left_out,
        "ratios": {name: ratio(rates, *of) for name, of in RATIOS.items()},
    }


def by_part(parts: dict[str, Workbench], names: list[str], seconds: float, rounds: int) -> dict:
    """The benchmarks of parts of a network as one; names of rows and ratios end in theirs."""
    found = {part: benchmark(bench, names, seconds, rounds) for part, bench in parts.items()}
    rows = [row | {"name": row["name"] + p} for p, one in found.items() for row in one["rows"]]
    tables = ("left_out", "ratios")
    return {"rows": rows} | {
        table: {name + p: value for p, one in found.items() for name, value in one[table].items()}
        for table in tables
    }


def agreement(bench: Workbench, row: Row, reference: np.ndarray) -> str | None:
    """How many of the checked flips a row decides as the full measure does: "16/16"."""
    found = row.run(checked_flips(bench))
    if found is None:
        return None
    wanted = (reference >= 0) & (reference < row.images)
    return f"{np.count_nonzero(found == wanted)}/{CHECKED}"


def _row(bench: Workbench, name: str, paced: Paced, taken: list[Turn], agree: str | None) -> dict:
    rates, cores = ([*column] for column in zip(*taken, strict=True))
    median = statistics.median(rates)
    found = {
        "name": name,
        "unit": "images/s" if name in GOLDEN else "verdicts/s",
        "median": median,
        "low": min(rates),
        "high": max(rates),
        "rates": rates,
        "cores": statistics.median(cores),
        "faults_a_block": paced.faults,
        "images": paced.row.images,
        **paced.row.settings,
    }
    if name not in GOLDEN:
        skipping = median if name in MEASURES else SKIPPING * median
        found |= {"agree": agree, "with_skipping": skipping}
    if name in MEASURES:
        found["exhaustive_hours"] = exhaustive(bench.engine) * PROJECTED / median / 3600
    return found


def exhaustive(runner: Engine) -> int:
    """Stuck-at faults in all sites."""
    return sum(2 * site.width * site.words for site in runner.sites)


# --- What the allocator is worth


def compare_allocators(rounds: int) -> dict:
    """Medians of every row in runs of their own, with the allocator as installed and tuned."""
    rates: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for setting in ("as_installed", "tuned"):
            for row in _rows_with(setting):
                of_row = rates.setdefault(row["name"], {"as_installed": [], "tuned": []})
                of_row[setting] += row["rates"]
    return {
        "rows": [
            {"name": name, "gain": ratio(of_row, "tuned", 1, ("as_installed",))}
            | {setting: statistics.median(found) for setting, found in of_row.items()}
            for name, of_row in rates.items()
        ]
    }


def _rows_with(allocator: str, *arguments: str) -> list[dict]:
    """The rows of one round of this benchmark in a process of its own."""
    arguments = (f"--allocator={allocator}", "--rounds=1", "--json", "--out=", *arguments)
    command = machine.again("experiments.bench", *arguments)
    found = subprocess.run(
        command, stdout=subprocess.PIPE, env=machine.untuned(), check=True, text=True
    )
    return json.loads(found.stdout.splitlines()[-1])["rows"]


def growth_row(faults: int, images: int) -> dict:
    """A row of `--growth`, with the allocator as a campaign has it."""
    tell(f"{faults:,} faults, {images:,} images")
    return _rows_with("as_installed", f"--faults={faults}", f"--images={images}")[0]


def tell(text: str) -> None:
    """Say on standard error how far the benchmark is."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)
