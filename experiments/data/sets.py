"""Data sets by name or file; `python -m experiments.data --help` says which there are."""

import gzip
import importlib.util
import io
import math
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data import events
from jfi.errors import InputError
from nets.transformer import CHARACTERS

PREPARED = ("mnist", "cifar10")
DATA_DIR = "~/tensorflow_datasets"
DIGITS_TRAIN = 1437  # of 1,797; four fifths
MNIST_FILES = {
    "x_train": "train-images-idx3-ubyte.gz",
    "y_train": "train-labels-idx1-ubyte.gz",
    "x_test": "t10k-images-idx3-ubyte.gz",
    "y_test": "t10k-labels-idx1-ubyte.gz",
}
# Of `text`: characters of one text, those from one text to the next, and the share of the whole,
# at its end, that is kept for testing.
LENGTH, STRIDE, HELD_OUT = 32, 8, 0.1
FRAMES = "frames"  # names the array that tells frames of events from images, and their binning


class Dataset(NamedTuple):
    """Images float32 in [0, 1], [B, H, W, C], not normalised; labels int32 [B] from 0.

    Of a set of events, counts float32 [B, T, H, W, P] or [B, T, channels] in place of images; of
    `text`, characters float32 [B, T], and as labels int32 [B, T] the one after each.

    The training half is None where there is none or it wasn't asked for.
    """

    name: str
    x_train: np.ndarray | None
    y_train: np.ndarray | None
    x_test: np.ndarray
    y_test: np.ndarray


class Inputs(NamedTuple):
    """What networks of any kind are tested on: x as it is held, [B, ...], of numbers of any type;
    labels as a criterion takes them, int32 [B] from 0 or numbers [B, ...]; None where there are
    none."""

    name: str
    x: np.ndarray
    y: np.ndarray | None


def names() -> tuple[str, ...]:
    """Data sets known by name; `load` also takes the path of a .npz file."""
    return ("digits", "text", *PREPARED, *events.SOURCES)


def load(
    name: str | os.PathLike,
    data_dir: str | os.PathLike | None = None,
    manual_dir: str | os.PathLike | None = None,
    *,
    train: bool = True,
    pixel_max: int | None = None,
) -> Dataset:
    """The data set of that name, or in that .npz file; without its training half if not `train`.

    uint8 images are divided by `pixel_max`, the value of white: 255 where it is None, unless the
    images are of 0 and 1 alone, which may be masks and have to be told.

    `data_dir` is where tensorflow-datasets keeps prepared sets (default ~/tensorflow_datasets), or
    the folder of a set of events; with `manual_dir`, a set not prepared yet is prepared from the
    files there.
    Raises InputError for an unknown or unprepared set, for arrays that aren't images with their
    labels, and for images that `pixel_max` is not of.
    """
    name = os.fspath(name)
    splits = ("train", "test") if train else ("test",)
    if name == "text":
        return _text(train)
    if name == "digits":
        arrays = _digits()
    elif name in PREPARED:
        arrays = _prepared(name, Path(data_dir or DATA_DIR).expanduser(), manual_dir, splits)
    elif name in events.SOURCES:
        arrays = events.load(name, Path(data_dir or DATA_DIR).expanduser(), splits=splits)
    elif name.endswith(".npz"):
        arrays = _read_npz(Path(name))
    else:
        known = ", ".join(names())
        raise InputError(f"dataset {name!r} is unknown; known are {known} and any .npz file")
    name = Path(name).stem if name.endswith(".npz") else name
    return _dataset(name, arrays, splits, pixel_max)


