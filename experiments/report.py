"""Make the report of a finished campaign again, or set campaigns side by side.

    python -m experiments.report RUN [OTHER ...]

RUN and OTHER are work directories of campaigns. Writes RUN/report.html (one file that needs
nothing beside itself), RUN/report.md with its figures and RUN/estimates.csv from what is on record
there: neither the network nor the images are needed. With OTHER, report.html ends with the
estimates of all of them side by side.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from jfi.campaign import records
from jfi.errors import InputError
from jfi.report import finished, page, tables

RUN = {"positional": True}  # how `cli.run` is to start it


def define_flags() -> None:
    """Flags of this script."""
    flags.DEFINE_string(
        "truth", None, "Work directory of an exhaustive campaign to compare RUN's estimates with."
    )


def main(runs: Sequence[str]) -> int | None:
    """Write the reports of the first run, others beside it."""
    if not runs:
        raise InputError("no run is named; give the work directory of a finished campaign")
    run, *others = runs
    truth = flags.FLAGS.truth
    known = truth_of(truth, finished.read(run).manifest) if truth else None
    for path in write(run, others, known):
        print(f"report: {path}")


def write(
    run: str | Path, others: Sequence[str | Path] = (), truth: Mapping[str, float] | None = None
) -> tuple[Path, Path]:
    """Write the page and report.md of a run; their paths."""
    there = finished.read(run)
    html = page.write(run, others, command=command(there.manifest.get("config", {})), truth=truth)
    verify, measured = (there.summary.get(part) for part in ("verify", "measured"))
    text = tables.write_report(run, there.manifest, there.estimates, verify, truth, measured)
    return html, text


def truth_of(workdir: str, here: Mapping[str, Any]) -> dict[str, float]:
    """Exhaustive shares by unit from the work directory of another campaign.

    Raises:
      InputError: it was not exhaustive, or of other faults, weights, images or estimate.
    """
    there = records.read_manifest(workdir)
    sampler = there.get("config", {}).get("sampler")
    if sampler != "exhaustive":
        raise InputError(f"truth {workdir} was sampled {sampler}, not exhaustive")
    for part in ("hashes", "sites", "population", "images"):
        if there.get(part) != here[part]:
            raise InputError(f"truth {workdir} has other {part}; it must be of the same campaign")
    own, other = (tables.estimated(tables.asked(x)) for x in (here, there))
    if own != other:
        raise InputError(
            f"truth {workdir} estimates {other}, not {own}; run it with --estimate={own}"
        )
    found = records.read_summary(workdir)["estimates"]
    return {unit["unit"]: unit["estimate"] for unit in found}


def command(config: Mapping[str, Any]) -> str | None:
    """The command that runs a campaign of these flags; None where they are not of `campaign`."""
    if not {"net", "dataset", "sampler"} <= set(config):
        return None
    config = dict(config)
    config["net"] = config.pop("net_path", config["net"])  # of the user's own network
    config.pop("net_sha256", None)
    given = [_flag(name, x) for name, x in config.items() if x is not None and x is not False]
    return " ".join(["python -m experiments.campaign", *given])


def _flag(name: str, value: Any) -> str:
    if value is True:
        return f"--{name}"
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"--{name}={shlex.quote(text)}"


if __name__ == "__main__":
    define_flags()
    cli.run(main, **RUN)
