"""The exhaustive truth: for how many images each flip of each bit is critical, in one file.

    python -m experiments.truth --net=lenet --dataset=digits --out=truth.npz

flips every bit of every kernel once, judges each flip on every image of the workload, and writes
one compact file: 28 kB after 20 s on 2 cores for LeNet on digits (103,872 flips, 360 images).
Every question about a sample of stuck-at faults is then answered without inference: of the two
faults of a bit one leaves it as it is, and is never critical, the other is the flip.

--sites picks the parameters. With --share=0.02 those are run whole, and a uniform 2% of the bits
of every other kernel besides. A run that was stopped goes on when started again with the same
flags, from OUT.parts, and ends with the same arrays.

The file is a compressed .npz of:

    meta         JSON text: net, dataset, images, seed, fault_model, sites [{name, shape, dtype}],
                 weights_hash, images_hash, commit, seconds and flips (of the run that ended it)
                 golden_correct, images that the network answers right (where there are labels)
    critical_k   int32 [words, width] for site number k: images that the flip of that bit is
                 critical for; -1 where it was not run
    correct_k    the same, images answered right with that flip; only where there are labels (files
                 made before it was kept lack it)
    words_k      unsigned [words]: the golden words of site number k
"""

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import campaign as campaign_script
from experiments import machine, target
from jfi import bits
from jfi.campaign import campaign, records
from jfi.engine.engine import Engine
from jfi.errors import InputError
from jfi.faults import FAULT_MODELS, FaultSpace, Site
from jfi.networks import sites
from jfi.networks.sites import Network
from jfi.report import tables as report
from jfi.sampling import estimates
from jfi.sampling.estimates import Estimate
from jfi.sampling.sampling import Request, Stratum

CONFIG = "net weights dataset images sites share seed dt".split()
UNKNOWN = -1
COLUMNS = ("site", "index", "bit", "critical", "correct")
# What reading a file may raise that is not, or not whole, what was written.
_DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError, zlib.error, zipfile.BadZipFile)


class Truth(NamedTuple):
    """What is known of the flips of S sites.

    critical: int32 [words, width] a site, images that a flip is critical for; -1: not run.
    words: unsigned [words] a site, the golden words.
    correct: as critical, images that are answered right; None where that is not known.
    """

    meta: dict[str, Any]
    sites: tuple[Site, ...]
    critical: tuple[np.ndarray, ...]
    words: tuple[np.ndarray, ...]
    correct: tuple[np.ndarray, ...] | None = None

    @property
    def space(self) -> FaultSpace:
        """The stuck-at faults that the truth is about."""
        return FaultSpace(self.sites, FAULT_MODELS["stuck_at"])

    @property
    def values(self) -> list[np.ndarray]:
        """The golden values of each site, in its shape."""
        pairs = zip(self.sites, self.words, strict=True)
        return [bits.from_bits(words, site.dtype).reshape(site.shape) for site, words in pairs]


def is_critical(truth: Truth, ids) -> np.ndarray:
    """bool [F]: whether stuck-at faults, by their ids in `truth.space`, are critical.

    Raises:
      InputError: an id out of range, or a fault whose flip was not run.
    """
    faults = truth.space.decode(np.asarray(ids))
    found = np.zeros(faults.site.shape, bool)
    for number in np.unique(faults.site):
        own = np.flatnonzero(faults.site == number)
        index, bit = faults.index[own], faults.bit[own]
        words = truth.words[number][index]
        flips = words != bits.set_bit(words, bit, faults.polarity[own])
        images = truth.critical[number][index, bit]
        missing = own[flips & (images == UNKNOWN)]
        if missing.size:
            at = f"index {faults.index[missing[0]]} bit {faults.bit[missing[0]]}"
            raise InputError(f"the truth does not know {truth.sites[number].name} {at}")
        found[own] = flips & (images > 0)
    return found


def unit_estimates(truth: Truth, confidence: float = 0.99) -> list[Estimate]:
    """The criticality of stuck-at faults in every unit: exact where all of its flips were run.

    Elsewhere the flips that were run are a simple random sample of each site. Shares are those of
    the flips halved: of the two faults of a bit only the flip can be critical.
    """
    population, known, critical = flip_counts(truth)
    stratum = np.repeat(np.arange(len(truth.sites))[:, None], population.shape[1], axis=1)
    names = [site.name for site in truth.sites]
    found = estimates.estimate(names, population, known, critical, stratum, confidence=confidence)
    return [_of_stuck_at(flips) for flips in found]


