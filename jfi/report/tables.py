"""The report of a campaign in text: a table to print, report.md with figures, their words."""

import csv
import html
import math
import os
import warnings as python_warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jfi.criteria import names
from jfi.networks.sites import told, told_beside
from jfi.report.names import clean, cleaned, shortened
from jfi.sampling.estimands import ACCURACY, FAULTS, PAIRS, WORDS
from jfi.sampling.estimates import LEVELS, Estimate

REPORT, TABLE = "report.md", "estimates.csv"
SAYS_NOTHING = 0.5  # an interval at least so wide
# What figures are of.
TITLES = {FAULTS: "Critical faults", PAIRS: "Critical pairs", ACCURACY: "Accuracy under fault"}
AXES = {
    FAULTS: "critical faults, %",
    PAIRS: "critical (fault, image) pairs, %",
    ACCURACY: "accuracy under fault, % of images",
}
COLUMNS = ("unit", "population", "injections", "estimate %", "margin %", "interval %")
TRUTH_COLUMNS = ("truth %", "inside")
_TITLES = {
    "network": "The network",
    "layer": "Per layer",
    "bit": "Per bit",
    "layer_bit": "Per layer and bit",
}
_UNITS = {"network": "network", "layer": "layers", "bit": "bits", "layer_bit": "bits of a layer"}
_GROUND = ("hashes", "quantile", "precision", "device", "versions")  # of the manifest
# Samplers that size their sample for some levels only. One in rounds reports only those it met.
_SIZED_FOR = {"network_wise": ("network",), "layer_wise": ("network", "layer")}
_INTERVALS = {
    "adaptive": "The interval is a confidence sequence's, by betting (Waudby-Smith and Ramdas, "
    "2024): it holds though the campaign stopped by what it saw.",
    "iterative": "The interval is Clopper-Pearson's, which does not reckon with a campaign that "
    "stops by what it saw.",
}
_BOUNDED = {
    "adaptive": _INTERVALS["adaptive"],
    "iterative": "The interval is a confidence sequence's, by betting (Waudby-Smith and Ramdas, "
    "2024), one for each stratum: it holds though the campaign stopped by what it saw.",
}
_MOST_DRAWN = 200  # units of a figure: an image has a largest height
_MOST_ROWS = {"layer": 60, "layer_bit": 12}  # the most critical; the others stay in TABLE


