"""The partition of pairs, against a scalar re-statement of it, its edges, NaN and infinities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asking import top1
from scipy.special import softmax

from jfi import outcomes
from jfi.outcomes import CLASS_MASK, CLASSES, CORRECT, CRITICAL


def classify(golden, faulty, label):
    """By top-1."""
    return outcomes.classify(golden, faulty, label, top1(golden.shape[-1]))


def class_name(code):
    return CLASSES[int(code) & CLASS_MASK]


def one(golden, faulty, label=0):
    return int(classify(jnp.asarray(golden), jnp.asarray(faulty), jnp.asarray(label)))


def stated(golden, faulty):
    """The taxonomy of one pair, as its definition reads, in float64."""
    if np.array_equal(golden, faulty):
        return "masked"
    if not np.isfinite(faulty).all():
        return "non_finite"
    top = golden.argmax()
    if faulty.argmax() != top:
        return "sdc_1"
    before, after = (softmax(x.astype(np.float64))[top] for x in (golden, faulty))
    change = abs(after - before) / before
    edges = [("sdc_0_5", 0.05), ("sdc_5_10", 0.1), ("sdc_10_20", 0.2), ("sdc_20", np.inf)]
    return next(name for name, edge in edges if change < edge)


def test_classify_agrees_with_the_definition_on_random_pairs():
    rng = np.random.default_rng(0)
    golden = rng.normal(size=(4000, 5)).astype(np.float32)
    scale = 10.0 ** rng.uniform(-4, 1, size=(4000, 1))
    faulty = (golden + scale * rng.normal(size=golden.shape)).astype(np.float32)
    faulty[::50] = golden[::50]
    faulty[1::50, 2] = np.inf
    faulty[2::50, 3] = np.nan
    label = rng.integers(0, 5, 4000)
    codes = np.asarray(jax.jit(classify)(golden, faulty, label))
    names = [class_name(code) for code in codes]
    assert names == [stated(g, f) for g, f in zip(golden, faulty, strict=True)]
    assert set(names) == set(CLASSES)
    np.testing.assert_array_equal((codes & CRITICAL) > 0, golden.argmax(1) != faulty.argmax(1))
    np.testing.assert_array_equal((codes & CORRECT) > 0, faulty.argmax(1) == label)


@pytest.mark.parametrize(
    ("golden", "faulty", "expected"),
    [
        # Dyadic confidences: the change is exactly 5, 10, 20 percent of golden.
        (20 / 32, 19 / 32, "sdc_5_10"),
        (20 / 32, 21 / 32, "sdc_5_10"),
        (20 / 32, 18 / 32, "sdc_10_20"),
        (20 / 32, 24 / 32, "sdc_20"),
        (20 / 32, np.nextafter(np.float32(19 / 32), np.float32(1)), "sdc_0_5"),
        (20 / 32, np.nextafter(np.float32(18 / 32), np.float32(1)), "sdc_5_10"),
        (20 / 32, np.nextafter(np.float32(16 / 32), np.float32(1)), "sdc_10_20"),
        (0.5, 0.5, "sdc_0_5"),
        (0.5, np.nan, "sdc_20"),
    ],
)
def test_bins_are_half_open_at_their_exact_edges(golden, faulty, expected):
    for bin_of in (outcomes.sdc_bin, jax.jit(outcomes.sdc_bin)):
        assert CLASSES[int(bin_of(jnp.float32(golden), jnp.float32(faulty)))] == expected


def test_unchanged_confidence_is_not_masked():
    """Logits that all move alike keep the confidence but are not equal to golden."""
    assert class_name(one([1.0, 0.0], [2.0, 1.0])) == "sdc_0_5"
    assert class_name(one([1.0, 0.0], [1.0, -0.0])) == "sdc_0_5"


@pytest.mark.parametrize(
    ("faulty", "critical"),
    [
        ([3.0, np.inf, 0.0], True),
        ([np.inf, 2.0, 0.0], False),
        ([3.0, -np.inf, 0.0], False),
        ([3.0, 2.0, np.nan], True),  # argmax takes a NaN as the maximum
        ([np.nan, 2.0, np.nan], False),  # and the first of several
        ([np.nan, np.inf, 0.0], False),
    ],
)
def test_non_finite_outputs_keep_their_own_class_and_the_critical_flag(faulty, critical):
    code = one([3.0, 2.0, 1.0], faulty)
    assert class_name(code) == "non_finite"
    assert bool(code & CRITICAL) == critical
    assert bool(code & CORRECT) == (not critical)


def test_what_has_the_bits_of_golden_is_masked():
    assert class_name(one([np.inf, 1.0], [np.inf, 1.0])) == "masked"
    assert class_name(one([np.nan, 1.0], [np.nan, 1.0])) == "masked"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_large_logits_do_not_overflow(dtype):
    big = float(jnp.finfo(dtype).max)
    golden = jnp.array([big, -big, 0.0], dtype)
    assert class_name(classify(golden, golden.at[1].set(0), 0)) == "sdc_0_5"
    assert class_name(classify(golden, golden.at[2].set(big), 0)) == "sdc_20"


def test_float64_logits_beyond_float32_do_not_overflow():
    with jax.enable_x64(True):
        golden = jnp.array([1e300, -1e300], jnp.float64)
        assert class_name(classify(golden, golden * 0.5, 0)) == "sdc_0_5"


def test_ties_go_to_the_first_maximum():
    assert not one([1.0, 1.0, 0.0], [1.0, 1.0, 0.5]) & CRITICAL
    assert one([1.0, 1.0, 0.0], [0.5, 1.0, 0.0]) & CRITICAL


def test_faults_broadcast_over_golden_and_vmap_agrees():
    rng = np.random.default_rng(1)
    golden = rng.normal(size=(6, 4)).astype(np.float32)
    faulty = golden + rng.normal(size=(3, 6, 4)).astype(np.float32)
    label = rng.integers(0, 4, 6)
    whole = classify(golden, faulty, label)
    mapped = jax.vmap(classify, (None, 0, None))(golden, faulty, label)
    assert whole.dtype == jnp.uint8
    np.testing.assert_array_equal(whole, mapped)


def random_codes(faults, images, seed=0):
    """Codes classify can give: masked is never critical, sdc_1 always, non-finite either."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, len(CLASSES), (faults, images)).astype(np.uint8)
    codes[0] = 0
    either = rng.random(codes.shape) < 0.5
    critical = (codes == outcomes.SDC_1) | ((codes == outcomes.NON_FINITE) & either)
    correct = rng.random(codes.shape) < 0.7
    return codes | (critical * CRITICAL).astype(np.uint8) | (correct * CORRECT).astype(np.uint8)


