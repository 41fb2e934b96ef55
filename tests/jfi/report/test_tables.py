"""What the report says, against estimates whose reading is known."""

import csv
import math
import struct

import numpy as np
import pytest

from jfi.report import tables as report
from jfi.sampling.estimates import Estimate, estimate

SITES = ["params/conv1/kernel", "params/block/conv2/kernel"]
MANIFEST = {
    "config": {
        "net": "lenet",
        "fault_model": "stuck_at",
        "confidence": 0.99,
        "error_margin": 0.01,
        "sites": "a|b",
    },
    "hashes": {"weights": "ab12"},
    "strata": [{"site": 0}],
}


def counts():
    population = np.full((2, 32), 5000)
    injections = np.full((2, 32), 1000)
    injections[:, 5] = 0
    injections[1, 7] = 10
    critical = np.zeros((2, 32), int)
    critical[:, 30], critical[:, 25] = [700, 650], [3, 1]
    return population, injections, critical


def estimates(levels=("network", "layer", "bit", "layer_bit")):
    stratum = np.arange(64).reshape(2, 32)
    return estimate(SITES, *counts(), stratum, confidence=0.99, assumed_p=0.001, levels=levels)


def unit(**changes):
    fields = ("network", "network", None, None, 1000, 100, 3)
    shares = (0.03, 0.02, 0.01, 0.08, 0.006, 0.085, 0.0)
    return Estimate(*fields, *shares)._replace(**changes)


def exhaustive():
    population, _, critical = counts()
    return {
        e.unit: e.estimate
        for e in estimate(
            SITES, population, population, critical * 5, np.zeros((2, 32)), confidence=0.99
        )
    }


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.12345678, "12.346"), (0, "0.000"), (1e-7, "1.0e-05"), (1, "100.000"), (math.nan, "-")],
)
def test_percent_shows_small_shares_and_missing_ones(share, text):
    assert report.percent(share) == text


