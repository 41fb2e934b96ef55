"""Faults and the space they form: numbered, never listed.

A fault is (site, index, bit, polarity). A `FaultSpace` gives each of its N faults an id in [0, N),
site-major, then by index, bit and polarity, and goes between ids and faults by int64 arithmetic
alone, so a space of 10^12 faults costs as little as one of ten.
"""

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jfi import bits as jbits
from jfi.errors import InputError, kind

# By name, its polarities. The last three are of spiking neurons, whose function they change: it
# never fires, fires at every step, or at other times (SpikingJET, ETS 2024, section IV).
FAULT_MODELS = {
    "stuck_at": (jbits.STUCK_AT_0, jbits.STUCK_AT_1),
    "flip": (jbits.FLIP,),
    "dead": (jbits.DEAD,),
    "saturated": (jbits.SATURATED,),
    "byzantine": (jbits.STUCK_AT_0, jbits.STUCK_AT_1),
}
# Where faults of a model are put unless sites are asked for; else in the kernels.
MODEL_SITES = {
    "dead": ".*spike",
    "saturated": ".*spike",
    "byzantine": ".*(beta|threshold|potential)",
}

COLUMNS = ("site", "index", "bit", "polarity")
_DTYPES = (np.int32, np.int64, np.int16, np.int8)


class Site(NamedTuple):
    """A place where faults live: a parameter leaf, or a named run-time value."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def words(self) -> int:
        """Numbers in the site."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bits in each of them."""
        return jbits.width(self.dtype)


class Faults(NamedTuple):
    """F faults as a struct of arrays. Their number is `faults.site.size`."""

    site: np.ndarray  # int32[F], position in the list of sites
    index: np.ndarray  # int64[F], position of the word in the site, C order
    bit: np.ndarray  # int16[F]
    polarity: np.ndarray  # int8[F], code in jfi.bits.POLARITIES


class FaultSpace:
    """Every fault of the given sites, polarities and bits.

    Args:
        sites: the S sites, with distinct names.
        polarities: codes of jfi.bits.POLARITIES; a fault model of FAULT_MODELS.
        bits: bit positions to break, all by default; a site has those that its words have. A
            fault of the whole word is one fault, booked as bit 0.

    Attributes:
        sites, polarities, bits: as given, polarities and bits in ascending order.
        size: N, the number of faults.
        cells: int64[S, W], faults of each (site, bit); W is the width of the widest site.
        site_sizes: int64[S], faults of each site.

    Raises:
        InputError: no site or two of one name, a dtype without bits, a polarity or bit that is
            repeated or does not exist, or more faults than int64 counts.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        polarities: Sequence[int],
        bits: Sequence[int] | None = None,
    ):
        self.sites = tuple(sites)
        _check_names([site.name for site in self.sites])
        self.widths = np.array([site.width for site in self.sites])
        self.polarities = _choice("polarity", polarities, len(jbits.POLARITIES))
        widest = int(self.widths.max())
        if bits is None:
            bits = (0,) if set(self.polarities) <= set(jbits.WHOLE_WORD) else range(widest)
        self.bits = _choice("bit", bits, widest)
        self.size = sum(
            site.words * int(count) * len(self.polarities)
            for site, count in zip(self.sites, self._bit_counts, strict=True)
        )
        if self.size > np.iinfo(np.int64).max:
            raise InputError(f"{self.size} faults are too many to number: int64 holds 2^63 - 1")

    @cached_property
    def cells(self) -> np.ndarray:
        has_bit = np.zeros((len(self.sites), int(self.widths.max())), np.int64)
        has_bit[:, list(self.bits)] = np.array(self.bits) < self.widths[:, None]
        words = np.array([site.words for site in self.sites], np.int64)
        return words[:, None] * has_bit * len(self.polarities)

    @cached_property
    def site_sizes(self) -> np.ndarray:
        return self.cells.sum(axis=1)

    def decode(self, ids) -> Faults:
        """The faults with ids int64[...]; fields have the shape of `ids`.

        Raises:
            InputError: an id that is not an integer in [0, N), naming its row.
        """
        ids = check_range("fault id", ids, self.size)
        site = np.searchsorted(self._ends, ids, side="right")
        rest, polarity = np.divmod(ids - self._starts[site], len(self.polarities))
        index, bit = np.divmod(rest, self._bit_counts[site])
        return Faults(
            site=site.astype(np.int32),
            index=index,
            bit=np.array(self.bits, np.int16)[bit],
            polarity=np.array(self.polarities, np.int8)[polarity],
        )

    def encode(self, faults: Faults) -> np.ndarray:
        """The ids int64[...] of `faults`; the inverse of `decode`.

        Raises:
            InputError: a fault that is not in the space, naming its row and field.
        """
        site = check_range("site", faults.site, len(self.sites))
        words = np.array([s.words for s in self.sites], np.int64)
        index = check_range("index", faults.index, words[site])
        bit = _rank("bit", faults.bit, self.bits)
        check_range("bit", faults.bit, self.widths[site])
        polarity = _rank("polarity", faults.polarity, self.polarities)
        return self._id(site, index, bit, polarity)

    def stratum_size(self, site: int | None = None, bit: int | None = None) -> int:
        """Faults in a stratum: of one site, one bit, both, or (None, None) the whole network.

        Raises:
            InputError: a site or bit that does not exist.
        """
        sites, widest = self.cells.shape
        rows = slice(None) if site is None else check_range("site", site, sites)
        columns = slice(None) if bit is None else check_range("bit", bit, widest)
        return int(self.cells[rows, columns].sum())

    def stratum_ids(self, site: int | None, bit: int | None, k) -> np.ndarray:
        """The ids int64[...] of the k-th faults of a stratum, counted in order of their ids.

        Args:
            site, bit: the stratum, as in `stratum_size`.
            k: int64[...], in [0, stratum_size(site, bit)).

        Raises:
            InputError: a site or bit that does not exist, or a `k` beyond the stratum, by row.
        """
        size = self.stratum_size(site, bit)
        k = check_range(f"fault of {self._describe(site, bit)}, number", k, size)
        if bit is None:
            return k if site is None else k + self._starts[site]
        if site is None:
            sizes = self.cells[:, bit]
            ends = np.cumsum(sizes)
            site = np.searchsorted(ends, k, side="right")
            k = k - (ends - sizes)[site]
        index, polarity = np.divmod(k, len(self.polarities))
        return self._id(site, index, np.searchsorted(self.bits, bit), polarity)

    def _id(self, site, index, bit_rank, polarity_rank) -> np.ndarray:
        within = (index * self._bit_counts[site] + bit_rank) * len(self.polarities) + polarity_rank
        return self._starts[site] + within

    def _describe(self, site: int | None, bit: int | None) -> str:
        where = "the network" if site is None else self.sites[site].name
        return where if bit is None else f"{where} bit {bit}"

    @cached_property
    def _bit_counts(self) -> np.ndarray:
        # A site's bits are the first of self.bits, which is sorted.
        return np.searchsorted(np.array(self.bits), self.widths).astype(np.int64)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.site_sizes)

    @cached_property
    def _starts(self) -> np.ndarray:
        return self._ends - self.site_sizes


def take(faults: Faults, rows) -> Faults:
    """The faults of these rows."""
    return Faults(*(column[rows] for column in faults))


def by_site(faults: Faults, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(site, the `rows` of its faults) for every site that occurs."""
    sites = faults.site[rows]
    for number in np.unique(sites):
        yield int(number), rows[sites == number]