def asked(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a campaign; what a library's caller did not name comes from its identity."""
    identity = manifest.get("identity", {})
    margin, confidence, t = identity.get("request") or (None, None, None)
    known = {"error_margin": margin, "confidence": confidence, "t": t}
    known |= {key: identity.get(key) for key in ("measure", "sampler", "estimate")}
    known = {key: value for key, value in known.items() if value is not None}
    return {"estimate": FAULTS} | known | dict(manifest.get("config", {}))


def estimated(config: Mapping[str, Any]) -> str:
    """What a campaign estimated, a name of `WORDS`; `faults` where it is not on record."""
    return config.get("estimate") or FAULTS


def parted(units: Iterable[Estimate]) -> tuple[list[Estimate], list[Estimate]]:
    """Units whose interval says something, and those without an injection or with one too wide."""
    known, empty = [], []
    for e in units:
        says = e.injections and e.cp_high - e.cp_low < SAYS_NOTHING
        (known if says else empty).append(e)
    return known, empty


def planned(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The levels for whose units the sampler of a campaign plans a margin; from its flags."""
    return _SIZED_FOR.get(_sampler(config), LEVELS)


def rows(
    estimates: Iterable[Estimate],
    truth: Mapping[str, float] | None = None,
    levels: Sequence[str] = LEVELS,
) -> list[tuple[str, ...]]:
    """One row a unit, as text in the order of ``COLUMNS`` (and ``TRUTH_COLUMNS`` with truth).

    The interval is Clopper-Pearson's, or the sampler's own. ``truth`` maps units to their
    exhaustive value in [0, 1]. Units of other than the ``levels`` that are `planned` for get no
    margin: their sample is as large as chance made it.
    """
    return [
        (
            e.unit,
            f"{e.population:,}",
            f"{e.injections:,}",
            percent(e.estimate),
            percent(e.margin) if e.level in levels else "-",
            f"{percent(e.cp_low)} .. {percent(e.cp_high)}",
            *(() if truth is None else _against(e, truth)),
        )
        for e in estimates
    ]


def table(
    estimates: Iterable[Estimate],
    truth: Mapping[str, float] | None = None,
    levels: Sequence[str] = LEVELS,
) -> str:
    """The rows as aligned plain text, header first; fit for any terminal or log."""
    lines = [COLUMNS + (() if truth is None else TRUTH_COLUMNS), *rows(estimates, truth, levels)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)]
        )
        for line in lines
    )


def inside(e: Estimate, value: float) -> bool:
    """Whether an exhaustive value lies in the Clopper-Pearson interval, both ends included."""
    return e.cp_low - 1e-12 <= value <= e.cp_high + 1e-12


def percent(share: float) -> str:
    """A share as percent without the sign: three decimals, more digits where they all are 0."""
    if math.isnan(share):
        return "-"
    return f"{100 * share:.1e}" if 0 < share < 5e-6 else f"{100 * share:.3f}"


def sentence(e: Estimate, manifest: Mapping[str, Any], images: int | None = None) -> str:
    """What the estimate of a unit says, in words; ``images`` is how many judged each fault."""
    config = manifest.get("config", {})
    where = "" if e.level == "network" else f"{e.unit} of "
    if e.injections == e.population:
        share, injected = f"Exactly {percent(e.estimate)}%", "Every one of them was"
    else:
        share = (
            f"With {confidence(config)} confidence between {percent(e.cp_low)}% and "
            f"{percent(e.cp_high)}%"
        )
        injected = f"{e.injections:,} of them were"
    faults = (
        f"the {e.population:,} {model(config)} faults in "
        f"{where}the chosen sites of {config.get('net', 'the network')}"
    )
    if estimated(config) == ACCURACY:
        golden = manifest.get("golden_accuracy")
        without = "" if golden is None else f"; without a fault {percent(golden)}%"
        return (
            f"Mean accuracy under fault, over {faults}: {share[0].lower()}{share[1:]} of "
            f"{_images(images)}{without}. {injected} injected."
        )
    if estimated(config) == PAIRS:
        return (
            f"{share} of the (fault, image) pairs of {faults} and {_images(images)} are critical: "
            f"{_does_for_one(manifest)}. {injected} injected."
        )
    return f"{share} of {faults} are critical: {_does(manifest, images)}. {injected} injected."


def _does(manifest: Mapping[str, Any], images: int | None) -> str:
    """What critical faults do, in words."""
    many = images and images > 1
    if _criterion(manifest) == "top_1":
        return f"they change at least one {f'of {images:,} predictions' if many else 'prediction'}"
    if is_of_workload(manifest) or not many:
        return f"each {critical(manifest)}"
    return f"each {critical(manifest)}, for at least one of {images:,} images"


def _does_for_one(manifest: Mapping[str, Any]) -> str:
    if _criterion(manifest) == "top_1":
        return "the fault changes the prediction"
    return f"the fault {critical(manifest)}"


def _images(images: int | None) -> str:
    return "the images" if images is None else f"{images:,} image{'s' if images > 1 else ''}"


def critical(manifest: Mapping[str, Any]) -> str:
    """What a critical fault of a campaign does to the outputs, in words."""
    return names.meaning(_criterion(manifest))


def is_of_workload(manifest: Mapping[str, Any]) -> bool:
    """Whether a fault is judged by all images together."""
    return _criterion(manifest).startswith("accuracy_drop")


def _criterion(manifest: Mapping[str, Any]) -> str:
    identity = manifest.get("identity", {})
    return str(identity.get("criterion", "top_1")) if isinstance(identity, Mapping) else "top_1"


def layers_sentence(estimates: Sequence[Estimate], config: Mapping[str, Any]) -> str:
    """What the estimates of sampled layers say, the worst first."""
    known = [e for e in _of(estimates, "layer") if e.injections]
    layers = _worst_first(known, config)
    named = ", ".join(f"{e.unit} {percent(e.cp_low)}% to {percent(e.cp_high)}%" for e in layers[:5])
    rest = "higher" if estimated(config) == ACCURACY else "lower"
    more = f", and {len(layers) - 5} more with {rest} estimates" if len(layers) > 5 else ""
    what = "" if estimated(config) == FAULTS else f", {WORDS[estimated(config)]}"
    return f"By layer{what}, each with {confidence(config)} confidence: {named}{more}."


def _worst_first(units: Iterable[Estimate], config: Mapping[str, Any]) -> list[Estimate]:
    sign = 1 if estimated(config) == ACCURACY else -1
    return sorted(units, key=lambda e: sign * e.estimate)


def warnings(
    estimates: Sequence[Estimate], error_margin: float | None, levels: Sequence[str] = LEVELS
) -> list[str]:
    """Where the sample says less than was asked for, one line for each reason.

    ``levels`` are those `planned` for.
    """
    unplanned = [e for e in estimates if e.level not in levels]
    rest = [e for e in estimates if e.level in levels]
    wide = [e for e in rest if error_margin is not None and _half_width(e) > error_margin]
    partial = [e for e in rest if e.unsampled > 0]
    found = []
    if unplanned:
        found.append(
            f"The sampler plans no margin for {_counted(unplanned, unplanned)}. Their intervals "
            "hold, but are as wide as chance left them. Half the width of the widest: "
            f"{_named(unplanned, lambda e: (e.cp_high - e.cp_low) / 2)}."
        )
    if wide:
        found.append(
            f"Too few injections for the requested margin of {percent(error_margin)}% in "
            f"{_counted(wide, estimates)}; the widest: {_named(wide, _half_width)}."
        )
    if partial:
        found.append(
            f"Part of the population was not sampled in {_counted(partial, estimates)}; the "
            "estimate counts it as changing nothing, the interval as assumed by the sampler. The "
            f"largest parts: {_named(partial, lambda e: e.unsampled)}."
        )
    return found


def write_report(
    workdir: str | os.PathLike,
    manifest: Mapping[str, Any],
    estimates: Sequence[Estimate],
    verify: Mapping[str, int] | None = None,
    truth: Mapping[str, float] | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``report.md``, its figures (PNG) and ``estimates.csv`` into the work directory.

    ``manifest`` holds ``config`` (the flags); ``verify`` the counts of the naive re-run;
    ``truth`` maps units to exhaustive values in [0, 1]; ``measured`` holds ``images`` (their
    number) and whatever else the run measured, such as ``verdicts_per_s``. Raises OSError when
    a file can't be written.
    """
    workdir, measured = Path(workdir), dict(measured or {})
    write_estimates(workdir / TABLE, estimates, truth)
    figures = _figures(workdir, estimates, truth, estimated(asked(manifest)))
    manifest = cleaned({**manifest, "config": asked(manifest)}, _in_markdown)
    estimates = [e._replace(unit=_in_markdown(e.unit)) for e in estimates]
    truth = None if truth is None else {_in_markdown(unit): x for unit, x in truth.items()}
    config = manifest["config"]
    levels = planned(config)
    parts = [
        f"# Faults in {config.get('net', 'the network')}",
        *[sentence(e, manifest, measured.get("images")) for e in _of(estimates, "network")],
        *([layers_sentence(estimates, config)] if _tells_layers(estimates, levels) else []),
        *[
            f"> **Note.** {line}"
            for line in warnings(estimates, config.get("error_margin"), levels)
        ],
        *[f"> **Note.** {line}" for line in uncovered(manifest)],
        *workload_part(manifest.get("workload")),
        *truth_part(estimates, truth),
        *[f"![{title}]({name})" for title, name in figures],
        *_tables(estimates, truth, config),
        interval_words(config),
        *verify_part(verify),
        "## What was run",
        *_facts("Measured", measured),
        *_facts("Flag", {key: value for key, value in config.items() if value is not None}),
        *_facts("Ground", {key: manifest[key] for key in _GROUND if key in manifest}),
    ]
    path = workdir / REPORT
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def write_estimates(
    path: str | os.PathLike,
    estimates: Iterable[Estimate],
    truth: Mapping[str, float] | None = None,
) -> None:
    """Write every unit's estimate as CSV, shares in [0, 1]. Raises OSError."""
    columns = (*Estimate._fields, *(() if truth is None else ("truth",)))
    # Names of users may hold lone surrogates, which UTF-8 does not.
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns)
        for e in estimates:
            known = () if truth is None else (truth.get(e.unit),)
            rows.writerow("" if _is_missing(x) else x for x in (*e, *known))


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _in_markdown(text: str) -> str:
    return html.escape(clean(text), quote=False)


def _against(e: Estimate, truth: Mapping[str, float]) -> tuple[str, str]:
    if e.unit not in truth:
        return "-", "-"
    return percent(truth[e.unit]), "yes" if inside(e, truth[e.unit]) else "NO"


def _of(estimates: Iterable[Estimate], level: str) -> list[Estimate]:
    return [e for e in estimates if e.level == level]


def _half_width(e: Estimate) -> float:
    """The achieved margin, or half the interval where no or every injection was critical.

    Rounded to 1% of itself: sample sizes are rounded to nearest.
    """
    return max(0.0 if math.isnan(e.margin) else e.margin, (e.high - e.low) / 2) / 1.01


def _named(units: Sequence[Estimate], share) -> str:
    """The worst few units with their share."""
    worst = sorted(units, key=share, reverse=True)[:3]
    return ", ".join(f"{e.unit} ({percent(share(e))}%)" for e in worst)


def _counted(units: Sequence[Estimate], of: Sequence[Estimate]) -> str:
    """How many units there are of each level: the network, 2 of 5 layers, 7 of 32 bits."""
    told = []
    for level in LEVELS:
        some, every = len(_of(units, level)), len(_of(of, level))
        if some:
            share = f"all {every:,}" if some == every else f"{some:,} of {every:,}"
            told.append("the network" if level == "network" else f"{share} {_UNITS[level]}")
    return told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"


def _sampler(config: Mapping[str, Any]) -> str:
    """The sampler's name; none where faults were listed."""
    return "" if config.get("faults") else config.get("sampler") or ""


def model(config: Mapping[str, Any]) -> str:
    """The fault model in words."""
    model = "listed" if config.get("faults") else config.get("fault_model") or "chosen"
    return str(model).replace("_", "-")


def confidence(config: Mapping[str, Any]) -> str:
    """The confidence of all intervals, in percent."""
    return f"{100 * (config.get('confidence') or 0.99):g}%"


def uncovered(manifest: Mapping[str, Any]) -> list[str]:
    """What is stored and was not broken: beside the sites of a campaign, and what can't be one."""
    beside, left_out = manifest.get("beside"), manifest.get("left_out")
    found = [f"No fault was put in {told_beside(beside)}."] if beside else []
    return [*found, *([f"Parameters that are no sites: {told(left_out)}."] if left_out else [])]


def workload_part(workload: Mapping[str, Any] | None) -> list[str]:
    """What choosing the images saves, and what it may miss."""
    if not workload:
        return []
    chosen, of = len(workload["indices"]), workload["of"]
    judged = f"The workload is {chosen:,} of {of:,} images: {workload['reason']}."
    if chosen == of:
        return [f"{judged} It leaves none out."]
    return [
        f"{judged} That saves {1 - chosen / of:.1%} of the inferences. A fault that is critical "
        f"only for some of the {of - chosen:,} images left out counts as not critical here: on all "
        f"{of:,} images the share of critical faults is as large or larger."
    ]


def _tells_layers(estimates: Sequence[Estimate], levels: Sequence[str]) -> bool:
    sampled = [e for e in _of(estimates, "layer") if 0 < e.injections < e.population]
    return "layer" in levels and bool(sampled)


def interval_words(config: Mapping[str, Any]) -> str:
    """Whose interval is shown."""
    kind = _sampler(config).partition("_")[0]
    if estimated(config) != FAULTS:
        return _BOUNDED.get(
            kind,
            "The interval is an empirical Bernstein bound (Fan, Grama and Liu, 2015; Waudby-Smith "
            "and Ramdas, 2024): it holds for any outcome in [0, 1]. Where a sampler plans with "
            "less than p = 0.5 (data-aware) it rests on that p.",
        )
    return _INTERVALS.get(
        kind,
        "The interval is Clopper-Pearson's; Wilson's is in `summary.json` beside it.",
    )


def truth_part(estimates: Sequence[Estimate], truth: Mapping[str, float] | None) -> list[str]:
    """How many intervals hold the exhaustive truth."""
    known = [e for e in estimates if truth and e.unit in truth]
    if not known:
        return []
    held = sum(inside(e, truth[e.unit]) for e in known)
    return [f"The exhaustive truth lies inside the interval of {held} of {len(known)} units."]


def verify_part(verify: Mapping[str, int] | None) -> list[str]:
    """A heading, and what the naive re-run said."""
    if not verify or not verify.get("pairs"):
        return ["## Verification", "No pair was re-run."]
    return [
        "## Verification",
        f"{verify['pairs']:,} random (fault, image) pairs were run again without any shortcut: "
        f"{verify['agreements']:,} agree, {verify['near_ties']:,} are near-ties (apart by less "
        f"than rounding), {verify['disagreements']:,} disagree. With 95% confidence, less than "
        f"{verify['bound']:.2%} of the verdicts that are not known beforehand are wrong.",
    ]


def _tables(
    estimates: Sequence[Estimate], truth: Mapping[str, float] | None, config: Mapping[str, Any]
) -> list[str]:
    levels = planned(config)
    header = COLUMNS + (() if truth is None else TRUTH_COLUMNS)
    parts = []
    for level in LEVELS:
        units = _of(estimates, level)
        listed, untold = _listed(units, level, config)
        if units:
            parts.append(f"## {_TITLES[level]}")
            parts += [_markdown(header, rows(listed, truth, levels))] if listed else []
            parts += untold
    return [*parts, f"Every unit is in `{TABLE}`."] if parts else []


def _listed(
    units: Sequence[Estimate], level: str, config: Mapping[str, Any]
) -> tuple[list[Estimate], list[str]]:
    """The units worth a row, and in words how many the others are."""
    known, empty = parted(units)
    harmless = [e for e in known if not e.critical] if level in ("bit", "layer_bit") else []
    listed = [e for e in known if e not in harmless]
    most = _MOST_ROWS.get(level, len(listed))
    left = len(listed) - most
    if left > 0:
        listed = _worst_first(listed, config)[:most]
    if estimated(config) == ACCURACY:
        rest, worst = "higher", f"at least {percent(min((e.cp_low for e in harmless), default=1))}"
    else:
        rest, worst = "lower", f"at most {percent(max((e.cp_high for e in harmless), default=0))}"
    told = [
        (left > 0, f"{left:,} with {rest} estimates are not listed"),
        (harmless, f"no critical fault was seen in {len(harmless):,}: {worst}% each"),
        (empty, f"the sample says nothing of {len(empty):,}"),
    ]
    words = "; ".join(text for holds, text in told if holds)
    return listed, [f"Of {len(units):,} {_UNITS[level]}, {words}."] if words else []


def _facts(title: str, facts: Mapping[str, Any]) -> list[str]:
    lines = [(str(key), f"{plain(value)}") for key, value in facts.items()]
    return [_markdown((title, "Value"), lines)] if lines else []


def plain(value: Any) -> str:
    """A value of the manifest to read."""
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items())
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *escaped))


