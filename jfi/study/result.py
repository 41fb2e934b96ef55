"""The result of a campaign, made of its work directory alone."""

import html
import math
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jfi import bits
from jfi.campaign import records
from jfi.errors import InputError
from jfi.report import finished, page, tables
from jfi.sampling.estimands import WORDS
from jfi.sampling.estimates import Estimate

SHOWN = 40  # most rows of the table of a result; `estimates` has all
MORE = "estimates(), faults(critical=True) and report() tell more"
FAULTS = (
    "site", "index", "position", "bit", "polarity", "before", "after", "before_hex", "after_hex",
    "critical", "first_image", "images",
)  # fmt: skip
_NUMBERS = ("estimate", "margin", "low", "high", "cp_low", "cp_high", "unsampled")


class Result:
    """What a campaign found; made by `Study.run`, and by `load` from its work directory.

    Printed, it is a sentence and a table; in a notebook also the report's figures.

    Attributes:
      workdir: where the record is.
      summary: `summary.json`: strict JSON, what was not estimated is None.
      manifest: `manifest.json`: what was run.
    """

    def __init__(self, workdir: str | PathLike, manifest: dict[str, Any], summary: dict[str, Any]):
        self.workdir, self.manifest, self.summary = Path(workdir), manifest, summary

    @property
    def estimated(self) -> str:
        """What was estimated: `faults`, `pairs` or `accuracy` (`jfi.sampling.estimands`)."""
        return tables.estimated(tables.asked(self.manifest))

    @property
    def sentence(self) -> str:
        """What was found, in words."""
        units = self._units()
        images = self.summary["images"]
        told = {**self.manifest, "config": self._config}
        whole = [tables.sentence(e, told, images) for e in units if e.level == "network"]
        if whole or all(e.level != "layer" for e in units):
            return " ".join(whole) or f"By bit, {WORDS[self.estimated]}: see the table."
        return tables.layers_sentence(units, self._config)

    def estimates(self, level: str | None = None):
        """A pandas DataFrame, one row a unit, with the fields of `jfi.Estimate` as columns.

        Args:
          level: `network`, `layer`, `bit` or `layer_bit`; by default all that there are.

        Raises:
          InputError: pandas is not installed; a level that the campaign did not estimate.
        """
        pandas = _pandas()
        there = list(dict.fromkeys(unit["level"] for unit in self.summary["estimates"]))
        if level is not None and level not in there:
            raise InputError(
                f"level {level!r} was not estimated; this campaign has {', '.join(there)}. "
                "Samplers in rounds bound what run(levels=...) asks for: network, layer, bit"
            )
        units = self._units(level)
        # As objects None stays None, and bits integers.
        kinds = {"site": object, "bit": object}
        return pandas.DataFrame(
            {
                name: pandas.Series([getattr(e, name) for e in units], dtype=kinds.get(name))
                for name in Estimate._fields
            }
        )

    def faults(self, critical: bool | None = None):
        """A pandas DataFrame, one row an injected fault, with the columns `FAULTS`.

        `index` is the word's position in the site in C order, `position` the same as one number an
        axis (time first, of faults at one step). `before` and `after` are the word without and with
        the fault as numbers, `before_hex` and `after_hex` its bits; None of run-time values, which
        have no word of their own. `first_image` is the first image it is critical for as the
        measure told it (with `detect` the one it was found by), -1 for none; `images` a list of all
        of them, None where that is not on record (of `detect`, or made without `keep_bits`).

        Args:
          critical: only critical faults (True), or only others (False); by default all.

        Raises:
          InputError: pandas is not installed; a shard that is damaged, or a record made before
            golden words were kept.
        """
        pandas = _pandas()
        columns: dict[str, list] = {name: [] for name in FAULTS}
        for part in self._parts(critical):
            for name in FAULTS:
                columns[name] += part[name]
        return pandas.DataFrame(columns)

    def report(self) -> list[str]:
        """Write `report.html`, `report.md` and its figures into the work directory; their paths.

        Raises:
          OSError: a file can't be written.
        """
        measured = {"images": self.summary["images"], **self.summary.get("measured", {})}
        verify = self.summary["verify"]
        path = tables.write_report(
            self.workdir, self.manifest, self._units(), verify, None, measured
        )
        figures = sorted(self.workdir.glob("*.png"))
        return [*map(str, (page.write(self.workdir), path, *figures))]

    def __repr__(self) -> str:
        shown, more = self._shown()
        table = tables.table(shown, levels=tables.planned(self._config))
        return "\n".join([self.sentence, "", table, *more, "", *self._notes()])

    def _repr_html_(self) -> str:
        """The same for a notebook, with the figures of the report below in a frame of their own."""
        shown, more = self._shown()
        levels = tables.planned(self._config)
        head = _row("th", tables.COLUMNS)
        body = "".join(_row("td", row) for row in tables.rows(shown, levels=levels))
        return (
            f"<p>{html.escape(self.sentence)}</p>"
            f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
            + "".join(f"<p>{html.escape(line)}</p>" for line in (*more, *self._notes()))
            + self._figures()
        )

    def _figures(self) -> str:
        """The report's page in a frame, with a style of its own; empty if its record is gone."""
        try:
            whole = page.page(finished.read(self.workdir))
        except (InputError, OSError):
            return ""
        frame = 'style="width: 100%; height: 40rem; border: 0; background: white"'
        return (
            "<details open><summary>Report, with figures</summary>"
            f'<iframe srcdoc="{html.escape(whole)}" {frame}></iframe></details>'
        )

    @property
    def _config(self) -> dict[str, Any]:
        return {**self.manifest.get("config", {}), "estimate": self.estimated}

    def _units(self, level: str | None = None) -> list[Estimate]:
        """The estimates; what JSON has no number for is NaN again."""
        units = (u for u in self.summary["estimates"] if level in (None, u["level"]))
        return [
            Estimate(**{k: math.nan if k in _NUMBERS and v is None else v for k, v in u.items()})
            for u in units
        ]

    def _shown(self) -> tuple[list[Estimate], list[str]]:
        """The units of the table, and what it leaves out."""
        units = self._units()
        first = [e for e in units if e.level in ("network", "layer")] or units
        left = len(first) - SHOWN
        return first[:SHOWN], [f"... and {left:,} more"] if left > 0 else []

    def _notes(self) -> list[str]:
        verify, measured = self.summary["verify"], self.summary.get("measured", {})
        accuracy = measured.get("golden_accuracy")
        images = self.summary["images"]
        golden = (
            [] if accuracy is None else [f"Golden accuracy {accuracy:.2%} on {images:,} images."]
        )
        checked = (
            f"{verify['pairs']:,} random pairs were run again naively, "
            f"{verify['disagreements']:,} disagree."
        )
        return [*golden, checked, f"On record in {self.workdir}; {MORE}."]

    def _parts(self, critical: bool | None) -> Iterator[dict[str, list]]:
        """The columns of the faults, shard by shard."""
        for shard in records.read_shards(self.workdir):
            if critical is not None:
                rows = (shard["first_critical"] >= 0) == critical
                shard = {name: column[rows] for name, column in shard.items()}
            yield _columns(shard, self.manifest, self.workdir)


