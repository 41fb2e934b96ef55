"""jfi.hardware.tuning: the chunk size is measured once and kept."""

import json

import pytest

from jfi.hardware import tuning
from jfi.hardware.devices import hardware


def test_smallest_of_the_fastest_is_taken():
    assert tuning._best({1: 10.0, 2: 96.0, 4: 100.0, 8: 50.0}) == 2


def test_rates_of_this_machine(monkeypatch):
    monkeypatch.setattr(tuning, "WORK", 1 << 22)
    monkeypatch.setattr(tuning, "CPU_BYTES", (1 << 20, 1 << 21))
    rates = dict(tuning._rates(hardware()))
    assert list(rates) == [1 << 20, 1 << 21]
    assert min(rates.values()) > 0


@pytest.fixture
def timed(monkeypatch):
    calls = []

    def rates(hardware):
        calls.append(1)
        yield from {1 << 20: 1.0, 1 << 22: 2.0}.items()

    monkeypatch.setattr(tuning, "_rates", rates)
    return calls


def kept(path):
    return tuning.tuned(hardware(), path).chunk_bytes


def test_kept(timed, tmp_path):
    path = tmp_path / "cache" / "chunks.json"
    assert kept(path) == kept(path) == 1 << 22
    assert len(timed) == 1
    assert list(json.loads(path.read_text()).values()) == [1 << 22]


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"another machine": 5}'])
def test_a_file_of_no_use_is_replaced(timed, tmp_path, text):
    path = tmp_path / "chunks.json"
    path.write_text(text)
    assert kept(path) == 1 << 22
    assert 1 << 22 in json.loads(path.read_text()).values()


def test_nowhere_to_keep_it(timed, tmp_path):
    (tmp_path / "file").touch()
    assert kept(tmp_path / "file" / "chunks.json") == 1 << 22
