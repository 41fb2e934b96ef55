"""Whatever is wrong with the input: one line that names it, exit status 2, before long work."""

from pathlib import Path

import numpy as np
import pytest

import jfi
import nets
from experiments import campaign, plan, target
from experiments.train import __main__ as train

DIGIT = np.zeros((4, 8, 8), np.float32)


@pytest.fixture(autouse=True)
def files(own_folder, monkeypatch, lenet_weights) -> None:
    """The files that the flags below name; no fault is to be run with any of them."""
    monkeypatch.setattr(jfi.Engine, "run", None)
    content = lenet_weights.read_bytes()
    Path("lenet.safetensors").write_bytes(content)
    Path("short.safetensors").write_bytes(content[:-40])
    Path("short.pt").write_bytes(b"PK\3\4" + bytes(100))
    Path("foreign.safetensors").write_text("no weights")
    Path("weights.txt").write_text("no weights")
    Path("file").touch()
    write_weights(
        "nan.safetensors", lambda kernel: np.where(kernel == kernel.max(), np.nan, kernel)
    )
    write_weights("shape.safetensors", lambda kernel: kernel[1:])
    write_weights("trained.safetensors", lambda kernel: kernel, {"mean": "[0.5]", "std": "[0.25]"})
    write_weights("header.safetensors", lambda kernel: kernel, {"mean": "[]", "std": "[0.25]"})
    np.savez("wrong_shape.npz", x_test=np.zeros((4, 9, 9), np.float32), y_test=np.arange(4))
    np.savez("label.npz", x_test=DIGIT, y_test=np.array([0, 1, 10, 2]))
    np.savez("negative.npz", x_test=DIGIT, y_test=np.array([0, -1, 1, 2]))
    np.savez("bright.npz", x_test=DIGIT + 255, y_test=np.arange(4))
    np.savez("mask.npz", x_test=np.eye(8, dtype=np.uint8)[None].repeat(4, 0), y_test=np.arange(4))
    np.savez("colour.npz", x_test=np.zeros((4, 8, 8, 2), np.float32), y_test=np.arange(4))
    for name, row in LISTS.items():
        header = "site,index,bit,polarity\nfc3/kernel,0,0,flip\n"
        Path(f"{name}.csv").write_text(header + row + "\n")
    Path("header.csv").write_text("layer,index,bit,polarity\n")


LISTS = {
    "bit": "fc3/kernel,1,32,flip",
    "index": "fc3/kernel,240,31,flip",
    "site": "fc4/kernel,0,0,flip",
    "polarity": "fc3/kernel,0,0,stuck",
    "cells": "fc3/kernel,0,0",
}


def write_weights(path: str, change, header=None) -> None:
    """LeNet's weights with one kernel changed."""
    variables = nets.load(nets.build("lenet", (8, 8, 1)), "lenet.safetensors")
    variables["params"]["fc2"]["kernel"] = change(np.asarray(variables["params"]["fc2"]["kernel"]))
    nets.save(path, variables, header)