def inputs(name: str | os.PathLike, data_dir: str | os.PathLike | None = None) -> Inputs:
    """The test half of a data set for networks that are not the project's.

    Of a .npz file, x_test exactly as the file holds it: of any rank and type of numbers, and y_test
    may be absent. Of a set known by name, what `load` gives.
    Raises InputError as `load`, and where x_test is missing, empty or no numbers, or y_test is not
    as many labels.
    """
    name = os.fspath(name)
    if not name.endswith(".npz"):
        dataset = load(name, data_dir, train=False)
        return Inputs(dataset.name, dataset.x_test, dataset.y_test)
    arrays = _read_npz(Path(name), ("x_test", "y_test"))
    what = f"dataset {Path(name).stem}"
    if "x_test" not in arrays:
        raise InputError(f"{what}: lacks x_test, what the network is tested on, [B, ...]")
    x = arrays["x_test"]
    if x.ndim < 2 or not x.size or x.dtype.kind not in "biuf":
        raise InputError(f"{what}: x_test is {x.dtype}{list(x.shape)}; numbers [B, ...] are right")
    if "y_test" not in arrays:
        return Inputs(Path(name).stem, x, None)
    y = arrays["y_test"]
    if y.dtype.kind not in "biuf" or not y.ndim:
        raise InputError(f"{what}: y_test is {y.dtype}{list(y.shape)}; numbers [B, ...] are right")
    if y.ndim == 1 and y.dtype.kind in "iu":
        y = _labels(f"{what}: y_test", y)
    if len(y) != len(x):
        raise InputError(f"{what}: x_test has {len(x)}, y_test {len(y)} labels; as many are right")
    return Inputs(Path(name).stem, x, y)


def add_jpegs(dataset: Dataset, path: str | os.PathLike) -> Dataset:
    """The data set with the JPEG images of a tar file after those of its training half.

    The tar holds train/<class>/<name>.jpg; labels are the places of the classes in alphabetical
    order, as CIFAR-10's are. What is outside train/ is left alone. Needs Pillow.
    Raises InputError where the file is missing, damaged, or without such images of one shape.
    """
    images, labels = _read_jpegs(Path(path))
    if images.shape[1:] != dataset.x_test.shape[1:]:
        raise InputError(
            f"images {path}: of shape {images.shape[1:]}; those of dataset {dataset.name} have "
            f"{dataset.x_test.shape[1:]}"
        )
    if dataset.x_train is not None:
        images = np.concatenate([dataset.x_train, images])
        labels = np.concatenate([dataset.y_train, labels])
    return dataset._replace(x_train=images, y_train=labels)


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Raise InputError where a label is outside 0 .. num_classes - 1."""
    for key in ("y_train", "y_test"):
        labels = getattr(dataset, key)
        if labels is not None and labels.max() >= num_classes:
            at = int(np.argmax(labels >= num_classes))
            raise InputError(
                f"dataset {dataset.name}: {key}[{at}] is {labels[at]}; "
                f"labels of {num_classes} classes are 0 to {num_classes - 1}"
            )


def prepare(name: str, data_dir: Path, manual_dir: str | os.PathLike | None = None) -> Path:
    """Have tensorflow-datasets prepare a set as array_record files; the folder they are in.

    Raises InputError where TensorFlow isn't installed or an official file is missing.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError(
            f"preparing {name} needs TensorFlow (pip install tensorflow-cpu); without it: "
            "python -m experiments.data --dataset=mnist --manual_dir=FOLDER --out=mnist.npz"
        )
    if name == "mnist" and manual_dir is not None:
        _check_files(Path(manual_dir))
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(download_config=config)
    return Path(builder.data_dir)


def convert_mnist(manual_dir: str | os.PathLike, out: str | os.PathLike) -> None:
    """Write the four official MNIST files as one .npz; InputError where one isn't as published."""
    _check_files(Path(manual_dir))
    arrays = {key: read_idx(Path(manual_dir) / file) for key, file in MNIST_FILES.items()}
    _dataset("mnist", arrays, ("train", "test"))  # checks them
    write_npz(out, arrays)


