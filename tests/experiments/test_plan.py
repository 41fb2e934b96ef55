"""Plans of ResNet-20 against the published sample sizes; what a plan prints and refuses."""

import json

import pytest

from experiments import plan
from jfi.engine import golden

# Ruospo et al., DATE 2023, Table I: faults, network-wise, layer-wise and data-unaware samples of
# layers 0 to 19. Layer 11 is printed with 9,226 words, ten too many: it has the shape of layer 10.
TABLE_I = (
    [(27_648, 27, 10_389, 26_272)]
    + [(147_456, 143, 14_954, 115_488)] * 6
    + [(294_912, 285, 15_752, 189_792)]
    + [(589_824, 571, 16_184, 279_872)] * 5
    + [(1_179_648, 1_142, 16_410, 366_912)]
    + [(2_359_296, 2_284, 16_524, 434_464)] * 5
    + [(40_960, 40, 11_834, 38_048)]
)


@pytest.fixture(autouse=True)
def known_speed(monkeypatch):
    """Measuring this machine's takes seconds, and is tested where campaigns are."""
    monkeypatch.setattr(golden, "golden_rate", lambda network, images: 1e4)


def planned(script, *arguments: str) -> dict:
    """What --json prints."""
    ended = script(plan, "--json", *arguments)
    assert ended.status == 0, ended.err
    assert ended.err == ""
    return json.loads(ended.out)


@pytest.mark.parametrize(
    ("sampler", "injections", "column"),
    [
        ("exhaustive", 17_173_504, 0),
        ("network_wise", 16_625, 1),
        ("layer_wise", 307_649, 2),
        ("data_unaware", 4_885_632, 3),
    ],
)
def test_resnet20_as_published(script, sampler, injections, column):
    found = planned(script, "--net=resnet20", f"--sampler={sampler}", "--t=2.58")
    assert (found["population"], found["injections"]) == (17_173_504, injections)
    assert [layer["population"] for layer in found["layers"]] == [row[0] for row in TABLE_I]
    assert [layer["injections"] for layer in found["layers"]] == [row[column] for row in TABLE_I]
    assert found["layers"][0]["site"] == "conv1/kernel"
    assert found["layers"][-1]["site"] == "linear/kernel"
    assert found["seconds"] > 0


def test_exact_quantile_is_the_default(script):
    """2.5758 for 99%: a few faults fewer than with 2.58, as n goes with its square."""
    found = planned(script, "--net=resnet20", "--sampler=network_wise", "--confidence=0.99")
    assert found["injections"] == 16_571


def test_flips_are_half_the_faults(script):
    found = planned(script, "--sampler=exhaustive", "--fault_model=flip", "--sites=fc./kernel")
    assert [layer["site"] for layer in found["layers"]] == [
        "fc1/kernel",
        "fc2/kernel",
        "fc3/kernel",
    ]
    assert found["population"] == found["injections"] == 32 * (400 * 120 + 120 * 84 + 84 * 10)


def test_data_aware_sizes_each_bit_by_the_weights(script, lenet_weights, own_folder):
    """The top exponent bit as without data, the last mantissa bit, which moves least, never."""
    named = ("--dataset=digits", f"--weights={lenet_weights}")
    aware = planned(script, "--sampler=data_aware", *named)
    unaware = planned(script, "--sampler=data_unaware", *named)
    assert [layer["site"] for layer in aware["layers"]][:2] == ["conv1/kernel", "conv2/kernel"]
    for one, other in zip(aware["layers"], unaware["layers"], strict=True):
        assert one["bits"]["30"] == other["bits"]["30"]
        assert one["bits"]["0"] == 0 < other["bits"]["0"]
        assert one["injections"] == sum(one["bits"].values()) < other["injections"]
    assert aware["injections"] == sum(layer["injections"] for layer in aware["layers"])


def test_tables_say_the_same_as_json(script):
    found = planned(script, "--sampler=layer_wise")
    ended = script(plan, "--sampler=layer_wise", "--images=1000")
    lines = ended.out.splitlines()
    expected = [
        [layer["site"], f"{layer['population']:,}", f"{layer['injections']:,}"]
        for layer in found["layers"]
    ]
    assert [line.split() for line in lines[1:6]] == expected
    assert lines[6].split() == ["total", f"{found['population']:,}", f"{found['injections']:,}"]
    assert lines[-1].startswith("expected on this machine for 1,000 images: ")


def test_expected_time_is_of_the_work_that_is_planned(script):
    """Twice the images, twice the inferences; the compilations stay."""
    one, two, none = (
        planned(script, "--sampler=network_wise", f"--images={n}")["seconds"]
        for n in (10**6, 2 * 10**6, 1)
    )
    assert one - none == pytest.approx(two - one, rel=1e-3)


def test_a_workload_is_chosen_and_counted(script, lenet_weights, own_folder):
    named = ("--dataset=digits", f"--weights={lenet_weights}", "--sampler=network_wise")
    found = planned(script, *named, "--workload=el2n:top:7")
    assert found["images"] == 7
    assert planned(script, *named, "--workload=margin", "--images=50")["images"] == 50
    layer = ("--workload=kennard_stone:top:8", "--workload_layer=fc1/kernel")
    assert planned(script, *named, *layer)["images"] == 8
    assert planned(script, *named, "--workload=expected:top:9")["images"] == 9
    ended = script(plan, *named, "--workload=deepgini:top:7")
    assert "workload: 7 of 360 images, deepgini the 7 highest" in ended.out
    ended = script(plan, "--workload=el2n:top:7")
    assert ended.status == 2 and "name them with --dataset" in ended.err


def test_data_aware_needs_weights(script, own_folder):
    ended = script(plan, "--sampler=data_aware")
    assert ended.status == 2
    assert "sampler data_aware plans from weights" in ended.err


def test_samplers_in_rounds_tell_what_they_may_take(script):
    ended = script(plan, "--net=lenet", "--sampler=adaptive", "--json")
    found = json.loads(ended.out)
    assert found["population"] == 3_934_080
    assert 0 < found["none_critical"] < found["tenth_critical"] < 20_000
    ended = script(plan, "--net=lenet", "--sampler=adaptive_score")
    assert ended.status == 2
    assert "adaptive_score chooses by the images" in ended.err
