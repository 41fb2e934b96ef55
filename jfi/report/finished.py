"""A finished campaign, read from its work directory alone: no network, no images."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jfi.campaign import records
from jfi.errors import InputError
from jfi.report import tables, tally
from jfi.report.names import clean
from jfi.report.tally import Seen, Word
from jfi.sampling import estimands
from jfi.sampling.estimands import Estimand
from jfi.sampling.estimates import Estimate

_SHARES = ("estimate", "margin", "low", "high", "cp_low", "cp_high", "unsampled")


class Finished(NamedTuple):
    """A campaign and what came out.

    workdir: as it was given.
    worst: the worst words, with their numbers where the summary holds them.
    """

    workdir: Path
    manifest: dict[str, Any]
    summary: dict[str, Any]
    estimates: tuple[Estimate, ...]
    seen: Seen
    worst: tuple[Word, ...]

    @property
    def config(self) -> dict[str, Any]:
        """What was asked (`jfi.report.tables.asked`)."""
        return tables.asked(self.manifest)

    def units(self, level: str) -> list[Estimate]:
        """The estimates of a level."""
        return [e for e in self.estimates if e.level == level]


def read(workdir: str | os.PathLike) -> Finished:
    """Read a run. Raises InputError where it is none, is not finished or is damaged."""
    workdir = Path(workdir)
    named = clean(str(workdir))
    if not (workdir / records.MANIFEST).is_file():
        raise InputError(
            f"run {named} holds no campaign: there is no {records.MANIFEST} in it; name the work "
            "directory of one"
        )
    if not (workdir / records.SUMMARY).is_file():
        raise InputError(
            f"run {named} is not finished: it has no {records.SUMMARY}; start its campaign again "
            "with the same flags, and it goes on to its end"
        )
    manifest, summary = records.read_manifest(workdir), records.read_summary(workdir)
    try:
        estimates = tuple(map(_estimate, summary["estimates"]))
        worst = tuple(Word(**word) for word in summary.get("worst", ()))
        seen = tally.read(workdir, manifest, _estimand(manifest))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"run {named} was written by another version of jfi, or is damaged: its record lacks "
            f"what a report needs ({clean(str(error))}); run its campaign again"
        ) from error
    return Finished(workdir, manifest, summary, estimates, seen, worst or seen.worst)


def _estimand(manifest: Mapping[str, Any]) -> Estimand:
    name = tables.estimated(tables.asked(manifest))
    return estimands.estimand(name, manifest.get("images"), manifest.get("golden_accuracy"))


def _estimate(unit: Mapping[str, Any]) -> Estimate:
    """JSON holds null for NaN: of a unit without an injection."""
    nan = {name: float("nan") for name in _SHARES if unit.get(name, 0.0) is None}
    return Estimate(**{**unit, **nan})
