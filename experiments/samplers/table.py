"""What bench_samplers wrote for several truths, as docs/samplers.md has it: tables and a figure.

    python -m experiments.bench_samplers --truth=experiments/truths/lenet_mnist.npz --out=runs/a
    python -m experiments.bench_samplers --truth=experiments/truths/lenet_digits.npz --out=runs/b
    python -m experiments.sampler_table --rows=runs/a/samplers.json,runs/b/samplers.json

writes sampler_table.md and sampler_table.png to --out. Three tables for each confidence: injections
until every unit has its margin; what the adaptive sampler needs for the margin that another one
achieved, which is smaller than the margin it asked for; and how often the intervals held the truth.
`scripts/samplers` makes experiments/results/sampler_table.md and .png.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments.samplers import benchmark
from jfi.errors import InputError
from jfi.sampling import estimates
from jfi.sampling.methods import LEVELS

COMPARED = (
    "network_wise, normal",
    "data_aware, normal",
    "data_aware, clopper_pearson",
    "iterative",
    "adaptive by |dw|",
    "adaptive certified",
)
CASE = ("truth", "method", "level", "asked", "confidence")
NEEDED = {*CASE, "injections", "widest", "coverage", "repeats", "units"}
FIGURE, FIGURE_TITLE = "sampler_table.png", "Injections against the margin achieved"
SLACK = 1.01  # sizes of fixed samples are rounded to nearest


def define_flags() -> None:
    """Flags of this script."""
    flags.DEFINE_list("rows", None, "Files samplers.json of bench_samplers.", required=True)
    flags.DEFINE_string("methods", ";".join(COMPARED), "The methods, their names joined by ';'.")
    flags.DEFINE_list("levels", list(LEVELS), f"The units: {', '.join(LEVELS)}.")
    flags.DEFINE_string("out", "runs/samplers", "Folder for sampler_table.md and .png.")


def read(paths: Iterable[str]) -> list[dict]:
    """The rows of all files; of two of one case the last.

    Raises:
        InputError: a file that can't be read, or is not of bench_samplers.
    """
    found = []
    for path in paths:
        try:
            rows = json.loads(Path(path).read_text())
            whole = bool(rows) and all(row.keys() >= NEEDED for row in rows)
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"rows {path} cannot be read: {error}") from None
        if not whole:
            raise InputError(f"rows {path} are not those of bench_samplers")
        found += rows
    return list({tuple(row[name] for name in CASE): row for row in found}.values())


def where(rows: Iterable[dict], **asked) -> list[dict]:
    """The rows with these entries."""
    return [row for row in rows if asked.items() <= row.items()]


def injections(rows: Sequence[dict], methods: Sequence[str]) -> str:
    """A line a truth, level and margin: injections of each method, and where it missed the margin.

    A method that has not its margin in every unit shows half of the widest interval.
    """
    header = ["truth", "units", "e", *methods]
    lines = []
    for truth, level, asked in _keys(rows, "truth", "level", "asked"):
        own = where(rows, truth=truth, level=level, asked=asked)
        cells = (_met(where(own, method=method), asked) for method in methods)
        lines.append([truth, level, f"{100 * asked:.3g}%", *cells])
    return _markdown(header, lines)


def _met(rows: Sequence[dict], asked: float) -> str:
    if not rows:
        return "-"
    (row,) = rows
    missed = f" (± {row['widest']:.2%})" if row["widest"] > SLACK * asked else ""
    return f"{row['injections']:,.0f}{missed}"


def at_margin(rows: Sequence[dict], margin: float) -> float:
    """Injections of a method for a margin, between its rows on a log scale; NaN outside them."""
    points = sorted((row["widest"], row["injections"]) for row in rows)
    if not points or not points[0][0] <= margin <= points[-1][0]:
        return float("nan")
    return float(np.exp(np.interp(np.log(margin), *np.log(points).T)))


def achieved(rows: Sequence[dict], methods: Sequence[str]) -> str:
    """How many times fewer injections adaptive methods take for the margin another achieved."""
    adaptive = [method for method in methods if method.startswith("adaptive")]
    lines = []
    for truth, level, method, asked in _keys(rows, "truth", "level", "method", "asked"):
        if method in adaptive or method not in methods:
            continue
        (row,) = where(rows, truth=truth, level=level, method=method, asked=asked)
        own = where(rows, truth=truth, level=level)
        needed = (at_margin(where(own, method=name), row["widest"]) for name in adaptive)
        times = [row["injections"] / n for n in needed]
        if not all(np.isnan(times)):
            cells = ("-" if np.isnan(x) else f"{x:.1f}" for x in times)
            about = [truth, level, method, f"{100 * asked:.3g}%", f"{row['widest']:.3%}"]
            lines.append([*about, f"{row['injections']:,.0f}", *cells])
    header = ["truth", "units", "method", "e", "achieved", "injections"]
    return _markdown([*header, *(f"times {name}" for name in adaptive)], lines)


def coverage(rows: Sequence[dict], methods: Sequence[str]) -> str:
    """How often the intervals of each method held the truth, over all margins.

    With the lower end of Clopper and Pearson's 95% interval of it, as if the units of a campaign
    were independent, and the number of units in all campaigns.
    """
    lines = []
    for truth, level in _keys(rows, "truth", "level"):
        own = where(rows, truth=truth, level=level)
        cells = (_covered(where(own, method=method)) for method in methods)
        lines.append([truth, level, *cells])
    return _markdown(["truth", "units", *methods], lines)


def _covered(rows: Sequence[dict]) -> str:
    if not rows:
        return "-"
    number = np.array([row["repeats"] * row["units"] for row in rows])
    held = round(float(number @ [row["coverage"] for row in rows]))
    low = float(estimates.clopper_pearson(held, number.sum(), 0.95)[0])
    return f"{held / number.sum():.2%} ({low:.2%} of {number.sum():,})"


def _keys(rows: Sequence[dict], *names: str) -> list[tuple]:
    """The different values of these entries, in order of appearance."""
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (header, *lines)]
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in (escaped[0], rule, *escaped[1:]))


def text(rows: Sequence[dict], methods: Sequence[str]) -> str:
    """The tables of each confidence as markdown, the highest first."""
    confidences = sorted({row["confidence"] for row in rows}, reverse=True)
    parts = (_section(where(rows, confidence=c), methods, c) for c in confidences)
    return "\n\n".join(["# Samplers compared", f"![{FIGURE_TITLE}]({FIGURE})", *parts])


def _section(rows: Sequence[dict], methods: Sequence[str], confidence: float) -> str:
    return "\n\n".join(
        [
            f"## {confidence:.0%}",
            "Injections until every unit has its margin. In brackets: half the widest interval, "
            "where that is more than asked for.",
            injections(rows, methods),
            "How many times fewer the adaptive samplers inject for the margin achieved:",
            achieved(rows, methods),
            "Intervals that held the truth, over all margins (lower end of its 95% interval):",
            coverage(rows, methods),
        ]
    )


def main() -> None:
    """Write the tables and the figure."""
    args = flags.FLAGS
    methods = args.methods.split(";")
    rows = read(args.rows)
    rows = [row for row in rows if row["method"] in methods and row["level"] in args.levels]
    if not rows:
        raise InputError(
            f"no row has a level of {', '.join(args.levels)} and one of {'; '.join(methods)}"
        )
    truths = [truth for (truth,) in _keys(rows, "truth")]
    rows.sort(key=lambda r: (truths.index(r["truth"]), LEVELS.index(r["level"]), -r["asked"]))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    found = text(rows, methods)
    (out / "sampler_table.md").write_text(found + "\n", encoding="utf-8")
    print(found)
    benchmark.draw(rows, out / FIGURE)
