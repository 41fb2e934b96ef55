"""Transformers by component and bit, with tiny networks."""

import csv

import jax
import numpy as np
import pytest

import jfi
import nets
from experiments import target
from experiments.transformers import __main__ as transformers
from experiments.transformers import components, tables
from jfi import bits
from jfi.criteria import built_in
from jfi.errors import InputError
from jfi.faults import FAULT_MODELS, Site
from nets import transformer

SHAPES = {"vit": (8, 8, 1), "gpt": (6,)}
REQUEST = jfi.Request(0.05, 0.99)


@pytest.fixture
def tiny(monkeypatch):
    """Networks of two heads and a width of 4, by name."""
    sizes, small = transformer.Sizes, {"width": 4, "depth": 1, "heads": 2, "wider": 2}
    monkeypatch.setattr(transformer, "Sizes", lambda **asked: sizes(**small | asked))

    def build(name):
        net = nets.build(name, SHAPES[name])
        return net, jax.tree.map(lambda x: 8 * x, nets.init(net, 0))  # answers that differ

    return build


@pytest.mark.parametrize("name", ["vit", "gpt"])
def test_every_parameter_is_of_one_component(tiny, name):
    network = target.read(*tiny(name))
    parts = components.split(network)
    assert [*parts] == [*components.COMPONENTS]
    assert {s for sites in parts.values() for s in sites} == {*network.parameters}
    names = {part: {site.name for site in sites} for part, sites in parts.items()}
    first = {
        "vit": {"embedding/kernel", "embedding/bias", "cls", "position"},
        "gpt": {"tokens/embedding", "position"},
    }
    assert names["embedding"] == first[name]
    assert {"norm/scale", "block1/norm1/bias", "block1/norm2/scale"} < names["norms"]
    assert {"block1/attention/k/kernel", "block1/attention/k/bias"} <= names["k"]
    assert sum(map(len, names.values())) == len(network.parameters)


def test_a_network_of_other_parts_is_refused():
    net = nets.build("lenet", (8, 8, 1))
    with pytest.raises(InputError, match="conv1/kernel is of no component; a transformer"):
        components.split(target.read(net, nets.init(net, 0)))


def test_fields_of_a_word():
    of32, of16 = components.fields(np.float32), components.fields(jax.numpy.bfloat16)
    assert [*of32] == ["sign", *map(str, range(30, 22, -1)), "mantissa"]
    assert (of32["sign"], of32["23"], of32["mantissa"]) == ((31,), (23,), tuple(range(23)))
    assert [*of16][1:-1] == [*map(str, range(14, 6, -1))]
    assert of16["mantissa"] == tuple(range(7))


def test_a_sample_by_bit_is_over_all_sites_of_a_component():
    sites = [
        Site(name, (words,), np.dtype("f4"))
        for name, words in zip("abc", (30, 70, 100), strict=True)
    ]
    space = jfi.FaultSpace(sites, FAULT_MODELS["flip"])
    parts = {"first": sites[:2][::-1], "second": sites[2:]}
    sizes = {bit: 20 if bit > 22 else 5 for bit in range(32)}
    ids = components.by_bit(space, parts, sizes, 3)
    faults = space.decode(ids)
    assert np.unique(ids).size == ids.size == 2 * sum(sizes.values())
    first = faults.site < 2
    for own in (first, ~first):
        assert np.bincount(faults.bit[own]).tolist() == [*sizes.values()]
    assert 0.2 < (faults.site[first] == 0).mean() < 0.4  # a third of the words
    # Components of one size have samples of their own.
    assert (faults.index[~first] != (faults.index + 70 * (faults.site == 0))[first]).any()
    plan = components.listed(space, REQUEST, ids)
    assert (plan.injections, plan.population.sum()) == (ids.size, ids.size)
    whole = components.by_bit(space, parts, dict.fromkeys(range(32), 999), 0)
    assert sorted(whole) == [*range(space.size)]


def test_counts_are_of_components():
    sites = [
        Site(name, (words,), np.dtype("f4"))
        for name, words in zip("abc", (30, 70, 100), strict=True)
    ]
    space = jfi.FaultSpace(sites, FAULT_MODELS["flip"])
    drawn = (("a", 3, 5, 1), ("b", 3, 6, 2), ("c", 3, 7, 3), ("c", 4, 8, 4))
    names = ("site", "bit", "injections", "critical")
    units = [{"level": "layer_bit", **dict(zip(names, row, strict=True))} for row in drawn]
    summary = {"estimates": [{"level": "network"}, *units]}
    found = components.counts(summary, space, {"x": sites[::2], "y": sites[1:2]})
    assert (found.population == [[130], [70]]).all()
    assert found.injections[:, 3:5].tolist() == [[12, 8], [6, 0]]
    assert found.critical[:, 3:5].tolist() == [[4, 4], [2, 0]]
    assert (found.injections.sum(), found.critical.sum()) == (26, 10)


