"""Recordings of event cameras and cochleas as frames, read and binned by tonic.

    nmnist         N-MNIST: event files of 5 bytes an event, 34x34 pixels, two polarities; either
                   Train/<digit>/*.bin and Test/<digit>/*.bin, as published, or <number>.bs2 with
                   lists train*.txt and test*.txt of lines "number digit"
    shd            Spiking Heidelberg Digits: shd_train.h5, shd_test.h5; 700 channels, 20 classes
    dvs128gesture  DVS128 Gesture, 128x128 pixels, two polarities, 11 classes; either
                   ibmGestureTrain/<user>/<class>.npy and ibmGestureTest/..., as tonic's download
                   unpacks them, classes from 0, or <class>.bs2 in the coding of N-MNIST's files,
                   classes from 1, all of them test recordings

A binning says how a recording becomes frames of counts [T, H, W, P] or [T, channels]. The usual
ones are those of SpikingJET (A. B. Gogebakan et al., ETS 2024), as its released tool feeds its
networks: T equal windows of each recording, events counted, lone events dropped first, every second
(N-MNIST) or fourth (DVS128) row and column kept.

Sources: Orchard et al., Frontiers in Neuroscience 9, 2015 (N-MNIST); Cramer et al., IEEE TNNLS 33,
2022 (SHD); Amir et al., CVPR 2017 (DVS128 Gesture).
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jfi.errors import InputError

SPLITS = ("train", "test")
WAYS = ("time", "count", "window")
EVENT_BYTES = 5


class Binning(NamedTuple):
    """How events become frames.

    steps: time steps T, of every recording.
    by: one of WAYS: `time`, T equal windows from the first event to the last; `count`, T windows
      of as many events each; `window`, windows of `window` microseconds from time 0, cut off or
      filled with empty frames at T.
    every: every so-manieth row and column (of a cochlea, channel) is kept, from the first.
    denoise: microseconds within which a direct neighbour must have had an event, else an event is
      dropped; 0 keeps all. Of cameras only.
    binary: 1 where there is any event, in place of their number.
    """

    steps: int
    by: str = "time"
    window: int = 3000
    every: int = 1
    denoise: int = 0
    binary: bool = False


class Source(NamedTuple):
    """A data set of recordings.

    recordings: `(folder, split)` -> (events, label) one by one, events a structured array of tonic.
    sensor: (width, height, polarities); channels are a width. classes: labels are 0 to classes - 1.
    usual: the binning where none is asked for.
    """

    recordings: Callable[[Path, str], Iterator[tuple[np.ndarray, int]]]
    sensor: tuple[int, int, int]
    classes: int
    usual: Binning


def load(name: str, folder: Path, binning: Binning | None = None, splits=SPLITS) -> dict:
    """The arrays of a data set: x_<split> [B, T, ...] uint8 and y_<split> [B] int32 for the splits
    that the folder holds, and how it was binned, as text, under `frames`.

    Raises InputError where tonic isn't installed, for a binning that can't be, and where the folder
    holds no test recordings or a file isn't as published.
    """
    if importlib.util.find_spec("tonic") is None:
        raise InputError(f"reading {name} needs tonic: pip install 'jfi[events]'")
    source = SOURCES[name]
    binning = binning or source.usual
    check(binning)
    arrays = {"frames": np.array(f"{name}: {binning}")}
    for split in splits:
        found = [
            (frames(events, source.sensor, binning), label)
            for events, label in source.recordings(folder, split)
        ]
        if found:
            x, y = zip(*found, strict=True)
            arrays |= {f"x_{split}": np.stack(x), f"y_{split}": np.array(y, np.int32)}
    if "x_test" not in arrays:
        raise InputError(f"data_dir {folder}: holds no test recordings of {name}")
    return arrays


def check(binning: Binning) -> None:
    """Raise InputError where a binning makes no frames."""
    if binning.by not in WAYS:
        raise InputError(f"binning by {binning.by!r} is unknown; known are {', '.join(WAYS)}")
    for field in ("steps", "window", "every"):
        if getattr(binning, field) < 1:
            raise InputError(f"{field} {getattr(binning, field)}: 1 or more is right")
    if binning.denoise < 0:
        raise InputError(f"denoise {binning.denoise}: microseconds, 0 or more, are right")


def frames(events: np.ndarray, sensor: tuple[int, int, int], binning: Binning) -> np.ndarray:
    """Counts [T, H, W, P] of a camera's events, or [T, channels] of a cochlea's, uint8.

    `events` has fields t (microseconds, ascending), x, p and, of a camera, y.
    Raises InputError where a count is above 255.
    """
    from tonic import functional

    camera = "y" in events.dtype.names
    if camera and binning.denoise and len(events):
        events = functional.denoise_numpy(events, filter_time=binning.denoise)
    shape = sensor[::-1] if camera else (1, sensor[0])
    counts = np.zeros((binning.steps, *shape), np.int16)
    if len(events):
        counts = functional.to_frame_numpy(events, sensor, **_slices(binning))
    counts = np.moveaxis(counts, 1, -1)[:, :: binning.every, :: binning.every]
    if binning.binary:
        counts = np.minimum(counts, 1)
    if counts.max() > np.iinfo(np.uint8).max:
        raise InputError(f"frames of {counts.max()} events in a pixel; more steps are right")
    return counts.astype(np.uint8) if camera else counts[..., 0].astype(np.uint8)


def _slices(binning: Binning) -> dict:
    """What tonic calls the way of cutting a recording into frames."""
    if binning.by == "time":
        return {"n_time_bins": binning.steps}
    if binning.by == "count":
        return {"n_event_bins": binning.steps}
    end = binning.steps * binning.window
    return {"time_window": binning.window, "start_time": 0, "end_time": end}


def _nmnist(folder: Path, split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Of one split, in the order of the list, or of digits and file names."""
    lists = sorted(folder.glob(f"{split}*.txt"))
    if lists:
        rows = np.loadtxt(lists[0], dtype=int, ndmin=2, comments="#")
        files = [(folder / f"{number}.bs2", int(digit)) for number, digit in rows]
    else:
        found = sorted(folder.glob(f"{split.title()}/[0-9]/*.bin"))
        files = [(path, int(path.parent.name)) for path in found]
    return ((_read_camera(path, SOURCES["nmnist"].sensor), digit) for path, digit in files)