def test_table_is_aligned_text_with_truth_beside_the_interval():
    found = [unit(), unit(unit="conv1", population=10**6), unit(unit="conv2")]
    lines = report.table(found, {"network": 0.085, "conv1": 0.0851}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert (
        lines[0].split()
        == "unit population injections estimate % margin % interval % truth % inside".split()
    )
    assert lines[1].split() == "network 1,000 100 3.000 2.000 0.600 .. 8.500 8.500 yes".split()
    assert lines[2].split()[-2:] == ["8.510", "NO"]
    assert lines[3].split()[-2:] == ["-", "-"]
    assert "truth" not in report.table(found)
    assert report.table([]).splitlines() == ["  ".join(report.COLUMNS)]


def test_a_chosen_workload_says_what_it_saves_and_may_miss(tmp_path):
    def told(chosen):
        workload = {"indices": list(range(chosen)), "reason": "el2n the highest", "of": 10_000}
        return report.write_report(tmp_path, {**MANIFEST, "workload": workload}, []).read_text()

    assert "211 of 10,000 images: el2n the highest. That saves 97.9% of the inf" in told(211)
    assert "only for some of the 9,789 images left out" in told(211)
    assert "It leaves none out" in told(10_000) and "saves" not in told(10_000)
    assert "workload" not in report.write_report(tmp_path, MANIFEST, []).read_text()


def test_the_network_is_put_in_words():
    text = report.sentence(unit(), MANIFEST, images=128)
    assert text == (
        "With 99% confidence between 0.600% and 8.500% of the 1,000 stuck-at faults in the chosen "
        "sites of lenet are critical: they change at least one of 128 predictions. 100 of them "
        "were injected."
    )
    assert "at least one prediction. 100" in report.sentence(unit(), MANIFEST)
    assert "at least one prediction. 100" in report.sentence(unit(), MANIFEST, images=1)
    exact = report.sentence(unit(injections=1000), MANIFEST)
    assert exact.startswith("Exactly 3.000% of the 1,000")
    assert "confidence" not in exact


def test_pairs_and_accuracy_are_put_in_words():
    pairs, accuracy = (
        {**MANIFEST, "config": {**MANIFEST["config"], "estimate": name}}
        for name in ("pairs", "accuracy")
    )
    assert report.sentence(unit(), pairs, images=128) == (
        "With 99% confidence between 0.600% and 8.500% of the (fault, image) pairs of the 1,000 "
        "stuck-at faults in the chosen sites of lenet and 128 images are critical: the fault "
        "changes the prediction. 100 of them were injected."
    )
    high = unit(estimate=0.93, cp_low=0.9, cp_high=0.95)
    told = report.sentence(high, {**accuracy, "golden_accuracy": 0.975}, images=128)
    assert told == (
        "Mean accuracy under fault, over the 1,000 stuck-at faults in the chosen sites of lenet: "
        "with 99% confidence between 90.000% and 95.000% of 128 images; without a fault 97.500%. "
        "100 of them were injected."
    )
    assert "without" not in report.sentence(high, accuracy, images=128)
    layers = [layer(f"l{k}", 0.9 + k / 100) for k in range(7)]
    text = report.layers_sentence(layers, accuracy["config"])
    assert text.startswith("By layer, mean accuracy under fault, % of images, each with 99% conf")
    assert text.index("l0") < text.index("l4") and "2 more with higher estimates" in text


def test_the_report_of_accuracy_lists_the_worst_bits_first(tmp_path):
    config = {**MANIFEST["config"], "estimate": "accuracy"}
    units = [
        unit(level="layer_bit", unit=f"bit {b}", site="a", bit=b, estimate=0.5 + b / 100,
             cp_low=0.5 + b / 100 - 0.01, cp_high=0.5 + b / 100 + 0.01, critical=int(b < 20))
        for b in range(32)
    ]  # fmt: skip
    text = report.write_report(tmp_path, {**MANIFEST, "config": config}, units).read_text()
    assert "| bit 0 |" in text and "| bit 11 |" in text and "| bit 12 |" not in text
    assert "8 with higher estimates are not listed" in text
    assert "no critical fault was seen in 12: at least 69.000% each" in text
    assert "empirical Bernstein bound" in text


def test_warnings_name_small_samples_and_unsampled_parts():
    assert report.warnings([unit(margin=0.0099, low=0.02, high=0.04)], 0.01) == []
    (small,) = report.warnings([unit()], 0.01)
    assert "requested margin of 1.000% in the network; the widest: network (" in small
    # No critical fault seen: the margin is 0 and the interval is not.
    assert report.warnings([unit(margin=0.0, low=0.0, high=0.5)], 0.01)
    (partial,) = report.warnings([unit(unsampled=0.25)], None)
    assert "not sampled" in partial
    assert "in the network" in partial and "network (25.000%)" in partial
    (many,) = report.warnings([unit(level="bit", unit=f"bit {b}") for b in range(32)], 0.01)
    assert "in all 32 bits; the widest: bit 0 (" in many and many.count("bit ") == 3
    few = [
        unit(level="bit", unit=f"bit {b}", margin=0.02 * (b < 3), low=0.0, high=0.0)
        for b in range(9)
    ]
    (both,) = report.warnings([*few, unit()], 0.01)
    assert "in the network and 3 of 9 bits" in both


def layer(name, estimate, **changes):
    fields = {"unit": name, "level": "layer", "site": name, "estimate": estimate}
    return unit(**fields | changes)


def test_layers_are_put_in_words_the_most_critical_first():
    shares = {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.0, "e": 0.02, "f": 0.05, "g": math.nan}
    found = [
        layer(k, x, cp_low=x / 2, cp_high=2 * x, injections=0 if k == "g" else 100)
        for k, x in shares.items()
    ]
    text = report.layers_sentence(found, {"confidence": 0.95})
    assert text.startswith("By layer, each with 95% confidence: b 15.000% to 60.000%, c 10.000% ")
    assert text.endswith("e 1.000% to 4.000%, and 1 more with lower estimates.")
    assert report.layers_sentence(found[:1], {}) == (
        "By layer, each with 99% confidence: a 5.000% to 20.000%."
    )


@pytest.mark.parametrize(
    ("config", "levels"),
    [
        ({"sampler": "network_wise"}, ("network",)),
        ({"sampler": "layer_wise"}, ("network", "layer")),
        ({"sampler": "data_aware"}, report.LEVELS),
        ({"sampler": "adaptive"}, report.LEVELS),
        ({"sampler": "network_wise", "faults": "list.csv"}, report.LEVELS),
        ({}, report.LEVELS),
    ],
)
def test_a_margin_is_planned_for_what_the_sample_was_sized_for(config, levels):
    assert report.planned(config) == levels


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_network_wise_sample_defends_no_margin_of_a_layer(tmp_path):
    """Each unit has its estimate and exact interval; the margin is the network's alone."""
    found = estimate(SITES, *counts(), np.zeros((2, 32)), confidence=0.99)
    config = MANIFEST["config"] | {"sampler": "network_wise"}
    text = report.write_report(tmp_path, {"config": config}, found).read_text()
    rows = [cells(line) for line in text.splitlines() if line.startswith(("| params", "| bit"))]
    rows = [row for row in rows if row[2] != "0"]
    assert {row[4] for row in rows} == {"-"}
    assert all(row[3] != "-" and " .. " in row[5] for row in rows)
    (network,) = (cells(line) for line in text.splitlines() if line.startswith("| network |"))
    assert float(network[4]) > 0
    assert "> **Note.** The sampler plans no margin for all 2 layers, all 32 bits" in text
    assert text.count("**Note.**") == 1
    assert "By layer" not in text
    table = report.table(found[:3], levels=("network",)).splitlines()
    assert [line.split()[4] for line in table[2:]] == ["-", "-"]


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        ("adaptive_distance", "a confidence sequence's, by betting"),
        ("adaptive_certified", "it holds though the campaign stopped by what it saw"),
        ("iterative", "does not reckon with a campaign that stops by what it saw"),
        ("layer_wise", "The interval is Clopper-Pearson's; Wilson's is in"),
    ],
)
def test_the_interval_is_named_for_what_it_is(sampler, words, tmp_path):
    manifest = {"config": {"sampler": sampler}}
    text = report.write_report(tmp_path, manifest, estimates(("network", "layer"))).read_text()
    assert words in text
    assert ("Clopper" in text) == (not sampler.startswith("adaptive"))


