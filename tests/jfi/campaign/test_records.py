"""Work directories that survive a kill, refuse another campaign, and lose nothing."""

import hashlib
import json
import math
import os
import resource
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from jfi import outcomes
from jfi.campaign import records
from jfi.errors import InputError
from jfi.faults import Faults

MANIFEST = {
    "config": {"net": "lenet", "seed": 0, "t": None, "levels": ("network", "bit")},
    "identity": {"weights": "ab12", "data": "cd34"},
    "versions": {"jax": "0.10"},
}


def faults(n):
    i = np.arange(n)
    return Faults(
        (i % 3).astype(np.int32), i.astype(np.int64), (i % 32).astype(np.int16), np.int8(i % 2)
    )


def rows(n, images=11, keep_bits=True, seed=0):
    rng = np.random.default_rng(seed)
    code = rng.integers(0, 6, (n, images)).astype(np.uint8)
    code |= np.uint8(outcomes.CRITICAL) * (code == outcomes.SDC_1)
    return outcomes.tally(code, keep_bits)


def write(workdir, number, n=20, **options):
    records.write_shard(workdir, number, np.arange(n) + 10**12, faults(n), rows(n, **options))


def with_changes(part, **changes):
    return {**MANIFEST, part: {**MANIFEST[part], **changes}}


def test_shards_come_back_as_they_were_written_in_order(tmp_path):
    workdir = records.open_workdir(tmp_path / "deep" / "run", MANIFEST)
    for number in (10, 9):
        write(workdir, number, seed=number)
    for number, shard in zip((9, 10), records.read_shards(workdir), strict=True):
        np.testing.assert_array_equal(shard["id"], np.arange(20) + 10**12)
        told = {k: v for k, v in rows(20, seed=number)._asdict().items() if v is not None}
        expected = {**faults(20)._asdict(), **told}
        for name, column in expected.items():
            np.testing.assert_array_equal(shard[name], column, err_msg=name)
            assert shard[name].dtype == column.dtype, name
        assert set(shard) == {*expected, "id", "decided"}
        assert set(shard["decided"]) == {records.INFERENCE}
    only = next(records.read_shards(workdir, ["critical", "bit"]))
    assert list(only) == ["critical", "bit"]


def test_bits_may_be_left_out_and_decided_given_per_row(tmp_path):
    workdir = records.open_workdir(tmp_path, MANIFEST)
    decided = np.arange(5) % 2
    records.write_shard(workdir, 0, np.arange(5), faults(5), rows(5, keep_bits=False), decided)
    (shard,) = records.read_shards(workdir)
    assert "critical_bits" not in shard
    np.testing.assert_array_equal(shard["decided"], decided)
    assert shard["decided"].dtype == np.uint8


def test_an_empty_shard_is_a_shard(tmp_path):
    workdir = records.open_workdir(tmp_path, MANIFEST)
    write(workdir, 0, n=0)
    assert records.has_shard(workdir, 0)
    (shard,) = records.read_shards(workdir)
    assert shard["critical_bits"].shape == (0, 2)


def test_the_same_rows_give_the_same_bytes(tmp_path):
    paths = []
    for name in "ab":
        workdir = records.open_workdir(tmp_path / name, MANIFEST)
        write(workdir, 0, n=3000)
        paths.append(records.shard_path(workdir, 0))
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("keep", [0, 1, 200, -1])
def test_a_truncated_shard_counts_as_missing_and_is_rewritten(tmp_path, keep):
    workdir = records.open_workdir(tmp_path, MANIFEST)
    assert not records.has_shard(workdir, 0)
    write(workdir, 0)
    path = records.shard_path(workdir, 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert not records.has_shard(workdir, 0)
    with pytest.raises(InputError, match=r"00000\.parquet can't be read"):
        list(records.read_shards(workdir))
    write(workdir, 0)
    assert path.read_bytes() == whole


def test_a_missing_column_is_named(tmp_path):
    workdir = records.open_workdir(tmp_path, MANIFEST)
    write(workdir, 0)
    with pytest.raises(InputError, match="nonsense"):
        list(records.read_shards(workdir, ["nonsense"]))


def test_a_campaign_goes_on_with_the_same_manifest_and_clears_leftovers(tmp_path):
    workdir = records.open_workdir(tmp_path, MANIFEST)
    text = (workdir / "manifest.json").read_text()
    leftovers = [workdir / "summary.json.partial", workdir / "outcomes" / "00000.parquet.partial"]
    for path in leftovers:
        path.write_bytes(b"half")
    assert not list(records.read_shards(workdir))
    again = {**MANIFEST, "versions": {"jax": "0.11"}}
    assert records.open_workdir(tmp_path, again) == workdir
    assert (workdir / "manifest.json").read_text() == text
    assert not any(path.exists() for path in leftovers)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (with_changes("config", seed=1, net="resnet20"), r'net was "lenet", is "resnet20"; seed'),
        (with_changes("config", seed=1), r"other flags: seed was 0, is 1\."),
        (with_changes("config", t=2.58), r"t was not set, is 2\.58"),
        (with_changes("config", faults="list.csv"), "faults was not set, is"),
        (with_changes("identity", data="ffff"), r'other content: data was "cd34", is "ffff"'),
    ],
)
def test_another_campaign_is_refused_naming_what_differs(tmp_path, manifest, message):
    records.open_workdir(tmp_path, MANIFEST)
    with pytest.raises(InputError, match=message) as refusal:
        records.open_workdir(tmp_path, manifest)
    assert "\n" not in str(refusal.value)
    assert records.read_manifest(tmp_path)["config"]["seed"] == 0