def _figures(
    workdir: Path, estimates: Sequence[Estimate], truth: Mapping[str, float] | None, what: str
) -> list[tuple[str, str]]:
    """Draw the figures; (title, file name) of each."""
    drawn = []
    for level, draw in (("layer", _draw_layers), ("bit", _draw_bits)):
        units, _ = parted(_of(estimates, level))
        units = units[:_MOST_DRAWN]
        if units:
            title, name = f"{TITLES[what]} {_TITLES[level].lower()}", f"{level}.png"
            figure, axes = _canvas(level, len(units))
            draw(axes, units, truth or {}, AXES[what])
            axes.set_title(title, loc="left")
            with python_warnings.catch_warnings():
                # A name may have characters that the font lacks: they are drawn as boxes.
                python_warnings.filterwarnings("ignore", "Glyph", UserWarning)
                figure.savefig(workdir / name, dpi=150, metadata={"Software": None})
            drawn.append((title, name))
    return drawn


def _canvas(level: str, units: int):
    # The object interface needs no display, no global backend and no clean-up.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (8, 1.6 + 0.24 * max(units, 4)) if level == "layer" else (8, 4)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _draw_layers(axes, units: Sequence[Estimate], truth: Mapping[str, float], what: str) -> None:
    """One line a layer, first on top, its name written out."""
    at = range(len(units))
    floor = _scale(axes.set_xscale, units)
    x, (below, above) = _points(units, floor)
    axes.errorbar(x, at, xerr=(below, above), **_STYLE)
    _mark_truth(axes, [truth.get(e.unit) for e in units], at, floor, swap=False)
    names = short_names([clean(e.unit) for e in units])
    axes.set_yticks(at, [shortened(name).replace("$", r"\$") for name in names])
    axes.set_ylim(len(units) - 0.4, -0.6)
    _finish(axes, axes.xaxis, axes.set_xlabel, axes.set_xlim, floor, what)


