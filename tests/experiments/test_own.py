"""Networks that users bring: files of theirs through plan, campaign, truth and bench."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import jfi
import nets
from experiments import campaign, own, plan, report
from experiments.bench import __main__ as bench
from experiments.samplers import truth
from jfi.campaign import records
from jfi.engine import golden

SOURCE = """
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np

from nets import HIDDEN  # a sibling, not the project's package of that name

RNG = np.random.default_rng(0)
PARAMS = {
    "first": RNG.standard_normal((36, HIDDEN)).astype("f4"),
    "second": RNG.standard_normal((HIDDEN, 4)).astype("f4"),
}


def apply(params, x):
    return jnp.maximum(x.reshape(len(x), -1) @ params["first"], 0) @ params["second"]


def embed(params, x):
    return params["first"][x].sum(1) @ params["second"]


class Dense(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        x = flax.linen.Dense(HIDDEN, name="a")(x.reshape(len(x), -1))
        return flax.linen.Dense(4, name="b")(jax.nn.relu(x))


def build():
    print("standard output is the script's")
    return apply, PARAMS


def embedding():
    return embed, PARAMS


def linen():
    return Dense(), Dense().init(jax.random.key(0), jnp.zeros((1, 6, 6, 1)))


def torch_cnn():
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))


def scaled():
    return torch_cnn(), lambda x: x.transpose(0, 3, 1, 2).astype("f4") / 255


def from_file():
    return "tiny.onnx", lambda x: x.transpose(0, 3, 1, 2).astype("f4") / 255


VALUE = 3


def needs(argument):
    return argument


def fails():
    return {}["missing"]


def leaves():
    raise SystemExit(3)


def other():
    return {"weights": 1}


def lacks():
    import haiku


def shortens():
    return build(), lambda x: x[:1]


def stumbles():
    return build(), lambda x: x.no_such


def texts():
    return build(), lambda x: "text"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A user's folder: networks, a sibling of theirs, and data sets."""
    path = tmp_path_factory.mktemp("user")
    (path / "mine.py").write_text(SOURCE)
    (path / "nets.py").write_text("HIDDEN = 8\n")
    (path / "broken.py").write_text("x = 1\ny = (\n")
    (path / "raises.py").write_text("x = 1\nraise KeyError('at import')\n")
    (path / "absent.py").write_text("import no_such_library\n")
    (path / "empty.py").touch()
    (path / "short.onnx").write_bytes(b"no onnx")
    write_onnx(path / "tiny.onnx")
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (12, 6, 6, 1)).astype(np.uint8), np.arange(12) % 4
    floats = np.float32(pixels) / 255
    sets = {
        "uint8": {"x_test": pixels, "y_test": labels},
        "nhwc": {"x_test": floats, "y_test": labels},
        "nchw": {"x_test": floats.transpose(0, 3, 1, 2)},
        "flat": {"x_test": floats[..., 0]},
        "tokens": {"x_test": rng.integers(0, 36, (12, 5)).astype(np.int32)},
        "classes": {"x_test": floats, "y_test": labels + 1},
        "fewer": {"x_test": floats, "y_test": labels[1:]},
        "train": {"x_train": floats},
        "text": {"x_test": np.full((3, 2), "text")},
        "vector": {"x_test": np.ones(3, np.float32)},
        "wide": {"x_test": np.ones((3, 7, 5), np.float32)},
    }
    for name, arrays in sets.items():
        np.savez(path / f"{name}.npz", **arrays)
    return path


