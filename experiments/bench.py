"""Verdicts per second of this engine and of its peers: one run, one machine, the same work.

    python -m experiments.bench --net=resnet20 --weights=resnet20.th --dataset=cifar10.npz \\
        --images=512 --json

takes under 15 minutes on 4 cores. Every row decides stuck-at faults drawn uniformly from all
layers and bits, in one order that is the same for every row, on the same images:

    golden                  this network without faults, images/s
    vmap                    jax.vmap over whole faulty parameter trees
    full, critical, detect  this engine, by what it is asked to tell
    pytorch_golden          PyTorch without faults, images/s
    pytorch_loop            PyTorch: patch the weight, run, restore
    pytorchfi               PyTorchFI 0.6.0
    snntorch_loop           snnTorch, of spiking networks: patch, run through time, restore

with rows of PyTorch also as `_compiled`: torch.compile, channels_last. A verdict is one fault
decided on one image. Rows take turns, round by round, in blocks of whole random samples; compiling
and finding the best batch size come before and are not timed. Reported are medians over rounds
with the lowest and the highest, and ratios taken within rounds. This engine knows half of all
stuck-at faults without running them; peers are shown as they are and, `with_skipping`, as if they
knew it too. `cores` are those busy on average; `exhaustive_hours` is how long every stuck-at fault
on 10,000 images would take. Before timing, every row decides the same exponent flips: `agree` tells
how many as the full measure does.

Of a spiking network, faults in parameters and in the state of neurons (potentials and spikes,
broken at every step) are two benchmarks in one run; names end in `_parameters` and `_state`.

PyTorch rows need PyTorch; snnTorch's `pip install snntorch==1.0.0`; PyTorchFI's
`pip install pytorchfi==0.6.0 --no-deps` (its weight injection imports nothing but torch). Rows that
can't be had are left out, saying so.

glibc maps large arrays afresh each time they are needed, which halves PyTorch. So the benchmark
starts itself again with MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000
(--allocator=tuned); --allocator=compare prints what that is worth to each row.

--zoo prints a row a network of many kinds, with random weights: how long a first verdict and
campaigns of 1,000 and 10,000 faults take by naive ways and by this engine's, and their ratios
(`experiments.zoo_table`).

--profile prints where the time of a campaign goes, --growth how time and host memory grow with
faults and images. Each run leaves its figures in --out as one JSON a network, device and commit.
"""

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jfi
import nets
from experiments import cli, costs, data, machine, target, turns, zoo, zoo_table
from experiments.turns import Paced, Row, Turn, block, fastest, ratio, take_turns
from jfi import bits
from jfi.engine.engine import Engine
from jfi.engine.inputs import MEASURES
from jfi.errors import InputError
from jfi.faults import FAULT_MODELS, Faults, FaultSpace, Site
from jfi.hardware.compiling import jit
from jfi.networks.sites import Network

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

    net: nets.Net
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
        changed = np.concatenate(found) != runner.golden.top1[: len(images)]
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
    """A job of `experiments.peers` at every batch size, and eager in every layout."""
    peers, images = _peers(), len(bench.engine.images)

    def row(**settings):
        peer = peers.peer(bench.net, bench.engine, **settings, compiled=compiled)
        return Row(partial(getattr(peers, job), peer), images, settings)

    layouts = ("channels_last",) if compiled else peers.LAYOUTS
    return [row(batch=b, layout=layout) for layout in layouts for b in batches(images)]


def snntorch_rows(bench: Workbench) -> list[Row]:
    """A loop over faults in snnTorch, on one core and on all."""
    if not bench.engine.network.taps:
        raise LeftOut(f"{bench.net.name} has no spiking neurons")
    _peers()
    try:
        import torch

        from experiments import spiking_peer
    except ImportError as error:
        raise LeftOut("snnTorch is not installed: pip install snntorch==1.0.0") from error
    runner = bench.engine
    peer = spiking_peer.peer(bench.net, runner.network, runner.images, runner.sites)

    def run(threads, faults):
        torch.set_num_threads(threads)
        return spiking_peer.loop(peer, faults)

    threads = sorted({1, machine.cores()})
    return [Row(partial(run, n), len(runner.images), {"threads": n}) for n in threads]


def _peers():
    """The module of the peers, with every core at PyTorch's service, as at JAX's."""
    try:
        import torch

        from experiments import peers
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
            _tell(f"{name} left out: {error}")
            continue
        agree[name] = agreement(bench, paced[name].row, reference)
        _tell(f"{name}: blocks of {paced[name].faults:,} faults, {dict(paced[name].row.settings)}")
    taken = take_turns(paced, bench.faults, rounds, _tell)
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
    _tell(f"{faults:,} faults, {images:,} images")
    return _rows_with("as_installed", f"--faults={faults}", f"--images={images}")[0]


# --- The script


