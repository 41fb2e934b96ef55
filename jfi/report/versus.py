"""Campaigns side by side: what was asked of each, and their estimates unit by unit."""

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from jfi.errors import InputError
from jfi.report import tables
from jfi.report.figures import axis, mark
from jfi.report.finished import Finished
from jfi.report.names import clean, shortened
from jfi.report.tables import percent
from jfi.sampling.estimands import WORDS
from jfi.sampling.estimates import Estimate

_MOST_UNITS = 100
_MOST_FLAGS = 12  # that differ


def compare(runs: Sequence[Finished]) -> dict[str, Any]:
    """The content of the section: runs, what differs, units with a mark of every run.

    Intervals that have no value in common with the first run's are marked as apart.

    Raises:
      InputError: a run that estimates something else than the first.
    """
    own = tables.estimated(runs[0].config)
    for run in runs[1:]:
        other = tables.estimated(run.config)
        if other != own:
            raise InputError(
                f"run {clean(str(run.workdir))} estimates {other}, the {WORDS[other]}, and "
                f"{clean(str(runs[0].workdir))} {own}, the {WORDS[own]}; set runs of one estimate "
                "beside each other"
            )
    labels = [_label(k) for k in range(len(runs))]
    known = [_known(run) for run in runs]
    units = list(dict.fromkeys(unit for found in known for unit in found))
    shown = units[:_MOST_UNITS]
    drawn = [found[unit] for found in known for unit in shown if unit in found]
    scale = axis([e.estimate for e in drawn], [e.cp_high for e in drawn])
    return {
        "runs": [
            {"label": label, "name": shortened(run.workdir.resolve().name), "words": _words(run)}
            for label, run in zip(labels, runs, strict=True)
        ],
        "differ": _differ(runs)[:_MOST_FLAGS],
        "axis": scale,
        "units": [
            {"name": shortened(unit), "lines": [
                {"label": label, "value": _value(found.get(unit)),
                 "mark": _mark(scale, found.get(unit)),
                 "apart": _apart(known[0].get(unit), found.get(unit))}
                for label, found in zip(labels, known, strict=True)
            ]}
            for unit in shown
        ],
        "more": len(units) - len(shown),
    }  # fmt: skip


def _label(number: int) -> str:
    return ascii_uppercase[number] if number < 26 else str(number + 1)


def _known(run: Finished) -> dict[str, Estimate]:
    """The network's and the layers' estimates that say something."""
    known, _ = tables.parted([*run.units("network"), *run.units("layer")])
    return {e.unit: e for e in known}


def _words(run: Finished) -> str:
    return (
        f"{run.config.get('net') or 'the network'}, {tables.model(run.config)} faults, "
        f"{run.summary['injections']:,} of {run.summary['population']:,} injected, "
        f"{run.summary.get('images', 0):,} images"
    )


def _differ(runs: Sequence[Finished]) -> list[tuple[str, list[str]]]:
    """Flags and hashes that are not the same in all runs, with the value of each."""
    found = []
    for part in ("config", "hashes"):
        facts = [run.manifest.get(part, {}) for run in runs]
        for key in dict.fromkeys(key for fact in facts for key in fact):
            values = [_plain(fact.get(key), part) for fact in facts]
            if len(set(values)) > 1:
                found.append((key.replace("_", " "), values))
    return found


def _plain(value: Any, part: str) -> str:
    if value is None:
        return "not set"
    return str(value)[:8] if part == "hashes" else shortened(tables.plain(value))


def _value(e: Estimate | None) -> str:
    if e is None:
        return "not told"
    if e.injections == e.population:
        return f"{percent(e.estimate)}% (exact)"
    return f"{percent(e.estimate)}% ({percent(e.cp_low)} to {percent(e.cp_high)})"


def _mark(scale, e: Estimate | None):
    return None if e is None else mark(scale, e.estimate, e.cp_low, e.cp_high)


def _apart(first: Estimate | None, e: Estimate | None) -> bool:
    if first is None or e is None:
        return False
    return e.cp_low > first.cp_high or e.cp_high < first.cp_low
