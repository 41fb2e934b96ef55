"""The comparison of samplers: truths read, campaigns repeated, rows, table, figure, bad input."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

import nets
from experiments.data import sets
from experiments.samplers import benchmark as bench
from jfi import bits
from jfi.bits import FLIP
from jfi.campaign import records
from jfi.sampling import methods, sfi
from jfi.sampling.sampling import Request

WORDS = (7, 12)


def written(path, critical=None, values=None, **meta):
    """A truth file in the format of experiments.truth, by default with 7 and 12 words."""
    rng = np.random.default_rng(0)
    values = values or [rng.normal(size=n).astype(np.float32) for n in WORDS]
    critical = critical or [rng.integers(-3, 9, (n, 32)).clip(0) for n in WORDS]
    about = {
        "net": "lenet",
        "dataset": "digits",
        "images": 8,
        "fault_model": "stuck_at",
        "sites": [
            {"name": f"layer{k}/kernel", "shape": list(x.shape), "dtype": "float32"}
            for k, x in enumerate(values)
        ],
        **meta,
    }
    arrays = {f"critical_{k}": np.int32(c) for k, c in enumerate(critical)}
    arrays |= {f"words_{k}": bits.to_bits(x).ravel() for k, x in enumerate(values)}
    np.savez(path, meta=np.array(json.dumps(about)), **arrays)
    return values, critical


def test_a_truth_is_read_fault_by_fault(tmp_path):
    values, critical = written(tmp_path / "t.npz")
    found = bench.read(tmp_path / "t.npz")
    assert found.space.size == 64 * sum(WORDS) == found.outcome.size
    faults = found.space.decode(np.arange(found.space.size))
    for number, (s, i, b, p) in enumerate(zip(*faults, strict=True)):
        word = values[s][[i]]
        is_flip = bits.faulty(word, int(b), int(p)).view("u4") == bits.faulty(
            word, int(b), FLIP
        ).view("u4")
        assert found.outcome[number] == (is_flip[0] and critical[s][i, b] > 0)


def test_a_truth_tells_pairs_and_accuracy(tmp_path):
    values, critical = written(tmp_path / "t.npz", golden_correct=6)
    correct = [np.int32(6 - np.minimum(x, 6) + (x == 3)) for x in critical]
    with np.load(tmp_path / "t.npz") as file:
        arrays = dict(file) | {f"correct_{k}": x for k, x in enumerate(correct)}
    np.savez(tmp_path / "t.npz", **arrays)
    for estimate, counts, still in (("pairs", critical, 0), ("accuracy", correct, 6)):
        found = bench.read(tmp_path / "t.npz", estimate=estimate)
        faults = found.space.decode(np.arange(found.space.size))
        for number, (s, i, b, p) in enumerate(zip(*faults, strict=True)):
            word = values[s].view(np.uint32)[i]
            is_flip = int(word) >> int(b) & 1 != p
            assert found.outcome[number] == (counts[s][i, b] if is_flip else still) / 8
        np.testing.assert_allclose(bench.shares(found, "network"), [found.outcome.mean()])
        assert found.estimand.unchanged == still / 8


def test_a_truth_without_answers_that_are_right_tells_no_accuracy(tmp_path):
    written(tmp_path / "t.npz")
    with pytest.raises(bench.InputError, match="does not hold which images are answered right"):
        bench.read(tmp_path / "t.npz", estimate="accuracy")
    assert bench.read(tmp_path / "t.npz", estimate="pairs").estimand.parts == 8


FIXED = [f"{name}, bernstein" for name in bench.FIXED]
ESTIMATED = [*FIXED, "iterative", "adaptive by cell", "adaptive by |dw|"]


@pytest.mark.parametrize("estimate", ["pairs", "accuracy"])
@pytest.mark.parametrize("method", ESTIMATED)
def test_every_sampler_holds_the_committed_truth(estimate, method):
    """LeNet on digits, network and layers, 12 campaigns at 90%."""
    path = Path(bench.__file__).parents[1] / "truths" / "lenet_digits.npz"
    found = bench.read(path, estimate=estimate)
    for level in ("network", "layer"):
        row = bench.row(found, bench.Case(method, level, 0.03, 0.9), 12)
        missed = round((1 - row["coverage"]) * 12 * row["units"])
        assert stats.binomtest(missed, 12 * row["units"], 0.1, alternative="greater").pvalue > 1e-3
        if method.startswith("adaptive"):
            assert row["widest"] <= 0.03


def test_words_known_in_part_are_left_out(tmp_path):
    critical = [np.ones((7, 32), int), np.ones((12, 32), int)]
    critical[0][2, 5] = -1
    critical[1][:] = -1
    written(tmp_path / "t.npz", critical)
    found = bench.read(tmp_path / "t.npz")
    assert [(s.name, s.shape) for s in found.space.sites] == [("layer0/kernel", (6,))]
    assert found.outcome.mean() == 0.5
    written(tmp_path / "t.npz", [critical[1][:7], critical[1]])
    with pytest.raises(bench.InputError, match="knows no word whole"):
        bench.read(tmp_path / "t.npz")


def test_hints_follow_the_words(tmp_path):
    critical = [np.ones((7, 32), int), np.ones((12, 32), int)]
    critical[0][2, 5] = -1
    written(tmp_path / "t.npz", critical)
    hints = bench.Hints(
        [np.stack(2 * [np.arange(n)]) for n in WORDS],
        [np.arange(n)[:, None] == np.arange(32) for n in WORDS],
    )
    found = bench.read(tmp_path / "t.npz", hints)
    assert found.space.size == 64 * (sum(WORDS) - 1)
    assert found.hints.sensitivity[0].tolist() == 2 * [[0, 1, 3, 4, 5, 6]]
    assert found.hints.certified[0].shape == (6, 32)
    assert bench.names(found)[-1] == "adaptive certified"


def test_certified_faults_are_not_injected_and_still_counted():
    found = bench.made_up(words=(60, 400))
    flips = [np.zeros((n, 32), bool) for n in (60, 400)]
    faults = found.space.decode(np.flatnonzero(found.outcome))
    for site, index, bit in zip(faults.site, faults.index, faults.bit, strict=True):
        flips[site][index, bit] = True
    ones = [np.ones((2, n)) for n in (60, 400)]
    found = found._replace(hints=bench.Hints(ones, [~x for x in flips]))
    plain, spared = (
        bench.row(found, bench.Case(name, "network", 0.005, 0.9), 10)
        for name in ("adaptive by |dw|", "adaptive certified")
    )
    assert spared["coverage"] == 1
    assert spared["injections"] < plain["injections"]


def test_true_shares_are_counted_one_by_one():
    found = bench.made_up(words=(5, 9))
    faults = found.space.decode(np.arange(found.space.size))
    for level in methods.LEVELS:
        units = methods.units(found.space, (level,))
        expected = [found.outcome[u.holds(faults.site, faults.bit)].mean() for u in units]
        np.testing.assert_allclose(bench.shares(found, level), expected)


@pytest.mark.parametrize("method", ["network_wise, normal", "layer_wise, clopper_pearson"])
def test_drawn_counts_are_distributed_as_those_of_drawn_faults(method):
    found = bench.made_up(words=(30, 90))
    case = bench.Case(method, "layer", 0.05, 0.9)
    sampler, kind = method.split(", ")
    whole = sfi.fixed(sampler, kind)
    request, oracle = Request(0.05, 0.9), found.outcome.__getitem__
    drawn = [whole(found.space, found.leaves, request, ("layer",), oracle, s) for s in range(300)]
    counted = [bench.campaigns(found, case)(seed) for seed in range(300)]
    assert drawn[0].injections == counted[0].injections
    for unit in (0, 1):
        for name in ("injections", "total", "low"):
            a, b = ([getattr(r.units[unit], name) for r in rs] for rs in (drawn, counted))
            assert stats.ks_2samp(a, b).pvalue > 1e-3


def test_a_row_counts_coverage_and_margins(monkeypatch):
    found = bench.made_up(words=(5, 9))
    truths = bench.shares(found, "layer")

    def result(found, case, seed):
        # Every fourth campaign leaves out the truth of the second layer.
        ends = [(0.0, 1.0), (truths[1] + 0.1 * (seed % 4 == 0), truths[1] + 0.2)]
        units = methods.units(found.space, ("layer",))
        made = [
            methods.interval(found.space, u, 1, 0, 0.0, *e)
            for u, e in zip(units, ends, strict=True)
        ]
        return methods.Result(tuple(made), (10, 10 * seed))

    monkeypatch.setattr(bench, "campaigns", lambda found, case: partial(result, found, case))
    row = bench.row(found, bench.Case("x", "layer", 0.1, 0.9), 8)
    assert row["injections"] == 45
    assert row["rounds"] == 2
    assert (row["coverage"], row["worst_unit"], row["widest"]) == (14 / 16, 0.75, 0.5)
    assert row["margin"] == pytest.approx((0.5 + (6 * 0.1 + 2 * 0.05) / 8) / 2)
    expected = stats.binomtest(14, 16).proportion_ci(0.95, method="exact").low
    assert row["coverage_low"] == pytest.approx(expected)


def test_adaptive_methods_cover_and_save_on_a_made_up_truth():
    found = bench.made_up()
    rows = {
        name: bench.row(found, bench.Case(name, "network", 0.01, 0.9), 20)
        for name in ("network_wise, normal", "iterative", "adaptive by cell", "adaptive by |dw|")
    }
    for name in ("adaptive by cell", "adaptive by |dw|"):
        assert rows[name]["coverage"] >= 0.9
        assert rows[name]["widest"] <= 0.01
        assert rows[name]["injections"] < rows["network_wise, normal"]["injections"] / 5


def test_smoke_writes_a_table_a_figure_and_rows(script, tmp_path):
    methods_ = "--methods=network_wise,adaptive by cell"
    ended = script(bench, "--smoke", methods_, "--levels=network,layer", f"--out={tmp_path}/new")
    assert ended.status == 0, ended.err
    rows = json.loads((tmp_path / "new/samplers.json").read_text())
    assert {(r["method"], r["level"]) for r in rows} == {
        (method, level)
        for method in ("network_wise, normal", "network_wise, clopper_pearson", "adaptive by cell")
        for level in ("network", "layer")
    }
    text = (tmp_path / "new/samplers.md").read_text()
    assert text.count("\n|") == 2 + len(rows)
    assert (tmp_path / "new/samplers.png").read_bytes()[1:4] == b"PNG"


def test_smoke_of_another_estimate_keeps_rows_of_its_own(script, tmp_path):
    flags = ("--smoke", "--levels=network", f"--out={tmp_path}", "--methods=layer_wise,adaptive")
    ended = script(bench, *flags, "--estimate=accuracy")
    assert ended.status == 0, ended.err
    rows = json.loads((tmp_path / "samplers.json").read_text())
    assert {r["method"] for r in rows} == {
        "layer_wise, normal", "layer_wise, bernstein", "adaptive by cell", "adaptive by |dw|",
    }  # fmt: skip
    assert {r["estimate"] for r in rows} == {"accuracy"}
    assert "mean accuracy under fault, % of images." in (tmp_path / "samplers.md").read_text()
    assert "rows of another truth" in script(bench, *flags, "--estimate=pairs").err


def test_goes_on_with_the_rows_that_are_there(script, tmp_path, monkeypatch):
    """Cases that were run with as many campaigns are kept, new ones join them."""
    flags = ("--smoke", "--levels=network", f"--out={tmp_path}")
    assert script(bench, *flags, "--methods=network_wise").status == 0
    path = tmp_path / bench.ROWS
    first = json.loads(path.read_text())
    path.write_text(json.dumps([{**row, "injections": 7} for row in first]))
    ended = script(bench, *flags, "--methods=network_wise,layer_wise")
    assert ended.status == 0, ended.err
    rows = json.loads(path.read_text())
    assert [row["method"].split(",")[0] for row in rows] == 2 * ["network_wise"] + 2 * [
        "layer_wise"
    ]
    assert [row["injections"] == 7 for row in rows] == [True, True, False, False]
    monkeypatch.setitem(bench.SMOKE, "repeats", 6)
    assert script(bench, *flags, "--methods=network_wise").status == 0
    again = json.loads(path.read_text())
    assert [row["repeats"] for row in again] == [6, 6, 5, 5]
    assert again[0]["injections"] == first[0]["injections"]


def test_rows_of_another_truth_are_not_joined(script, own_folder):
    written(own_folder / "t.npz")
    (own_folder / "out").mkdir()
    path = own_folder / "out" / bench.ROWS
    for held, message in (("[1]", "cannot be read"), ('[{"truth": "x"}]', "another truth than t")):
        path.write_text(held)
        ended = script(bench, "--truth=t.npz", "--out=out")
        assert (ended.status, ended.err.count("\n")) == (2, 1)
        assert message in ended.err
        assert path.read_text() == held


def of_lenet(weights, path, factor, net=None, **meta):
    """A truth of the first kernel of a LeNet, times a factor, no flip of it critical."""
    net = net or nets.build("lenet", (8, 8, 1))
    variables = nets.load(net, weights)
    kernel = factor * np.asarray(variables["params"]["conv1"]["kernel"])
    site = {"name": "conv1/kernel", "shape": list(kernel.shape), "dtype": "float32"}
    images = nets.normalise(net, sets.load("digits").x_test[:8])
    hashes = {
        "weights_hash": records.hash_arrays([("conv1/kernel", kernel)]),
        "images_hash": records.hash_arrays([("images", images)]),
    }
    zeros = [np.zeros((kernel.size, 32))]
    written(path, zeros, values=[kernel], sites=[site], **hashes | meta)


def test_hints_are_of_images_normalised_as_those_of_the_truth(
    lenet_weights, own_folder, monkeypatch
):
    net = nets.normalising(nets.build("lenet", (8, 8, 1)), [0.5], [0.25])
    recorded = {"mean": [0.5], "std": [0.25], "pixel_max": None}
    of_lenet(lenet_weights, own_folder / "t.npz", 1, net, **recorded)
    monkeypatch.setattr(bench.flags, "FLAGS", SimpleNamespace(data_dir=None))
    assert bench.hints_of(own_folder / "t.npz", str(lenet_weights), "digits").certified[0].any()
    of_lenet(lenet_weights, own_folder / "t.npz", 1, net, **recorded | {"mean": [0.4]})
    with pytest.raises(bench.InputError, match="is of other images"):
        bench.hints_of(own_folder / "t.npz", str(lenet_weights), "digits")


def test_a_network_tells_which_faults_need_no_injection(
    lenet_weights, script, own_folder, monkeypatch
):
    of_lenet(lenet_weights, own_folder / "t.npz", 1)
    flags = (
        *("--truth=t.npz", f"--weights={lenet_weights}", "--dataset=digits", "--margins=0.1"),
        *("--methods=adaptive", "--levels=network", "--out=out"),
    )
    ended = script(bench, *flags, "--repeats=3")
    assert ended.status == 0, ended.err
    rows = {r["method"]: r for r in json.loads((own_folder / "out/samplers.json").read_text())}
    assert rows["adaptive certified"]["coverage"] == rows["adaptive by score"]["coverage"] == 1
    assert rows["adaptive certified"]["widest"] < rows["adaptive by |dw|"]["widest"]

    # Again, with more campaigns, from the hints that were kept.
    def anew(*of):
        raise bench.InputError("made anew")

    monkeypatch.setattr(bench, "hints_of", anew)
    assert script(bench, *flags, "--repeats=4").status == 0
    of_lenet(lenet_weights, own_folder / "t.npz", 1, images_hash="that of others")
    assert "made anew" in script(bench, *flags).err


def test_other_weights_than_those_of_the_truth_are_refused(lenet_weights, script, own_folder):
    of_lenet(lenet_weights, own_folder / "t.npz", 2)
    ended = script(bench, "--truth=t.npz", f"--weights={lenet_weights}", "--dataset=digits")
    assert ended.status == 2
    assert "t.npz is of other values of conv1/kernel than" in ended.err


def test_other_images_than_those_of_the_truth_are_refused(lenet_weights, script, own_folder):
    of_lenet(lenet_weights, own_folder / "t.npz", 1, images=9)
    flags = ("--truth=t.npz", f"--weights={lenet_weights}", "--dataset=digits", "--repeats=1")
    ended = script(bench, *flags, "--margins=0.1", "--levels=network", "--methods=adaptive")
    assert ended.status == 2
    assert "t.npz is of other images than the first 9 of digits" in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no --truth given"),
        (["--truth=absent.npz"], "truth absent.npz cannot be read"),
        (["--smoke", "--methods=magic"], "method 'magic' is unknown; choose from network_wise"),
        (["--smoke", "--levels=neuron"], "level 'neuron' is unknown"),
        (["--truth=t.npz", "--margins=0.01,big"], "margins 0.01,big must be numbers between"),
        (["--truth=t.npz", "--confidences=95"], "confidences 95 must be numbers between"),
        (["--truth=t.npz", "--weights=w"], "needs both --weights and --dataset"),
    ],
)
def test_bad_input_is_named_in_one_line(script, own_folder, arguments, message):
    written(own_folder / "t.npz")
    ended = script(bench, *arguments)
    assert ended.status == 2
    assert message in ended.err
    assert ended.err.count("\n") == 1
