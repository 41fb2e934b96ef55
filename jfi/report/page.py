"""The report of a campaign as one page: report.html, which needs nothing beside itself."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jfi.report import finished, narrowing, tables, versus
from jfi.report.figures import around, axis, mark, shade
from jfi.report.finished import Finished
from jfi.report.names import clean, shortened
from jfi.report.tables import percent
from jfi.sampling.estimands import ACCURACY, FAULTS, WORDS
from jfi.sampling.estimates import Estimate

PAGE = "report.html"
_TEMPLATE = "page.html.jinja"
_MOST_CELLS = 8192  # of the heat map
_MOST_BARS = 200  # of images; more of them share a bar
_MOST_ROWS = 200  # of layers
_MEASURES = {
    "full": "how every image's answer changes",
    "critical": "for which images each fault is critical",
    "detect": "whether each fault is critical for any image",
}


def write(
    workdir: str | os.PathLike,
    others: Sequence[str | os.PathLike] = (),
    *,
    command: str | None = None,
    truth: Mapping[str, float] | None = None,
) -> Path:
    """Write ``report.html`` into the work directory of a finished campaign.

    Args:
      others: work directories of campaigns to set beside it.
      command: the one that repeats the campaign.
      truth: exhaustive shares in [0, 1] by unit.

    Raises:
      InputError: a run is none, is not finished or is damaged.
      OSError: the file can't be written.
    """
    run, beside = finished.read(workdir), [finished.read(other) for other in others]
    path = run.workdir / PAGE
    path.write_text(page(run, beside, command=command, truth=truth), encoding="utf-8")
    return path


def page(
    run: Finished,
    others: Sequence[Finished] = (),
    *,
    command: str | None = None,
    truth: Mapping[str, float] | None = None,
) -> str:
    """The page as HTML; arguments as of `write`."""
    content = {
        "title": f"Faults in {run.config.get('net') or 'the network'}",
        "what": tables.TITLES[tables.estimated(run.config)],
        "answer": _answer(run),
        "asked": _asked(run),
        "layers": _rows(run, truth or {}),
        "bits": _bits(run, truth or {}),
        "map": _map(run),
        "images": _images(run),
        "narrowed": _narrowed(run),
        "worst": run.worst,
        "detect": run.config.get("measure") == "detect",
        "warnings": _warnings(run),
        "sure": _sure(run, truth),
        "command": command,
        "repeat": _repeat(run),
        "versus": versus.compare([run, *others]) if others else None,
    }
    return _template().render(content) + "\n"


def _template():
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("jfi.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    return environment.get_template(_TEMPLATE)


def _answer(run: Finished) -> dict[str, Any]:
    """The answer, its two sentences."""
    network = run.units("network")
    images = run.summary.get("images")
    if not network:
        return {"value": None, "text": tables.layers_sentence(run.estimates, run.config)}
    (e,) = network
    exact = e.injections == e.population
    return {
        "value": None if math.isnan(e.estimate) else percent(e.estimate),
        "interval": None if exact else f"{percent(e.cp_low)}% to {percent(e.cp_high)}%",
        "text": tables.sentence(e, {**run.manifest, "config": run.config}, images),
    }


def _asked(run: Finished) -> list[tuple[str, str]]:
    """What was asked, in words."""
    config, manifest = run.config, run.manifest
    weights = config.get("weights") or "the weights that come with it"
    sites = [e.unit for e in run.units("layer")] or manifest.get("sites", [])
    named = ", ".join(shortened(name) for name in sites[:8])
    more = f" and {len(sites) - 8} more" if len(sites) > 8 else ""
    images = run.summary.get("images", 0)
    dataset = f" of {config['dataset']}" if config.get("dataset") else ""
    workload = manifest.get("workload")
    chosen = f", chosen out of {workload['of']:,}: {workload['reason']}" if workload else ""
    injected, population = run.summary["injections"], run.summary["population"]
    measure = config.get("measure") or manifest.get("identity", {}).get("measure")
    asked = [
        ("Network", f"{config.get('net') or 'the network'}, {weights}" if "weights" in config
         else config.get("net") or "the network"),
        ("Sites", f"{len(sites)}: {named}{more}"),
        ("Faults", f"{tables.model(config)} faults, {population:,} of them; {injected:,} injected, "
         f"{_how_drawn(config)}"),
        ("Images", f"{images:,}{dataset}{chosen}"),
        ("Confidence", "not needed, every fault was injected" if _is_exact(run)
         else tables.confidence(config) + _margin(config)),
        ("Critical", f"a fault that {tables.critical(manifest)}, against the network without a "
         f"fault{'' if tables.is_of_workload(manifest) else ', of at least one image'}"),
    ]  # fmt: skip
    what = tables.estimated(config)
    if what != FAULTS:
        golden = manifest.get("golden_accuracy")
        beside = what == ACCURACY and golden is not None
        without = f"; without a fault {percent(golden)}%" if beside else ""
        asked.append(("Estimated", f"{WORDS[what]}{without}"))
    return asked + ([("Measured", _MEASURES[measure])] if measure in _MEASURES else [])


def _margin(config: Mapping[str, Any]) -> str:
    margin = config.get("error_margin")
    return f", with a margin of {percent(margin)}% wanted" if margin else ""


def _how_drawn(config: Mapping[str, Any]) -> str:
    if config.get("faults"):
        return f"those of the list {config['faults']}"
    sampler = config.get("sampler")
    if sampler == "exhaustive":
        return "every one"
    seed = f" with seed {config['seed']}" if config.get("seed") is not None else ""
    return f"drawn {str(sampler).replace('_', '-')}{seed}" if sampler else f"drawn{seed}"


def _told(e: Estimate) -> str:
    if not e.injections:
        return "not sampled"
    if e.injections == e.population:
        return f"{percent(e.estimate)}% (exact)"
    return f"{percent(e.estimate)}% ({percent(e.cp_low)}% to {percent(e.cp_high)}%)"


def _hover(e: Estimate) -> str:
    return f"{shortened(e.unit)}: {_told(e)}, {e.injections:,} of {e.population:,} injected"


def _axis(run: Finished, units: Sequence[Estimate], truth: Mapping[str, float]):
    if units and tables.estimated(run.config) == ACCURACY:  # far from 0, all of them
        known = [truth[e.unit] for e in units if e.unit in truth]
        return around([e.cp_low for e in units] + known, [e.cp_high for e in units] + known)
    values = [e.estimate for e in units] + [truth[e.unit] for e in units if e.unit in truth]
    return axis(values, [e.cp_high for e in units])


def _rows(run: Finished, truth: Mapping[str, float]) -> dict[str, Any]:
    """Layers, in the order of the network."""
    known, empty = tables.parted(run.units("layer"))
    drawn = known[:_MOST_ROWS]
    scale = _axis(run, drawn, truth)
    names = tables.short_names([e.unit for e in drawn])
    return {
        "axis": scale,
        "units": [
            {"name": shortened(name), "value": percent(e.estimate), "title": _hover(e),
             "mark": mark(scale, e.estimate, e.cp_low, e.cp_high, truth.get(e.unit))}
            for e, name in zip(drawn, names, strict=True)
        ],
        "more": len(known) - len(drawn), "empty": len(empty), "truth": bool(truth),
    }  # fmt: skip


def _bits(run: Finished, truth: Mapping[str, float]) -> dict[str, Any]:
    """Bits, the highest on the left, as a word is written."""
    known, empty = tables.parted(run.units("bit"))
    drawn = sorted(known, key=lambda e: -e.bit)
    scale = _axis(run, drawn, truth)
    return {
        "axis": scale,
        "bars": [
            {"label": str(e.bit) if _is_labelled(k, [e.bit for e in drawn], e.bit) else "",
             "title": _hover(e),
             "mark": mark(scale, e.estimate, e.cp_low, e.cp_high, truth.get(e.unit))}
            for k, e in enumerate(drawn)
        ],
        "empty": len(empty),
    }  # fmt: skip


def _is_labelled(position: int, bits: Sequence[int], bit: int) -> bool:
    """The highest bit, and every fourth that is not right beside it."""
    return len(bits) <= 8 or position == 0 or (bit % 4 == 0 and bits[0] - bit > 1)


def _map(run: Finished) -> dict[str, Any]:
    """Layer by bit: the share of each, and how sure it is, on hover."""
    units = run.units("layer_bit")
    known, empty = tables.parted(units)
    said = {(e.site, e.bit) for e in known}
    by_cell = {(e.site, e.bit): e for e in units}
    sites = list(dict.fromkeys(e.site for e in units))
    bits = sorted({e.bit for e in units}, reverse=True)
    shown = sites[: _MOST_CELLS // max(len(bits), 1)]
    names = tables.short_names(shown)
    # The worst is dark.
    dark = (lambda x: 1 - x) if tables.estimated(run.config) == ACCURACY else (lambda x: x)

    def cell(site, bit):
        e = by_cell.get((site, bit))
        if e is None:
            return {"kind": "none", "title": "", "shade": 0}
        kind = "known" if (site, bit) in said else "unsure"
        return {"kind": kind, "title": f"bit {bit}: {_told(e)}", "shade": _shade(e, dark)}

    return {
        "bits": [str(bit) if _is_labelled(k, bits, bit) else "" for k, bit in enumerate(bits)],
        "rows": [
            {"name": shortened(name), "cells": [cell(site, bit) for bit in bits]}
            for site, name in zip(shown, names, strict=True)
        ] if known else [],
        "more": len(sites) - len(shown), "empty": len(empty),
        "legend": [(percent(dark(x)), shade(x)) for x in (0, 0.01, 0.1, 0.25, 0.5, 1)],
    }  # fmt: skip


def _shade(e: Estimate, dark: Callable[[float], float]) -> float:
    return 0.0 if math.isnan(e.estimate) else shade(dark(e.estimate))


def _images(run: Finished) -> dict[str, Any]:
    """Which images reveal critical faults, in the order of the workload."""
    seen = run.seen
    if not seen.critical or seen.by_image.size < 2:
        return {"bars": []}
    size = -(-seen.by_image.size // _MOST_BARS)
    starts = range(0, seen.by_image.size, size)
    parts = [seen.by_image[start : start + size] for start in starts]
    shares = [float(part.max()) / seen.critical for part in parts]
    scale = axis(shares, [], log=False)
    best = np.argsort(-seen.by_image, kind="stable")[:5]
    few = np.sort(seen.by_image)[::-1][:10].sum() / seen.critical
    return {
        "axis": scale, "size": size, "every": seen.every_image,
        "bars": [
            {"title": f"{_image_name(start, part.size)}: {percent(share)}%",
             "mark": mark(scale, share, 0.0, share),
             "label": str(start) if k % (-(-len(parts) // 6)) == 0 else ""}
            for k, (start, part, share) in enumerate(zip(starts, parts, shares, strict=True))
        ],
        "best": [(int(k), f"{seen.by_image[k]:,}") for k in best if seen.by_image[k]],
        "critical": f"{seen.critical:,}",
        "ten": percent(float(few)),
        "silent": int((seen.by_image == 0).sum()),
        "of": int(seen.by_image.size),
    }  # fmt: skip


def _image_name(start: int, size: int) -> str:
    return f"image {start}" if size == 1 else f"most of images {start} to {start + size - 1}"


def _narrowed(run: Finished) -> dict[str, Any]:
    found = narrowing.steps(run.manifest, run.summary, run.estimates, run.seen)
    if len(found) < 2:
        return {"bars": [], "exact": _is_exact(run)}
    first, last = found[0], found[-1]
    informed = [s for s in found if s.high - s.low < 0.5] or [last]
    scale = around([s.low for s in informed], [s.high for s in informed])
    return {
        "axis": scale,
        "bars": [
            {"label": _short(step.injections) if k % (-(-len(found) // 8)) == 0 else "",
             "title": f"after {step.injections:,} injections: {percent(step.low)}% to "
                      f"{percent(step.high)}%",
             "mark": mark(scale, step.estimate, step.low, step.high)}
            for k, step in enumerate(found)
        ],
        "first": f"{percent(first.low)}% to {percent(first.high)}%",
        "last": f"{percent(last.low)}% to {percent(last.high)}%",
        "rounds": "rounds" in run.summary,
        "times": f"{(first.high - first.low) / max(last.high - last.low, 1e-12):,.1f}",
    }  # fmt: skip


def _short(number: int) -> str:
    """Three digits at most: 950, 7.5k, 58k, 1.2M."""
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.{1 if number < 10 * power else 0}f}{letter}"
    return str(number)


def _is_exact(run: Finished) -> bool:
    """Whether every fault of the population was injected."""
    return run.summary["injections"] == run.summary["population"]


def _warnings(run: Finished) -> list[str]:
    """Grouped by reason, and what is left out."""
    levels = tables.planned(run.config)
    found = tables.warnings(run.estimates, run.config.get("error_margin"), levels)
    found += tables.uncovered(run.manifest)
    if run.summary.get("subnormal"):
        found.append(
            f"{run.summary['subnormal']:,} faults make a word subnormal, which XLA's code for CPUs "
            "takes for zero."
        )
    return found + tables.workload_part(run.manifest.get("workload"))


def _sure(run: Finished, truth: Mapping[str, float] | None) -> list[str]:
    text = tables.verify_part(run.summary.get("verify"))[1:]
    worst = (run.summary.get("verify") or {}).get("worst")
    found = [*text, *([f"The worst of them: {worst}."] if worst else [])]
    how = [] if _is_exact(run) else [tables.interval_words(run.config)]
    return [*found, *how, *tables.truth_part(run.estimates, truth)]


def _repeat(run: Finished) -> list[tuple[str, list[tuple[str, str]]]]:
    """Facts in groups: what the run measured, flags, hashes, versions."""
    ground = {k: run.manifest[k] for k in ("device", "precision", "screen") if run.manifest.get(k)}
    groups = {
        "Measured": run.summary.get("measured", {}),
        "Flags": {
            key: value for key, value in run.manifest.get("config", {}).items() if value is not None
        },
        "Hashes": run.manifest.get("hashes", {}),
        "Versions": run.manifest.get("versions", {}),
        "Machine": ground,
    }
    lines = partial(map, lambda pair: (str(pair[0]), tables.plain(pair[1])))
    return [(title, list(lines(facts.items()))) for title, facts in groups.items() if facts]
