"""The work directory of a campaign: what was run, what came out, safe against a kill.

``manifest.json``
    Everything needed to repeat the campaign, written once. ``config`` (the flags), ``hashes`` (of
    weights and data) and ``identity`` (all that decides outcomes) must match for a campaign to go
    on; other parts (versions, device) may differ. ``forms`` tells dtype and shape of each site, so
    that a record can be read without the network.
``outcomes/00000.parquet`` ...
    One row a fault, with the word it breaks as it is without (``word``; 0 of run-time values), in
    shards that are written whole or not at all, each with the hash of the identity it was made
    under. The same rows give the same bytes.
``summary.json``
    The estimates, in strict JSON (NaN and infinities become null).
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jfi.errors import InputError
from jfi.faults import Faults
from jfi.outcomes import Outcomes

MANIFEST, SUMMARY, SHARDS = "manifest.json", "summary.json", "outcomes"
IDENTITY, INFERENCE = 0, 1  # how a row was decided: known without a run, or by running it
BITS = ("critical_bits", "masked_bits")  # columns of packed bits, one an image
# Of a flag that is not on record: it came later.
_DEFAULTS = {"config": {"estimate": "faults"}}
_IDENTITY = "jfi_identity"  # in the metadata of a shard
_PARTIAL = ".partial"  # suffix of files being written


def open_workdir(path: str | os.PathLike, manifest: Mapping[str, Any]) -> Path:
    """The work directory at ``path``, new or to be gone on with; its manifest on disk.

    ``manifest`` holds ``config``, ``hashes`` and ``identity`` (flat dicts) and whatever else is
    worth keeping. An existing manifest is left as it is. Raises InputError when the directory
    cannot be created or written, when its manifest cannot be read or is gone from beside its
    shards, and when one of the three differs from it, naming each entry with both values.
    """
    workdir = Path(path)
    _make_writable(workdir)
    if not (workdir / MANIFEST).exists():
        if any((workdir / SHARDS).glob("*.parquet")):
            raise InputError(
                f"work directory {workdir} holds outcomes but no {MANIFEST}, so that nothing tells "
                "of which campaign they are; name another directory"
            )
        _write_json(workdir / MANIFEST, manifest)
        return workdir
    there, here = read_manifest(workdir), _strict(manifest)
    # What a user knows by name comes before what only decides outcomes.
    for part, what in (("config", "flags"), ("hashes", "content"), ("identity", "content")):
        old, new = (_DEFAULTS.get(part, {}) | x.get(part, {}) for x in (there, here))
        _refuse_difference(workdir, f"other {what}", old, new)
    return workdir


def _make_writable(workdir: Path) -> None:
    """Create the directory, prove that it takes a file, and clear what a kill left behind."""
    try:
        (workdir / SHARDS).mkdir(parents=True, exist_ok=True)
        for folder in (workdir, workdir / SHARDS):
            for leftover in folder.glob(f"*{_PARTIAL}"):
                leftover.unlink()
            probe = folder / f"probe{_PARTIAL}"
            probe.write_bytes(b"probe")
            probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"work directory {workdir} can't be written: {reason}") from error


def _refuse_difference(workdir: Path, what: str, old: dict, new: dict) -> None:
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if keys:
        named = "; ".join(
            f"{key} was {_shown(old.get(key))}, is {_shown(new.get(key))}" for key in keys
        )
        raise InputError(
            f"work directory {workdir} holds a campaign with {what}: {named}. "
            "Go on with the same, or name another directory"
        )


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)


def read_manifest(workdir: str | os.PathLike) -> dict:
    """The manifest. Raises InputError when it is missing or damaged."""
    return _read_json(Path(workdir) / MANIFEST)


def write_summary(workdir: str | os.PathLike, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json`` whole; NamedTuples become objects, NaN null. Raises OSError."""
    _write_json(Path(workdir) / SUMMARY, summary)


def read_summary(workdir: str | os.PathLike) -> dict:
    """The summary. Raises InputError when it is missing or damaged."""
    return _read_json(Path(workdir) / SUMMARY)


def shard_path(workdir: str | os.PathLike, number: int) -> Path:
    """Where shard ``number`` of a work directory is, or will be."""
    return Path(workdir) / SHARDS / f"{number:05d}.parquet"