BAD = {
    "--net=alexnet": "net 'alexnet' is unknown; known are lenet, resnet20",
    "--dataset=svhn": "dataset 'svhn' is unknown; known are digits",
    "--dataset=none.npz": "dataset none.npz: no such file",
    "--dataset=wrong_shape.npz": "lenet",
    "--dataset=colour.npz": "images of 2 channels",
    "--dataset=label.npz": "y_test[2] is 10; labels of 10 classes are 0 to 9",
    "--dataset=negative.npz": "y_test holds -1; labels from 0 are right",
    "--dataset=bright.npz": "x_test holds 255.0; floats in [0, 1] are right",
    "--dataset=mnist --data_dir=.": "dataset mnist isn't prepared in .",
    "--dataset=mask.npz": "x_test is uint8 of 0 and 1 alone; say what white is: --pixel_max=1",
    "--pixel_max=255": "x_test is float64; --pixel_max is of uint8 images only",
    "--pixel_max=0": "--pixel_max=0",
    "--mean=0.5": "mean 0.5: --std is missing; the two go together",
    "--std=0.5": "std 0.5: --mean is missing; the two go together",
    "--mean=half --std=1": "mean 'half' is no list of numbers",
    "--mean= --std=1": "mean : 0 numbers; images of lenet have 1 channels",
    "--mean=0.5,0.5 --std=1": "mean 0.5,0.5: 2 numbers; images of lenet have 1 channels",
    "--mean=nan --std=1": "mean nan: finite numbers are right",
    "--mean=0.5 --std=0": "std 0: finite numbers above 0 are right",
    "--mean=0.5 --std=nan": "std nan: finite numbers above 0 are right",
    "--weights=trained.safetensors --mean=0.1 --std=0.25": "were trained with 0.5 and 0.25",
    "--weights=header.safetensors": "header.safetensors: its header tells of another net: mean ",
    "--images=361": "images 361 is out of range; digits has 1 to 360",
    "--images=0": "--images=0",
    "--images=many": "--images=many",
    "--weights=none.pt": "weights none.pt: no such file",
    "--weights=weights.txt": "weights weights.txt: unknown extension",
    "--weights=short.safetensors": "weights short.safetensors: truncated",
    "--weights=short.pt": "weights short.pt: truncated",
    "--weights=foreign.safetensors": "not a safetensors file",
    "--weights=nan.safetensors": "params/fc2/kernel holds nan at (",
    "--weights=shape.safetensors": "params/fc2/kernel has shape (31, 24); lenet has it as (32, 24)",
    "--net=resnet20 --weights=lenet.safetensors": "",
    "--sampler=all": "--sampler=all",
    "--fault_model=stuck": "--fault_model=stuck",
    "--measure=most": "--measure=most",
    "--measure=detect --keep_bits": "keep_bits needs the measure critical or full",
    "--sites=conv": "sites 'conv' matches no site in full; the sites are conv1/kernel",
    "--sites=conv(": "sites 'conv(' is not a regular expression",
    "--error_margin=0": "error_margin 0.0 is not between 0 and 1",
    "--error_margin=1.5": "error_margin 1.5 is not between 0 and 1",
    "--error_margin=nan": "error_margin nan is not between 0 and 1",
    "--confidence=1": "confidence 1.0 is not between 0 and 1",
    "--confidence=-0.5": "confidence -0.5 is not between 0 and 1",
    "--t=0": "t 0.0 is not a positive number",
    "--seed=-1": "--seed=-1",
    "--verify=-1": "--verify=-1",
    "--memory=0": "--memory=0",
    "--unknown=1": "unknown",
    "digits": "argument 'digits' is unknown",
    "--faults=none.csv": "fault list none.csv cannot be read",
    "--faults=header.csv": "the first line must be the header site,index,bit,polarity",
    "--faults=bit.csv": "line 3: bit of fc3/kernel is '32', not an integer from 0 to 31",
    "--faults=index.csv": "line 3: index of fc3/kernel is '240', not an integer from 0 to 239",
    "--faults=site.csv": "line 3: no site 'fc4/kernel'",
    "--faults=polarity.csv": "line 3: polarity 'stuck' is none of stuck_at_0",
    "--faults=cells.csv": "line 3: 3 cells",
    "--workload=el3n": "workload 'el3n': metric 'el3n' is unknown",
    "--workload=el2n:top:361": "a selection of 361 images is out of range; there are 1 to 360",
    "--workload=el2n:central:0:9": "no image is within 0 of 9",
    "--workload=kennard_stone:top:9 --workload_layer=fc9": "layer 'fc9' is unknown; the kernels",
    "--truth=none": "none/manifest.json can't be read",
    "--workdir=file": "work directory file can't be written",
    "--workdir=file/run": "work directory file/run can't be written",
}


def assert_one_line(ended, message: str) -> None:
    assert ended.status == 2, ended.err
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert message in ended.err


@pytest.mark.parametrize("flags", BAD)
def test_campaign(script, flags):
    # Flags given twice: the last counts.
    ended = script(campaign, "--weights=lenet.safetensors", *flags.split())
    assert_one_line(ended, BAD[flags])
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.parquet"))


@pytest.mark.parametrize(
    "flags",
    [
        "--net=alexnet",
        "--sampler=all",
        "--sites=conv",
        "--error_margin=0",
        "--confidence=1",
        "--t=0",
        "--images=0",
        "--std=0.5",
        "--pixel_max=0",
        "--weights=short.safetensors --dataset=digits",
        "--weights=nan.safetensors --dataset=digits",
    ],
)
def test_plan(script, flags):
    ended = script(plan, "--sampler=layer_wise", *flags.split())
    assert_one_line(ended, BAD[flags.split()[0]])
    assert ended.out == ""


def test_untrained_weights_say_how_to_train_them(script, monkeypatch):
    monkeypatch.setattr(target, "KEPT", Path("none"))
    expected = "python -m experiments.train --net=lenet --dataset=digits"
    assert_one_line(script(campaign), expected)
    assert_one_line(script(plan, "--dataset=digits"), expected)


def test_a_damaged_record_is_named(script):
    """Of a work directory gone on with: nothing in it is overwritten."""
    Path("run", "outcomes").mkdir(parents=True)
    Path("run", "manifest.json").write_text("{")
    ended = script(campaign, "--weights=lenet.safetensors", "--workdir=run")
    assert_one_line(ended, "run/manifest.json is damaged, not JSON")
    assert Path("run", "manifest.json").read_text() == "{"


def test_train_refuses_a_set_without_training_half(script):
    np.savez("test_only.npz", x_test=DIGIT, y_test=np.arange(4))
    assert_one_line(script(train, "--dataset=test_only.npz"), "no x_train and y_train")