def test_shares_of_unions_are_unbiased_and_their_intervals_hold():
    """Against known truths of two components: large and rarely critical, small and often."""
    rng = np.random.default_rng(0)
    population = np.array([[4000, 4000, 4000], [100, 100, 100]])
    truth = np.array([[2000, 40, 0], [90, 30, 5]])
    injections = np.array([[60, 40, 40], [60, 40, 40]])
    found, held = [], 0
    for _ in range(100):
        drawn = rng.hypergeometric(truth, population - truth, injections)
        one = components.share(
            components.Counts(population, injections, drawn), range(2), range(3), 0.99
        )
        found.append(one.estimate)
        held += one.low <= truth.sum() / population.sum() <= one.high
    share = truth.sum() / population.sum()
    assert abs(np.mean(found) - share) < 4 * np.std(found) / np.sqrt(len(found))
    # Pooled counts would be far off: the sample has other proportions than the population.
    assert abs((truth / population * injections).sum() / injections.sum() - share) > 0.1
    assert held >= 97


def test_one_bit_of_a_component_has_the_exact_interval():
    counts = components.Counts(*(np.array([[n, 1]]) for n in (1000, 50, 7)))
    one = components.share(counts, [0], [0], 0.99)
    low, high = jfi.sampling.estimates.hypergeometric(7, 50, 1000, 0.99)
    assert one == (1000, 50, 7, 0.14, low, high)
    counts = components.Counts(*(np.array([[n]]) for n in (50, 50, 7)))
    assert components.share(counts, [0], [0], 0.99)[3:] == (0.14, 0.14, 0.14)


def naive_head(net, variables, x):
    """bool [F]: the flips of the head, word by word and bit by bit, kernel and bias, critical for
    any image; each by the network run anew."""
    apply = jax.jit(lambda v: nets.apply(net, v, x).argmax(-1))
    golden, head, found = np.asarray(apply(variables)), variables["params"]["head"], {}
    for leaf in ("kernel", "bias"):
        values = np.asarray(head[leaf])
        for index in range(values.size):
            for bit in range(32):
                word = values.ravel().copy()
                word[index] = bits.faulty(word[index : index + 1], bit, bits.FLIP)[0]
                faulty = {**head, leaf: word.reshape(values.shape)}
                changed = {"params": {**variables["params"], "head": faulty}}
                found[leaf, index, bit] = (np.asarray(apply(changed)) != golden).any()
    return found


def test_the_script_tells_what_naive_runs_do(script, tiny, tmp_path):
    net, variables = tiny("vit")
    nets.save(tmp_path / "w.safetensors", variables)
    x = np.random.default_rng(1).random((4, *net.input_shape)).astype(np.float32)
    np.savez(tmp_path / "made.npz", x_test=x, y_test=np.arange(4))
    command = (
        "--net=vit", f"--dataset={tmp_path}/made.npz", f"--weights={tmp_path}/w.safetensors",
        "--few=100", "--error_margin=0.2", "--per_bit=50", "--per_mantissa_bit=50",
        "--verify=20", "--noeach", f"--out={tmp_path}/out",
    )  # fmt: skip
    ended = script(transformers, *command)
    assert ended.status == 0, ended.err
    assert "0 disagree" in ended.out
    with open(tmp_path / "out" / "vit_made.csv", newline="") as file:
        rows = {(row["component"], row["bits"]): row for row in csv.DictReader(file)}
    naive = naive_head(net, variables, nets.normalise(net, x))
    assert len(naive) == int(rows["head", tables.ALL]["injections"]) == 50 * 32
    for group, own in {**components.fields(np.float32), tables.ALL: range(32)}.items():
        truth = [critical for (_, _, bit), critical in naive.items() if bit in own]
        assert int(rows["head", group]["critical"]) == sum(truth), group
        assert float(rows["head", group]["low"]) == float(rows["head", group]["high"])
    for name in (*components.COMPONENTS, tables.ALL):
        assert f"| {name} |" in ended.out
    again = script(transformers, *command)
    assert again.status == 0 and "This call ran 0 faults" in again.out


def test_texts_are_judged_by_their_last_token(tiny):
    net, variables = tiny("gpt")
    network = target.read(net, variables)
    x = np.random.default_rng(0).integers(0, 96, (5, 6)).astype(np.float32)
    labels = np.asarray(nets.apply(net, variables, x)).argmax(-1)
    labels[0, :-1] = (labels[0, :-1] + 1) % 96  # earlier tokens do not count
    labels[1, -1] = (labels[1, -1] + 1) % 96
    sites = jfi.select(network, ".*")
    last = jfi.Engine(network, x, labels, sites, criterion=built_in.tokens("last"))
    assert last.accuracy == 0.8
    only = jfi.Engine(network, x, labels[:, -1], sites, criterion=built_in.tokens("last"))
    assert only.accuracy == 0.8
    every = jfi.Engine(network, x, labels, sites, criterion=built_in.tokens("any"))
    assert every.accuracy == 0.6
