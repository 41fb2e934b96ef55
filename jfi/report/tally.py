"""What the outcomes on record tell beside the estimates: the worst words, the images that count."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jfi import bits
from jfi.campaign import records
from jfi.networks.sites import Network
from jfi.sampling.bernstein import Sums
from jfi.sampling.estimands import CRITICAL, FAULTS, Estimand

WORST = 10  # words that are listed
STEPS = 8  # parts of a sample, for how the estimate narrowed


class Word(NamedTuple):
    """The fault of a word that most images reveal.

    images: how many. before, after: the number and its word, where they are known.
    """

    site: str
    index: int
    bit: int
    fault: str
    images: int
    step: int | None = None
    before: str | None = None
    after: str | None = None


class Seen(NamedTuple):
    """A pass over the outcomes of a campaign, whose S sites have at most W bits.

    faults, critical: how many there are.
    worst: the words that most images reveal, worst first.
    by_image: int64 [B], critical faults that each image reveals, or where not ``every_image``
        those that it is the first to reveal.
    injected, revealed: int64 [STEPS, S, W], faults and critical faults of each random part.
    outcomes: of each random part, where what is estimated is not the share of critical faults.
    """

    faults: int
    critical: int
    worst: tuple[Word, ...]
    by_image: np.ndarray
    every_image: bool
    injected: np.ndarray
    revealed: np.ndarray
    outcomes: Sums | None = None


def read(
    workdir: str | os.PathLike, manifest: Mapping[str, Any], estimand: Estimand = CRITICAL
) -> Seen:
    """Read every shard once. Raises InputError for one that is damaged."""
    sites, images = list(manifest.get("sites", ())), int(manifest.get("images") or 0)
    cells = (STEPS, len(sites), 1 + max(manifest.get("identity", {}).get("bits", ()), default=63))
    injected, revealed = np.zeros(cells, np.int64), np.zeros(cells, np.int64)
    sums = np.zeros((2, *cells))
    by_image, every, worst = np.zeros(images, np.int64), True, []
    for number, shard in enumerate(records.read_shards(workdir)):
        hit = shard["first_critical"] >= 0
        part = np.random.default_rng(number).integers(0, STEPS, hit.size)
        cell = part, shard["site"], shard["bit"]
        np.add.at(injected, cell, 1)
        np.add.at(revealed, cell, hit)
        if estimand.name != FAULTS:
            outcome = estimand.counts(shard) / estimand.parts
            for x, new in zip(sums, (outcome, outcome**2), strict=True):
                np.add.at(x, cell, new)
        every = every and "critical_bits" in shard
        by_image += _by_image(shard, hit, images)
        worst = _worst([*worst, *_words(shard, sites)])
    total = int(injected.sum()), int(revealed.sum())
    found = Seen(*total, tuple(worst), by_image, every and total[0] > 0, injected, revealed)
    if estimand.name == FAULTS:
        return found
    return found._replace(outcomes=Sums(injected, *sums, estimand.unchanged))


def worst(workdir: str | os.PathLike, network: Network) -> tuple[Word, ...]:
    """The worst words of a campaign on record, with their numbers before and after the fault."""
    known = {site.name: site for site in network.parameters}
    seen = read(workdir, records.read_manifest(workdir))
    return told(seen.worst, lambda name: network.values(known[name]) if name in known else None)


def told(words: Sequence[Word], golden: Callable[[str], np.ndarray | None]) -> tuple[Word, ...]:
    """The words with their numbers before and after the fault.

    ``golden`` gives the values of a site by name; None where it has none, as run-time values.
    """
    return tuple(_told(word, golden(word.site)) for word in words)


def _told(word: Word, values: np.ndarray | None) -> Word:
    if values is None:
        return word
    before = np.ravel(values)[word.index : word.index + 1]
    after = bits.faulty(before, word.bit, bits.POLARITIES.index(word.fault))
    return word._replace(before=_number(before), after=_number(after))


def _number(value: np.ndarray) -> str:
    """One number, and its word in hexadecimal digits."""
    word, number = int(bits.to_bits(value)[0]), value[0]
    digits = bits.width(value.dtype) // 4
    shown = str(number) if np.issubdtype(value.dtype, np.integer) else f"{float(number):.6g}"
    return f"{shown} (0x{word:0{digits}x})"


def _by_image(shard: Mapping[str, np.ndarray], hit: np.ndarray, images: int) -> np.ndarray:
    if "critical_bits" in shard:
        return np.unpackbits(shard["critical_bits"], axis=1)[:, :images].sum(axis=0, dtype=np.int64)
    return np.bincount(shard["first_critical"][hit], minlength=images)[:images]


def _words(shard: Mapping[str, np.ndarray], sites: Sequence[str]) -> list[Word]:
    """The worst fault of each of the worst words of a shard."""
    images = shard["critical"]
    # A word has at most two faults a bit of 64: so many faults hold enough words.
    order = np.argsort(-images, kind="stable")[: 128 * WORST]
    steps = shard.get("step")
    return _worst(
        Word(
            sites[shard["site"][k]], int(shard["index"][k]), int(shard["bit"][k]),
            bits.POLARITIES[shard["polarity"][k]], int(images[k]),
            None if steps is None or steps[k] < 0 else int(steps[k]),
        )
        for k in order if images[k] > 0
    )  # fmt: skip


def _worst(words) -> list[Word]:
    """The worst words, one fault each; of equals those that come first."""
    found: dict[tuple[str, int], Word] = {}
    for word in sorted(words, key=lambda word: -word.images):
        found.setdefault((word.site, word.index), word)
    return list(found.values())[:WORST]