def _gestures(folder: Path, split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Of one split, in the order of users and classes; recordings by number alone are for tests."""
    sensor, numbered = SOURCES["dvs128gesture"].sensor, []
    if split == "test":
        numbered = [path for path in folder.glob("*.bs2") if path.stem.isdecimal()]
    for path in sorted(numbered, key=lambda path: int(path.stem)):
        yield _read_camera(path, sensor), int(path.stem) - 1
    unpacked = folder.glob(f"ibmGesture{split.title()}/*/*.npy")
    for path in sorted(unpacked, key=lambda path: (path.parent.name, int(path.stem))):
        yield _read_gesture(path, sensor), int(path.stem)


def _read_gesture(path: Path, sensor: tuple[int, int, int]) -> np.ndarray:
    """Events of an array [E, 4] of x, y, polarity and milliseconds."""
    from tonic import io

    try:
        x, y, p, t = np.load(path, allow_pickle=False).T
    except (ValueError, EOFError) as error:
        raise InputError(f"events {path}: truncated, or no array [E, 4] of events") from error
    return _inside(path, io.make_structured_array(x, y, t * 1000, p), sensor)


def _read_camera(path: Path, sensor: tuple[int, int, int]) -> np.ndarray:
    """Events (x, y, t in microseconds, p) of a file of 5 bytes each: x, y, polarity and time."""
    from tonic import io

    if not path.is_file():
        raise InputError(f"events {path}: no such file")
    if path.stat().st_size % EVENT_BYTES:
        raise InputError(f"events {path}: {path.stat().st_size} bytes; {EVENT_BYTES} an event")
    return _inside(path, io.read_mnist_file(path, io.events_struct), sensor)


def _inside(path: Path, events: np.ndarray, sensor: tuple[int, int, int]) -> np.ndarray:
    """The events; InputError where one is off the sensor."""
    outside = (events["x"] >= sensor[0]) | (events["y"] >= sensor[1])
    if outside.any():
        x, y = (int(events[axis][outside][0]) for axis in "xy")
        raise InputError(
            f"events {path}: one at ({x}, {y}), outside {sensor[0]}x{sensor[1]} pixels"
        )
    return events


def _shd(folder: Path, split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Of one split, in the order of its file; times there are seconds."""
    import h5py
    from tonic import io

    path, fields = folder / f"shd_{split}.h5", np.dtype([("t", int), ("x", int), ("p", int)])
    if not path.is_file():
        return
    try:
        with h5py.File(path) as file:
            trains = file["spikes/times"], file["spikes/units"], file["labels"]
            for times, units, label in zip(*trains, strict=True):
                micros = times.astype(np.float64) * 1e6
                yield io.make_structured_array(micros, units, 0, dtype=fields), int(label)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"events {path}: truncated, or not a file of SHD ({error})") from error


SOURCES = {
    "nmnist": Source(_nmnist, (34, 34, 2), 10, Binning(100, every=2, denoise=10_000)),
    "shd": Source(_shd, (700, 1, 1), 20, Binning(100)),
    "dvs128gesture": Source(_gestures, (128, 128, 2), 11, Binning(25, every=4, denoise=10_000)),
}
