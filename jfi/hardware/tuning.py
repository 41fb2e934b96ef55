"""What is fastest on this machine, found once and kept: the chunk size, and ways to run faults.

Kept in `jfi` within the user's cache folder, like compiled programs.

A chunk should be large enough to keep every core or the whole GPU busy, and small enough for its
values to stay in the caches. What is timed is what suffixes spend their time on: a convolution.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfi.hardware.devices import SHARED, SPREAD, Hardware, hardware

SHAPE = (16, 16, 32)  # of a value of one pair, in the middle of a small network
CPU_BYTES = tuple(1 << k for k in range(20, 25))
OTHER_BYTES = tuple(1 << k for k in range(23, 29))  # a GPU wants more at a time
REPEATS = 5
WORK = 1 << 27  # bytes of values of one timing, on a CPU
ENOUGH = 0.95  # of the best rate: the smallest chunk that reaches it is taken


def tuned(hardware: Hardware, path: str | os.PathLike) -> Hardware:
    """`hardware` with the best chunk size, from the JSON file at `path` or measured and kept there.

    A file that can't be read or written is no error: it is measured again then.
    """
    known, machine = _read(Path(path)), _machine(hardware)
    if machine not in known:
        known[machine] = _best(dict(_rates(hardware)))
        _write(Path(path), known)
    return hardware._replace(chunk_bytes=known[machine])


def usual() -> Hardware:
    """All local devices with the chunk size that is fastest on them; compiled programs are kept."""
    keep_compiled()
    found = folder()
    return hardware() if found is None else tuned(hardware(), found / "chunks.json")


def keep_compiled() -> None:
    """Keep compiled programs between runs, unless JAX was told where to already."""
    found = folder()
    if jax.config.jax_compilation_cache_dir is None and found is not None:
        jax.config.update("jax_compilation_cache_dir", str(found / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def folder() -> Path | None:
    """Where things are kept between runs; None if it can't be made."""
    try:
        found = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jfi"
        found.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return found


def kept(own: Hardware, what: str, find: Callable[[], Any]) -> Any:
    """What was found of `what` on this machine before, else what `find` says now."""
    found = folder()
    if found is None:
        return find()
    known, key = _read(found / "ways.json"), f"{_machine(own)}: {what}"
    if key not in known:
        known[key] = find()
        _write(found / "ways.json", known)
    return known[key]


def seconds(run: Callable[[], Any]) -> float:
    """The better of two times, once it was run to compile."""
    run()
    return min(_spent(run), _spent(run))


def _spent(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


def _best(rates: dict[int, float]) -> int:
    wanted = ENOUGH * max(rates.values())
    return min(size for size, rate in rates.items() if rate >= wanted)


def _rates(hardware: Hardware) -> Iterator[tuple[int, float]]:
    """(chunk bytes, bytes a second of a device), each size in turn."""
    sizes = CPU_BYTES if jax.default_backend() == "cpu" else OTHER_BYTES
    pair = jax.ShapeDtypeStruct(SHAPE, np.float32)
    nbytes = pair.size * pair.dtype.itemsize
    kernel = hardware.share(jnp.full((3, 3, SHAPE[-1], SHAPE[-1]), 1e-3))
    work = max(WORK, 4 * max(sizes))
    step = hardware.jit(_step, SPREAD, SHARED)
    for size in sizes:
        values = hardware.zeros(size // nbytes, pair)
        jax.block_until_ready(step(values, kernel))
        spent = [_seconds(step, values, kernel, work // size) for _ in range(REPEATS)]
        yield size, work / statistics.median(spent)


def _step(values, kernel):
    for _ in range(2):
        values = jax.nn.relu(
            jax.lax.conv_general_dilated(
                values, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=jax.lax.Precision.HIGHEST,
            )
        )  # fmt: skip
    return values


def _seconds(step, values, kernel, times: int) -> float:
    started = time.perf_counter()
    jax.block_until_ready([step(values, kernel) for _ in range(times)])
    return time.perf_counter() - started


def _machine(hardware: Hardware) -> str:
    device = hardware.mesh.devices.flat[0]
    kind = f"{device.platform} {device.device_kind} x{hardware.count}"
    return f"{kind}, {os.cpu_count()} cores, jax {jax.__version__}"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, known: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=2) + "\n")
    except OSError:
        return
