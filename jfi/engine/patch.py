"""How a local change travels through a network: one rule per primitive.

A faulty value that equals the golden one but for a block is held as a `Patch`: the block and
where it is. A faulted weight starts as one element; a convolution or a dense layer, linear in
it, turns it into one output channel (the rank-one update); element-wise operations, pooling and
layout changes keep it there; the next convolution or dense layer is updated from its golden
output with that one input channel. Where no rule holds, the value is evaluated whole.

Rules see single images and single faults; the engine maps them over many with `vmap`.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jfi import bits
from jfi.networks import scans
from jfi.networks.convolution import Conv, numbers, taps
from jfi.networks.program import bind

Index = Any  # an int32 scalar, usually traced


class Patch(NamedTuple):
    """A value that equals the golden one outside a block.

    at: per axis, the index of the block on that axis, or None where it spans the whole axis.
    blocks: [2, ...], the faulty and the golden block; size 1 on the axes that `at` fixes.

    The golden block is made again beside the faulty one, in the same loops: the golden run may
    round otherwise (another loop, another exp), and only this tells that nothing has changed.
    """

    at: tuple[Index | None, ...]
    blocks: Any

    @property
    def value(self):
        """The faulty block."""
        return self.blocks[0]

    @property
    def golden(self):
        """The golden block."""
        return self.blocks[1]

    def map(self, at: Sequence[Index | None], change: Callable[[Any], Any]) -> "Patch":
        """The patch at `at` with both blocks changed alike."""
        return Patch(tuple(at), jax.vmap(change)(self.blocks))


def pair(at: Sequence[Index | None], value, golden) -> Patch:
    """The patch of a faulty and a golden block."""
    return Patch(tuple(at), jnp.stack([value, golden]))


class Golden(Protocol):
    """Access to values of the golden run, whole or by block."""

    def whole(self, atom) -> Any: ...

    def block(self, atom, at: Sequence[Index | None]) -> Any:
        """The block of `atom` that a patch at `at` would cover."""

    def padded(self, atom, config, start, sizes) -> Any:
        """The window `sizes` at `start` of `atom` padded with zeros as in `lax.pad`."""


def shape(atom) -> tuple[int, ...]:
    """Sizes of the axes of a variable or literal."""
    return atom.aval.shape


def simplify(atom, patch: Patch) -> Patch | Any:
    """The patch of `atom`, or the plain value when the block spans all of it."""
    at = tuple(None if d == 1 else i for i, d in zip(patch.at, shape(atom), strict=True))
    return patch.value if all(i is None for i in at) else patch._replace(at=at)


def whole(golden: Golden, atom, value: Patch | Any) -> Any:
    """The full faulty value: golden with the patch written in."""
    if not isinstance(value, Patch):
        return value
    # A select vectorises; a dynamic update under vmap becomes a scatter, slow on CPU.
    changed = inside(shape(atom), value.at, bits.differs(value.value, value.golden))
    return jnp.where(changed, value.value, golden.whole(atom))


def inside(dims, at: Sequence[Index | None], changed=True):
    """bool: where a value of these sizes is in the block `at`, and `changed`."""
    here = [
        lax.broadcasted_iota(jnp.int32, dims, axis) == index
        for axis, index in enumerate(at)
        if index is not None
    ]
    return reduce(jnp.logical_and, here, changed)


def _blockwise(golden: Golden, eqn, values, at) -> Patch:
    """The equation on every operand cut to the block `at`; scalars as they are."""
    operands = [
        value.blocks
        if isinstance(value, Patch)
        else golden.block(atom, at)
        if shape(atom)
        else golden.whole(atom)
        for atom, value in zip(eqn.invars, values, strict=True)
    ]
    axes = [0 if isinstance(value, Patch) else None for value in values]
    return Patch(at, jax.vmap(lambda *blocks: bind(eqn, blocks)[0], axes)(*operands))


def only(values) -> Patch | None:
    """The one patch among operands that are otherwise golden (None), else None."""
    faulty = [value for value in values if value is not None]
    return faulty[0] if len(faulty) == 1 and isinstance(faulty[0], Patch) else None


def _fixed(patch: Patch) -> list[int]:
    return [axis for axis, index in enumerate(patch.at) if index is not None]


# --- Rules. Each takes (golden, eqn, values): an operand's value is None where it is golden, a
# --- Patch, or a full array; it returns a Patch, or None where it does not apply.


def _elementwise(golden, eqn, values):
    at = _common_index(values)
    if at is None:
        return None
    return _blockwise(golden, eqn, values, at)


def _common_index(values):
    """The block that all patches share; None if they differ or a full value is among them."""
    faulty = [value for value in values if value is not None]
    if not all(isinstance(value, Patch) for value in faulty):
        return None
    at = faulty[0].at
    # Tracers are compared by identity: the same fault index stays the same object.
    same = all(i is j for value in faulty for i, j in zip(value.at, at, strict=True))
    return at if same else None


def _broadcast_in_dim(golden, eqn, values):
    patch = only(values)
    if patch is None:
        return None
    dims = eqn.params["broadcast_dimensions"]
    at = [None] * len(eqn.params["shape"])
    for axis, index in zip(dims, patch.at, strict=True):
        at[axis] = index
    out = tuple(d if i is None else 1 for d, i in zip(eqn.params["shape"], at, strict=True))
    return patch.map(at, lambda block: lax.broadcast_in_dim(block, out, dims))


def _transpose(golden, eqn, values):
    (patch,) = values
    order = eqn.params["permutation"]
    at = [patch.at[axis] for axis in order]
    return patch.map(at, lambda block: lax.transpose(block, order))


def _squeeze(golden, eqn, values):
    (patch,) = values
    gone = eqn.params["dimensions"]
    at = tuple(index for axis, index in enumerate(patch.at) if axis not in gone)
    return patch.map(at, lambda block: lax.squeeze(block, gone))


def _reshape(golden, eqn, values):
    patch = only(values)
    if patch is None or eqn.params["dimensions"] is not None:
        return None
    old, new = shape(eqn.invars[0]), eqn.params["new_sizes"]
    if all(i is not None or d == 1 for i, d in zip(patch.at, old, strict=True)):
        at = _unravel(_ravel(patch.at, old), new)
    else:
        at = _kept_axes(patch.at, old, new)
    if at is None:
        return None
    out = tuple(d if i is None else 1 for d, i in zip(new, at, strict=True))
    return patch.map(at, lambda block: lax.reshape(block, out))


def _kept_axes(at, old, new):
    """`at` on the new shape if every fixed axis survives the reshape, else None."""
    out: list[Index | None] = [None] * len(new)
    for axis, index in enumerate(at):
        if index is None:
            continue
        before = math.prod(old[:axis])
        place = [j for j, d in enumerate(new) if d == old[axis] and math.prod(new[:j]) == before]
        if not place:
            return None
        out[place[0]] = index
    return tuple(out)


def _ravel(at, dims):
    flat = jnp.int32(0)
    for index, d in zip(at, dims, strict=True):
        flat = flat * d + (0 if index is None else index)
    return flat


def _unravel(flat, dims):
    at = []
    for d in reversed(dims):
        at.append(None if d == 1 else flat % d)
        flat = flat // d
    return tuple(reversed(at))


def _reduce(golden, eqn, values):
    patch = only(values)
    axes = eqn.params.get("axes", ())
    if patch is None or set(axes).intersection(_fixed(patch)) or is_rounded(eqn.outvars[0]):
        return None
    at = [index for axis, index in enumerate(patch.at) if axis not in axes]
    return patch.map(at, lambda block: bind(eqn, [block])[0])


def _reduce_window(golden, eqn, values):
    (patch,), params = values, eqn.params
    if is_rounded(eqn.outvars[0]):
        return None
    rank = len(patch.at)
    plain = all(
        params["window_dimensions"][axis] == 1
        and params["window_strides"][axis] == 1
        and params["padding"][axis] == (0, 0)
        and (params.get("base_dilation") or (1,) * rank)[axis] == 1
        for axis in _fixed(patch)
    )
    if not plain:
        return None
    return patch.map(patch.at, lambda block: bind(eqn, [block])[0])


def _pad(golden, eqn, values):
    patch, fill = values
    config = list(eqn.params["padding_config"])
    if not isinstance(patch, Patch) or fill is not None:
        return None
    at = list(patch.at)
    for axis in _fixed(patch):
        low, _, interior = config[axis]
        at[axis], config[axis] = at[axis] * (interior + 1) + low, (0, 0, 0)
    if any(low < 0 or high < 0 for low, high, _ in eqn.params["padding_config"]):
        return None  # Negative padding may cut the block off.
    zero = golden.whole(eqn.invars[1])
    return patch.map(at, lambda block: lax.pad(block, zero, config))


def _slice(golden, eqn, values):
    (patch,) = values
    dims = shape(eqn.invars[0])
    start, limit = list(eqn.params["start_indices"]), list(eqn.params["limit_indices"])
    strides = list(eqn.params["strides"] or (1,) * len(dims))
    for axis in _fixed(patch):
        if (start[axis], limit[axis], strides[axis]) != (0, dims[axis], 1):
            return None
        limit[axis] = 1
    return patch.map(patch.at, lambda block: lax.slice(block, start, limit, strides))


def _concatenate(golden, eqn, values):
    axis = eqn.params["dimension"]
    at = _common_index(values)
    if at is None:
        return None
    if at[axis] is None:
        return _blockwise(golden, eqn, values, at)
    place = [k for k, value in enumerate(values) if value is not None]
    if len(place) != 1:
        return None
    offset = sum(shape(atom)[axis] for atom in eqn.invars[: place[0]])
    return values[place[0]]._replace(at=(*at[:axis], at[axis] + offset, *at[axis + 1 :]))


def _stack(golden, eqn, values):
    axis, at = eqn.params["axis"], _common_index(values)
    place = [k for k, value in enumerate(values) if value is not None]
    if at is None or len(place) != 1:
        return None
    patch = values[place[0]]
    at = (*at[:axis], jnp.int32(place[0]), *at[axis:])
    return patch.map(at, lambda block: jnp.expand_dims(block, axis))


def is_rounded(atom) -> bool:
    """Whether sums come out in less than float32: rounded again, an update is not what a run gives.

    A golden sum has lost what the rounding took, so no update of it is exact.
    """
    dtype = atom.aval.dtype
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _difference(patch: Patch, dtype):
    """Faulty minus golden on the block, in the type the product is accumulated in."""
    value, golden = patch.value.astype(dtype), patch.golden.astype(dtype)
    # Where both are products, the compiler fuses one into the subtraction: x - x is not 0 then.
    return jnp.where(value == golden, jnp.zeros((), dtype), value - golden)


def _updated(golden, out, at, patch: Patch, product: Callable[[Any], Any]) -> Patch:
    """The golden block of `out` at `at`, with the faulty product in its sums for the golden one.

    Args:
      product: what a block of the operand adds to the sums.
    """
    block = golden.block(out, at)
    value, old = (product(part.astype(block.dtype)) for part in patch.blocks)
    # Where it was all there is, nothing of it may stay: what comes next may ask for the sign. A
    # compiler that fuses the product into the subtraction leaves what rounding took.
    rest = jnp.where(block == old, jnp.zeros((), block.dtype), block - old)
    return pair(at, jnp.where(value == old, block, rest + value), block)


def dot_general(golden, eqn, values):
    """Rank-one update of a dense layer, from either operand.

    With one contracted index fixed, out = golden_out + (faulty - golden) * other[index], in effect.
    """
    patch = only(values)
    if patch is None:
        return None
    side = 0 if values[0] is not None else 1
    contract, batch = eqn.params["dimension_numbers"]
    other = eqn.invars[1 - side]
    (out,) = eqn.outvars
    at_other: list[Index | None] = [None] * len(shape(other))
    at_batch: list[Index | None] = [None] * len(batch[side])
    free: list[Index | None] = []
    for axis, index in enumerate(patch.at):
        if axis in contract[side]:
            at_other[contract[1 - side][contract[side].index(axis)]] = index
        elif axis in batch[side]:
            place = batch[side].index(axis)
            at_other[batch[1 - side][place]] = at_batch[place] = index
        else:
            free.append(index)
    rest = [None] * (len(shape(out)) - len(at_batch) - len(free))
    at = (*at_batch, *free, *rest) if side == 0 else (*at_batch, *rest, *free)
    factor = golden.block(other, at_other)

    def product(block, factor):
        return bind(eqn, (block, factor) if side == 0 else (factor, block))[0]

    if not set(contract[side]).intersection(_fixed(patch)):
        return patch.map(at, lambda block: product(block, factor))
    if is_rounded(out):
        return None
    factor = factor.astype(out.aval.dtype)
    return _updated(golden, out, at, patch, lambda block: product(block, factor))


def _conv(golden, eqn, values):
    conv, patch = numbers(eqn), only(values)
    if conv is None or patch is None or is_rounded(eqn.outvars[0]):
        return None
    return (_conv_weight if values[0] is None else _conv_channel)(golden, eqn, conv, patch)


def _conv_weight(golden, eqn, conv: Conv, patch: Patch):
    """One weight changed: in its output channel, its product by a shifted input channel."""
    (x, kernel), (out,) = eqn.invars, eqn.outvars
    if any(i is None and d != 1 for i, d in zip(patch.at, shape(kernel), strict=True)):
        return None
    co, ci, *tap = (0 if patch.at[axis] is None else patch.at[axis] for axis in conv.rhs)
    per_group = shape(kernel)[conv.rhs[0]] // conv.groups
    start = [0] * len(shape(x))
    start[conv.lhs[1]] = (co // per_group) * shape(kernel)[conv.rhs[1]] + ci
    for axis, k, gap in zip(conv.lhs[2:], tap, conv.dilation, strict=True):
        start[axis] = k * gap
    sizes = conv.window(shape(x), shape(out), batch=shape(x)[conv.lhs[0]])
    shifted = conv.strided(golden.padded(x, conv.pad_config(), start, sizes))
    at: list[Index | None] = [None] * len(shape(out))
    at[conv.out[1]] = co
    shifted = shifted.astype(out.aval.dtype)
    return _updated(golden, out, at, patch, lambda block: block.reshape(()) * shifted)


def _conv_channel(golden, eqn, conv: Conv, patch: Patch):
    """One input channel changed: out = golden_out + that channel's change through its taps."""
    (x, kernel), (out,) = eqn.invars, eqn.outvars
    feature = conv.lhs[1]
    if _fixed(patch) != [feature]:
        return None
    channel = patch.at[feature]
    depthwise = conv.depthwise(shape(x), shape(kernel))
    if conv.groups > 1 and not depthwise:
        return None
    at_kernel: list[Index | None] = [None] * len(shape(kernel))
    at: list[Index | None] = [None] * len(shape(out))
    if depthwise:
        at_kernel[conv.rhs[0]] = at[conv.out[1]] = channel
    elif conv.groups == 1:
        at_kernel[conv.rhs[1]] = channel
    # One convolution of the difference is half the work of one of each.
    delta = _difference(patch, out.aval.dtype)
    weights = golden.block(kernel, at_kernel).astype(delta.dtype)
    block = golden.block(out, at)
    return pair(at, block + taps(conv, shape(out), delta, weights), block)


