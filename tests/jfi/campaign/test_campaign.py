"""How much of a campaign is recorded at a time, and that no other campaign takes the record."""

import jax.numpy as jnp
import numpy as np
import pytest

import jfi
from jfi.campaign import campaign, records


@pytest.mark.parametrize(
    ("images", "measure", "faults"),
    [
        (100, "full", 2**19 // 100),  # so many pairs
        (10_000, "full", 256),  # the fewest
        (1, "full", 2**16),  # the most
        (100, "critical", 2**22 // 100),
        (10_000, "critical", campaign.PAYING),  # bounds of all images are made for each shard
        (10_000, "detect", campaign.PAYING),
    ],
)
def test_faults_of_a_shard(images, measure, faults):
    assert campaign.shard_size(images, measure) == faults


def small(apply=None, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    params = {"a": draw((6, 8), np.float32), "c": draw((8, 4), np.float32)}
    images = np.random.default_rng(9).standard_normal((16, 6), np.float32)
    network = jfi.network(
        apply or (lambda p, x: jnp.maximum(x @ p["a"], 0) @ p["c"]), params, images[0]
    )
    return jfi.Engine(network, images, np.zeros(16, int), network.sites)


def campaign_of(engine, path, sampler="network_wise", margin=0.05, seed=0, measure="full"):
    request = jfi.Request(error_margin=margin)
    plan = jfi.plan(engine.network, sampler, fault_model="flip", request=request, seed=seed)
    return jfi.run(plan, engine, path, {}, measure=measure)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sampler": "exhaustive"}, "strata"),
        ({"margin": 0.02}, "request"),
        ({"seed": 1}, "seed"),
        ({"measure": "critical"}, "measure"),
    ],
)
def test_another_campaign_never_takes_the_records_of_one(tmp_path, options, named):
    engine = small()
    campaign_of(engine, tmp_path)
    with pytest.raises(jfi.InputError, match=f"other content: .*{named} was"):
        campaign_of(engine, tmp_path, **options)


def test_another_network_never_takes_the_records_of_one(tmp_path):
    campaign_of(small(), tmp_path)
    with pytest.raises(jfi.InputError, match=r"other content: .*program was"):
        campaign_of(small(lambda p, x: jnp.maximum(x @ p["a"], 0.1) @ p["c"]), tmp_path)
    with pytest.raises(jfi.InputError, match="other content: parameters was"):
        campaign_of(small(seed=1), tmp_path)


def test_a_list_that_was_edited_is_another_campaign(tmp_path):
    engine = small()
    types = np.int32, np.int64, np.int16, np.int8
    for index, expected in ((3, None), (4, "listed was")):
        row = (
            np.array([value], kind) for value, kind in zip((0, index, 30, 2), types, strict=True)
        )
        plan = jfi.plan_listed(engine.network, jfi.Faults(*row))
        if expected is None:
            jfi.run(plan, engine, tmp_path, {})
        else:
            with pytest.raises(jfi.InputError, match=expected):
                jfi.run(plan, engine, tmp_path, {})


def test_a_list_of_nothing_or_of_no_faults_is_refused():
    network = small().network
    with pytest.raises(jfi.InputError, match="faults are none; list at least one"):
        jfi.plan_listed(network, jfi.fault_list([], jfi.listable(network)))
    row = (np.array([value]) for value in (-1, 0, 0, 2))
    with pytest.raises(jfi.InputError, match="site -1 in row 0 is not in 0 to 1"):
        jfi.plan_listed(network, jfi.Faults(*row))


def test_an_engine_of_other_sites_than_the_plan_is_refused(tmp_path):
    """Faults name sites by position: they would strike elsewhere."""
    engine = small()
    other = jfi.Engine(engine.network, engine.images, engine.labels, engine.sites[1:])
    with pytest.raises(jfi.InputError, match=r"1 sites \(c, .* plan 2 sites \(a, .*plan.space.sit"):
        campaign_of(other, tmp_path)


def test_shards_without_their_manifest_or_of_another_are_refused(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    campaign_of(small(), first)
    campaign_of(small(seed=1), second)
    ours = records.shard_path(first, 0)
    ours.write_bytes(records.shard_path(second, 0).read_bytes())
    with pytest.raises(jfi.InputError, match=r"00000\.parquet holds the outcomes of another"):
        campaign_of(small(), first)
    (first / records.MANIFEST).unlink()
    with pytest.raises(jfi.InputError, match=r"outcomes but no manifest\.json"):
        campaign_of(small(), first)


def test_the_same_campaign_goes_on(tmp_path):
    whole = campaign_of(small(), tmp_path)
    again = campaign_of(small(), tmp_path)
    assert again["run"]["faults"] == 0
    assert again["estimates"] == whole["estimates"]


@pytest.mark.parametrize("measure", ["full", "critical", "detect"])
def test_verification_reads_the_record(tmp_path, measure):
    """Not only what the engine says now: outcomes on record may have been made otherwise."""
    from pyarrow import parquet

    engine, plan = small(), jfi.plan(small().network, "exhaustive", fault_model="flip")
    jfi.run(plan, engine, tmp_path, {}, measure=measure, verify_pairs=300)
    path = records.shard_path(tmp_path, 0)
    table = parquet.read_table(path)
    column = table.column_names.index("first_critical")
    never = np.full(len(table), -1, np.int32)
    spoilt = table.set_column(column, "first_critical", [never])
    parquet.write_table(spoilt.replace_schema_metadata(parquet.read_metadata(path).metadata), path)
    with pytest.raises(jfi.VerificationError, match="verification failed") as error:
        jfi.run(plan, engine, tmp_path, {}, measure=measure, verify_pairs=300)
    assert error.value.summary["verify"]["disagreements"] > 3


def test_what_first_critical_tells_of_each_image():
    engine = small()
    image, first = np.array([0, 3, 4, 15, 15]), np.array([3, 3, 3, 3, -1])
    assert engine.told(first, image, "full").tolist() == [0, 1, -1, -1, 0]
    order = engine.order  # nearest to another answer first
    found = engine.told(np.full(16, order[5]), order, "detect")
    assert found.tolist() == [0] * 5 + [1] + [-1] * 10


def test_outcomes_beyond_those_of_a_campaign_are_refused(tmp_path):
    campaign_of(small(), tmp_path)
    stray = records.shard_path(tmp_path, 7)
    stray.write_bytes(records.shard_path(tmp_path, 0).read_bytes())
    with pytest.raises(jfi.InputError, match=r"00007\.parquet is not of this campaign"):
        campaign_of(small(), tmp_path)


def test_faults_of_subnormal_words_are_counted(tmp_path):
    """By hand: an exponent of 0 and a mantissa that is not."""
    engine = small()
    engine.network.params["c"][0] = 0.0
    found = campaign_of(engine, tmp_path, "exhaustive", measure="critical")
    words = np.concatenate([leaf.ravel() for leaf in engine.network.params.values()])
    flipped = words.view(np.uint32)[:, None] ^ (np.uint32(1) << np.arange(32, dtype=np.uint32))
    subnormal = (flipped >> 23 & 0xFF == 0) & (flipped & 0x7FFFFF != 0)
    assert found["subnormal"] == subnormal.sum() >= 4 * 23
