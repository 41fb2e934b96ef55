"""JPEG images of a tar file, added to a training half."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.data import sets
from jfi.errors import InputError

CIFAR = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "cifar10"


def jpeg(value: int, side: int = 8) -> bytes:
    """A JPEG of one colour."""
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(file, "jpeg", quality=95)
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def colour(train: bool = True) -> sets.Dataset:
    images = np.zeros((2, 8, 8, 3), np.float32)
    labels = np.array([5, 6], np.int32)
    return sets.Dataset("own", *((images, labels) if train else (None, None)), images, labels)


MEMBERS = {
    "train/frog/2.jpg": jpeg(200),
    "train/cat/0.jpg": jpeg(30),
    "train/frog/1.jpg": jpeg(100),
    "test/cat/0.jpg": jpeg(1),
    "README.md": b"text",
}


@pytest.mark.parametrize("root", ["", "images/"])
def test_training_images_follow_those_there_with_alphabetical_labels(tmp_path, root):
    path = tar(tmp_path / "a.tar", {root + name: content for name, content in MEMBERS.items()})
    found = sets.add_jpegs(colour(), path)
    assert found.y_train.tolist() == [5, 6, 0, 1, 1] and found.y_train.dtype == np.int32
    values = found.x_train.mean((1, 2, 3)) * 255
    np.testing.assert_allclose(values, [0, 0, 30, 100, 200], atol=1)
    np.testing.assert_array_equal(found.x_test, colour().x_test)


def test_a_set_without_a_training_half_gets_one(tmp_path):
    found = sets.add_jpegs(colour(train=False), tar(tmp_path / "a.tar", MEMBERS))
    assert found.x_train.shape == (3, 8, 8, 3)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"test/cat/0.jpg": jpeg(1)}, "no train/<class>/"),
        ({"train/cat/0.jpg": b"no JPEG"}, "truncated, or not a tar file of JPEGs"),
        ({"train/cat/0.jpg": jpeg(1), "train/cat/1.jpg": jpeg(1, 9)}, "of one shape"),
        ({"train/cat/0.jpg": jpeg(1, 9)}, r"of shape \(9, 9, 3\); those of dataset own"),
    ],
)
def test_other_images_are_refused(tmp_path, members, message):
    with pytest.raises(InputError, match=message):
        sets.add_jpegs(colour(), tar(tmp_path / "a.tar", members))


def test_a_file_that_is_no_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar(tmp_path / "b.tar", MEMBERS).read_bytes()[:700])
    with pytest.raises(InputError, match="truncated, or not a tar"):
        sets.add_jpegs(colour(), tmp_path / "a.tar")
    with pytest.raises(InputError, match="no such file"):
        sets.add_jpegs(colour(), tmp_path / "none.tar")


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.is_dir(), reason="no ../shared with the images of CIFAR-10")
def test_the_jpegs_of_cifar10_have_the_labels_of_the_exact_images():
    """The nearest JPEG of an exact image is its own, 30 dB away."""
    exact = sets.load(CIFAR / "cifar10_exact_subset.npz")
    bare = exact._replace(x_train=None, y_train=None)
    found = sets.add_jpegs(bare, CIFAR / "cifar10_jpegq75.tar")
    assert np.bincount(found.y_train).tolist() == [5000] * 10
    jpegs = found.x_train.reshape(50_000, -1)
    images = exact.x_train[:50].reshape(50, -1)
    apart = (images**2).sum(1)[:, None] - 2 * images @ jpegs.T + (jpegs**2).sum(1)
    nearest = apart.argmin(1)
    np.testing.assert_array_equal(found.y_train[nearest], exact.y_train[:50])
    assert np.sqrt(np.mean((images - jpegs[nearest]) ** 2)) < 0.05
