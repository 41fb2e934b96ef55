"""The benchmark: its faults, its clockwork, its ratios, and the peers against our own verdicts."""

import json
import os
import statistics
import sys

import jax
import numpy as np
import pytest
import torch

import jfi
import nets
from experiments import machine, target
from experiments.bench import __main__ as bench
from experiments.bench import benchmark, costs, models, peers, turns
from jfi.engine import routes, verify
from jfi.engine.engine import Engine
from jfi.errors import InputError
from jfi.faults import Faults, FaultSpace
from nets.weights import from_torch

QUICK = [name for name in benchmark.ROWS if not name.endswith("_compiled")]


def faults_of(n: int) -> Faults:
    """n faults that differ in their index."""
    zeros = np.zeros(n, np.int32)
    return Faults(zeros, np.arange(n), zeros.astype(np.int16), zeros.astype(np.int8))


def workbench(net: nets.Net, images: int, every: int = 1) -> benchmark.Workbench:
    """Random weights and images; of the kernels, every so many."""
    network = target.read(net, nets.init(net, 0))
    x = np.random.default_rng(0).standard_normal((images, *net.input_shape), np.float32)
    sites = jfi.select(network)[::every]
    runner = Engine(network, x, np.zeros(images, int), sites)
    return benchmark.Workbench(net, runner, turns.draw(FaultSpace(sites, (0, 1)), 0, 1000))


@pytest.fixture(scope="module")
def lenet() -> benchmark.Workbench:
    return workbench(nets.build("lenet", (8, 8, 1)), 32)


