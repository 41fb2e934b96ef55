"""A network as data: one flat list of primitive equations for one image.

`trace` turns any `apply(params, x) -> outputs` into a jaxpr without nested calls, so that the
rest of the engine can ask of every value what it depends on. The network is not edited.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from jfi.networks import convolution

# Primitives that only call an inner program; inlined. Control flow (scan, while, cond) stays.
_CALLS = frozenset(
    "jit pjit closed_call core_call call remat remat2 checkpoint "
    "custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr custom_lin".split()
)
PRODUCTS = frozenset(["dot_general", "conv_general_dilated"])
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


class Program(NamedTuple):
    """The equations of a network for one image, with dead code dropped, or a section of them.

    `leaves` are the variables of the parameter leaves in pytree order, `x` that of the input
    [1, ...], `out` that of the output, a row [1, N]; `consts` holds values captured by closure.
    """

    eqns: tuple[Any, ...]
    leaves: tuple[Any, ...]
    x: Any
    out: Any
    consts: dict[Any, Any]


def bind(eqn, values: Sequence[Any]) -> list[Any]:
    """The outputs of one equation on `values`, computed as is fastest on this machine."""
    if eqn.primitive.name == "conv_general_dilated":
        found = convolution.fast(eqn, *values)
        if found is not None:
            return [found]
    return _bind(eqn, values)


def _bind(eqn, values: Sequence[Any]) -> list[Any]:
    """The outputs of one equation as it stands."""
    out = eqn.primitive.bind(*values, **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _inner(eqn) -> core.ClosedJaxpr | None:
    if eqn.primitive.name not in _CALLS:
        return None
    found = next((eqn.params[key] for key in _INNER if key in eqn.params), None)
    return core.ClosedJaxpr(found, ()) if isinstance(found, core.Jaxpr) else found


def _evaluate(closed: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Evaluate `closed` on `args`, inlining every call."""
    jaxpr = closed.jaxpr
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        inner = _inner(eqn)
        outs = _bind(eqn, values) if inner is None else _evaluate(inner, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def flatten(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The same program with every call inlined."""
    return jax.make_jaxpr(lambda *args: _evaluate(closed, args))(*closed.in_avals)


def _live(eqns, output, given) -> tuple[Any, ...]:
    """The equations that `output` needs where `given` is known, in order."""
    needed, kept = {output}, []
    for eqn in reversed(eqns):
        if needed.intersection(eqn.outvars) and given not in eqn.outvars:
            kept.append(eqn)
            needed.update(atom for atom in eqn.invars if not isinstance(atom, core.Literal))
    return tuple(reversed(kept))


def trace(apply: Callable[[Any, Any], Any], params: Any, image: jax.ShapeDtypeStruct) -> Program:
    """The flat program of `apply` on one image.

    Args:
      apply: `(params, x [B, ...]) -> outputs [B, N]`, traceable by JAX, images independent.
      params: pytree of arrays (or of `jax.ShapeDtypeStruct`).
      image: shape and dtype of one image, without the batch axis.
    """
    leaves, tree = jax.tree.flatten(params)
    x = jax.ShapeDtypeStruct((1, *image.shape), image.dtype)

    def flat_apply(*args):
        return apply(jax.tree.unflatten(tree, args[:-1]), args[-1])

    flat = flatten(jax.make_jaxpr(flat_apply)(*leaves, x))
    jaxpr = flat.jaxpr
    return Program(
        eqns=_live(jaxpr.eqns, jaxpr.outvars[0], None),
        leaves=tuple(jaxpr.invars[:-1]),
        x=jaxpr.invars[-1],
        out=jaxpr.outvars[0],
        consts=dict(zip(jaxpr.constvars, flat.consts, strict=True)),
    )


def section(program: Program, start=None, end=None) -> Program:
    """The part of a program that makes `end` from `start`, by default its output, its input."""
    x = program.x if start is None else start
    out = program.out if end is None else end
    return program._replace(eqns=_live(program.eqns, out, x), x=x, out=out)


def dependents(program: Program, source) -> frozenset:
    """Every variable whose value depends on the variable `source`, itself included."""
    return reached(program.eqns, [source])


def reached(eqns: Sequence[Any], sources: Sequence[Any]) -> frozenset:
    """Every variable of the equations that depends on one of the `sources`, themselves included."""
    found = set(sources)
    for eqn in eqns:
        if any(not isinstance(atom, core.Literal) and atom in found for atom in eqn.invars):
            found.update(eqn.outvars)
    return frozenset(found)


def run(program: Program, leaves: Sequence[Any], x: Any, evaluate=bind) -> dict[Any, Any]:
    """Every value of a run on one image `x` [1, ...], by variable.

    Args:
      evaluate: `(eqn, values) -> outputs`; by default the golden run.
    """
    env = {**program.consts, program.x: x, **dict(zip(program.leaves, leaves, strict=True))}
    for eqn in program.eqns:
        values = [a.val if isinstance(a, core.Literal) else env[a] for a in eqn.invars]
        env.update(zip(eqn.outvars, evaluate(eqn, values), strict=True))
    return env


def text(program: Program) -> str:
    """The program in words, the same for the same program, without the values of constants."""
    numbers: dict[Any, int] = {}

    def word(atom) -> str:
        if isinstance(atom, core.Literal):
            return f"{atom.val}:{atom.aval}"
        return f"v{numbers.setdefault(atom, len(numbers))}:{atom.aval}"

    def line(outs, name, params, operands) -> str:
        return f"{[*map(word, outs)]} = {name} {params} {[*map(word, operands)]}"

    ends = line([program.x, *program.leaves], "inputs", "", [])
    lines = (line(e.outvars, e.primitive, e.params, e.invars) for e in program.eqns)
    # What is left of Python objects is named by its address, which says nothing.
    whole = "\n".join([ends, *lines, word(program.out)])
    return re.sub(r" at 0x[0-9a-f]+", "", whole)


def nbytes(aval) -> int:
    """Bytes of a value of this shape and dtype."""
    return math.prod(aval.shape) * aval.dtype.itemsize


def count(eqns: Sequence[Any]) -> int:
    """Equations, those within loops and branches among them."""
    given = [x for eqn in eqns for x in eqn.params.values()]
    listed = [x for some in given for x in (some if isinstance(some, tuple) else (some,))]
    within = [x for x in listed if isinstance(x, core.ClosedJaxpr)]
    return len(eqns) + sum(count(x.jaxpr.eqns) for x in within)


def flops(eqns: Sequence[Any]) -> int:
    """Floating-point operations of the equations: products in full, others one an element."""
    return sum(_flops(eqn) for eqn in eqns)


def _flops(eqn) -> int:
    inner = _inner(eqn)
    if inner is not None:
        return flops(inner.jaxpr.eqns)
    if eqn.primitive.name == "scan":
        return eqn.params["length"] * flops(eqn.params["jaxpr"].jaxpr.eqns)
    out = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * out * math.prod(kernel) // features
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * out * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return out