Rule = Callable[[Golden, Any, Sequence[Any]], Patch | None]

# By primitive, and when a rule is exact. All hold for any dtype unless said; NaN, infinities and
# signed zeros go through as the equation computes them, in the faulty and in the golden block
# alike. A rule sees one operand that is a patch, the others golden, unless said; where it is not
# proven it returns None, and the equation is run whole.
RULES: dict[str, Rule] = {
    # An element of the output depends on that element of the operands alone. Several patches, and
    # one leaf used several times, if all are of one block.
    **dict.fromkeys(scans.ELEMENTWISE, _elementwise),
    # No axis that the block fixes is reduced, so whole sums are made again; not of floats below
    # float32, where their order would show in the result.
    **dict.fromkeys(
        "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or".split(), _reduce
    ),
    # The same; windows on the axes that the block fixes are single elements.
    **dict.fromkeys(
        "reduce_window_sum reduce_window_max reduce_window_min".split(),
        _reduce_window,
    ),
    # Elements change their place, none its value.
    "broadcast_in_dim": _broadcast_in_dim,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,  # axes that the block fixes survive it, or the block is one word
    "pad": _pad,  # golden filling, no negative padding
    "slice": _slice,  # axes that the block fixes are kept whole
    "stack": _stack,  # one patch
    "concatenate": _concatenate,  # several patches if all are of one block, on another axis
    # In the golden sums the faulty product for the golden one. Up to an epsilon of the golden sum
    # for float32 and float64, and as a run gives it where all else in the sum is 0; exact for
    # integers (they wrap); refused for outputs below float32, whose golden sums have lost what was
    # rounded.
    "dot_general": dot_general,
    # The same of one weight. Of one input channel the golden sums plus the product of the
    # difference, up to an epsilon of the golden sum; channels of a group where each is its own.
    "conv_general_dilated": _conv,
}