def _draw_bits(axes, units: Sequence[Estimate], truth: Mapping[str, float], what: str) -> None:
    """The highest bit on the left, as a word is written."""
    at = [e.bit for e in units]
    floor = _scale(axes.set_yscale, units)
    y, (below, above) = _points(units, floor)
    axes.errorbar(at, y, yerr=(below, above), **_STYLE)
    _mark_truth(axes, [truth.get(e.unit) for e in units], at, floor, swap=True)
    axes.set_xlim(max(at) + 0.7, min(at) - 0.7)
    axes.set_xticks(at, [str(bit) for bit in at], fontsize="small")
    axes.set_xlabel("bit")
    _finish(axes, axes.yaxis, axes.set_ylabel, axes.set_ylim, floor, what)


_STYLE = {
    "fmt": "o",
    "color": "#1f5a96",
    "ecolor": "#7fa8d1",
    "markersize": 4.5,
    "elinewidth": 2.2,
    "label": "estimate and interval",
}


def _scale(set_scale, units: Sequence[Estimate]) -> float:
    """Log scale where criticality spans orders of magnitude; the axis's lower end in percent."""
    seen = [e.estimate for e in units if e.estimate > 0]
    if len(units) < 2 or not seen or max(seen) < 50 * min(min(seen), *(e.cp_high for e in units)):
        return 0.0
    set_scale("log")
    lowest = min(seen + [e.cp_high for e in units if e.cp_high > 0])
    return 100 * 10.0 ** math.floor(math.log10(lowest) - 0.3)


