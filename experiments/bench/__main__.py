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
can't be had are left out, saying so. Your own network (--net=my_model.py:build or FILE.onnx) has
rows of PyTorch, eager ones, where it is a module of PyTorch, but for PyTorchFI's.

glibc maps large arrays afresh each time they are needed, which halves PyTorch. So the benchmark
starts itself again with MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000
(--allocator=tuned); --allocator=compare prints what that is worth to each row.

--zoo prints a row a network of many kinds, with random weights: how long a first verdict and
campaigns of 1,000 and 10,000 faults take by naive ways and by this engine's, and their ratios
(`experiments.bench.zoo_table`).

--profile prints where the time of a campaign goes, --growth how time and host memory grow with
faults and images. Each run leaves its figures in --out as one JSON a network, device and commit.
"""

import json
import re
import time
from pathlib import Path
from typing import Any

from absl import flags

import jfi
from experiments import cli, machine, target
from experiments.bench import costs, turns, zoo, zoo_table
from experiments.bench.benchmark import (
    ENGINE_BLOCK,
    LISTED,
    MEBIBYTE,
    ROWS,
    SPIKING,
    Workbench,
    by_part,
    compare_allocators,
    growth_row,
    tell,
)
from jfi.engine.engine import Engine
from jfi.engine.inputs import MEASURES
from jfi.errors import InputError
from jfi.faults import FAULT_MODELS, FaultSpace, Site
from jfi.networks.sites import Network

# --- The script


IMAGES = 512  # of a workload that is not said


def define_flags() -> None:
    """Flags of this script."""
    target.define_network("resnet20", own_too=True)
    target.define_workload("cifar10", "512, or all", own_too=True)
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
    if args.growth and args.faults is None:
        rows = costs.growth(growth_row, len(target.load().images))
        return "growth", {"measure": args.measure, "rows": rows}
    under = target.load(most=IMAGES)
    network = under.network
    memory = args.memory * MEBIBYTE

    def bench_of(sites) -> Workbench:
        space = FaultSpace(sites, FAULT_MODELS["stuck_at"])
        faults = turns.draw(space, args.seed, LISTED)
        runner = Engine(network, under.images, under.labels, sites, memory=memory)
        # Figures are those in the midst of an exhaustive campaign.
        runner.expect(dict(enumerate(space.site_sizes.tolist())))
        return Workbench(under.source, runner, faults)

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
    return "bench", by_part(parts, names, args.seconds, args.rounds) | under.config


def _zoo(args) -> list[dict]:
    """Rows of networks by every way, or one way of one network."""
    zoo.check(args.networks)
    if args.way is None:
        return zoo_table.table(args.networks, args.rounds, args.patience, tell)
    return [zoo_table.measure(args.networks[0], args.way, args.long, args.seed)]


def _parts(network: Network) -> dict[str, tuple[Site, ...]]:
    """What is benchmarked apart, by what its names end in."""
    if not network.taps:
        return {"": jfi.select(network)}
    state = tuple(site for site in network.sites if site.name in network.taps)
    return {"_parameters": network.parameters, "_state": state}


def _keep(found: dict, folder: Path) -> None:
    """Write <mode>-<measure>-<net>-<device>-<commit>.json."""
    device = found["device"]
    what = (found["mode"], found.get("measure", ""), found["net"])
    parts = (*what, device["platform"], device["kind"], device["cores"])
    name = re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, parts)).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{found['commit'] or 'unknown'}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    tell(f"kept: {path}")


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


if __name__ == "__main__":
    define_flags()
    cli.run(main)
