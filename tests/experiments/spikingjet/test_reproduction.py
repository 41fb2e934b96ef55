"""The script that reproduces SpikingJET, on small frames and against the paper's sample sizes."""

import json

import numpy as np
import pytest

import jfi
import nets
from experiments import target
from experiments.spikingjet import __main__ as spikingjet
from experiments.spikingjet import reproduction
from jfi.campaign import records
from jfi.sampling.sampling import Request

FRAMES = (8, 5, 5, 2)  # time steps, rows, columns, polarities


@pytest.fixture(scope="module")
def released_size():
    """Networks of the released sizes with fresh weights, by name."""
    names = ("snn_nmnist", "snn_dvs128")
    built = {name: nets.build(name) for name in names}
    return {name: target.read(net, nets.init(net, 0)) for name, net in built.items()}


@pytest.mark.parametrize("name", ["snn_nmnist", "snn_dvs128"])
def test_flips_in_all_six_places_are_as_many_as_in_table_ii(released_size, name):
    request = Request(0.01, 0.99, 2.58)
    options = {"sites_pattern": ".*", "fault_model": "flip", "request": request}
    plan = jfi.plan(released_size[name], "network_wise", **options)
    assert plan.injections - 1 == reproduction.PUBLISHED_TIMES[name][0]  # rounded down there
    published = reproduction.PUBLISHED[name]
    assert {site.name for site in plan.space.sites} == published.keys()


def test_published_rows_are_shares():
    for rows in reproduction.PUBLISHED.values():
        for sdc, masked in rows.values():
            assert min(sdc, masked) >= 0 and sdc + masked <= 100


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Ten samples of counted events, and weights of a network for them."""
    folder, draw = tmp_path_factory.mktemp("snn"), np.random.default_rng(0)
    x = draw.poisson(0.3, (10, *FRAMES)).astype(np.uint8)
    np.savez(folder / "events.npz", x_test=x, y_test=np.arange(10), frames="made up")
    nets.save(folder / "w.safetensors", nets.init(nets.build("snn_nmnist", FRAMES), 0))
    return folder


def test_the_script_writes_its_tables_and_goes_on(script, frames, tmp_path):
    command = (
        f"--dataset={frames}/events.npz", f"--weights={frames}/w.safetensors", "--verify=100",
        "--error_margin=0.05", f"--out={tmp_path}",
    )  # fmt: skip
    ended = script(spikingjet, *command)
    assert ended.status == 0, ended.err
    assert "100 agree, 0 are near-ties, 0 disagree" in ended.out
    name = "snn_nmnist_events_stuck_at"
    kept = json.loads((tmp_path / f"{name}.json").read_text())
    assert kept["injections"] == kept["faults"] and kept["samples"] == 10
    assert sum(kept["shares"]) == pytest.approx(1)
    assert (tmp_path / "figure2.png").stat().st_size > 1000
    rows = [line.strip("| ").split(" | ") for line in ended.out.splitlines() if "lif1 |" in line]
    assert {row[1] for row in rows} == {"threshold", "beta", "potential", "spike"}
    again = script(spikingjet, *command)
    assert json.loads((tmp_path / f"{name}.json").read_text()) == kept
    assert again.out == ended.out


def test_rows_count_what_the_records_hold(script, frames, tmp_path):
    script(
        spikingjet, f"--dataset={frames}/events.npz", f"--weights={frames}/w.safetensors",
        "--verify=0", "--error_margin=0.05", f"--out={tmp_path}", "--fault_model=dead",
        "--sites=.*spike",
    )  # fmt: skip
    work = tmp_path / "snn_nmnist_events_dead"
    found = reproduction.rows(work, ["lif1/spike", "lif2/spike"], np.array([20, 10]), 10)
    masked = sum(int(shard["masked"].sum()) for shard in records.read_shards(work))
    network = found[-1]
    assert network.population == 30
    assert network.shares[reproduction.SHOWN.index("masked")] == pytest.approx(
        masked / network.injections / 10
    )
    assert all(row.shares is None or sum(row.shares) == pytest.approx(1) for row in found)
