"""experiments.report: a campaign's reports made again from its records alone."""

import json
import shlex
import shutil

import pytest

from experiments import campaign, report
from jfi.engine import golden


@pytest.fixture(scope="module")
def runs(script, lenet_weights, tmp_path_factory):
    """Folder of a sampled campaign, and of its copy that passes for the whole."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(golden, "golden_rate", lambda network, images: 1e4)
        ended = script(
            campaign, "--sites=fc3/kernel", "--images=10", "--verify=20", "--error_margin=0.05",
            f"--weights={lenet_weights}", "--sampler=layer_wise", f"--workdir={folder / 'sample'}",
        )  # fmt: skip
    assert ended.status == 0, ended.err
    shutil.copytree(folder / "sample", folder / "whole")
    manifest = json.loads((folder / "whole" / "manifest.json").read_text())
    manifest["config"]["sampler"] = "exhaustive"
    (folder / "whole" / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_reports_are_made_again_as_they_were(script, runs):
    run = runs / "sample"
    names = ("report.html", "report.md", "estimates.csv", "layer.png")
    before = {name: (run / name).read_bytes() for name in names}
    for name in names:
        (run / name).unlink()
    ended = script(report, str(run))
    assert ended.status == 0, ended.err
    assert ended.out.splitlines() == [f"report: {run / name}" for name in names[:2]]
    assert {name: (run / name).read_bytes() for name in names} == before
    assert b"(0x" in before["report.html"]  # words before and after
    assert b"python -m experiments.campaign --net=lenet" in before["report.html"]


def test_campaigns_are_set_side_by_side(script, runs):
    run, other = runs / "sample", runs / "whole"
    ended = script(report, str(run), str(other), f"--truth={other}")
    assert ended.status == 0, ended.err
    page = (run / "report.html").read_text()
    assert "B: whole" in page and "Squares are the exhaustive truth" in page
    assert "truth" in (run / "estimates.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no run is named; give the work directory"),
        (["nowhere"], "run nowhere holds no campaign: there is no manifest.json in it"),
        (["unfinished"], "run unfinished is not finished: it has no summary.json"),
        (["unfinished", "--other=1"], "Unknown command line flag 'other'"),
    ],
)
def test_what_is_no_finished_run_is_refused(script, own_folder, arguments, words):
    (own_folder / "unfinished").mkdir()
    (own_folder / "unfinished" / "manifest.json").write_text(json.dumps({"config": {}}))
    ended = script(report, *arguments)
    assert ended.status == 2
    assert words in ended.err and ended.err.count("\n") == 1


def test_the_command_holds_every_flag_that_was_set():
    config = {"net": "lenet", "dataset": "a b.npz", "sampler": "adaptive", "t": None, "seed": 0,
              "keep_bits": True, "activations": False, "levels": ["network", "bit"]}  # fmt: skip
    assert shlex.split(report.command(config)) == [
        "python", "-m", "experiments.campaign", "--net=lenet", "--dataset=a b.npz",
        "--sampler=adaptive", "--seed=0", "--keep_bits", "--levels=network,bit",
    ]  # fmt: skip
    assert report.command({"net": "own"}) is None