def test_an_exhaustive_campaign_has_nothing_to_be_confident_of(tmp_path):
    population, _, critical = counts()
    whole = estimate(SITES, population, population, critical, np.zeros((2, 32)), confidence=0.99)
    text = report.write_report(tmp_path, {"config": {"sampler": "exhaustive"}}, whole).read_text()
    assert "By layer" not in text
    assert "Note" not in text


def test_names_of_users_break_neither_text_nor_figure(tmp_path):
    name = "a|<b>\x00\n$x_{ 漢\ud800"
    found = [e._replace(unit=e.unit.replace(SITES[0], name)) for e in estimates()]
    text = report.write_report(tmp_path, {"config": {"net": name}}, found).read_text("utf-8")
    assert "&lt;b&gt;\\x00\\x0a$x_{ 漢\\ud800" in text and "\x00" not in text and "<b>" not in text
    assert "| a\\|&lt;b" in text
    assert png_size(tmp_path / "layer.png")[0] == 1200


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_the_report_holds_all_of_it(tmp_path):
    verify = {
        "pairs": 2000,
        "agreements": 1999,
        "near_ties": 1,
        "disagreements": 0,
        "bound": 0.0015,
    }
    measured = {"images": 128, "verdicts_per_second": 1234.5}
    path = report.write_report(tmp_path, MANIFEST, estimates(), verify, exhaustive(), measured)
    text = path.read_text()
    assert path == tmp_path / "report.md"
    assert text.startswith("# Faults in lenet\n\nWith 99% confidence between ")
    assert "at least one of 128 predictions" in text
    assert "\n\nBy layer, each with 99% confidence: params/" in text
    assert "The interval is Clopper-Pearson's" in text
    assert "lies inside the interval of " in text
    for name in ("layer.png", "bit.png"):
        assert f"]({name})" in text
        width, height = png_size(tmp_path / name)
        assert width == 1200
        assert height > 300
    for words in ("1,999 agree, 1 are near-ties", "verdicts_per_second | 1,234.5", "a\\|b"):
        assert words in text
    assert "weights: ab12" in text
    assert "strata" not in text
    # What says nothing is counted, and told in full in the table beside the report.
    assert "| bit 5 " not in text and "0.000 .. 100.000" not in text
    assert "Of 32 bits, no critical fault was seen in 29: at most " in text
    assert "; the sample says nothing of 1." in text
    with open(tmp_path / "estimates.csv", newline="") as file:
        table = {row["unit"]: row for row in csv.DictReader(file)}
    assert len(table) == len(estimates()) and table["bit 5"]["estimate"] == ""
    assert table["bit 5"]["cp_high"] == "1.0" and float(table["bit 30"]["truth"]) > 0
    # Every line of a table has the cells of its header.
    blocks = [b.splitlines() for b in text.split("\n\n") if b.startswith("|")]
    assert all(len({line.replace("\\|", "").count("|") for line in b}) == 1 for b in blocks)


def test_the_report_names_what_is_left_out(tmp_path):
    left_out = {f"mask{k}": "bool words can't be broken" for k in range(9)}
    manifest = {**MANIFEST, "left_out": left_out}
    text = report.write_report(tmp_path, manifest, estimates()).read_text()
    assert "> **Note.** Parameters that are no sites: mask0 (bool words can't be broken), " in text
    assert "mask7 (bool words can't be broken), 1 more." in text


def test_the_report_needs_neither_truth_nor_verification_nor_criticals(tmp_path):
    population, injections, critical = counts()
    none = estimate(SITES, population, injections, 0 * critical, np.zeros((2, 32)), confidence=0.9)
    text = report.write_report(tmp_path, {"config": {}}, none).read_text()
    assert "No pair was re-run." in text
    assert "truth" not in text
    text = report.write_report(tmp_path, {}, estimates(("network",))).read_text()
    assert ".png" not in text


def test_the_same_campaign_draws_the_same_figure(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        report.write_report(tmp_path / name, MANIFEST, estimates())
    for figure in ("layer.png", "bit.png", "report.md"):
        assert (tmp_path / "a" / figure).read_bytes() == (tmp_path / "b" / figure).read_bytes()


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["params/a/kernel", "params/b/kernel"], ["a", "b"]),
        (["conv/kernel", "conv/bias"], ["kernel", "bias"]),
        (["p/a/x/kernel", "p/b/kernel"], ["a/x", "b"]),
        (["kernel", "p/kernel"], ["kernel", "p/kernel"]),
        (["p/only/kernel"], ["p/only/kernel"]),
        (["w", "w2"], ["w", "w2"]),
    ],
)
def test_layer_names_lose_only_what_all_of_them_share(names, short):
    assert report.short_names(names) == short