def write_onnx(path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.parser.parse_graph(
        "tiny (float[N, 1, 6, 6] x) => (float[N, 4] y) "
        "{ a = Conv (x, w) b = Relu (a) c = Flatten (b) y = Gemm (c, f) }"
    )
    rng = np.random.default_rng(1)
    for name, shape in {"w": (3, 1, 3, 3), "f": (48, 4)}.items():
        values = rng.standard_normal(shape).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


@pytest.fixture(autouse=True)
def quick(monkeypatch, folder):
    """In the user's folder, without measuring this machine."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(golden, "golden_rate", lambda network, images: 1e4)


TAKEN = {  # --net: (--dataset, sites by default)
    "mine.py": ("nhwc", ["first", "second"]),
    "mine.py:embedding": ("tokens", ["second"]),
    "mine.py:torch_cnn": ("nchw", ["0.weight", "3.weight"]),
    "mine.py:scaled": ("uint8", ["0.weight", "3.weight"]),
    "mine.py:from_file": ("uint8", ["w", "f"]),
    "tiny.onnx": ("nchw", ["w", "f"]),
}


@pytest.mark.parametrize("net", TAKEN)
def test_plan_and_campaign(script, tmp_path, folder, monkeypatch, net):
    dataset, sites = TAKEN[net]
    flags = [f"--net={net}", f"--dataset={dataset}.npz", "--sampler=network_wise"]
    flags += ["--error_margin=0.1"]
    planned = script(plan, *flags, "--json")
    assert planned.status == 0, planned.err
    found = json.loads(planned.out)
    assert [row["site"] for row in found["layers"]] == sites and found["images"] == 12
    workdir = tmp_path / "run"
    ended = script(campaign, *flags, f"--workdir={workdir}", "--verify=50")
    assert ended.status == 0, ended.err
    summary, manifest = records.read_summary(workdir), records.read_manifest(workdir)
    assert summary["verify"]["pairs"] == 50 and not summary["verify"]["disagreements"]
    labelled = "y_test" in np.load(f"{dataset}.npz")
    assert ("golden_accuracy" in summary["measured"]) == labelled == ("correct" in summary["pairs"])
    assert (": no labels on 12 images" in ended.out) == (not labelled)
    # The report repeats it from anywhere, and knows the file's bytes.
    command = re.search(r"<pre>python -m (.*)</pre>", (workdir / "report.html").read_text())[1]
    named = net if ":" in net or net.endswith(".onnx") else f"{net}:build"
    assert f"--net={folder / named} --dataset={folder / dataset}.npz" in command
    assert manifest["config"]["net_sha256"] in (workdir / "report.md").read_text()
    before = records.read_summary(workdir)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jfi.Engine, "run", None)
    again = script(campaign, *shlex.split(command)[1:], f"--workdir={workdir}", "--verify=0")
    assert again.status == 0, again.err
    assert records.read_summary(workdir)["estimates"] == before["estimates"]


def test_a_network_is_adopted_as_jfi_adopts_it(script, tmp_path, folder):
    """Verdicts of the script are those of the library on the same model and images."""
    flags = ["--net=mine.py:torch_cnn", "--dataset=nchw.npz", "--sampler=network_wise"]
    ended = script(campaign, *flags, "--error_margin=0.1", f"--workdir={tmp_path / 'a'}")
    assert ended.status == 0, ended.err
    x = np.load("nchw.npz")["x_test"]
    study = jfi.study(own.load("mine.py:torch_cnn").model, x)
    options = {"error_margin": 0.1, "measure": "full", "progress": False}
    found = study.run("network_wise", workdir=tmp_path / "b", **options)
    assert records.read_summary(tmp_path / "a")["estimates"] == found.summary["estimates"]


def test_other_flags_of_a_campaign(script, tmp_path, folder):
    """Workload, measure, a sampler in rounds, and outputs of layers of Flax Linen."""
    flags = ["--net=mine.py:linen", "--dataset=nhwc.npz", "--workload=margin:top:6"]
    flags += ["--sampler=adaptive_distance", "--error_margin=0.05", "--measure=critical"]
    ended = script(campaign, *flags, "--levels=network", f"--workdir={tmp_path / 'a'}")
    assert ended.status == 0, ended.err
    assert records.read_manifest(tmp_path / "a")["images"] == 6
    assert records.read_manifest(tmp_path / "a")["sites"] == ["a/kernel", "b/kernel"]
    flags = ["--net=mine.py:linen", "--dataset=nhwc.npz", "--activations", "--sites=.*/output"]
    flags += ["--sampler=network_wise", "--error_margin=0.1", f"--workdir={tmp_path / 'b'}"]
    ended = script(campaign, *flags)
    assert ended.status == 0, ended.err
    assert records.read_manifest(tmp_path / "b")["sites"] == ["a/output", "b/output"]
    ended = script(campaign, *flags[1:], "--net=mine.py:build")
    assert ended.status == 2 and "only layers of Flax Linen are told" in ended.err


def test_truth(script, tmp_path, folder):
    out = tmp_path / "truth.npz"
    ended = script(
        truth, "--net=mine.py", "--dataset=nhwc.npz", "--images=3", "--sites=second",
        f"--out={out}", "--verify=50",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    known = truth.load(out)
    assert known.meta["net"] == "mine.py:build" and len(known.meta["net_sha256"]) == 64
    assert [site.name for site in known.sites] == ["second"] and known.critical[0].max() > 0


@pytest.mark.parametrize("net", ["mine.py:torch_cnn", "tiny.onnx"])
def test_bench(script, folder, tmp_path, monkeypatch, net):
    monkeypatch.setattr(bench.machine, "tune_allocator", lambda module: None)
    rows = "golden,detect,pytorch_golden,pytorch_loop,pytorch_loop_compiled,pytorchfi,snntorch_loop"
    ended = script(
        bench, f"--net={net}", "--dataset=nchw.npz", f"--rows={rows}", "--seconds=0.01",
        "--rounds=1", "--json", f"--out={tmp_path}",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    found = json.loads(ended.out)
    here = {row["name"]: row.get("agree") for row in found["rows"]}
    wanted = {"golden": None, "detect": "16/16"}
    if net != "tiny.onnx":
        wanted |= {"pytorch_golden": None, "pytorch_loop": "16/16"}
    assert here == wanted and found["net"] in (net, f"{net}:build")
    assert all("no such peer" in why for why in found["left_out"].values())


def test_modules_of_the_project_come_back(folder):
    assert own.load("mine.py").model[1]["first"].shape == (36, 8)
    assert sys.modules["nets"] is nets
    assert str(folder) in sys.path[1:]  # for imports in functions
    assert "mine" not in sys.modules


def test_a_changed_file_is_refused(script, folder, tmp_path):
    path = tmp_path / "copied.py"
    path.write_text((folder / "mine.py").read_text().replace("from nets import HIDDEN", "HIDDEN=8"))
    flags = [f"--net={path}", "--dataset=nhwc.npz", "--sampler=network_wise", "--error_margin=0.2"]
    assert script(campaign, *flags, f"--workdir={tmp_path / 'run'}").status == 0
    path.write_text(path.read_text() + "# changed\n")
    ended = script(campaign, *flags, f"--workdir={tmp_path / 'run'}")
    assert ended.status == 2 and "net_sha256 was" in ended.err
    assert script(report, str(tmp_path / "run")).status == 0


MINE = "--net=mine.py --dataset=nhwc.npz"
BAD = {
    "--net=none.py --dataset=nhwc.npz": "net none.py: there is no file",
    "--net=none.onnx --dataset=nhwc.npz": "net none.onnx: there is no file",
    "--net=model.keras --dataset=nhwc.npz": "your own as FILE.py:FUNCTION, FILE.onnx or FILE.nir",
    "--net=short.onnx --dataset=nchw.npz": "is no ONNX model that onnx can read",
    "--net=mine.py": "your own network needs images that it takes",
    f"{MINE} --mean=0.5 --std=1": "gets its images as they are; leave --mean out and normalise in",
    f"{MINE} --pixel_max=1": "gets its images as they are; leave --pixel_max out",
    f"{MINE} --weights=x.th": "weights x.th: your own network mine.py brings its weights",
    "--net=broken.py --dataset=nhwc.npz": "broken.py:2)",
    "--net=raises.py --dataset=nhwc.npz": "the file raised KeyError: 'at import' (",
    "--net=absent.py --dataset=nhwc.npz": "No module named 'no_such_library'",
    "--net=empty.py --dataset=nhwc.npz": "empty.py has no build; it has no function",
    "--net=mine.py:nothing --dataset=nhwc.npz": "no nothing; it has apply, embed, Dense, build",
    "--net=mine.py:VALUE --dataset=nhwc.npz": "mine.py has int 3, no function, as VALUE",
    "--net=mine.py:needs --dataset=nhwc.npz": "needs() missing 1 required positional argument",
    "--net=mine.py:fails --dataset=nhwc.npz": "fails() raised KeyError: 'missing' (",
    "--net=mine.py:leaves --dataset=nhwc.npz": "leaves() raised SystemExit: 3 (",
    "--net=mine.py:lacks --dataset=nhwc.npz": "install it: pip install 'jfi[haiku]'",
    "--net=mine.py:other --dataset=nhwc.npz": "model is dict of 'weights', which jfi does not know",
    "--net=mine.py:shortens --dataset=nhwc.npz": "it must be as many images, 12",
    "--net=mine.py:stumbles --dataset=nhwc.npz": "float32[12, 6, 6, 1] raised AttributeError",
    "--net=mine.py:texts --dataset=nhwc.npz": "returns str 'text'; it must be a batch",
    "--net=mine.py:torch_cnn --dataset=nhwc.npz": "It does run on x.transpose(0, 3, 1, 2) of",
    "--net=mine.py:torch_cnn --dataset=uint8.npz": "(0, 3, 1, 2).astype('float32') / 255 of",
    "--net=mine.py:torch_cnn --dataset=flat.npz": "It does run on x[:, None] of",
    "--net=tiny.onnx --dataset=nhwc.npz": "return ('tiny.onnx', lambda x: x.transpose(0, 3, 1, 2))",
    "--net=mine.py --dataset=wide.npz": "on images float32[3, 7, 5] it raised TypeError",
    "--net=mine.py --dataset=train.npz": "dataset train: lacks x_test",
    "--net=mine.py --dataset=text.npz": "x_test is <U4[3, 2]; numbers [B, ...] are right",
    "--net=mine.py --dataset=vector.npz": "x_test is float32[3]; numbers [B, ...] are right",
    "--net=mine.py --dataset=fewer.npz": "x_test has 12, y_test 11 labels",
    "--net=mine.py --dataset=classes.npz": "dataset classes: y_test: label 4 is out of range",
    f"{MINE} --images=13": "images 13 is out of range; nhwc has 1 to 12",
    f"{MINE} --sites=conv": "matches no site in full; the sites are first, second",
    f"{MINE} --activations": "only layers of Flax Linen are told by --activations",
    "--net=mine.py --dataset=tokens.npz --workload=el2n:top:3": "",
    "--net=tiny.onnx --dataset=nchw.npz --workload=el2n:top:3": "there are no labels",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(script, monkeypatch, flags):
    monkeypatch.setattr(jfi.Engine, "run", None)
    monkeypatch.setitem(sys.modules, "haiku", None)  # not installed
    ended = script(plan, "--sampler=layer_wise", *flags.split())
    assert ended.status == 2, ended.err
    lines = [line for line in ended.err.splitlines() if line != "standard output is the script's"]
    assert len(lines) == 1 and lines[0].startswith("error: ") and BAD[flags] in lines[0]
    assert ended.out == ""
