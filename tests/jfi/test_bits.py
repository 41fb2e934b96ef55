import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jfi import bits
from jfi.errors import InputError

DTYPES = [
    np.dtype(d)
    for d in (
        *("float16", "float32", "float64", "int8", "uint8", "int16", "int32", "uint32", "int64"),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    )
]
ON_JAX = [d for d in DTYPES if d.itemsize < 8]


def every_kind_of_word(dtype, count=64):
    """Words of NaNs with payloads, infinities, subnormals, both zeros and random ones."""
    width = 8 * dtype.itemsize
    rng = np.random.default_rng(0)
    random = rng.integers(0, 2**width, count, dtype=f"u{dtype.itemsize}", endpoint=False)
    corners = [0, 1, 2 ** (width - 1), 2 ** (width - 1) + 1, 2**width - 1, 2 ** (width - 1) - 1]
    if dtype == np.float32:
        corners += [0x7F800000, 0xFF800000, 0x7F800001, 0xFFC12345, 0x007FFFFF]
    return np.concatenate([np.array(corners, f"u{dtype.itemsize}"), random])


def word_by_text(word, bit, polarity, width):
    """The faulty word, by editing its binary digits."""
    digits = list(f"{word:0{width}b}")
    at = width - 1 - bit
    digits[at] = ("0", "1", "10"[int(digits[at])])[polarity]
    return int("".join(digits), 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_words_make_the_round_trip_bit_for_bit(dtype):
    words = every_kind_of_word(dtype)
    values = bits.from_bits(words, dtype)
    assert values.dtype == dtype
    assert bits.to_bits(values).tolist() == words.tolist()
    assert bits.to_bits(values).base is not None  # a view
    assert bits.width(dtype) == 8 * dtype.itemsize


@pytest.mark.parametrize("dtype", ON_JAX, ids=str)
def test_jax_words_make_the_round_trip_bit_for_bit(dtype):
    words = every_kind_of_word(dtype)
    values = jax.jit(lambda w: bits.from_bits(w, dtype))(words)
    assert values.dtype == dtype
    assert np.asarray(jax.jit(bits.to_bits)(values)).tolist() == words.tolist()


def test_float32_words_are_those_of_ieee_754():
    values = np.array([1.0, -2.5, 1e-45, np.inf], np.float32)
    expected = [struct.unpack("<I", struct.pack("<f", v))[0] for v in values]
    assert bits.to_bits(values).tolist() == expected


def test_float32_bits_are_numbered_sign_31_exponent_30_to_23_mantissa_from_22():
    one = np.float32(1.0)
    assert bits.faulty(one, 31, bits.FLIP) == -1.0
    assert bits.faulty(one, 30, bits.FLIP) == np.inf
    assert bits.faulty(one, 23, bits.FLIP) == 0.5
    assert bits.faulty(one, 22, bits.FLIP) == 1.5
    assert bits.faulty(one, 0, bits.FLIP) == np.nextafter(one, np.float32(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_set_bit_edits_one_binary_digit(dtype):
    width = bits.width(dtype)
    words = every_kind_of_word(dtype, count=10)[:, None, None]
    bit = np.arange(width)[:, None]
    polarity = np.arange(3)
    faulty = bits.set_bit(words, bit, polarity)
    assert faulty.dtype == words.dtype
    expected = [
        [[word_by_text(int(w), b, p, width) for p in range(3)] for b in range(width)]
        for w in words.ravel()
    ]
    assert faulty.tolist() == expected


@pytest.mark.parametrize("dtype", ON_JAX, ids=str)
def test_jax_and_numpy_make_the_same_faults(dtype):
    values = bits.from_bits(every_kind_of_word(dtype, count=10), dtype)[:, None, None]
    bit = np.arange(bits.width(dtype), dtype=np.int16)[:, None]
    polarity = np.arange(3, dtype=np.int8)
    here = bits.faulty(values, bit, polarity)
    with jax.numpy_dtype_promotion("strict"):
        there = jax.jit(bits.faulty)(values, bit, polarity)
    assert here.dtype == there.dtype == dtype
    assert bits.to_bits(here).tolist() == bits.to_bits(np.asarray(there)).tolist()


@given(word=st.integers(0, 2**64 - 1), bit=st.integers(0, 63))
def test_stuck_at_is_idempotent_and_flip_undoes_itself(word, bit):
    words = np.array([word], np.uint64)
    for stuck in (bits.STUCK_AT_0, bits.STUCK_AT_1):
        once = bits.set_bit(words, bit, stuck)
        assert bits.set_bit(once, bit, stuck) == once
        assert once in (words, bits.set_bit(words, bit, bits.FLIP))
    assert bits.set_bit(bits.set_bit(words, bit, bits.FLIP), bit, bits.FLIP) == words


def test_numpy_float64_stays_whole_while_jax_has_no_64_bit_words():
    assert not jax.config.jax_enable_x64
    assert bits.faulty(np.float64(1.0), 52, bits.FLIP) == 0.5
    assert bits.faulty(np.float64(1.0), 63, bits.STUCK_AT_1) == -1.0
    assert bits.faulty(np.int64(1), 62, bits.FLIP) == 2**62 + 1


def test_float64_in_jax_needs_x64():
    leaf = np.array([1.0, 2.0])
    with pytest.raises(InputError, match=r"float64 words do not fit JAX.*jax_enable_x64"):
        bits.inject(leaf, 0, 63, bits.FLIP)
    with pytest.raises(InputError, match="uint64 words do not fit JAX"):
        bits.faulty(leaf, jnp.array([0, 63]), bits.FLIP)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        assert jax.jit(bits.inject)(leaf, 1, 63, bits.FLIP).tolist() == [1.0, -2.0]
        assert bits.inject(leaf, 0, 52, bits.FLIP).tolist() == [0.5, 2.0]


@pytest.mark.parametrize("dtype", ON_JAX, ids=str)
def test_dead_and_saturated_are_the_numbers_0_and_1_whatever_the_bit(dtype):
    x = bits.from_bits(every_kind_of_word(dtype), dtype)
    for bit in (0, bits.width(dtype) - 1):
        assert (bits.faulty(x, bit, bits.DEAD) == np.zeros((), dtype)).all()
        assert (bits.faulty(x, bit, bits.SATURATED) == np.ones((), dtype)).all()


@pytest.mark.parametrize("dtype", ON_JAX, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4)], ids=str)
def test_inject_changes_one_word_of_a_copy(dtype, shape):
    size = int(np.prod(shape))
    leaf = bits.from_bits(every_kind_of_word(dtype)[:size].reshape(shape), dtype)
    rng = np.random.default_rng(1)
    index = rng.integers(0, size, 12)
    bit = rng.integers(0, bits.width(dtype), 12).astype(np.int16)
    polarity = rng.integers(0, 3, 12).astype(np.int8)
    with jax.numpy_dtype_promotion("strict"):
        many = jax.jit(jax.vmap(bits.inject, (None, 0, 0, 0)))(leaf, index, bit, polarity)
    assert many.dtype == dtype and many.shape == (12, *shape)
    for faulty, i, b, p in zip(np.asarray(many), index, bit, polarity, strict=True):
        expected = bits.to_bits(leaf).ravel().tolist()
        expected[i] = word_by_text(expected[i], b, p, bits.width(dtype))
        assert bits.to_bits(faulty).ravel().tolist() == expected


@settings(max_examples=20, deadline=None)
@given(index=st.integers(0, 5), bit=st.integers(0, 31), polarity=st.integers(0, 4))
def test_inject_takes_python_integers(index, bit, polarity):
    leaf = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    expected = np.asarray(leaf).ravel().copy()
    expected[index] = bits.faulty(expected[index], bit, polarity)
    faulty = bits.inject(leaf, index, bit, polarity)
    assert (
        bits.to_bits(np.asarray(faulty)).tolist() == bits.to_bits(expected.reshape(2, 3)).tolist()
    )


@pytest.mark.parametrize(
    "dtype",
    [bool, complex, object, "U3", "S2", "M8[s]", ">f4", np.longdouble, ml_dtypes.int4],
    ids=str,
)
def test_dtypes_without_whole_native_words_are_refused(dtype):
    with pytest.raises(InputError, match=r"has no words to break: use a float or integer"):
        bits.width(dtype)


def test_what_is_out_of_range_is_refused_where_it_is_known():
    leaf = jnp.ones((2, 3))
    with pytest.raises(InputError, match="bit 32 is out of range: give 0 to 31"):
        bits.faulty(np.float32(1), [3, 32], bits.FLIP)
    with pytest.raises(InputError, match="bit -1 is out of range"):
        bits.faulty(leaf, -1, bits.FLIP)
    with pytest.raises(InputError, match="polarity 5 is out of range: give 0 to 4"):
        bits.faulty(leaf, 0, 5)
    with pytest.raises(InputError, match="index 6 is out of range: give 0 to 5"):
        bits.inject(leaf, 6, 0, bits.FLIP)
    with pytest.raises(InputError, match="words of float32 are uint32, not uint16"):
        bits.from_bits(np.zeros(2, np.uint16), np.float32)
