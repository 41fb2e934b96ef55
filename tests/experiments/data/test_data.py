"""Data sets: the embedded one, .npz files, MNIST's official files, tensorflow-datasets' own."""

import gzip
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from experiments.data import sets
from jfi.errors import InputError
from nets.transformer import CHARACTERS

MNIST = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "mnist"
IMAGES = np.arange(4 * 5 * 5, dtype=np.uint8).reshape(4, 5, 5)
LABELS = np.array([3, 1, 0, 2], np.uint8)


def npz(folder: Path, **arrays) -> Path:
    np.savez(folder / "own.npz", **arrays)
    return folder / "own.npz"


def idx(array: np.ndarray) -> bytes:
    """The published format: two zeros, 8 for unsigned byte, the rank, sizes, values."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def official_files(folder: Path) -> Path:
    arrays = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:2], "y_test": LABELS[:2]}
    for key, file in sets.MNIST_FILES.items():
        (folder / file).write_bytes(gzip.compress(idx(arrays[key])))
    return folder


def test_digits_are_scikit_learns_in_a_fixed_split():
    from sklearn.datasets import load_digits

    digits, (images, labels) = sets.load("digits"), load_digits(return_X_y=True)
    assert digits.x_train.shape == (1437, 8, 8, 1)
    assert digits.x_test.shape == (360, 8, 8, 1)
    assert digits.x_test.dtype == np.float32 and digits.y_test.dtype == np.int32
    pixels = np.concatenate([digits.x_train, digits.x_test]).reshape(-1, 64) * 16
    found = np.column_stack([pixels, np.concatenate([digits.y_train, digits.y_test])])
    expected = np.column_stack([images, labels])
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])
    # Pinned: the split is the same on every machine and with every release of NumPy.
    assert digits.y_test[:10].tolist() == [5, 8, 6, 6, 4, 9, 0, 5, 1, 4]


def test_without_training_half():
    digits = sets.load("digits", train=False)
    assert digits.x_train is None and digits.y_train is None
    assert len(digits.x_test) == 360


def test_npz_of_bytes_is_scaled_and_gets_its_channel(tmp_path):
    dataset = sets.load(npz(tmp_path, x_test=IMAGES, y_test=LABELS))
    assert dataset.name == "own" and dataset.x_train is None
    np.testing.assert_array_equal(dataset.x_test[..., 0], np.float32(IMAGES) / np.float32(255))
    assert dataset.y_test.tolist() == [3, 1, 0, 2]


MASKS = (IMAGES > 10).astype(np.uint8)


@pytest.mark.parametrize(
    ("images", "pixel_max", "expected"),
    [
        (MASKS, 1, np.float32(MASKS)),
        (MASKS, 255, MASKS / np.float32(255)),
        (MASKS > 0, None, np.float32(MASKS)),  # booleans leave no doubt
        (np.zeros_like(MASKS), None, np.zeros_like(MASKS)),  # nor does black
        (IMAGES, 128, IMAGES / np.float32(128)),
    ],
)
def test_what_white_is_can_be_told(tmp_path, images, pixel_max, expected):
    dataset = sets.load(npz(tmp_path, x_test=images, y_test=LABELS), pixel_max=pixel_max)
    assert dataset.x_test.dtype == np.float32
    np.testing.assert_array_equal(dataset.x_test[..., 0], expected)


@pytest.mark.parametrize(
    ("arrays", "pixel_max", "message"),
    [
        ({"x_test": MASKS}, None, "x_test is uint8 of 0 and 1 alone; say what white is"),
        (
            {"x_test": IMAGES, "x_train": MASKS, "y_train": LABELS},
            None,
            "x_train is uint8 of 0 and",
        ),
        (
            {"x_test": IMAGES},
            1,
            f"x_test holds {IMAGES.max()}; with --pixel_max=1, 0 to 1 are right",
        ),
        ({"x_test": MASKS > 0}, 1, "x_test is bool; --pixel_max is of uint8 images only"),
        ({"x_test": MASKS / 1.0}, 1, "x_test is float64; --pixel_max is of uint8 images only"),
        (
            {"x_test": MASKS[:, None].repeat(2, 1)[..., None], "frames": np.array("binned")},
            1,
            "x_test holds events; --pixel_max is of uint8 images only",
        ),
    ],
)
def test_images_that_what_is_told_of_white_is_not_of(tmp_path, arrays, pixel_max, message):
    path = npz(tmp_path, **({"y_test": LABELS} | arrays))
    with pytest.raises(InputError) as error:
        sets.load(path, pixel_max=pixel_max)
    assert message in str(error.value)


def test_npz_of_floats_is_taken_as_it_is(tmp_path):
    images = np.random.default_rng(0).random((4, 3, 6, 2))
    path = npz(tmp_path, x_test=images, y_test=LABELS, x_train=images[:3], y_train=LABELS[:3])
    dataset = sets.load(str(path))
    np.testing.assert_array_equal(dataset.x_test, images.astype(np.float32))
    assert dataset.x_train.shape == (3, 3, 6, 2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_test": LABELS}, "lacks x_test"),
        ({"x_test": IMAGES}, "lacks y_test"),
        ({"x_test": IMAGES, "y_test": LABELS, "x_train": IMAGES}, "lacks y_train"),
        ({"x_test": IMAGES[0], "y_test": LABELS}, "x_test has shape (5, 5)"),
        ({"x_test": IMAGES[:0], "y_test": LABELS[:0]}, "x_test has shape (0, 5, 5, 1)"),
        ({"x_test": IMAGES.astype(int), "y_test": LABELS}, "x_test is int64"),
        ({"x_test": IMAGES.astype(float), "y_test": LABELS}, "x_test holds 2.0"),
        ({"x_test": np.full((4, 5, 5), np.nan), "y_test": LABELS}, "x_test holds nan"),
        ({"x_test": IMAGES, "y_test": LABELS[:3]}, "4 images, 3 labels in test"),
        ({"x_test": IMAGES, "y_test": LABELS / 1.0}, "y_test is float64"),
        ({"x_test": IMAGES, "y_test": np.eye(4, dtype=int)}, "of shape (4, 4)"),
        ({"x_test": IMAGES, "y_test": np.array([0, -1, 0, 0])}, "y_test holds -1"),
        (
            {"x_test": IMAGES, "y_test": LABELS, "x_train": IMAGES[:, 1:], "y_train": LABELS},
            "x_train have shape (4, 5, 1), those of x_test (5, 5, 1)",
        ),
    ],
)
def test_arrays_that_are_no_images_with_labels(tmp_path, arrays, message):
    with pytest.raises(InputError) as error:
        sets.load(npz(tmp_path, **arrays))
    assert message in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty", "one array", "objects"])
def test_files_that_are_no_npz(tmp_path, damage):
    path = npz(tmp_path, x_test=IMAGES, y_test=LABELS)
    single = io.BytesIO()
    np.save(single, IMAGES)
    content = {
        "truncated": path.read_bytes()[:-30],
        "foreign": b"PK\3\4 no arrays",
        "empty": b"",
        "one array": single.getvalue(),
        "objects": path.read_bytes(),
    }
    path.write_bytes(content[damage])
    if damage == "objects":
        npz(tmp_path, x_test=np.array([{}, []], object), y_test=LABELS)
    with pytest.raises(InputError, match=r"own\.npz: truncated, or not a \.npz file"):
        sets.load(path)


def test_unknown_and_missing_sets(tmp_path):
    with pytest.raises(InputError, match=r"known are digits, text, mnist, cifar10"):
        sets.load("svhn")
    with pytest.raises(InputError, match="no such file"):
        sets.load(tmp_path / "none.npz")


def test_text_is_told_by_its_next_characters():
    dataset = sets.load("text")
    assert dataset.x_train.shape[1:] == dataset.x_test.shape[1:] == (sets.LENGTH,)
    for x, y in ((dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)):
        assert (x[:, 1:] == y[:, :-1]).all()
        assert min(x.min(), y.min()) >= 0 and max(x.max(), y.max()) < len(CHARACTERS)
    # Each half runs on from one text to the next.
    step = sets.STRIDE
    assert (dataset.x_train[1, :-step] == dataset.x_train[0, step:]).all()
    assert (dataset.x_test[1:, 0] == dataset.y_test[:-1, -1]).all()
    words = "".join(CHARACTERS[int(n)] for n in dataset.x_test.ravel())
    assert words.count(" the ") > 100
    assert sets.load("text", train=False).x_train is None


def test_labels_beyond_the_classes_are_named(tmp_path):
    dataset = sets.load(npz(tmp_path, x_test=IMAGES, y_test=LABELS))
    sets.check_labels(dataset, 4)
    with pytest.raises(InputError, match=r"y_test\[0\] is 3; labels of 3 classes are 0 to 2"):
        sets.check_labels(dataset, 3)


def test_mnist_files_become_a_npz(tmp_path):
    out = tmp_path / "mnist.npz"
    sets.convert_mnist(official_files(tmp_path), out)
    dataset = sets.load(out)
    np.testing.assert_array_equal(dataset.x_train[..., 0], IMAGES / np.float32(255))
    assert dataset.y_test.tolist() == [3, 1]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(idx(IMAGES))[:-20], "truncated, or not gzip"),
        (b"not gzip", "truncated, or not gzip"),
        (gzip.compress(b"\0\0\x0d\1", mtime=0), "not an IDX file"),
        (gzip.compress(idx(IMAGES)[:-1]), "holds 99 values; its header says [4, 5, 5]"),
    ],
)
def test_damaged_mnist_files(tmp_path, content, message):
    (official_files(tmp_path) / sets.MNIST_FILES["x_train"]).write_bytes(content)
    with pytest.raises(InputError) as error:
        sets.convert_mnist(tmp_path, tmp_path / "mnist.npz")
    assert message in str(error.value)
    assert not (tmp_path / "mnist.npz").exists()


def test_a_missing_mnist_file_is_named(tmp_path):
    (official_files(tmp_path) / sets.MNIST_FILES["y_test"]).unlink()
    with pytest.raises(InputError, match=r"lacks t10k-labels-idx1-ubyte\.gz"):
        sets.convert_mnist(tmp_path, tmp_path / "mnist.npz")


def test_an_unprepared_set_says_how_to_prepare_it(tmp_path):
    with pytest.raises(InputError, match=r"python -m experiments\.data --dataset=cifar10"):
        sets.load("cifar10", tmp_path)


def message(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    size, length = len(content), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def example(image: np.ndarray, label: int) -> bytes:
    """A tf.train.Example with a PNG under `image` and an integer under `label`."""
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    features = {
        b"image": message(1, message(1, png.getvalue())),
        b"label": message(3, message(1, bytes([label]))),
    }
    entries = (message(1, message(1, k) + message(2, v)) for k, v in features.items())
    return message(1, b"".join(entries))


def prepared(data_dir: Path, file_format: str = "array_record") -> Path:
    """A folder as tensorflow-datasets 4.9 writes it for MNIST, with our few images."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = data_dir / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    kinds = "tensorflow_datasets.core.features"
    image = {"dtype": "uint8", "shape": {"dimensions": ["5", "5", "1"]}}
    features = {
        "image": {"pythonClassName": f"{kinds}.image_feature.Image", "image": image},
        "label": {
            "pythonClassName": f"{kinds}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "10"},
        },
    }
    dictionary = f"{kinds}.features_dict.FeaturesDict"
    split = {"numBytes": "1", "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}
    sizes = {"train": 4, "test": 2}
    info = {
        "name": "mnist",
        "version": "3.0.1",
        "fileFormat": file_format,
        "splits": [split | {"name": k, "shardLengths": [str(n)]} for k, n in sizes.items()],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    content = {"pythonClassName": dictionary, "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(content))
    for name, size in sizes.items():
        writer = ArrayRecordWriter(
            str(folder / f"mnist-{name}.{file_format}-00000-of-00001"), "group_size:1"
        )
        for record in map(example, IMAGES[:size], LABELS[:size].tolist()):
            writer.write(record)
        writer.close()
    return data_dir


def test_prepared_sets_are_read_without_tensorflow(tmp_path):
    dataset = sets.load("mnist", prepared(tmp_path))
    np.testing.assert_array_equal(dataset.x_train[..., 0], IMAGES / np.float32(255))
    assert dataset.y_train.tolist() == LABELS.tolist()
    assert dataset.y_test.tolist() == [3, 1]
    assert sets.load("mnist", tmp_path, train=False).x_train is None


def test_sets_prepared_in_another_format_say_how_to_prepare_them(tmp_path):
    with pytest.raises(InputError, match="holds tfrecord, not array_record; prepare it with"):
        sets.load("mnist", prepared(tmp_path, "tfrecord"))


@pytest.mark.data
@pytest.mark.skipif(not MNIST.is_dir(), reason="no ../shared with MNIST's official files")
def test_official_mnist():
    """Sizes and class counts as published; the first test digit is a 7."""
    images = sets.read_idx(MNIST / sets.MNIST_FILES["x_train"])
    labels = {key: sets.read_idx(MNIST / sets.MNIST_FILES[key]) for key in ("y_train", "y_test")}
    assert images.shape == (60_000, 28, 28)
    assert round(float(images.mean()) / 255, 4) == 0.1307
    assert labels["y_test"][:4].tolist() == [7, 2, 1, 0]
    assert np.bincount(labels["y_test"]).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009
    ]  # fmt: skip