def load(workdir: str | PathLike) -> Result:
    """The result of a campaign that has finished, from its work directory, without the model.

    Raises:
      InputError: there is no campaign, or it has not finished, or its files are damaged.
    """
    workdir = Path(workdir)
    manifest = records.read_manifest(workdir)
    if not (workdir / records.SUMMARY).exists():
        raise InputError(
            f"{workdir} holds a campaign that has not finished; run it again with the same options "
            "and it goes on"
        )
    return Result(workdir, manifest, records.read_summary(workdir))


def _columns(
    shard: Mapping[str, np.ndarray], manifest: Mapping[str, Any], workdir: Path
) -> dict[str, list]:
    """The columns `FAULTS` of a shard, of Python values."""
    if "word" not in shard or "forms" not in manifest:
        raise InputError(
            f"{workdir} was recorded before golden words were kept, so that faults can't be told; "
            "run the campaign again in another work directory"
        )
    first = shard["first_critical"]
    names = ("position", "before", "after", "before_hex", "after_hex")
    found = {
        "site": [manifest["sites"][number] for number in shard["site"]],
        "index": shard["index"].tolist(),
        "bit": shard["bit"].tolist(),
        "polarity": [bits.POLARITIES[code] for code in shard["polarity"]],
        "critical": (first >= 0).tolist(),
        "first_image": first.tolist(),
        "images": _images(shard.get("critical_bits"), first.size, manifest["images"]),
        **{name: [None] * first.size for name in names},
    }
    for number in np.unique(shard["site"]):
        rows = np.flatnonzero(shard["site"] == number)
        own = {name: column[rows] for name, column in shard.items()}
        for name, values in zip(names, _words(own, manifest["forms"][number]), strict=True):
            for row, value in zip(rows, values, strict=True):
                found[name][row] = value
    return found


def _words(shard: Mapping[str, np.ndarray], form: Mapping[str, Any]) -> tuple[list, ...]:
    """Positions, words before and after as numbers, and as bits, of faults of one site."""
    count, shape = shard["index"].size, tuple(form["shape"])
    at = np.unravel_index(shard["index"], shape) if shape else ()
    positions = list(zip(*(axis.tolist() for axis in at), strict=True)) or [()] * count
    if not form["stored"]:
        return positions, *[[None] * count] * 4
    dtype = jnp.dtype(form["dtype"])
    word = shard["word"].astype(bits.word_dtype(dtype))
    broken = bits.mask(word, *bits.masks(dtype, shard["bit"], shard["polarity"]))
    digits = bits.width(dtype) // 4
    numbers = ([_number(x) for x in bits.from_bits(w, dtype)] for w in (word, broken))
    texts = ([f"0x{x:0{digits}x}" for x in w.tolist()] for w in (word, broken))
    return positions, *numbers, *texts


def _number(value) -> float | int:
    return int(value) if isinstance(value, np.integer) else float(value)


def _images(packed: np.ndarray | None, count: int, images: int) -> list[list[int] | None]:
    """For each fault the images it is critical for; None where that is not on record."""
    if packed is None:
        return [None] * count
    found: list[list[int] | None] = [[] for _ in range(count)]
    hit = np.flatnonzero(packed.any(axis=1))
    for row, flags in zip(hit, np.unpackbits(packed[hit], axis=1, count=images), strict=True):
        found[row] = np.flatnonzero(flags).tolist()
    return found


def _row(tag: str, cells) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _pandas():
    try:
        import pandas
    except ImportError as error:
        raise InputError(
            "pandas is not installed, and tables of a result are its data frames: "
            "pip install pandas"
        ) from error
    return pandas