@pytest.mark.parametrize("images", [1, 8, 13])
def test_tally_counts_partition_the_images(images):
    codes = random_codes(50, images)
    rows = outcomes.tally(codes, keep_bits=True)
    np.testing.assert_array_equal(rows.masked + rows.non_critical + rows.critical, images)
    np.testing.assert_array_equal(sum(getattr(rows, name) for name in CLASSES), images)
    for f, row in enumerate(codes):
        hits = [b for b, code in enumerate(row) if code & CRITICAL]
        assert rows.critical[f] == len(hits)
        assert rows.first_critical[f] == (hits[0] if hits else -1)
        assert rows.correct[f] == sum(bool(code & CORRECT) for code in row)
        assert [rows.critical_bits[f, b // 8] >> (7 - b % 8) & 1 for b in range(images)] == [
            int(b in hits) for b in range(images)
        ]
        masked = [code & CLASS_MASK == CLASSES.index("masked") for code in row]
        assert np.unpackbits(rows.masked_bits[f])[:images].tolist() == masked
        for number, name in enumerate(CLASSES):
            assert getattr(rows, name)[f] == sum(code & CLASS_MASK == number for code in row)


def test_tally_keeps_no_bits_unless_asked_and_takes_no_faults():
    rows = outcomes.tally(random_codes(3, 4))
    assert rows.critical_bits is None and rows.masked_bits is None
    empty = outcomes.tally(np.zeros((0, 9), np.uint8), keep_bits=True)
    assert empty.masked.shape == (0,)
    assert empty.critical_bits.shape == (0, 2)