def check_faults(faults: Faults, sites: Sequence[Site]) -> Faults:
    """F faults, their `site` a position in `sites`, as NumPy columns of the dtypes of `Faults`.

    Raises:
        InputError: columns that are not flat or of one length, or a fault that is none of the
            sites, naming its column, row and value, and the range.
    """
    if not isinstance(faults, Faults):
        raise InputError(
            f"faults are {kind(faults)}, not jfi.Faults: make them with jfi.fault_list"
        )
    faults = Faults(*map(_integers, COLUMNS, faults))
    shapes = [column.shape for column in faults]
    if faults.site.ndim != 1 or len(set(shapes)) != 1:
        forms = ", ".join(
            f"{name} {list(shape)}" for name, shape in zip(COLUMNS, shapes, strict=True)
        )
        raise InputError(f"faults have columns {forms}; they must be flat and of one length")
    site = check_range("site", faults.site, len(sites))
    words = np.array([site.words for site in sites], np.int64)
    widths = np.array([site.width for site in sites], np.int64)
    index = check_range("index", faults.index, words[site])
    bit = check_range("bit", faults.bit, widths[site])
    polarity = check_range("polarity", faults.polarity, len(jbits.POLARITIES))
    columns = zip((site, index, bit, polarity), _DTYPES, strict=True)
    return Faults(*(column.astype(dtype, copy=False) for column, dtype in columns))


def fault_list(rows: Iterable[tuple[str, Any, int, str]], sites: Sequence[Site]) -> Faults:
    """F faults from rows (site, index, bit, polarity), in their order.

    `site` is the name of one of `sites`; `index` the position of the word in it, C order, or one
    position an axis; `bit` its number; `polarity` one of jfi.bits.POLARITIES.

    Raises:
        InputError: a row that names no fault of the sites: with its number, the value and what
            would be right.
    """
    return _listed(((f"fault {n}", row) for n, row in enumerate(rows)), sites)


def read_fault_list(path: str | Path, sites: Sequence[Site]) -> Faults:
    """The faults listed in a CSV file with the columns site, index, bit and polarity.

    `site` is the name of one of `sites`; `index` the position of the word in it, C order; `bit` its
    number; `polarity` one of jfi.bits.POLARITIES. Faults keep the file's order. A row may occur
    more than once, and is then that many faults.

    Raises:
        InputError: a file that cannot be read, has another header or no fault, or a row that names
            no fault of the sites: with the file, the line, the value and what would be right.
    """
    rows = _read_rows(Path(path))
    if not rows:
        raise InputError(f"fault list {path} has no faults below its header")
    return _listed(((f"fault list {path}, line {n}", row) for n, row in rows), sites)