@pytest.fixture(scope="module")
def resnet() -> benchmark.Workbench:
    return workbench(nets.build("resnet20", (8, 8, 3)), 4, every=7)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told to go on: clock(seconds)."""
    now = [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])

    def go_on(seconds: float) -> None:
        now[0] += seconds

    return go_on


# --- Faults


def test_faults_are_drawn_uniformly_and_seeded():
    sites = [jfi.Site("a", (3, 5), np.dtype("f4")), jfi.Site("b", (45,), np.dtype("f4"))]
    space = FaultSpace(sites, (0, 1))
    drawn, again = turns.draw(space, 1, 4000), turns.draw(space, 1, 4000)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert not np.array_equal(drawn.index, turns.draw(space, 2, 4000).index)
    # A binomial of 4,000 with p = 3/4 and 1/2: five standard deviations.
    assert abs(drawn.site.sum() - 3000) < 137
    assert abs(drawn.polarity.sum() - 2000) < 158
    assert set(drawn.bit) == set(range(32))
    assert (np.diff(drawn.site) < 0).any()


def test_after_the_last_fault_comes_the_first():
    assert turns.block(faults_of(5), 4, 7).index.tolist() == [4, 0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize(
    ("images", "sizes"),
    [(512, [512, 256, 128, 64, 32]), (932, [932, 466, 233]), (10_000, [2500, 1250, 625]), (7, [7])],
)
def test_batches_divide_the_workload(images, sizes):
    assert benchmark.batches(images) == sizes


# --- Clockwork


def test_pace_finds_the_block_that_takes_the_time(clock):
    given = []

    def run(faults):
        given.append(faults.site.size)
        clock(2.0 + 0.25 * faults.site.size)

    paced = turns.pace(turns.Row(run, 10, {}, step=4), faults_of(3), 20.0)
    assert given == [4, 28, 64]  # 3, 9 and 18 seconds
    assert paced.faults == 72  # 20 seconds
    assert paced.rate == pytest.approx(64 * 10 / 18)


def test_pace_of_a_first_block_that_takes_too_long(clock):
    row = turns.Row(lambda faults: clock(8.0 * faults.site.size), 10, {}, step=4)
    assert turns.pace(row, faults_of(3), 20.0).faults == 4


def test_the_fastest_setting_is_taken(clock):
    rows = [
        turns.Row(lambda faults, cost=cost: clock(cost * faults.site.size), 1, {"cost": cost})
        for cost in (0.2, 0.05, 0.1)
    ]
    paced = turns.fastest(rows, faults_of(9), 2.0)
    assert paced.row.settings == {"cost": 0.05}
    assert paced.faults == 40


def test_rows_take_turns_on_the_same_faults(clock):
    seen = []

    def row(name, cost):
        def run(faults):
            seen.append((name, faults.index.tolist()))
            clock(cost * faults.site.size)

        return turns.Paced(turns.Row(run, 100, {}), 2, 0)

    taken = turns.take_turns({"a": row("a", 0.5), "b": row("b", 0.25)}, faults_of(5), 3)
    parts = [[0, 1], [2, 3], [4, 0]]
    order = ["a", "b", "b", "a", "a", "b"]
    assert seen == list(zip(order, [parts[0]] * 2 + [parts[1]] * 2 + [parts[2]] * 2, strict=True))
    rates = {name: [turn.rate for turn in taken[name]] for name in taken}
    assert rates == {"a": [200.0] * 3, "b": [400.0] * 3}


def test_ratios_are_medians_within_rounds_to_the_best_other():
    rates = {"ours": [30.0, 8.0, 90.0], "slow": [1.0, 2.0, 3.0], "quick": [10.0, 4.0, 9.0]}
    assert turns.ratio(rates, "ours", 1, ("slow", "quick")) == 3.0
    assert turns.ratio(rates, "ours", 2, ("slow",)) == 15.0 / 1
    assert turns.ratio(rates, "ours", 1, ("absent",)) is None
    assert turns.ratio(rates, "absent", 1, ("slow",)) is None


def test_ratios_name_rows_that_exist():
    for row, granted, others in benchmark.RATIOS.values():
        assert {row, *others} <= set(benchmark.ROWS)
        assert granted >= 1


# --- The peers


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_weights_to_pytorch_and_back(name, request):
    work = request.getfixturevalue(name)
    state = models.module(work.source, work.engine.network).state_dict()
    arrays = from_torch({k: v.numpy() for k, v in state.items()}, dict(work.source.flattened))
    for site in work.engine.network.sites:
        path = site.name if site.name.startswith("batch_stats/") else f"params/{site.name}"
        np.testing.assert_array_equal(arrays.pop(path), work.engine.network.values(site))
    assert not arrays


@pytest.mark.parametrize(
    ("name", "layout"),
    [("lenet", "channels_first"), ("lenet", "channels_last"), ("resnet", "channels_last")],
)
def test_the_loop_gives_the_verdicts_of_naive_runs_and_restores(name, layout, request):
    work = request.getfixturevalue(name)
    faults = costs.at_every_site(work.engine, 6)
    images, count = len(work.engine.images), faults.site.size
    pairs = turns.take(faults, np.repeat(np.arange(count), images))
    logits = verify.naive(work.engine, pairs, np.tile(np.arange(images), count))
    top1 = logits.argmax(-1).reshape(count, images)
    wanted = (top1 != work.engine.answers).any(axis=1)
    peer = peers.peer(work.source, work.engine, batch=images // 2, layout=layout, compiled=False)
    before = {name: value.clone() for name, value in peer.model.state_dict().items()}
    assert wanted.any() and not wanted.all()
    np.testing.assert_array_equal(peers.loop(peer, faults), wanted)
    assert all(torch.equal(before[k], v) for k, v in peer.model.state_dict().items())


def test_pytorchfi_gives_the_verdicts_of_the_loop(lenet):
    pytest.importorskip("pytorchfi", reason="PyTorchFI is not installed")
    peer = peers.peer(lenet.source, lenet.engine, batch=16, layout="channels_last", compiled=False)
    faults = costs.at_every_site(lenet.engine, 5)
    wanted = peers.loop(peer, faults)
    assert wanted.any() and not wanted.all()
    np.testing.assert_array_equal(peers.pytorchfi(peer, faults), wanted)


def test_a_model_that_is_another_network_is_refused(lenet):
    other = lenet.engine.network.params["params"]
    other = {"params": other | {"fc3": jax.tree.map(lambda x: x + 1e-3, other["fc3"])}}
    network = target.read(lenet.source, other)
    apart = models.module(lenet.source, network)
    logits = apart(torch.tensor(lenet.engine.images.transpose(0, 3, 1, 2))).detach().numpy()
    with pytest.raises(InputError, match=r"lenet gives logits .* away from ours"):
        models.check_logits(lenet.source, logits, lenet.engine.golden.logits)


# --- The rows and the script


@pytest.mark.parametrize("name", ["vmap", "full", "critical", "detect", "pytorch_loop"])
def test_rows_agree_on_exponent_flips(lenet, name):
    reference = lenet.engine.run(benchmark.checked_flips(lenet)).first_critical
    assert (reference >= 0).any() and (reference < 0).any()
    for row in benchmark.ROWS[name](lenet)[:2]:
        assert benchmark.agreement(lenet, row, reference) == "16/16"
        wrong = np.where(reference < 0, 0, -1)
        assert benchmark.agreement(lenet, row, wrong) == "0/16"


def flags_of(weights, *more: str) -> tuple[str, ...]:
    return (
        "--net=lenet", f"--weights={weights}", "--dataset=digits", "--images=32", "--seconds=0.02",
        "--rounds=2", "--allocator=as_installed", "--json", *more,
    )  # fmt: skip


def test_script_prints_and_keeps_every_row(script, lenet_weights, own_folder):
    ended = script(bench, *flags_of(lenet_weights, f"--rows={','.join(QUICK)}"))
    assert ended.status == 0, ended.err
    found = json.loads(ended.out.splitlines()[-1])
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) | set(found["left_out"]) == set(QUICK)
    assert set(found["left_out"]) <= {"pytorchfi", "snntorch_loop"}
    for row in rows.values():
        assert len(row["rates"]) == 2
        assert row["low"] <= row["median"] <= row["high"]
        assert row["median"] == statistics.median(row["rates"])
        assert row.get("agree") in (None, "16/16")
    assert rows["pytorch_loop"]["with_skipping"] == 2 * rows["pytorch_loop"]["median"]
    assert rows["critical"]["with_skipping"] == rows["critical"]["median"]
    pairs = zip(rows["critical"]["rates"], rows["golden"]["rates"], strict=True)
    expected = statistics.median(a / b for a, b in pairs)
    assert found["ratios"]["critical_over_golden"] == pytest.approx(expected)
    assert found["ratios"]["critical_over_pytorch_compiled_skipping"] is None
    (kept,) = (own_folder / "runs" / "bench").iterdir()
    assert kept.name.startswith("bench-lenet-")
    assert json.loads(kept.read_text()) == found


def test_missing_pytorch_leaves_its_rows_out(script, lenet_weights, own_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    ended = script(bench, *flags_of(lenet_weights, "--rows=golden,pytorch_loop", "--out="))
    found = json.loads(ended.out.splitlines()[-1])
    assert [row["name"] for row in found["rows"]] == ["golden"]
    assert "PyTorch is not installed" in found["left_out"]["pytorch_loop"]
    assert not list(own_folder.iterdir())


def test_unknown_rows_are_refused(script, lenet_weights):
    ended = script(bench, *flags_of(lenet_weights, "--rows=golden,gold"))
    assert ended.status == 2
    assert ended.err.startswith("error: row 'gold' is unknown; choose from golden, vmap, full")


@pytest.mark.parametrize("measure", ["full", "critical"])
def test_profile_accounts_for_every_site(script, lenet_weights, own_folder, monkeypatch, measure):
    monkeypatch.setattr(costs, "SITE_SECONDS", 0.01)
    monkeypatch.setattr(costs, "PROFILED", 64)
    for cost in ("EQUATION", "HOST"):  # so few images would not pay for bounds
        monkeypatch.setattr(routes, cost, 0)
    arguments = flags_of(lenet_weights, "--profile", f"--measure={measure}")
    found = json.loads(script(bench, *arguments).out.splitlines()[-1])
    assert [row["site"] for row in found["rows"]] == [
        f"{name}/kernel" for name in ("conv1", "conv2", "fc1", "fc2", "fc3")
    ]
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    assert found["stages"]["run"] > 0
    assert any(row["certified"] > 0 for row in found["rows"]) == (measure == "critical")


def test_growth_over_faults_then_images(monkeypatch):
    monkeypatch.setattr(costs, "FAULTS", (32, 64, 128))
    monkeypatch.setattr(costs, "IMAGES", (8, 16, 1000))
    asked = []

    def row(faults, images):
        asked.append((faults, images))
        return {"seconds": costs.PATIENCE * faults / 50}

    assert len(costs.growth(row, 360)) == len(asked)
    assert asked == [(32, 8), (64, 8), (32, 16), (32, 360)]  # 64 faults took too long to go on


def test_a_row_of_growth_is_measured_in_a_process_of_its_own(
    script, lenet_weights, own_folder, monkeypatch
):
    monkeypatch.setattr(costs, "FAULTS", (32,))
    monkeypatch.setattr(costs, "IMAGES", (8,))
    own = flags_of(lenet_weights, "--growth", "--measure=full")
    monkeypatch.setattr(machine.sys, "argv", ["bench.py", *own])
    ended = script(bench, *own)
    (row,) = json.loads(ended.out.splitlines()[-1])["rows"]
    assert (row["faults"], row["images"]) == (32, 8)
    assert row["us_per_verdict"] == pytest.approx(row["seconds"] / (32 * 8) * 1e6)
    assert row["peak_mib"] > 0


def test_the_script_starts_again_once_with_its_allocator(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *of: started.append(of))
    monkeypatch.setattr(machine.sys, "argv", ["bench.py", "--json"])
    for name in machine.MALLOC:
        monkeypatch.delenv(name, raising=False)
    machine.tune_allocator("experiments.bench")
    ((_, command, environment),) = started
    assert command[1:] == ["-m", "experiments.bench", "--json"]
    assert machine.MALLOC.items() <= environment.items()
    monkeypatch.setattr(os, "environ", environment)
    machine.tune_allocator("experiments.bench")
    assert len(started) == 1
    assert not machine.untuned().keys() & machine.MALLOC.keys()


@pytest.mark.slow
def test_compiled_rows_agree(lenet):
    reference = lenet.engine.run(benchmark.checked_flips(lenet)).first_critical
    for row in benchmark.ROWS["pytorch_loop_compiled"](lenet):
        assert benchmark.agreement(lenet, row, reference) == "16/16"


def test_parameters_and_state_of_a_spiking_network(script, own_folder, tmp_path):
    pytest.importorskip("snntorch")
    frames = (6, 4, 4, 2)
    x = np.random.default_rng(0).poisson(0.4, (8, *frames)).astype(np.uint8)
    np.savez(tmp_path / "events.npz", x_test=x, y_test=np.arange(8), frames="made up")
    nets.save(tmp_path / "w.safetensors", nets.init(nets.build("snn_nmnist", frames), 0))
    ended = script(
        bench, "--net=snn_nmnist", f"--dataset={tmp_path}/events.npz", "--seconds=0.01",
        f"--weights={tmp_path}/w.safetensors", "--rounds=1", "--json", "--allocator=as_installed",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    found = json.loads(ended.out.splitlines()[-1])
    rows = {row["name"]: row for row in found["rows"]}
    for part in ("parameters", "state"):
        assert rows[f"full_{part}"]["agree"] == rows[f"snntorch_loop_{part}"]["agree"] == "16/16"
        assert found["ratios"][f"full_over_snntorch_{part}"] > 0
