"""The words of a number format as bits: read them, break them, put them back.

Bit 0 is the least significant bit of the word. For float32, bit 31 is the sign, bits 30 to 23 the
exponent, and bit 0 the last bit of the mantissa.

Every function takes NumPy arrays and JAX arrays, concrete or traced. NumPy arrays stay NumPy, so
that 64-bit words work whatever JAX is set to. Nothing here does arithmetic on the numbers: NaN
payloads, signed zeros and subnormals pass through unchanged.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfi.errors import InputError

# The last two are of the whole word, whichever bit they name: stuck at the number 0, at 1.
POLARITIES = ("stuck_at_0", "stuck_at_1", "flip", "dead", "saturated")
STUCK_AT_0, STUCK_AT_1, FLIP, DEAD, SATURATED = range(5)
WHOLE_WORD = (DEAD, SATURATED)

_WORDS = {8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}


def width(dtype) -> int:
    """Bits in one word of `dtype`: 8, 16, 32 or 64.

    Raises:
        InputError: `dtype` is not a real number format of whole native words (it is bool, complex,
            object, string, int4, extended precision or of foreign byte order).
    """
    dtype = np.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        bits = jnp.finfo(dtype).bits
    elif jnp.issubdtype(dtype, jnp.integer):
        bits = jnp.iinfo(dtype).bits
    else:
        bits = 0
    if bits not in _WORDS or bits != 8 * dtype.itemsize or not dtype.isnative:
        raise InputError(
            f"dtype {dtype} has no words to break: "
            "use a float or integer of 8, 16, 32 or 64 bits in native byte order"
        )
    return bits


def has_words(dtype) -> bool:
    """Whether `dtype` is a number format whose words can be broken."""
    try:
        return width(dtype) > 0
    except (InputError, TypeError):
        return False


def word_dtype(dtype) -> np.dtype:
    """The unsigned integer as wide as `dtype`. Raises InputError as `width` does."""
    return _WORDS[width(dtype)]


def to_bits(x):
    """Words of `x` as unsigned integers of the same shape: a view in NumPy, a bitcast in JAX."""
    if isinstance(x, jax.Array):
        return lax.bitcast_convert_type(x, word_dtype(x.dtype))
    x = np.asarray(x)
    return x.view(word_dtype(x.dtype))


def from_bits(words, dtype):
    """Numbers of `dtype` with the given words; the inverse of `to_bits`.

    Raises:
        InputError: `words` are not the unsigned integers as wide as `dtype`.
    """
    dtype = np.dtype(dtype)
    if words.dtype != word_dtype(dtype):
        raise InputError(f"words of {dtype} are {word_dtype(dtype)}, not {words.dtype}")
    if isinstance(words, jax.Array):
        return lax.bitcast_convert_type(words, dtype)
    return np.asarray(words).view(dtype)


def differs(a, b):
    """bool: where two arrays of one dtype differ in their bits; -0.0 is not 0.0, a NaN is itself.

    Words that can't be broken (bool, complex) are compared as numbers.
    """
    return to_bits(a) != to_bits(b) if has_words(a.dtype) else a != b


def is_subnormal(x: np.ndarray) -> np.ndarray:
    """bool: numbers that XLA's code for CPUs takes for zero: not 0, but below the least normal one.

    Of float16 and the float8 types none are: they are computed in float32, where all are normal.
    """
    if x.dtype not in (np.float32, np.float64, jnp.bfloat16):
        return np.zeros(x.shape, bool)
    with np.errstate(invalid="ignore"):  # bfloat16 warns of NaN
        return (x != 0) & (np.abs(x) < jnp.finfo(x.dtype).smallest_normal)


def masks(dtype, bit, polarity):
    """What a fault does to a word: `(keep, change)` with faulty = (word & keep) ^ change.

    Args:
        dtype: of the numbers.
        bit, polarity: integers that broadcast against each other, in [0, width) and codes of
            `POLARITIES`.

    Returns:
        Words of the unsigned integer as wide as `dtype`: JAX arrays if an argument is, else NumPy.

    Raises:
        InputError: a bit or polarity out of range (one that is traced cannot be checked).
    """
    word = word_dtype(dtype)
    _check_range("bit", bit, 8 * word.itemsize)
    _check_range("polarity", polarity, len(POLARITIES))
    xp, unit = np, np.ones((), word)
    if any(isinstance(a, jax.Array) for a in (bit, polarity)):
        xp, unit = jnp, _on_device(unit)
    # The mask is made in the word's own dtype: promotion must never widen or sign it.
    one = xp.left_shift(unit, xp.asarray(bit).astype(word))
    none, polarity = xp.zeros_like(one), xp.asarray(polarity)
    in_word = [polarity == code for code in WHOLE_WORD]
    keep = xp.where(polarity == FLIP, ~none, xp.where(in_word[0] | in_word[1], none, ~one))
    number_one = to_bits(np.ones((), dtype))[()]
    change = xp.where((polarity == STUCK_AT_1) | (polarity == FLIP), one, none)
    return keep, xp.where(in_word[1], xp.asarray(number_one), change)


def mask(words, keep, change):
    """Words with masks of `masks` applied; the three broadcast, all of one unsigned dtype."""
    return (words & keep) ^ change


def set_bit(words, bit, polarity):
    """`words`, taken as unsigned integers, each with a fault; arguments as of `masks`.

    Returns:
        Words of the dtype of `words`: a JAX array if any of the three is, else a NumPy array.

    Raises:
        InputError: as `masks` does.
    """
    return mask(words, *masks(words.dtype, bit, polarity))


def faulty(x, bit, polarity):
    """`x` with a fault in every number; arguments broadcast, as of `masks`."""
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    return from_bits(mask(to_bits(x), *masks(x.dtype, bit, polarity)), x.dtype)


def inject(leaf, index, bit, polarity) -> jax.Array:
    """`leaf` with one faulty word: the naive, obviously right injection the fast path answers to.

    Args:
        leaf: numbers of any shape.
        index: scalar position of the word in C order, in [0, leaf.size); may be traced.
        bit, polarity: scalars, as in `masks`; may be traced.

    Returns:
        A JAX array of the shape and dtype of `leaf`. Map over faults with `jax.vmap`.

    Raises:
        InputError: an index, bit or polarity out of range (one that is traced cannot be checked).
    """
    leaf = _on_device(leaf)
    _check_range("index", index, leaf.size)
    words = to_bits(leaf).ravel()
    words = words.at[index].set(mask(words[index], *masks(leaf.dtype, bit, polarity)))
    return from_bits(words, leaf.dtype).reshape(leaf.shape)


def _on_device(x) -> jax.Array:
    """`x` as a JAX array of the same dtype; without x64 JAX would quietly halve 64-bit words."""
    array = jnp.asarray(x)
    if not isinstance(x, jax.Array) and array.dtype != np.asarray(x).dtype:
        raise InputError(
            f"{np.asarray(x).dtype} words do not fit JAX as it is set: enable jax_enable_x64, "
            "or use NumPy arrays throughout"
        )
    return array


def _check_range(what: str, values, end: int) -> None:
    """A shift beyond the word would quietly inject nothing, an index beyond it the wrong fault."""
    if isinstance(values, jax.core.Tracer):
        return
    values = np.asarray(values)
    bad = (values < 0) | (values >= end)
    if bad.any():
        raise InputError(f"{what} {values[bad][0]} is out of range: give 0 to {end - 1}")
