"""experiments.bench.zoo: every network is taken, and its table is made of runs of their own."""

import json

import jax
import numpy as np
import pytest

import jfi
from experiments.bench import __main__ as bench
from experiments.bench import zoo, zoo_table
from jfi.errors import InputError

SMALL = ("mlp", "embedding", "encoder", "vit", "gpt", "lenet")
RECURRENT = ("lstm", "gru")


@pytest.mark.parametrize("name", SMALL)
def test_a_network_is_taken_as_it_is(name):
    sample = zoo.sample(name)
    network = jfi.network(sample.apply, sample.params, sample.images[0])
    logits = np.asarray(jax.jit(network.apply)(network.params, sample.images))
    assert len(logits) == zoo.IMAGES
    assert np.isfinite(logits).all()
    assert len(np.unique(logits.argmax(1))) > 1


@pytest.mark.parametrize("name", RECURRENT)
def test_scanned_and_unrolled_are_one_network(name):
    ways = [zoo.sample(f"{name}_{way}") for way in ("unrolled", "scanned")]
    unrolled, scanned = (jax.jit(way.apply)(way.params, way.images) for way in ways)
    np.testing.assert_allclose(unrolled, scanned, rtol=1e-5, atol=1e-5)


def test_gates_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    for name, kind in (("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)):
        sample = zoo.sample(f"{name}_scanned")
        net = kind(zoo.FEATURES, zoo.HIDDEN, batch_first=True)
        p = {k: torch.from_numpy(np.array(v)) for k, v in sample.params.items()}
        with torch.no_grad():
            net.weight_ih_l0.copy_(p["input"])
            net.weight_hh_l0.copy_(p["hidden"])
            net.bias_ih_l0.copy_(p["bias"])
            net.bias_hh_l0.zero_()
            out, _ = net(torch.from_numpy(sample.images))
        wanted = (out[:, -1] @ p["out"]).numpy()
        found = jax.jit(sample.apply)(sample.params, sample.images)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_every_way_gives_the_same_verdicts():
    sample = zoo.sample("mlp")
    network = jfi.network(sample.apply, sample.params, sample.images[0])
    sites = zoo_table._sites(network)
    space = jfi.FaultSpace(sites, zoo_table.FAULT_MODELS["stuck_at"])
    faults = zoo_table.turns.draw(space, 0, 200)
    found = [
        zoo_table._judge(way, network, sites, sample.images)[1](faults) for way in zoo_table.WAYS
    ]
    assert 0 < found[0].sum() < 200
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_an_unknown_network_is_named(script):
    ended = script(bench, "--zoo", "--networks=mlp,perceptron", "--allocator=as_installed")
    assert ended.status == 2
    assert "'perceptron' is unknown; choose from mlp, embedding" in ended.err
    with pytest.raises(InputError, match="choose from mlp"):
        zoo.sample("perceptron")


def test_a_row_of_runs_that_came_through_and_one_that_failed():
    done = {"first_s": 1.0, "short_s": 2.0, "long_s": 8.0, "rate": 10.0, "golden": 3.0}
    found = {way: [done, done | {"long_s": 4.0}] for way in (*zoo_table.WAYS, zoo_table.TORCH)}
    found["loop"] = [done | {"long_s": 3.0}]
    found["full"] = [{"failed": "out of memory"}]
    row = zoo_table._row("mlp", found)
    assert row["naive"] == "loop"
    assert row["critical_ratio"] == 0.5
    assert row["full_long_s"] is None
    assert row["golden_torch"] == 3.0
    assert row["failed"] == "full: out of memory"


@pytest.mark.slow
def test_the_table(script):
    ended = script(
        bench,
        "--zoo",
        "--networks=mlp",
        "--long=0.1",
        "--rounds=1",
        "--json",
        "--out=",
        "--allocator=as_installed",
    )
    (row,) = json.loads(ended.out.splitlines()[-1])["rows"]
    assert "failed" not in row
    assert min(row[f"{way}_long_s"] for way in zoo_table.WAYS) > 0


@pytest.mark.parametrize("name", zoo.ZOO)
def test_twins_in_pytorch_have_the_same_weights(name):
    pytest.importorskip("torch")
    from experiments.bench import zoo_torch

    if name == "snn_nmnist":
        assert name not in zoo_torch.TWINS
        return
    ours = jax.eval_shape(lambda: zoo.sample(name).params)
    theirs = [p.numel() for p in zoo_torch.TWINS[name]().parameters() if p.ndim > 1]
    wanted = sum(leaf.size for leaf in jax.tree.leaves(ours) if leaf.ndim > 1)
    assert sum(theirs) == pytest.approx(wanted, rel=0.02)  # places of tokens are no weights there
