"""Recordings of events: files in the published formats, binning, and real recordings."""

from pathlib import Path

import h5py
import numpy as np
import pytest

import nets
from experiments.data import __main__ as data
from experiments.data import events, sets
from experiments.data.events import Binning
from jfi.errors import InputError

SHARED = Path(__file__).resolve().parents[3].parent / "shared"
NMNIST = SHARED / "data" / "nmnist" / "NMNISTsmall"
GESTURES = SHARED / "data" / "dvs128gesture"
RELEASED = SHARED / "weights" / "spikingjet"

needs_data = pytest.mark.skipif(
    not (NMNIST.is_dir() and GESTURES.is_dir() and RELEASED.is_dir()),
    reason="no ../shared with event files and SpikingJET's weights",
)
CAMERA = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", bool)])


def recording(seed: int, count: int = 400, side: int = 34, end: int = 300_000) -> np.ndarray:
    """Events (x, y, t, p) at random, the first at time 0."""
    draw = np.random.default_rng(seed)
    found = np.zeros(count, CAMERA)
    found["x"], found["y"] = draw.integers(0, side, (2, count))
    found["t"] = np.sort(draw.integers(0, end, count))
    found["t"][0], found["p"] = 0, draw.random(count) < 0.5
    return found


def write_camera(path: Path, found: np.ndarray) -> None:
    """5 bytes an event: x, y, then polarity in the highest bit and 23 bits of time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x, y, t, p = (found[field].astype(int) for field in "xytp")
    columns = (x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255)
    path.write_bytes(np.column_stack(columns).astype(np.uint8).tobytes())


def write_listed(folder: Path, train: int = 2, test: int = 1) -> Path:
    """Numbered recordings with the two lists; number n is the digit n % 10."""
    for name, numbers in (("train1K", range(1, train + 1)), ("test100", range(60, 60 + test))):
        rows = [f"{number}\t{number % 10}\n" for number in numbers]
        (folder / f"{name}.txt").write_text("".join(["#sample #class\n", *rows]))
        for number in numbers:
            write_camera(folder / f"{number}.bs2", recording(number))
    return folder


def write_shd(path: Path, trains, labels) -> None:
    """Times in seconds and units of each recording, of any length, and labels."""
    with h5py.File(path, "w") as file:
        for name, kind in (("times", np.float16), ("units", np.uint16)):
            rows = file.create_dataset(
                f"spikes/{name}", len(labels), h5py.vlen_dtype(np.dtype(kind))
            )
            for i, train in enumerate(trains):
                rows[i] = train[name == "units"]
        file["labels"] = np.array(labels, np.uint16)


def counted(found: np.ndarray, edges, side: int = 34) -> np.ndarray:
    """[T, H, W, P] by NumPy's histogram."""
    axes = (np.arange(side + 1), np.arange(side + 1), np.arange(3))
    sample = tuple(found[field].astype(float) for field in "tyxp")
    return np.histogramdd(sample, (edges, *axes))[0]


def test_windows_of_time_are_a_histogram():
    found = recording(0)
    edges = np.array([0, 100_000, 200_000, 300_000]) - 0.5
    x = events.frames(found, (34, 34, 2), Binning(3, "window", 100_000))
    assert x.dtype == np.uint8
    np.testing.assert_array_equal(x, counted(found, edges))


def test_windows_are_cut_off_and_filled_at_the_number_of_steps():
    found = recording(0)
    for steps in (2, 5):
        x = events.frames(found, (34, 34, 2), Binning(steps, "window", 100_000))
        assert x.shape == (steps, 34, 34, 2)
        assert x.sum() == (found["t"] < steps * 100_000).sum()
    assert x[3:].sum() == 0


def test_equal_times_run_from_first_to_last_event():
    found = recording(1)
    found["t"] += 5000
    step = (found["t"][-1] - found["t"][0]) // 4
    edges = found["t"][0] + step * np.arange(5) - 0.5
    x = events.frames(found, (34, 34, 2), Binning(4))
    np.testing.assert_array_equal(x, counted(found, edges))


def test_equal_counts():
    x = events.frames(recording(2), (34, 34, 2), Binning(8, "count"))
    assert x.sum(axis=(1, 2, 3)).tolist() == [50] * 8


def test_binary_and_every_other_pixel():
    found, plain = recording(3, 5000), Binning(2, "window", 150_000)
    full = events.frames(found, (34, 34, 2), plain)
    assert full.max() > 1
    thin = events.frames(found, (34, 34, 2), plain._replace(every=2, binary=True))
    np.testing.assert_array_equal(thin, full[:, ::2, ::2] > 0)


def test_denoising_drops_an_event_without_neighbours():
    """Tonic drops none in the first `denoise` microseconds."""
    found = np.zeros(3, CAMERA)
    found["x"], found["y"], found["t"] = [4, 5, 20], [4, 4, 20], [5000, 5500, 5600]
    kept = events.frames(found, (34, 34, 2), Binning(1, "window", 10_000, denoise=1000))
    assert kept.sum() == 1 and kept[0, 4, 5, 0] == 1


