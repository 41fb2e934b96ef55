"""The main job from the command line: records, resuming, refusing, comparing with the truth."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import jfi
import nets
from experiments import campaign, target
from experiments.data import sets
from jfi.campaign import campaign as jfi_campaign
from jfi.campaign import records
from jfi.engine import engine, golden

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--sites=fc3/kernel", "--images=20", "--verify=50")
FAULTS = 24 * 10 * 32 * 2  # of fc3's kernel
SHARD = 512  # faults, so that a campaign has many


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Many small shards; no measuring of this machine."""
    monkeypatch.setattr(jfi_campaign, "SHARD_FAULTS", (SHARD, SHARD))
    monkeypatch.setattr(golden, "golden_rate", lambda network, images: 1e4)


@pytest.fixture(scope="module")
def exhaustive(script, lenet_weights, tmp_path_factory) -> Path:
    """Work directory of an exhaustive campaign, never interrupted."""
    workdir = tmp_path_factory.mktemp("exhaustive")
    with (
        mock.patch.object(jfi_campaign, "SHARD_FAULTS", (SHARD, SHARD)),
        mock.patch.object(golden, "golden_rate", lambda network, images: 1e4),
    ):
        ended = script(campaign, *flags_of(workdir, lenet_weights, "exhaustive"))
    assert ended.status == 0, ended.err
    return workdir


def flags_of(workdir, weights, sampler: str) -> list[str]:
    return [*SMALL, f"--weights={weights}", f"--workdir={workdir}", f"--sampler={sampler}"]


def outcomes(workdir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (workdir / "outcomes").iterdir()}


def test_summary_and_report(exhaustive):
    summary = json.loads((exhaustive / "summary.json").read_text())
    assert summary["population"] == summary["injections"] == FAULTS
    network, *others = summary["estimates"]
    assert {"unit", "estimate", "margin", "low", "high"} <= set(network)
    assert network["unit"] == "network" and network["margin"] == 0
    assert [e["unit"] for e in others[:2]] == ["fc3/kernel", "bit 0"]
    verify = summary["verify"]
    assert {"pairs", "agreements", "near_ties", "disagreements"} <= set(verify)
    assert verify["pairs"] == verify["agreements"] + verify["near_ties"] == 50
    assert summary["decided"]["identity"] == summary["decided"]["inference"] == 10 * FAULTS
    assert sum(summary["decided"].values()) == 20 * FAULTS
    report = (exhaustive / "report.md").read_text()
    assert f"Exactly {100 * network['estimate']:.3f}% of the {FAULTS:,} stuck-at faults" in report
    assert (exhaustive / "layer.png").stat().st_size > 1000
    manifest = json.loads((exhaustive / "manifest.json").read_text())
    assert manifest["config"]["sampler"] == "exhaustive" and manifest["versions"]["jax"]


def test_estimate_is_the_share_of_faults_that_change_an_answer(exhaustive, lenet_weights):
    """Of the top exponent bit, by flipping it in NumPy and running the network as it is."""
    net = nets.build("lenet", (8, 8, 1))
    variables = nets.load(net, lenet_weights)
    digits = sets.load("digits")
    images, _ = target.workload(net, digits, 20)
    golden = np.asarray(nets.apply(net, variables, images)).argmax(1)
    kernel = np.asarray(variables["params"]["fc3"]["kernel"])
    critical = 0
    for index in range(kernel.size):
        words = kernel.reshape(-1).view(np.uint32).copy()
        words[index] ^= np.uint32(1 << 30)
        variables["params"]["fc3"]["kernel"] = words.view(np.float32).reshape(kernel.shape)
        faulty = np.asarray(nets.apply(net, variables, images)).argmax(1)
        critical += bool((faulty != golden).any())
    found = {e["unit"]: e for e in records.read_summary(exhaustive)["estimates"]}["bit 30"]
    assert found["population"] == 2 * kernel.size
    assert found["critical"] == critical > 0  # of the two stuck-ats, one leaves the bit as it is


DIES = """
import os, signal
from experiments import campaign, cli
from jfi.campaign import campaign as jfi_campaign

replace, files = os.replace, []

def die(partial, path):  # at the worst moment: written, not yet in place
    files.append(path)
    if len(files) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(partial, path)

os.replace = die
jfi_campaign.SHARD_FAULTS = ({shard}, {shard})
campaign.define_flags()
cli.run(campaign.main)
"""