def define_flags() -> None:
    """Flags of this script."""
    target.define_network("resnet20")
    target.define_workload("cifar10", "512, or all")
    flags.DEFINE_integer("seed", 0, "Seed of the faults.", 0)
    flags.DEFINE_list(
        "rows",
        None,
        f"The rows to run: {', '.join(ROWS)}. Default: all but the last; of a spiking network "
        f"{', '.join(SPIKING)}.",
    )
    flags.DEFINE_float(
        "seconds", 6.0, f"Seconds of a block; {ENGINE_BLOCK} times as long for this engine.", 0
    )
    flags.DEFINE_integer("rounds", 3, "Blocks of each row.", 1)
    flags.DEFINE_integer("memory", 1024, "MiB of golden values kept on the device at a time.", 1)
    flags.DEFINE_enum(
        "allocator", "tuned", ["tuned", "as_installed", "compare"],
        "glibc's: tuned for large arrays, as it is, or every row in both.",
    )  # fmt: skip
    flags.DEFINE_bool("profile", False, "Print where the time of a campaign goes.")
    flags.DEFINE_bool("growth", False, "Print how time and memory grow with faults and images.")
    flags.DEFINE_integer(
        "faults",
        None,
        "Of --growth: the row of so many faults, on --images images, and no other.",
        1,
    )
    flags.DEFINE_enum("measure", "critical", list(MEASURES), "Of --profile and --growth.")
    flags.DEFINE_bool("zoo", False, "Print a row a network of many kinds.")
    flags.DEFINE_list("networks", list(zoo.ZOO), f"Of --zoo: {', '.join(zoo.ZOO)}.")
    flags.DEFINE_enum(
        "way", None, [*zoo_table.WAYS, zoo_table.TORCH], "Of --zoo: this way of one network alone."
    )
    flags.DEFINE_float("long", 30.0, "Of --zoo: seconds after which a campaign is estimated.", 0)
    flags.DEFINE_float("patience", 600.0, "Of --zoo: seconds for one way of one network.", 0)
    flags.DEFINE_bool("json", False, "Print one JSON object, in the last line, and no table.")
    flags.DEFINE_string("out", "runs/bench", "Folder for the figures as JSON; empty for none.")


def main() -> None:
    """Run what the flags ask for, print it, keep it."""
    args = flags.FLAGS
    unknown = [name for name in args.rows or () if name not in ROWS]
    if unknown:
        raise InputError(f"row {unknown[0]!r} is unknown; choose from {', '.join(ROWS)}")
    if args.allocator == "tuned":
        machine.tune_allocator("experiments.bench")
    started = time.perf_counter()
    mode, found = _measure()
    found = {
        "mode": mode,
        "net": "zoo" if args.zoo else args.net,
        "dataset": None if args.zoo else args.dataset,
        "seed": args.seed,
        **machine.describe(),
        "seconds": round(time.perf_counter() - started, 1),
        **found,
    }
    if args.out:
        _keep(found, Path(args.out))
    print(json.dumps(found) if args.json else _table(found))


def _measure() -> tuple[str, dict]:
    args = flags.FLAGS
    if args.allocator == "compare":
        return "allocator", compare_allocators(args.rounds)
    if args.zoo:
        return "zoo", {"rows": _zoo(args)}
    dataset = data.load(args.dataset, args.data_dir, train=False)
    net = nets.build(args.net, dataset.x_test.shape[1:])
    network = target.load_network(net, target.weights_path(net, dataset.name))
    if args.growth and args.faults is None:
        rows = costs.growth(growth_row, len(dataset.x_test))
        return "growth", {"measure": args.measure, "rows": rows}
    images, labels = target.workload(net, dataset, _images(dataset))
    memory = args.memory * MEBIBYTE

    def bench_of(sites) -> Workbench:
        space = FaultSpace(sites, FAULT_MODELS["stuck_at"])
        faults = turns.draw(space, args.seed, LISTED)
        runner = Engine(network, images, labels, sites, memory=memory)
        # Figures are those in the midst of an exhaustive campaign.
        runner.expect(dict(enumerate(space.site_sizes.tolist())))
        return Workbench(net, runner, faults)

    if args.growth or args.profile:
        _, runner, faults = bench_of(jfi.select(network))
        if args.profile:
            return "profile", costs.profile(runner, faults, args.measure)
        row = costs.growth_row(runner, turns.block(faults, 0, args.faults), args.measure)
        return "growth", {"measure": args.measure, "rows": [row]}
    parts = {name: bench_of(sites) for name, sites in _parts(network).items()}
    names = args.rows or (
        SPIKING if network.taps else [name for name in ROWS if name != "snntorch_loop"]
    )
    return "bench", by_part(parts, names, args.seconds, args.rounds)


def _zoo(args) -> list[dict]:
    """Rows of networks by every way, or one way of one network."""
    zoo.check(args.networks)
    if args.way is None:
        return zoo_table.table(args.networks, args.rounds, args.patience, _tell)
    return [zoo_table.measure(args.networks[0], args.way, args.long, args.seed)]


def _parts(network: Network) -> dict[str, tuple[Site, ...]]:
    """What is benchmarked apart, by what its names end in."""
    if not network.taps:
        return {"": jfi.select(network)}
    state = tuple(site for site in network.sites if site.name in network.taps)
    return {"_parameters": network.parameters, "_state": state}


def _images(dataset: data.Dataset) -> int:
    wanted = flags.FLAGS.images
    return min(512, len(dataset.x_test)) if wanted is None else wanted


def _keep(found: dict, folder: Path) -> None:
    """Write <mode>-<measure>-<net>-<device>-<commit>.json."""
    device = found["device"]
    what = (found["mode"], found.get("measure", ""), found["net"])
    parts = (*what, device["platform"], device["kind"], device["cores"])
    name = re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, parts)).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{found['commit'] or 'unknown'}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    _tell(f"kept: {path}")


def _table(found: dict) -> str:
    """The rows as aligned columns, then what is beside them."""
    rows = [{k: v for k, v in row.items() if k != "rates"} for row in found["rows"]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) for line in cells]
    for part in ("ratios", "stages", "left_out"):
        there = {name: value for name, value in found.get(part, {}).items() if value is not None}
        lines += [f"{name}: {_cell(value)}" for name, value in there.items()]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _tell(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