def test_a_recording_without_events_is_empty_frames():
    for by in events.WAYS:
        x = events.frames(np.zeros(0, CAMERA), (34, 34, 2), Binning(3, by, denoise=10))
        assert x.shape == (3, 34, 34, 2) and x.sum() == 0


def test_listed_recordings_become_a_data_set(tmp_path):
    dataset = sets.load("nmnist", write_listed(tmp_path))
    assert dataset.x_train.shape == (2, 100, 17, 17, 2) and dataset.x_train.dtype == np.float32
    assert dataset.y_train.tolist() == [1, 2] and dataset.y_test.tolist() == [0]
    expected = events.frames(recording(60), (34, 34, 2), events.SOURCES["nmnist"].usual)
    np.testing.assert_array_equal(dataset.x_test[0], expected)
    assert sets.load("nmnist", tmp_path, train=False).x_train is None


def test_published_folders_of_nmnist(tmp_path):
    for i, name in enumerate(("Train/7/00001", "Train/0/00002", "Test/3/00001")):
        write_camera(tmp_path / f"{name}.bin", recording(i))
    dataset = sets.load("nmnist", tmp_path)
    assert dataset.y_train.tolist() == [0, 7] and dataset.y_test.tolist() == [3]


def test_spiking_heidelberg_digits(tmp_path):
    """Times are seconds in half precision; 0.5 and 0.75 s are exact in it."""
    trains = [([0, 0.5, 0.5, 1], [0, 699, 699, 3]), ([0, 0.75, 1], [5, 6, 7])]
    write_shd(tmp_path / "shd_test.h5", trains, [19, 4])
    dataset = sets.load("shd", tmp_path)
    assert dataset.x_train is None and dataset.y_test.tolist() == [19, 4]
    assert dataset.x_test.shape == (2, 100, 700)
    found = np.argwhere(dataset.x_test)
    assert found.tolist() == [[0, 0, 0], [0, 50, 699], [1, 0, 5], [1, 75, 6]]
    assert dataset.x_test[0, 50, 699] == 2


def test_gestures_are_named_by_their_class(tmp_path):
    for number in (10, 2):
        write_camera(tmp_path / f"{number}.bs2", recording(number, side=128))
    dataset = sets.load("dvs128gesture", tmp_path)
    assert dataset.x_test.shape == (2, 25, 32, 32, 2)
    assert dataset.y_test.tolist() == [1, 9] and dataset.x_train is None


def test_gestures_as_tonic_unpacks_them(tmp_path):
    """The published sizes: 100 files and more, or tonic downloads them. Its reading is ours."""
    from tonic.datasets import DVSGesture

    folder, rng = tmp_path / "DVSGesture", np.random.default_rng(7)
    for user in range(24, 34):
        for label in range(11):
            path = folder / "ibmGestureTest" / f"user{user}_led" / f"{label}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            t = np.sort(rng.integers(0, 2000, 30))
            np.save(path, np.column_stack([rng.integers(0, 128, (30, 2)), t % 2, t]).astype(float))
    (folder / DVSGesture.test_filename).write_bytes(b"")
    binning = Binning(4, "window", 500_000)
    ours = events.load("dvs128gesture", folder, binning)
    theirs = DVSGesture(str(tmp_path), train=False)
    order = sorted(range(110), key=lambda i: (theirs.users[i], theirs.targets[i]))
    assert ours["y_test"].tolist() == [theirs.targets[i] for i in order]
    for i in (0, 57, 109):
        found = events.frames(theirs[order[i]][0], (128, 128, 2), binning)
        np.testing.assert_array_equal(ours["x_test"][i], found)
    np.save(path, np.zeros(3))
    with pytest.raises(InputError, match=r"10\.npy: truncated, or no array \[E, 4\]"):
        events.load("dvs128gesture", folder, binning)


def test_heidelberg_digits_as_tonic_reads_them(tmp_path):
    from tonic.datasets import SHD

    draw = np.random.default_rng(8)
    trains = [
        (np.sort(draw.random(n)).astype(np.float16), draw.integers(0, 700, n)) for n in (80, 120)
    ]
    write_shd(tmp_path / "shd_test.h5", trains, [3, 11])
    theirs = SHD.__new__(SHD)  # its constructor wants the archive that the file came in
    theirs.location_on_system, theirs.data_filename = str(tmp_path), "shd_test.h5"
    theirs.transform = theirs.target_transform = None
    ours = sets.load("shd", tmp_path)
    for i in range(2):
        found, label = theirs[i]
        expected = events.frames(found, (700, 1, 1), Binning(100))
        np.testing.assert_array_equal(ours.x_test[i], expected)
        assert ours.y_test[i] == label


def test_the_command_writes_what_loads_the_same(tmp_path, script):
    folder, out = write_listed(tmp_path), tmp_path / "events.npz"
    ended = script(data, "--dataset=nmnist", f"--data_dir={folder}", f"--out={out}")
    assert ended.status == 0 and "train: 2 of (100, 17, 17, 2)" in ended.out
    one, other = sets.load(out), sets.load("nmnist", folder)
    assert one.name == "events" and one.x_test.dtype == np.float32
    for key in ("x_train", "y_train", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(one, key), getattr(other, key))