@pytest.mark.parametrize("content", ['{"config": {', "", "[1]", "\x00\x01"])
def test_a_damaged_manifest_is_said_to_be_so(tmp_path, content):
    records.open_workdir(tmp_path, MANIFEST)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        records.open_workdir(tmp_path, MANIFEST)


def test_a_directory_that_cannot_be_made_or_written_is_an_input_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"work directory .*file.* can't be written: "):
            records.open_workdir(path, MANIFEST)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    with pytest.raises(InputError, match="can't be written: Permission denied"):
        records.open_workdir(tmp_path / "new", MANIFEST)


def test_missing_files_are_input_errors(tmp_path):
    for read in (records.read_manifest, records.read_summary):
        with pytest.raises(InputError, match="can't be read"):
            read(tmp_path)


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_failed_write_leaves_everything_else_as_it_was(tmp_path, monkeypatch, step):
    workdir = records.open_workdir(tmp_path, MANIFEST)
    write(workdir, 0)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, fail)
    for number in (0, 1):
        with pytest.raises(OSError, match="No space left"):
            write(workdir, number, seed=5)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    assert not records.has_shard(workdir, 1)


FULL_DISK = """
import sys
sys.path.insert(0, sys.argv[2])
import resource, signal
import test_records as t
workdir = t.records.open_workdir(sys.argv[1], t.MANIFEST)
t.write(workdir, 0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    t.write(workdir, 1, n=5000)
except OSError as error:
    print("refused:", error.strerror)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs file size limits")
def test_a_disk_that_fills_up_in_the_middle_of_a_shard(tmp_path):
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), here]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout.startswith("refused:"), run.stderr
    assert sorted(path.name for path in (tmp_path / "outcomes").iterdir()) == ["00000.parquet"]
    assert records.has_shard(tmp_path, 0)


def test_the_summary_is_strict_json(tmp_path):
    summary = {
        "estimates": [np.float32("nan"), math.inf, np.float64(0.5)],
        "counts": np.arange(2),
        "cells": rows(1, keep_bits=False),
    }
    records.open_workdir(tmp_path, MANIFEST)
    records.write_summary(tmp_path, summary)

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse)["estimates"] == [None, None, 0.5]
    there = records.read_summary(tmp_path)
    assert there["counts"] == [0, 1]
    assert there["cells"]["first_critical"] == rows(1).first_critical.tolist()


def test_hashes_are_stable_and_see_every_change():
    leaves = [("a/kernel", np.arange(6, dtype=np.float32)), ("b", np.float64(1.5))]
    known = records.hash_arrays(leaves)
    stated = b'["a/kernel", "float32", [6]]' + leaves[0][1].tobytes()
    stated += b'["b", "float64", []]' + leaves[1][1].tobytes()
    assert known == hashlib.sha256(stated).hexdigest()
    assert records.hash_arrays(reversed(leaves)) == known
    x = leaves[0][1]
    changed = [x.reshape(2, 3), x.astype(np.float64), x.view(np.int32), x[:5], x[::-1]]
    digests = {records.hash_arrays([("a/kernel", y), leaves[1]]) for y in changed}
    digests |= {records.hash_arrays([("a/bias", x), leaves[1]]), known}
    assert len(digests) == 7
    # Content, not layout; and types that NumPy itself lacks.
    assert records.hash_arrays([("a/kernel", np.repeat(x, 2)[::2]), leaves[1]]) == known
    assert records.hash_arrays([("h", x.astype(ml_dtypes.bfloat16))])