def killed(folder: Path, arguments: list[str]) -> int:
    """Exit status of a campaign that kills itself while writing its eighth file."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-c", DIES.format(shard=SHARD), *arguments]
    return subprocess.run(command, env=environment, capture_output=True).returncode


def disk_full(script, monkeypatch, arguments: list[str]):
    """How a campaign ends whose disk is full at its eighth file."""
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 14:  # two a file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        return script(campaign, *arguments)


@pytest.mark.parametrize("end", ["kill", "disk full"])
def test_goes_on_after_the_worst(script, monkeypatch, tmp_path, exhaustive, lenet_weights, end):
    arguments = flags_of(tmp_path / "run", lenet_weights, "exhaustive")
    if end == "kill":
        assert killed(tmp_path, arguments) == -signal.SIGKILL
    else:
        ended = disk_full(script, monkeypatch, arguments)
        assert ended.status == 1
        assert ended.err.startswith("error: [Errno 28] No space left on device")
        assert ended.err.count("\n") == 1
    left = list((tmp_path / "run" / "outcomes").glob("*.parquet"))
    assert len(left) == 6  # after the manifest
    again = script(campaign, *arguments)
    assert again.status == 0, again.err
    assert outcomes(tmp_path / "run") == outcomes(exhaustive)
    summaries = (records.read_summary(path) for path in (tmp_path / "run", exhaustive))
    one, other = ({**summary, "run": None, "measured": None} for summary in summaries)
    assert one == other
    assert records.read_summary(tmp_path / "run")["run"]["faults"] == FAULTS - 6 * SHARD


@pytest.mark.parametrize("measure", ["critical", "detect"])
def test_other_measures_find_the_same(script, tmp_path, exhaustive, lenet_weights, measure):
    arguments = [*flags_of(tmp_path, lenet_weights, "exhaustive"), f"--measure={measure}"]
    ended = script(campaign, *arguments)
    assert ended.status == 0, ended.err
    found = records.read_summary(tmp_path)
    assert found["estimates"] == records.read_summary(exhaustive)["estimates"]
    assert sum(found["decided"].values()) == 20 * FAULTS
    # Gone on with after half of its outcomes were lost, to the same bytes.
    before = outcomes(tmp_path)
    for name in list(before)[::2]:
        (tmp_path / "outcomes" / name).unlink()
    assert script(campaign, *arguments, "--verify=0").status == 0
    assert outcomes(tmp_path) == before


def test_a_finished_campaign_runs_nothing_again(script, monkeypatch, exhaustive, lenet_weights):
    before, measured = outcomes(exhaustive), records.read_summary(exhaustive)["measured"]
    monkeypatch.setattr(jfi.Engine, "run", None)
    ended = script(campaign, *flags_of(exhaustive, lenet_weights, "exhaustive"), "--verify=0")
    assert ended.status == 0, ended.err
    assert outcomes(exhaustive) == before
    assert records.read_summary(exhaustive)["measured"] == measured


@pytest.mark.parametrize(
    ("flag", "difference"),
    [
        ("--sampler=layer_wise", 'sampler was "exhaustive", is "layer_wise"'),
        ("--seed=1", "seed was 0, is 1"),
        ("--images=19", "images was 20, is 19"),
        ("--confidence=0.9", "confidence was 0.99, is 0.9"),
        ("--sites=fc2/kernel", 'sites was "fc3/kernel", is "fc2/kernel"'),
        ("--keep_bits", "keep_bits was false, is true"),
        ("--measure=critical", 'measure was "full", is "critical"'),
        ("--mean=0.5 --std=0.3081", "mean was [0.1307], is [0.5]"),
        ("--estimate=pairs", 'estimate was "faults", is "pairs"'),
    ],
)
def test_other_flags_are_refused(script, exhaustive, lenet_weights, flag, difference):
    before = outcomes(exhaustive)
    ended = script(campaign, *flags_of(exhaustive, lenet_weights, "exhaustive"), *flag.split())
    assert ended.status == 2
    assert "holds a campaign with other flags" in ended.err and difference in ended.err
    assert outcomes(exhaustive) == before


def test_mean_and_std_are_on_record_and_the_usual_ones_are_no_others(
    script, exhaustive, lenet_weights
):
    config = records.read_manifest(exhaustive)["config"]
    assert (config["mean"], config["std"], config["pixel_max"]) == ([0.1307], [0.3081], None)
    flags = flags_of(exhaustive, lenet_weights, "exhaustive")
    assert script(campaign, *flags, "--mean=0.1307", "--std=0.3081").status == 0


def test_other_weights_in_the_same_file_are_refused(script, exhaustive, lenet_weights):
    before = lenet_weights.read_bytes()
    net = nets.build("lenet", (8, 8, 1))
    nets.save(lenet_weights, nets.init(net, 1))
    ended = script(campaign, *flags_of(exhaustive, lenet_weights, "exhaustive"))
    lenet_weights.write_bytes(before)
    assert ended.status == 2 and "other content: parameters was" in ended.err


def test_estimates_stand_beside_the_truth(script, tmp_path, exhaustive, lenet_weights):
    arguments = flags_of(tmp_path, lenet_weights, "layer_wise")
    arguments += ["--error_margin=0.02", f"--truth={exhaustive}"]
    ended = script(campaign, *arguments)
    assert ended.status == 0, ended.err
    header, network, layer = ended.out.splitlines()[1:4]
    assert header.split()[-3:] == ["truth", "%", "inside"]
    truth = records.read_summary(exhaustive)["estimates"][0]["estimate"]
    assert network.split()[-2:] == layer.split()[-2:] == [f"{100 * truth:.3f}", "yes"]
    # Asked for 2% at 99%, and got it.
    found = records.read_summary(tmp_path)["estimates"][0]
    assert abs(found["estimate"] - truth) < found["margin"] < 0.02
    assert (
        "The exhaustive truth lies inside the interval of" in (tmp_path / "report.md").read_text()
    )


@pytest.mark.parametrize("estimate", ["pairs", "accuracy"])
def test_pairs_and_accuracy_stand_beside_their_truth(
    script, tmp_path, exhaustive, lenet_weights, estimate
):
    """The truth by the record of every fault."""
    arguments = flags_of(tmp_path / "whole", lenet_weights, "exhaustive")
    ended = script(campaign, *arguments, f"--estimate={estimate}", "--measure=critical")
    assert ended.status == 0, ended.err
    column = "critical" if estimate == "pairs" else "correct"
    counts = [shard[column] for shard in records.read_shards(exhaustive)]
    (whole, *_) = records.read_summary(tmp_path / "whole")["estimates"]
    assert whole["estimate"] == pytest.approx(np.concatenate(counts).mean() / 20)
    arguments = [
        *flags_of(tmp_path / "run", lenet_weights, "adaptive_distance"), f"--estimate={estimate}",
        "--error_margin=0.02", "--levels=network", "--measure=critical",
    ]  # fmt: skip
    ended = script(campaign, *arguments, f"--truth={tmp_path / 'whole'}")
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[2].split()[-2:] == [f"{100 * whole['estimate']:.3f}", "yes"]
    assert "for the share of (fault" in ended.out or "for the mean accuracy under" in ended.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Estimated" in page and f"--estimate={estimate}" in page
    assert ("; without a fault" in page) == (estimate == "accuracy")
    other = script(
        campaign, *arguments[:4], "--sampler=layer_wise", f"--truth={tmp_path / 'whole'}"
    )
    assert other.status == 2 and f"estimates {estimate}, not faults" in other.err


def test_pairs_are_not_told_by_detect(script, tmp_path, lenet_weights):
    arguments = [*flags_of(tmp_path / "run", lenet_weights, "layer_wise"), "--measure=detect"]
    ended = script(campaign, *arguments, "--estimate=pairs")
    assert ended.status == 2 and "measure 'detect' tells only one" in ended.err
    assert ended.err.count("\n") == 1 and not (tmp_path / "run").exists()


def copied(truth: Path, folder: Path, file: str, change) -> Path:
    """The records of a campaign without its outcomes, one file of them changed."""
    folder.mkdir()
    for name in (records.MANIFEST, records.SUMMARY):
        content = json.loads((truth / name).read_text())
        if name == file:
            change(content)
        (folder / name).write_text(json.dumps(content))
    return folder


def test_a_truth_outside_is_shown(script, tmp_path, exhaustive, lenet_weights):
    def change(summary):
        summary["estimates"][0]["estimate"] = 0.9

    truth = copied(exhaustive, tmp_path / "truth", records.SUMMARY, change)
    arguments = flags_of(tmp_path / "run", lenet_weights, "layer_wise")
    ended = script(campaign, *arguments, "--error_margin=0.05", f"--truth={truth}")
    network, layer = ended.out.splitlines()[2:4]
    assert network.split()[-2:] == ["90.000", "NO"]
    assert layer.split()[-1] == "yes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["config"].update(sampler="layer_wise"), "was sampled layer_wise"),
        (lambda m: m["hashes"].update(images="0"), "has other hashes"),
        (lambda m: m.update(sites=["fc2/kernel"]), "has other sites"),
        (lambda m: m.update(images=7), "has other images"),
        (lambda m: m.update(population=1), "has other population"),
    ],
)
def test_another_truth_is_refused(script, tmp_path, exhaustive, lenet_weights, change, message):
    truth = copied(exhaustive, tmp_path / "truth", records.MANIFEST, change)
    arguments = flags_of(tmp_path / "run", lenet_weights, "layer_wise")
    ended = script(campaign, *arguments, f"--truth={truth}")
    assert ended.status == 2 and message in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("measure", ["critical", "detect"])
def test_a_workload_is_the_campaign_of_its_images(
    script, exhaustive, lenet_weights, measure, tmp_path
):
    arguments = [*flags_of(tmp_path, lenet_weights, "exhaustive"), f"--measure={measure}"]
    ended = script(campaign, *arguments, "--workload=margin:top:5")
    assert ended.status == 0, ended.err
    assert "workload: 5 of 20 images, margin the 5 lowest" in ended.out
    manifest = records.read_manifest(tmp_path)
    assert manifest["config"]["workload"] == "margin:top:5" and manifest["images"] == 5
    chosen = manifest["workload"]["indices"]
    assert len(set(chosen)) == 5 and manifest["workload"]["of"] == 20
    found, whole = (
        records.read_summary(folder)["estimates"][0]["critical"]
        for folder in (tmp_path, exhaustive)
    )
    assert 0 < found <= whole
    assert "That saves 75.0% of the inferences" in (tmp_path / "report.md").read_text()
    ended = script(campaign, *arguments, "--workload=margin:top:6")
    assert ended.status == 2 and 'workload was "margin:top:5", is "margin:top:6"' in ended.err


def test_an_explicit_list_is_injected_in_its_order(script, own_folder, lenet_weights):
    listed = [("fc3/kernel", 5, 30, "flip"), ("fc1/bias", 0, 31, "stuck_at_1")] * 2
    rows = "".join(",".join(map(str, row)) + "\n" for row in listed)
    Path("faults.csv").write_text("site,index,bit,polarity\n" + rows)
    ended = script(
        campaign, "--faults=faults.csv", f"--weights={lenet_weights}", "--images=10", "--keep_bits"
    )
    assert ended.status == 0, ended.err
    workdir = Path("runs", "lenet_digits_listed")
    (shard,) = records.read_shards(workdir)
    assert shard["index"].tolist() == [5, 0, 5, 0]
    assert shard["bit"].tolist() == [30, 31, 30, 31]
    assert shard["polarity"].tolist() == [2, 1, 2, 1]
    np.testing.assert_array_equal(shard["critical"][:2], shard["critical"][2:])
    images = np.unpackbits(shard["critical_bits"], axis=1)[:, :10]
    np.testing.assert_array_equal(images.sum(1), shard["critical"])
    summary = records.read_summary(workdir)
    assert summary["population"] == summary["injections"] == 4
    assert summary["estimates"][0]["critical"] == (shard["critical"] > 0).sum()
    assert summary["estimates"][0]["margin"] == 0


def test_a_disagreement_fails_the_run(script, tmp_path, monkeypatch, lenet_weights):
    """With an engine that inverts what it injects."""
    right = engine.bits.faulty
    monkeypatch.setattr(engine.bits, "faulty", lambda *a: -right(*a))
    ended = script(campaign, *flags_of(tmp_path, lenet_weights, "layer_wise"), "--error_margin=0.1")
    assert ended.status == 1
    assert ended.err.startswith("error: verification failed: fc3/kernel index")
    assert records.read_summary(tmp_path)["verify"]["disagreements"] > 0


@pytest.mark.parametrize("when", ["", "@step", "@0"])
def test_faults_in_activations_of_lenet(script, tmp_path, lenet_weights, when):
    arguments = flags_of(tmp_path, lenet_weights, "layer_wise")
    ended = script(
        campaign, *arguments, "--activations", f"--sites=(conv1|fc1)/output{when}",
        "--error_margin=0.05", "--verify=150",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    found = records.read_summary(tmp_path)
    assert found["verify"]["pairs"] == 150 and not found["verify"]["disagreements"]
    layers = [unit for unit in found["estimates"] if unit["level"] == "layer"]
    assert [unit["unit"] for unit in layers] == [f"conv1/output{when}", f"fc1/output{when}"]
    assert all(0 < unit["estimate"] < 0.5 for unit in layers)
    names = set(records.read_shard(tmp_path, 0))
    assert ("step" in names) == bool(when)