def test_the_command_bins_as_its_flags_say(tmp_path, script):
    folder, out = write_listed(tmp_path), tmp_path / "events.npz"
    how = "--steps=7 --bin_by=window --window_us=20000 --every=1 --denoise_us=0 --binary".split()
    assert script(data, "--dataset=nmnist", f"--data_dir={folder}", f"--out={out}", *how)[0] == 0
    expected = events.frames(recording(60), (34, 34, 2), Binning(7, "window", 20_000, binary=True))
    np.testing.assert_array_equal(sets.load(out).x_test[0], expected)


def test_frames_are_no_images(tmp_path):
    """Bytes without `frames` are scaled by 255, and want the axes of images."""
    x, y = np.full((2, 3, 4), 2, np.uint8), np.zeros(2, np.uint8)
    np.savez(tmp_path / "images.npz", x_test=x, y_test=y)
    np.savez(tmp_path / "trains.npz", x_test=x, y_test=y, frames="by hand")
    assert sets.load(tmp_path / "images.npz").x_test.shape == (2, 3, 4, 1)
    trains = sets.load(tmp_path / "trains.npz")
    assert trains.x_test.shape == (2, 3, 4) and trains.x_test.max() == 2


@pytest.mark.parametrize(
    ("binning", "message"),
    [
        (Binning(0), "steps 0: 1 or more"),
        (Binning(5, "event"), "known are time, count, window"),
        (Binning(5, "window", 0), "window 0: 1 or more"),
        (Binning(5, every=0), "every 0"),
        (Binning(5, denoise=-1), "denoise -1"),
    ],
)
def test_a_binning_that_cannot_be_is_told(tmp_path, binning, message):
    with pytest.raises(InputError, match=message):
        events.load("nmnist", write_listed(tmp_path), binning)


def test_files_that_are_not_as_published_are_told(tmp_path):
    folder = write_listed(tmp_path)
    for content, message in (
        (b"1234567", "7 bytes; 5 an event"),
        (bytes([40, 3, 0, 0, 0]), r"one at \(40, 3\), outside 34x34"),
    ):
        (folder / "60.bs2").write_bytes(content)
        with pytest.raises(InputError, match=message):
            sets.load("nmnist", folder)
    (folder / "60.bs2").unlink()
    with pytest.raises(InputError, match=r"60\.bs2: no such file"):
        sets.load("nmnist", folder)
    (folder / "shd_test.h5").write_bytes(b"not HDF5")
    with pytest.raises(InputError, match=r"shd_test\.h5: truncated, or not a file of SHD"):
        sets.load("shd", folder)
    with pytest.raises(InputError, match="holds no test recordings of shd"):
        sets.load("shd", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("x", "message"),
    [(np.ones((2, 3, 4, 1)), r"\[B, T, H, W, P\]"), (-np.ones((2, 3, 4)), "no count of events")],
)
def test_frames_that_are_none_are_told(tmp_path, x, message):
    np.savez(tmp_path / "own.npz", x_test=x, y_test=np.zeros(2, int), frames="")
    with pytest.raises(InputError, match=message):
        sets.load(tmp_path / "own.npz")


def test_more_events_than_a_byte_counts_are_told():
    found = np.zeros(300, CAMERA)
    with pytest.raises(InputError, match="300 events in a pixel; more steps"):
        events.frames(found, (34, 34, 2), Binning(1, "window"))


def test_events_go_into_a_named_file(script, tmp_path):
    ended = script(data, "--dataset=nmnist", f"--data_dir={tmp_path}")
    assert ended.status == 2 and "--out=FILE.npz" in ended.err


@needs_data
@pytest.mark.data
def test_released_weights_recognise_real_digits():
    """83 of the 100; the paper has 83.58% of all 10,000."""
    dataset = sets.load("nmnist", NMNIST, train=False)
    assert np.bincount(dataset.y_test).sum() == 100
    net = nets.build("snn_nmnist", dataset.x_test.shape[1:])
    variables = nets.load(net, RELEASED / "NMNIST.th")
    logits = nets.apply(net, variables, nets.normalise(net, dataset.x_test))
    assert abs(int((logits.argmax(-1) == dataset.y_test).sum()) - 83) <= 1


@needs_data
@pytest.mark.data
def test_released_weights_recognise_real_gestures():
    """8 of the 10; the paper has 72.26% of the whole test set."""
    dataset = sets.load("dvs128gesture", GESTURES)
    net = nets.build("snn_dvs128", dataset.x_test.shape[1:])
    variables = nets.load(net, RELEASED / "CSNN.th")
    logits = nets.apply(net, variables, nets.normalise(net, dataset.x_test))
    assert abs(int((logits.argmax(-1) == dataset.y_test).sum()) - 8) <= 1