def _listed(rows: Iterable[tuple[str, Sequence[Any]]], sites: Sequence[Site]) -> Faults:
    """The faults of rows, each with where it is from."""
    numbers = {site.name: i for i, site in enumerate(sites)}
    parsed = [_parse_row(where, row, sites, numbers) for where, row in rows]
    columns = zip(*parsed, strict=True) if parsed else [()] * len(COLUMNS)
    return Faults(*(np.array(c, dtype) for c, dtype in zip(columns, _DTYPES, strict=True)))


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, cells) of each row below the header; blank lines are left out."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, [c.strip() for c in row]) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"fault list {path} cannot be read as CSV: {error}") from error
    header = rows[0][1] if rows else []
    if header != list(COLUMNS):
        raise InputError(
            f"fault list {path} starts with {','.join(header)!r}: "
            f"the first line must be the header {','.join(COLUMNS)}"
        )
    return rows[1:]


def _parse_row(
    where: str, row: Sequence[Any], sites: Sequence[Site], numbers: dict[str, int]
) -> tuple[int, int, int, int]:
    if not isinstance(row, tuple | list):
        raise InputError(f"{where} is {kind(row)}, not one of {COLUMNS}")
    if len(row) != len(COLUMNS):
        raise InputError(f"{where}: {len(row)} cells, not the {len(COLUMNS)} of {COLUMNS}")
    name, index, bit, polarity = row
    if name not in numbers:
        raise InputError(f"{where}: no site {name!r}; the sites are {_some(numbers)}")
    if polarity not in jbits.POLARITIES:
        raise InputError(f"{where}: polarity {polarity!r} is none of {_some(jbits.POLARITIES)}")
    site = sites[numbers[name]]
    return (
        numbers[name],
        _parse_index(f"{where}: index of {name}", index, site),
        _parse_integer(f"{where}: bit of {name}", bit, site.width),
        jbits.POLARITIES.index(polarity),
    )


def _parse_index(what: str, index: Any, site: Site) -> int:
    """A position in C order, given as such or as one position an axis."""
    if not isinstance(index, tuple | list):
        return _parse_integer(what, index, site.words)
    if len(index) != len(site.shape):
        raise InputError(f"{what} is {index!r}, not {len(site.shape)} positions in {site.shape}")
    axes = zip(index, site.shape, strict=True)
    at = [_parse_integer(f"{what}, axis {n}", i, end) for n, (i, end) in enumerate(axes)]
    return int(np.ravel_multi_index(at, site.shape)) if at else 0


def _parse_integer(what: str, value: Any, end: int) -> int:
    number = int(value) if isinstance(value, int | np.integer) else value
    if not re.fullmatch(r"[0-9]{1,18}", str(number)) or int(number) >= end:
        raise InputError(f"{what} is {number!r}, not an integer from 0 to {end - 1}")
    return int(number)


def _some(names: Sequence[str], most: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_names(names: list[str]) -> None:
    if not names:
        raise InputError("a fault space needs at least one site")
    repeated = sorted(name for name, times in Counter(names).items() if times > 1)
    if repeated:
        raise InputError(f"site {repeated[0]!r} is given more than once")


def _choice(what: str, values: Sequence[int], end: int) -> tuple[int, ...]:
    """`values` in ascending order, if they are distinct integers in [0, end)."""
    chosen = sorted(int(v) for v in values)
    if not chosen or len(set(chosen)) != len(chosen) or chosen[0] < 0 or chosen[-1] >= end:
        raise InputError(f"{what} choice {chosen} must be distinct integers from 0 to {end - 1}")
    return tuple(chosen)


def check_range(what: str, values, end) -> np.ndarray:
    """`values` as int64, if they are integers in [0, end); `end` broadcasts against them."""
    values = _integers(what, values)
    bad = (values < 0) | (values >= end)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        limit = int(np.broadcast_to(end, values.shape).flat[row])
        raise InputError(f"{what} {values.flat[row]} in row {row} is not in 0 to {limit - 1}")
    return values.astype(np.int64)


def _integers(what: str, values) -> np.ndarray:
    try:
        values = np.asarray(values)
    except (TypeError, ValueError):  # rows of unequal length
        raise InputError(f"{what} is {kind(values)}, not an array of integers") from None
    if values.dtype.kind not in "iu" and values.size:
        raise InputError(f"{what} has dtype {values.dtype}, not an integer dtype")
    return values


def _rank(what: str, values, choice: tuple[int, ...]) -> np.ndarray:
    """Position of each value in the sorted `choice`."""
    values = np.asarray(values)
    bad = ~np.isin(values, choice)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise InputError(f"{what} {values.flat[row]} in row {row} is none of {choice}")
    return np.searchsorted(np.array(choice), values)