def shares(truth: Truth) -> dict[str, float]:
    """The exact criticality, in [0, 1], of every unit all of whose flips were run."""
    found = unit_estimates(truth)
    return {e.unit: e.estimate for e in found if e.injections == e.population}


def flip_counts(truth: Truth) -> np.ndarray:
    """int64 [3, S, W]: flips there are of each site and bit, run of them, critical of them."""
    counts = np.zeros((3, len(truth.sites), max(site.width for site in truth.sites)), np.int64)
    for number, (site, images) in enumerate(zip(truth.sites, truth.critical, strict=True)):
        rows = np.full(site.width, site.words), (images != UNKNOWN).sum(0), (images > 0).sum(0)
        counts[:, number, : site.width] = rows
    return counts


def complete(truth: Truth) -> Truth:
    """The truth of only those sites all of whose flips were run.

    Raises:
      InputError: there is none.
    """
    whole = [k for k, images in enumerate(truth.critical) if (images != UNKNOWN).all()]
    if not whole:
        raise InputError("the truth knows no site in full; make one with --sites")
    return Truth(truth.meta, *(column and tuple(column[k] for k in whole) for column in truth[1:]))


def load(path: str | os.PathLike) -> Truth:
    """A truth from its file.

    Raises:
      InputError: no such file, or it is not whole, or its parts do not fit each other.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            found = tuple(
                Site(s["name"], tuple(s["shape"]), np.dtype(s["dtype"])) for s in meta["sites"]
            )
            critical, words, correct = (
                tuple(file[f"{name}_{k}"] for k in range(len(found)) if f"{name}_{k}" in file)
                for name in ("critical", "words", "correct")
            )
    except FileNotFoundError:
        raise InputError(f"truth {path}: no such file; experiments.truth makes one") from None
    except _DAMAGED as error:
        raise InputError(f"truth {path}: truncated, or not a file of experiments.truth") from error
    if not len(found) == len(critical) == len(words) or len(correct) not in (0, len(found)):
        raise InputError(f"truth {path}: truncated, or not a file of experiments.truth")
    for site, images, own in zip(found, critical, words, strict=True):
        if images.shape != (site.words, site.width) or own.shape != (site.words,):
            raise InputError(f"truth {path}: {site.name} has {images.shape} and {own.shape} values")
    return Truth(meta, found, critical, words, correct or None)


def save(path: str | os.PathLike, truth: Truth) -> None:
    """Write a truth, whole or not at all; the same truth gives the same bytes."""
    path = Path(path)
    arrays = {"meta": np.array(json.dumps(truth.meta))}
    for k, (critical, words) in enumerate(zip(truth.critical, truth.words, strict=True)):
        arrays |= {f"critical_{k}": critical, f"words_{k}": words}
    arrays |= {f"correct_{k}": correct for k, correct in enumerate(truth.correct or ())}
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, path)


def plan(
    network: Network, pattern: str | None = None, share: float | None = None, seed: int = 0
) -> campaign.Plan:
    """The flips to run: all of the sites of the pattern, and a share of those of other kernels.

    Args:
      pattern: regular expression of the sites to run whole; by default all kernels.
      share: of the bits of every other kernel, drawn uniformly; none by default.

    Raises:
      InputError: a pattern that matches nothing, or a share outside (0, 1).
    """
    if share is not None and not 0 < share < 1:
        raise InputError(f"share {share} is not between 0 and 1, both excluded")
    whole = set(sites.select(network, pattern))
    others = set(sites.select(network)) if share is not None else set()
    space = FaultSpace([s for s in network.sites if s in whole | others], FAULT_MODELS["flip"])
    sizes = space.site_sizes.tolist()
    strata = tuple(
        Stratum(k, None, size, size if site in whole else round(share * size), 0.5)
        for k, (site, size) in enumerate(zip(space.sites, sizes, strict=True))
    )
    return campaign.Plan(space, Request(), strata, space.cells, seed)


def write(
    out: str | os.PathLike,
    work: campaign.Plan,
    engine: Engine,
    config: Mapping[str, Any],
    *,
    verify_pairs: int = 0,
    progress: Callable[[campaign.Progress], None] = lambda progress: None,
) -> Truth:
    """Run the flips of a plan, or go on with them in `out`.parts, and write the truth to `out`.

    Args:
      config: what else decides the outcome; kept in `meta`.
      verify_pairs: pairs to run again naively at the end.

    Raises:
      InputError: `out`.parts can't be used, or holds something else.
      VerificationError: a pair that was run again came out otherwise.
    """
    out = Path(out)
    parts = out.with_name(f"{out.name}.parts")
    summary = campaign.run(
        work, engine, parts, config,
        measure="critical", verify_pairs=verify_pairs, progress=progress,
    )  # fmt: skip
    chosen = work.space.sites
    meta = {**config, **_meta(chosen, engine, records.read_manifest(parts), summary["run"])}
    words = (bits.to_bits(engine.network.values(site)).ravel() for site in chosen)
    if engine.is_labelled:
        meta["golden_correct"] = round(engine.accuracy * len(engine.images))
    correct = collect(parts, chosen, "correct") if engine.is_labelled else None
    truth = Truth(meta, chosen, collect(parts, chosen), tuple(words), correct)
    save(out, truth)
    shutil.rmtree(parts)
    return truth


def _meta(chosen: tuple[Site, ...], engine: Engine, manifest: Mapping, run: Mapping) -> dict:
    described = [
        {"name": s.name, "shape": list(s.shape), "dtype": str(np.dtype(s.dtype))} for s in chosen
    ]
    return {
        "images": len(engine.images),
        "fault_model": "stuck_at",
        "sites": described,
        "weights_hash": manifest["hashes"]["parameters"],
        "images_hash": manifest["hashes"]["images"],
        "commit": machine.commit(),
        "seconds": round(run["seconds"], 1),
        "flips": int(run["faults"]),
    }


def collect(
    workdir: str | os.PathLike, own: tuple[Site, ...], column: str = "critical"
) -> tuple[np.ndarray, ...]:
    """int32 [words, width] of each site, from a column of the flips in a work directory."""
    counts = tuple(np.full((site.words, site.width), UNKNOWN, np.int32) for site in own)
    for shard in records.read_shards(workdir, COLUMNS):
        for number in np.unique(shard["site"]):
            rows = shard["site"] == number
            counts[number][shard["index"][rows], shard["bit"][rows]] = shard[column][rows]
    return counts


def _of_stuck_at(flips: Estimate) -> Estimate:
    halved = {
        name: getattr(flips, name) / 2
        for name in ("estimate", "margin", "low", "high", "cp_low", "cp_high")
    }
    return flips._replace(
        population=2 * flips.population, injections=2 * flips.injections, **halved
    )


def define_flags() -> None:
    """Flags of this script."""
    target.define_network(own_too=True)
    target.define_workload(own_too=True)
    flags.DEFINE_string(
        "sites",
        None,
        "Parameter leaves to run whole: a regular expression that matches their whole name. "
        "Default: the kernels of all convolution and dense layers.",
    )
    flags.DEFINE_float("share", None, "Also this share, in (0, 1), of the bits of other kernels.")
    flags.DEFINE_integer("seed", 0, "Seed of the share.", 0)
    flags.DEFINE_integer("verify", 1000, "Random pairs to run again naively at the end.", 0)
    flags.DEFINE_integer("memory", 1024, "MiB of golden values kept on the device at a time.", 1)
    flags.DEFINE_string("out", None, "The file. Default: runs/truth_<net>_<dataset>.npz.")


def main() -> int | None:
    """Make the truth that the flags ask for, and print its criticality."""
    args = flags.FLAGS
    under = target.load()
    work = plan(under.network, args.sites, args.share, args.seed)
    out = Path(args.out or Path("runs", f"truth_{under.name}_{under.dataset}.npz"))
    if out.exists():
        raise InputError(f"--out={out} is there already; name another file, or move it away")
    engine = Engine(
        under.network,
        under.images,
        under.labels,
        work.space.sites,
        memory=args.memory * campaign_script.MEBIBYTE,
    )
    config = {name: getattr(args, name) for name in CONFIG} | under.config
    with campaign_script.LiveProgress() as progress:
        truth = write(out, work, engine, config, verify_pairs=args.verify, progress=progress)
    print(report.table([e for e in unit_estimates(truth) if e.level in ("network", "layer")]))
    print(f"{truth.meta['flips']:,} flips in {truth.meta['seconds']:,} s")
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")
    return None