def has_shard(workdir: str | os.PathLike, number: int) -> bool:
    """Whether shard ``number`` is there whole; a damaged one counts as missing."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        parquet.read_table(shard_path(workdir, number))
    except (OSError, pa.ArrowException):
        return False
    return True


def write_shard(
    workdir: str | os.PathLike,
    number: int,
    ids: np.ndarray,
    faults: Faults,
    outcomes: Outcomes,
    decided: np.ndarray | int = INFERENCE,
    step: np.ndarray | None = None,
    identity: str = "",
    word: np.ndarray | None = None,
) -> None:
    """Write the outcomes of F faults as shard ``number``, whole or not at all.

    ``ids`` is int64 ``[F]``, ``decided`` uint8 ``[F]`` or one value (``IDENTITY``,
    ``INFERENCE``), ``step`` int32 ``[F]`` where there are transient faults, ``identity`` the hash
    of the campaign's, ``word`` uint64 ``[F]`` the golden words. Raises OSError when the file can't
    be written: nothing else is touched.
    """
    from pyarrow import parquet

    table = _table(np.asarray(ids), faults, outcomes, decided, {"step": step, "word": word})
    # One row group and fixed settings: the same rows give the same bytes.
    settings = {"compression": "zstd", "compression_level": 3, "store_schema": False}

    def write(file):
        with parquet.ParquetWriter(file, table.schema, **settings) as writer:
            writer.add_key_value_metadata({_IDENTITY: identity})
            writer.write_table(table, row_group_size=max(len(table), 1))

    _write_whole(shard_path(workdir, number), write)


def _table(ids: np.ndarray, faults: Faults, outcomes: Outcomes, decided, more: Mapping[str, Any]):
    import pyarrow as pa

    counts = {name: column for name, column in outcomes._asdict().items() if column is not None}
    bits = {name: counts.pop(name) for name in BITS if name in counts}
    columns = {
        "id": ids.astype(np.int64),
        "site": faults.site.astype(np.int32),
        "index": faults.index.astype(np.int64),
        "bit": faults.bit.astype(np.int16),
        "polarity": faults.polarity.astype(np.int8),
        "decided": np.broadcast_to(np.asarray(decided, np.uint8), ids.shape),
        **{name: column for name, column in more.items() if column is not None},
        **{name: np.asarray(column, np.int32) for name, column in counts.items()},
    }
    arrays = {name: pa.array(np.ascontiguousarray(x)) for name, x in columns.items()}
    for name, rows in bits.items():
        packed = pa.py_buffer(np.ascontiguousarray(rows, np.uint8))
        kind = pa.binary(rows.shape[1])
        arrays[name] = pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, packed])
    return pa.table(arrays)


def read_shards(
    workdir: str | os.PathLike, columns: Sequence[str] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The shards in order, each as a dict of NumPy columns; only ``columns`` where given.

    Columns of ``BITS`` come as uint8 ``[F, ceil(B / 8)]``. Raises InputError for a shard that is
    damaged or lacks a column.
    """
    for path in sorted((Path(workdir) / SHARDS).glob("*.parquet")):
        yield read_shard(workdir, int(path.stem), columns)


def read_shard(
    workdir: str | os.PathLike, number: int, columns: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Shard ``number``, as in `read_shards`."""
    import pyarrow as pa
    from pyarrow import parquet

    path = shard_path(workdir, number)
    try:
        table = parquet.read_table(path)
        table = table if columns is None else table.select(list(columns))
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"outcome shard {path} can't be read: {reason}") from error
    return {name: _column(table[name].combine_chunks()) for name in table.column_names}


def _column(array) -> np.ndarray:
    """A pyarrow array as NumPy; fixed-size binary of width w as uint8 ``[F, w]``."""
    import pyarrow as pa

    if not pa.types.is_fixed_size_binary(array.type):
        return array.to_numpy(zero_copy_only=False)
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1], np.uint8, len(array) * width, array.offset * width)
    return data.reshape(len(array), width)


def recorded(
    workdir: str | os.PathLike, number: int, ids: np.ndarray, columns: Sequence[str], identity: str
) -> dict[str, np.ndarray]:
    """Shard ``number`` of the faults ``ids`` int64 ``[F]``, as in `read_shard`.

    Raises InputError for a shard that was made under another identity, or is of other faults.
    """
    from pyarrow import parquet

    shard = read_shard(workdir, number, ("id", *columns))
    path = shard_path(workdir, number)
    made_by = (parquet.read_metadata(path).metadata or {}).get(_IDENTITY.encode(), b"").decode()
    if made_by != identity or not np.array_equal(shard["id"], ids):
        what = "the outcomes of another campaign" if made_by != identity else "other faults"
        raise InputError(
            f"{path} holds {what} than this one; move it away, or name another work directory"
        )
    return shard


def check_count(workdir: str | os.PathLike, shards: int) -> None:
    """Raises InputError where outcomes are there that are not of the first so many ``shards``."""
    own = {shard_path(workdir, number).stem for number in range(shards)}
    for path in sorted((Path(workdir) / SHARDS).glob("*.parquet")):
        if path.stem not in own:
            raise InputError(
                f"{path} is not of this campaign, which has {shards} shards; move it away, or name "
                "another work directory"
            )


def hash_json(value: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of what is strict JSON; the order of keys does not matter."""
    text = json.dumps(_strict(value), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_arrays(named: Iterable[tuple[str, Any]]) -> str:
    """SHA-256 (hex) of arrays by name, dtype, shape and C-order content; order does not matter."""
    digest = hashlib.sha256()
    for name, value in sorted(named, key=lambda pair: pair[0]):
        array = np.ascontiguousarray(value)
        digest.update(json.dumps([name, str(array.dtype), list(np.shape(value))]).encode())
        digest.update(array.view(np.uint8).reshape(-1) if array.size else b"")
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """``value`` of dicts, lists and Python's numbers alone; NamedTuples become dicts."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    return value


def _strict(value: Any) -> Any:
    """``value`` as strict JSON holds it: as `plain` makes it, NaN and infinities as null."""
    return _finite(plain(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged, not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: a JSON object is needed")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(_strict(value), indent=2, allow_nan=False) + "\n"
    _write_whole(path, lambda file: file.write(text.encode()))


def _write_whole(path: Path, write) -> None:
    """Write a file so that it is there whole or not at all, whatever happens meanwhile."""
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
