"""The program split at a fault: the golden prefix, run once an image, and the faulty suffix.

For one faulted leaf or run-time value, `split` walks the program once and notes which golden
values the faulty part reads. `prefix` computes exactly those for all images, and `suffix` continues
from them for one (fault, image) pair. Values are told apart three ways, because it decides the
speed under `vmap`: constants (golden weights and what follows from them alone, never batched),
residuals (one per image, gathered by image) and fault-dependent values.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jfi import bits
from jfi.engine import patch
from jfi.engine.step import step
from jfi.networks import taps
from jfi.networks.program import Program, bind, dependents, flops, nbytes, reached, run
from jfi.networks.taps import Tap


class Key(NamedTuple):
    """A golden value the suffix reads: a variable, zero-padded by `config` if given."""

    var: Any
    config: tuple[tuple[int, int, int], ...] | None = None

    @property
    def aval(self) -> jax.ShapeDtypeStruct:
        dims = self.var.aval.shape
        for axis, (low, high, interior) in enumerate(self.config or ()):
            inner = dims[axis] + max(0, dims[axis] - 1) * interior
            dims = (*dims[:axis], low + inner + high, *dims[axis + 1 :])
        return jax.ShapeDtypeStruct(dims, self.var.aval.dtype)


class Split(NamedTuple):
    """The program split at one parameter leaf, by its number, or at one run-time value.

    constants, residuals: the golden values the suffix reads, by dependence on the image.
    flops: floating-point operations of one pair; live: bytes of its largest value.
    """

    program: Program
    source: int | Tap
    constants: tuple[Key, ...]
    residuals: tuple[Key, ...]
    flops: int
    live: int


class _Recorder:
    """A `patch.Golden` that only notes what is read."""

    def __init__(self):
        self.keys: dict[Key, None] = {}

    def _note(self, key: Key, sizes):
        self.keys[key] = None
        return jnp.zeros(sizes, key.var.aval.dtype)

    def whole(self, atom):
        if isinstance(atom, core.Literal):
            return atom.val
        return self._note(Key(atom), atom.aval.shape)

    def block(self, atom, at):
        if isinstance(atom, core.Literal):
            return atom.val
        return self._note(Key(atom), _block_shape(atom, at))

    def padded(self, atom, config, start, sizes):
        return self._note(Key(atom, tuple(config)), sizes)


class _Stored:
    """A `patch.Golden` over the constants and the residuals of one image."""

    def __init__(self, constants: dict, residuals: dict, image):
        self.constants, self.residuals, self.image = constants, residuals, image

    def _window(self, key, start, sizes):
        start = [jnp.asarray(index, jnp.int32) for index in start]  # of one type, x64 or not
        if key in self.constants:
            return lax.dynamic_slice(self.constants[key], start, sizes)
        # One slice of the whole stack: gathering the image first would copy all of it.
        found = lax.dynamic_slice(self.residuals[key], (self.image, *start), (1, *sizes))
        return found.reshape(sizes)

    def whole(self, atom):
        if isinstance(atom, core.Literal):
            return atom.val
        key = Key(atom)
        if key in self.constants:
            return self.constants[key]
        return self._window(key, [0] * len(atom.aval.shape), atom.aval.shape)

    def block(self, atom, at):
        if isinstance(atom, core.Literal) or all(i is None for i in at):
            return self.whole(atom)
        return self._window(Key(atom), [0 if i is None else i for i in at], _block_shape(atom, at))

    def padded(self, atom, config, start, sizes):
        return self._window(Key(atom, tuple(config)), start, sizes)


def _block_shape(atom, at) -> tuple[int, ...]:
    return tuple(d if i is None else 1 for i, d in zip(at, atom.aval.shape, strict=True))


def _continue(
    program: Program, source: int | Tap, golden: patch.Golden, at: Sequence[Any], value, evaluate
):
    """Faulty output of one image, with the fault that `at` and `value` give in the source."""
    env, fault, now = {}, None, 0
    if isinstance(source, Tap):
        fault = taps.injection(source, at, value)
    else:
        leaf = program.leaves[source]
        same = golden.block(leaf, at)
        env[leaf] = patch.simplify(leaf, patch.pair(at, value.reshape(same.shape), same))

    def read(atom):
        return None if isinstance(atom, core.Literal) else env.get(atom)

    for eqn in program.eqns:
        values = [read(atom) for atom in eqn.invars]
        strikes = 0 if fault is None else taps.steps(eqn, fault.name)
        if strikes or any(value is not None for value in values):
            outs = step(golden, eqn, values, evaluate, fault, now)
            env.update(zip(eqn.outvars, outs, strict=True))
        now += strikes
    if read(program.out) is None:
        return golden.whole(program.out)
    return patch.whole(golden, program.out, env[program.out])


def split(program: Program, source: int | Tap) -> Split:
    """Split `program` at parameter leaf number `source` (pytree order), or at a run-time value."""
    recorder = _Recorder()
    operands = _operands(program, source)
    jaxpr = jax.make_jaxpr(
        lambda at, value: _continue(program, source, recorder, at, value, bind),
    )(*operands).jaxpr
    image = dependents(program, program.x)
    faulty = reached(jaxpr.eqns, jaxpr.invars)  # the others are one for all pairs
    return Split(
        program,
        source,
        constants=tuple(key for key in recorder.keys if key.var not in image),
        residuals=tuple(key for key in recorder.keys if key.var in image),
        flops=flops(jaxpr.eqns),
        live=max(nbytes(var.aval) for eqn in jaxpr.eqns for var in eqn.outvars if var in faulty),
    )


def _operands(program: Program, source: int | Tap) -> tuple[list[Any], Any]:
    """Shapes of what `_continue` takes of one fault."""
    index = jax.ShapeDtypeStruct((), jnp.int32)
    if isinstance(source, Tap):
        words = jax.ShapeDtypeStruct((2,), bits.word_dtype(source.dtype))
        return [index] * (1 + len(source.shape)), words
    aval = program.leaves[source].aval
    return [index] * len(aval.shape), jax.ShapeDtypeStruct((), aval.dtype)


def image_bytes(split: Split) -> int:
    """Bytes of the residuals of one image."""
    return sum(nbytes(key.aval) for key in split.residuals)


def read(keys: Sequence[Key], env: dict) -> list[Any]:
    """The golden values of a run (`program.run`) that a suffix reads."""
    return [_padded(env, key) for key in keys]


def _padded(env, key: Key):
    if key.config is None:
        return env[key.var]
    return lax.pad(env[key.var], jnp.zeros((), env[key.var].dtype), key.config)


def prefix(split: Split, leaves: Sequence[Any], images) -> tuple[list[Any], list[Any]]:
    """Golden values for the suffix: constants, and residuals [B, 1, ...] of images [B, ...]."""
    residuals = jax.vmap(
        lambda image: read(split.residuals, run(split.program, leaves, image[None]))
    )(images)
    # Constants do not depend on the image: any will do, and the compiler drops its part.
    env = run(split.program, leaves, jnp.zeros((1, *images.shape[1:]), images.dtype))
    return read(split.constants, env), residuals


def suffix(split: Split, constants, residuals, image, at: Sequence[Any], value, evaluate=bind):
    """Faulty output of one pair: image number `image`, word `at` of the source set to `value`.

    Args:
      constants, residuals: from `prefix`.
      image: int32 scalar, row of the residuals.
      at: int32 scalars, one per axis of the leaf.
      value: scalar of the leaf's dtype. Of a run-time value, `at` and `value` are as of
        `jfi.networks.taps.injection`.
      evaluate: `(eqn, values) -> outputs`, where an equation is evaluated whole.
    """
    golden = _Stored(
        dict(zip(split.constants, constants, strict=True)),
        dict(zip(split.residuals, residuals, strict=True)),
        image,
    )
    return _continue(split.program, split.source, golden, at, value, evaluate)