def _points(units: Sequence[Estimate], floor: float) -> tuple[list, tuple[list, list]]:
    """Points in percent and the bars below and above; a log axis shows zero at its floor."""
    at = [max(100 * e.estimate, floor) for e in units]
    below = [x - min(x, max(100 * e.cp_low, floor)) for x, e in zip(at, units, strict=True)]
    above = [max(100 * e.cp_high - x, 0.0) for x, e in zip(at, units, strict=True)]
    return at, (below, above)


def _mark_truth(axes, values: Sequence, at: Sequence, floor: float, swap: bool) -> None:
    pairs = [(max(100 * v, floor), a) for v, a in zip(values, at, strict=True) if v is not None]
    if pairs:
        x, y = zip(*(pair[::-1] if swap else pair for pair in pairs), strict=True)
        style = {"facecolors": "none", "edgecolors": "#c8501e", "linewidths": 1.4}
        axes.scatter(x, y, marker="D", s=44, label="exhaustive truth", zorder=3, **style)


def _finish(axes, axis, set_label, set_limit, floor: float, what: str) -> None:
    from matplotlib.ticker import FuncFormatter

    floor_text = f"points at {floor:g} are 0" if floor else ""
    set_label(" · ".join(filter(None, (what, floor_text))))
    axis.grid(True, color="#e4e4e4")
    if floor:
        set_limit(floor / 1.3, None)
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    elif what != AXES[ACCURACY]:
        set_limit(0, None)
    axes.figure.legend(frameon=False, fontsize="small", loc="outside upper left", ncols=2)


def short_names(names: Sequence[str]) -> list[str]:
    """Site names without the leading and trailing parts that all of them share."""
    parts = [name.split("/") for name in names]
    if len(parts) < 2:
        return list(names)
    shared = min(len(p) for p in parts) - 1
    head = next((i for i in range(shared) if len({p[i] for p in parts}) > 1), shared)
    rest = [p[head:] for p in parts]
    shared = min(len(p) for p in rest) - 1
    tail = next((i for i in range(shared) if len({p[-1 - i] for p in rest}) > 1), shared)
    return ["/".join(p[: len(p) - tail]) for p in rest]