def write_npz(out: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as a .npz file, whole or not at all."""
    out = Path(out)
    temporary = out.with_name(f".{out.name}.part")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, out)


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """The uint8 array of a gzipped IDX file: 0, 0, type 8, rank, big-endian sizes, values."""
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: truncated, or not gzip ({error})") from error
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise InputError(f"{path}: not an IDX file of unsigned bytes")
    shape = np.frombuffer(content, ">u4", content[3], offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
    if values.size != math.prod(shape):
        raise InputError(f"{path}: holds {values.size} values; its header says {shape}")
    return values.reshape(shape)


def _digits() -> dict[str, np.ndarray]:
    """Scikit-learn's digits, 0 .. 16 scaled to [0, 1], in a fixed order and split.

    The order comes from the raw stream of Philox, which no release of NumPy changes.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.argsort(np.random.Philox(0).random_raw(len(labels)))
    images, labels = (images.reshape(-1, 8, 8, 1) / 16)[order], labels[order]
    return {
        "x_train": images[:DIGITS_TRAIN],
        "y_train": labels[:DIGITS_TRAIN],
        "x_test": images[DIGITS_TRAIN:],
        "y_test": labels[DIGITS_TRAIN:],
    }


def _text(train: bool) -> Dataset:
    """The reference of the language that Python's own `help` shows, cut into short texts.

    Its first nine tenths are for training, the rest for testing; another release of Python has
    another text. It repeats itself: 18% of the test texts of Python 3.11 are in the training half
    too, word for word. Characters are numbered as in `nets.transformer.CHARACTERS`, others are
    blanks.
    """
    from pydoc_data.topics import topics

    whole = "".join(topics[name] for name in sorted(topics))
    known = {character: number for number, character in enumerate(CHARACTERS)}
    numbers = np.array([known.get(character, known[" "]) for character in whole], np.int32)
    border = round(len(numbers) * (1 - HELD_OUT))
    halves = []
    for half, step in ((numbers[:border], STRIDE), (numbers[border:], LENGTH)):
        texts = np.lib.stride_tricks.sliding_window_view(half, LENGTH + 1)[::step]
        halves.append((texts[:, :-1].astype(np.float32), texts[:, 1:].copy()))
    return Dataset("text", *(halves[0] if train else (None, None)), *halves[1])


def _prepared(
    name: str, data_dir: Path, manual_dir: str | os.PathLike | None, splits: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Arrays of a set that tensorflow-datasets prepared, read without TensorFlow."""
    versions = sorted((data_dir / name).glob("*/dataset_info.json"))
    if not versions and manual_dir is None:
        raise InputError(_how_to_prepare(f"dataset {name} isn't prepared in {data_dir}", name))
    folder = versions[-1].parent if versions else prepare(name, data_dir, manual_dir)
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        stored = f"{folder} holds {builder.info.file_format.value}, not array_record"
        raise InputError(_how_to_prepare(stored, name))
    arrays = {}
    for split in splits:
        source = builder.as_data_source(split=split)
        examples = source.__getitems__(range(len(source)))
        arrays[f"x_{split}"] = np.stack([example["image"] for example in examples])
        arrays[f"y_{split}"] = np.array([example["label"] for example in examples])
    return arrays


def _how_to_prepare(problem: str, name: str) -> str:
    return (
        f"{problem}; prepare it with: python -m experiments.data --dataset={name} "
        "--data_dir=DIR (--help says how without network access or TensorFlow)"
    )


def _read_npz(
    path: Path, keys: tuple[str, ...] = (*MNIST_FILES, FRAMES)
) -> Mapping[str, np.ndarray]:
    """Arrays of a .npz file, those of these that are there; pickled objects are refused."""
    if not path.is_file():
        raise InputError(f"dataset {path}: no such file")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys if key in arrays}
    except (ValueError, EOFError, zlib.error, zipfile.BadZipFile, TypeError) as error:
        raise InputError(f"dataset {path}: truncated, or not a .npz file of arrays") from error


def _read_jpegs(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of train/<class>/*.jpg in a tar file, in the order of their names."""
    if not path.is_file():
        raise InputError(f"images {path}: no such file")
    try:
        with tarfile.open(path) as tar:
            found = {
                member.name: _decode(tar.extractfile(member).read())
                for member in tar
                if re.fullmatch(r"(.*/)?train/[^/]+/[^/]+\.jpe?g", member.name)
            }
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"images {path}: truncated, or not a tar file of JPEGs") from error
    names = sorted(found)
    folders = sorted({Path(name).parent for name in names})
    if len({image.shape for image in found.values()}) != 1:
        raise InputError(f"images {path}: no train/<class>/*.jpg of one shape in it")
    images = _images(f"images {path}", np.stack([found[name] for name in names]), 255)
    return images, np.array([folders.index(Path(name).parent) for name in names], np.int32)


def _decode(jpeg: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image)


def _dataset(
    name: str,
    arrays: Mapping[str, np.ndarray],
    splits: tuple[str, ...],
    pixel_max: int | None = None,
) -> Dataset:
    """The arrays as a Dataset, checked; the test half is required, the training half isn't."""
    halves = {"train": (None, None), "test": (None, None)}
    for split in splits:
        if split == "test" or f"x_{split}" in arrays or f"y_{split}" in arrays:
            halves[split] = _half(name, arrays, split, pixel_max)
    dataset = Dataset(name, *halves["train"], *halves["test"])
    if dataset.x_train is not None and dataset.x_train.shape[1:] != dataset.x_test.shape[1:]:
        raise InputError(
            f"dataset {name}: images of x_train have shape {dataset.x_train.shape[1:]}, "
            f"those of x_test {dataset.x_test.shape[1:]}; one shape is right"
        )
    return dataset


def _half(
    name: str, arrays: Mapping[str, np.ndarray], split: str, pixel_max: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Checked images and labels of one split."""
    for key in (f"x_{split}", f"y_{split}"):
        if key not in arrays:
            raise InputError(f"dataset {name}: lacks {key}; x_test and y_test are needed")
    read = _frames if FRAMES in arrays else _images
    images = read(f"dataset {name}: x_{split}", arrays[f"x_{split}"], pixel_max)
    labels = _labels(f"dataset {name}: y_{split}", arrays[f"y_{split}"])
    if len(images) != len(labels):
        raise InputError(f"dataset {name}: {len(images)} images, {len(labels)} labels in {split}")
    return images, labels


def _images(what: str, images: np.ndarray, pixel_max: int | None) -> np.ndarray:
    """Images as float32 in [0, 1], [B, H, W, C]; uint8 divided by `pixel_max`."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.size == 0:
        raise InputError(f"{what} has shape {images.shape}; [B, H, W, C] is right")
    if images.dtype == np.uint8:
        return images / np.float32(_white(what, int(images.max()), pixel_max))
    if pixel_max is not None:
        raise InputError(f"{what} is {images.dtype}; --pixel_max is of uint8 images only")
    if images.dtype == np.bool_:
        return images.astype(np.float32)
    if images.dtype.kind != "f":
        raise InputError(f"{what} is {images.dtype}; uint8, bool or floats in [0, 1] are right")
    wrong = ~((images >= 0) & (images <= 1))  # true of NaN also
    if wrong.any():
        raise InputError(f"{what} holds {images[wrong][0]}; floats in [0, 1] are right")
    return images.astype(np.float32)


def _white(what: str, largest: int, pixel_max: int | None) -> int:
    """What white is in uint8 images: as it is told, or 255, which those of 0 and 1 alone need not
    mean."""
    if pixel_max is None and largest == 1:
        raise InputError(
            f"{what} is uint8 of 0 and 1 alone; say what white is: --pixel_max=1 for masks, which "
            "stay 0 and 1, or --pixel_max=255, which divides by 255"
        )
    white = 255 if pixel_max is None else pixel_max
    if largest > white:
        raise InputError(
            f"{what} holds {largest}; with --pixel_max={white}, 0 to {white} are right"
        )
    return white


def _frames(what: str, counts: np.ndarray, pixel_max: int | None) -> np.ndarray:
    """Counts of events by time step as float32, [B, T, H, W, P] or [B, T, channels]."""
    if pixel_max is not None:
        raise InputError(f"{what} holds events; --pixel_max is of uint8 images only")
    if counts.ndim not in (3, 5) or counts.size == 0:
        raise InputError(
            f"{what} has shape {counts.shape}; [B, T, H, W, P] or [B, T, channels] is right"
        )
    if counts.dtype.kind not in "uif" or not (np.isfinite(counts).all() and counts.min() >= 0):
        raise InputError(f"{what} holds what is no count of events; numbers from 0 are right")
    return counts.astype(np.float32)


def _labels(what: str, labels: np.ndarray) -> np.ndarray:
    """Labels as int32 [B]."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(
            f"{what} is {labels.dtype} of shape {labels.shape}; integers of shape [B] are right"
        )
    if labels.size and labels.min() < 0:
        raise InputError(f"{what} holds {labels.min()}; labels from 0 are right")
    return labels.astype(np.int32)


def _check_files(folder: Path) -> None:
    """Raise InputError where one of MNIST's official files is missing."""
    for file in MNIST_FILES.values():
        if not (folder / file).is_file():
            raise InputError(f"manual_dir {folder}: lacks {file}, an official file of MNIST")
