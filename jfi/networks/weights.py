"""Which parameter leaves enter a product as its weight, however they are laid out on the way.

A weight is followed from its leaf to the product: joined with others, stacked, sliced, padded,
transposed, changed element by element; and into loops and branches, as a constant or as one slice
a step. What meets a value of the image before is none, as biases, scales of norms, and embeddings
that are looked up; nor is what is repeated over a weight, or a row beside it, its scale or bias.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jax.extend import core

from jfi.networks import program, scans
from jfi.networks.program import PRODUCTS, Program, reached

# What takes a product with a weight; the last of matrices by groups of rows.
_PRODUCTS = PRODUCTS | {"ragged_dot_general"}
# What keeps words, or sums, of the first operand; the others say where.
_PARTS = frozenset("slice dynamic_slice gather split unstack pad reduce_sum".split())
# What puts operands beside each other, or one into another.
_JOINS = frozenset("concatenate stack dynamic_update_slice scatter".split())


class _Weight(NamedTuple):
    """What a value holds of leaves: all or some of their words.

    vector: it came as one row of words, as biases and scales do, and is not stacked to more;
    spread: its words are repeated.
    """

    leaves: frozenset[int]
    vector: bool = False
    spread: bool = False


class _Body(NamedTuple):
    """The inner program of a loop or a branch.

    operands: what its inputs are at first; carry: which of them the next step takes from the
    outputs, first to first.
    """

    jaxpr: core.Jaxpr
    operands: Sequence[Any]
    carry: slice

    @property
    def carried(self) -> list[tuple[Any, Any]]:
        """(input, the output it is carried on as)."""
        return list(zip(self.jaxpr.invars[self.carry], self.jaxpr.outvars, strict=False))


def products(program: Program) -> Iterator[tuple[int, Any]]:
    """(leaf, equation) of every leaf that enters a product as its weight, or a part of one.

    A loop or a branch that multiplies by it, as a recurrent layer does, is such an equation too.
    """
    held = {
        var: _Weight(frozenset([number]), _is_row(var.aval))
        for number, var in enumerate(program.leaves)
    }
    for eqn, leaves in _entering(program.eqns, held, reached(program.eqns, [program.x])):
        yield from ((leaf, eqn) for leaf in sorted(leaves))


def _entering(eqns, held: dict[Any, _Weight], image) -> Iterator[tuple[Any, frozenset[int]]]:
    """The equations that take a product by weights, and the leaves of these.

    Args:
      held: the weights by value; what the equations make of them is added.
      image: the values that depend on the image.
    """
    for eqn in eqns:
        own = [None if isinstance(a, core.Literal) else held.get(a) for a in eqn.invars]
        if not any(own):
            continue
        inner = [_inside(body, own, eqn, held, image) for body in _bodies(eqn)]
        leaves = frozenset().union(*inner)
        if eqn.primitive.name in _PRODUCTS:
            leaves = _factors(eqn, own, image)
        if leaves:
            yield eqn, leaves
        found = None if inner else _kept(eqn, own)
        looked_up = len(eqn.invars) == 1 or _looks_up_matrices(eqn)
        if found and (eqn.outvars[0] not in image or looked_up):
            held.update((var, _laid_out(found, var)) for var in eqn.outvars)


def _factors(eqn, own: Sequence[_Weight | None], image) -> frozenset[int]:
    """The leaves that a product takes as weights."""
    inside = [_is_in(atom, image) for atom in eqn.invars]
    some = [
        side
        for side, weight in enumerate(own)
        # What is looked up is one for values of the image; for other weights it is a value.
        if weight and not _scales(eqn, side) and (all(inside[:2]) or not inside[side])
    ]
    if not any(inside):  # a row by a matrix is a state, or a query that is learned
        some = [side for side in some if _axes(eqn.invars[side].aval) > 1] or some
    return _leaves(own[side] for side in some)


def _leaves(weights) -> frozenset[int]:
    return frozenset().union(*(weight.leaves for weight in weights))


def _scales(eqn, side: int) -> bool:
    """Whether a product only multiplies by an operand, element by element, as a norm's scale."""
    if eqn.primitive.name != "dot_general":
        return False
    _, batch = eqn.params["dimension_numbers"]
    return len(batch[side]) == len(eqn.invars[side].aval.shape)


def _kept(eqn, own: Sequence[_Weight | None]) -> _Weight | None:
    """The weight that an equation makes of those among its operands, None if it makes none."""
    name, (out, *_) = eqn.primitive.name, eqn.outvars
    if name in _PRODUCTS:
        return _Weight(frozenset())  # its factors are told; a row that it meets is a bias
    if name in _PARTS:
        return own[0]
    if name in _JOINS:
        return _joined([weight for weight in own if weight])
    if name in ("broadcast_in_dim", "tile") and _words(out) > _words(eqn.invars[0]):
        # A row that is repeated scales what it meets.
        return None if own[0].vector else own[0]._replace(spread=True)
    some = [w for w, a in zip(own, eqn.invars, strict=True) if w and _words(a) == _words(out)]
    return _joined([w for w in some if not w.spread] or some)


def _joined(weights: Sequence[_Weight]) -> _Weight | None:
    """Several as one. A row that meets a matrix is its bias; rows alone are neurons' weights."""
    weights = [weight for weight in weights if not weight.vector] or weights
    if not weights:
        return None
    vector, spread = (all(column) for column in list(zip(*weights, strict=True))[1:])
    return _Weight(_leaves(weights), vector, spread)


def _laid_out(weight: _Weight, var) -> _Weight:
    """A weight as a value of that shape."""
    return weight._replace(vector=_is_row(var.aval, weight.vector))


def _is_row(aval, was: bool = False) -> bool:
    """Whether a value has one axis, or is still a row that `was` one: with others of size 1."""
    return len(aval.shape) < 2 or (was and _axes(aval) < 2)


def _axes(aval) -> int:
    """Axes longer than 1."""
    return sum(d > 1 for d in aval.shape)


def _words(atom) -> int:
    return math.prod(atom.aval.shape)


def _looks_up_matrices(eqn) -> bool:
    """Whether an equation looks up whole matrices, as of experts; embeddings are rows."""
    return eqn.primitive.name in ("gather", "dynamic_slice") and (
        sum(d > 1 for d in eqn.params["slice_sizes"]) > 1
    )


def _bodies(eqn) -> list[_Body]:
    """The inner programs of an equation that is a loop or a branch."""
    name, p = eqn.primitive.name, eqn.params
    if scan := scans.read(eqn):
        carry = slice(scan.consts, scan.consts + scan.carry)
        return [_Body(scan.body.jaxpr, eqn.invars, carry)]
    if name == "while":
        operands = eqn.invars[p["cond_nconsts"] :]
        return [_Body(_flat(p["body_jaxpr"]).jaxpr, operands, slice(p["body_nconsts"], None))]
    if name == "cond":
        return [_Body(_flat(b).jaxpr, eqn.invars[1:], slice(0, 0)) for b in p["branches"]]
    return []


@lru_cache(maxsize=64)
def _flat(body: core.ClosedJaxpr) -> core.ClosedJaxpr:
    return program.flatten(body)


def _inside(body: _Body, own, eqn, held: dict[Any, _Weight], image) -> frozenset[int]:
    """The leaves that a body takes products by; the weights that it hands out are held."""
    inputs = list(zip(body.jaxpr.invars, body.operands, own[-len(body.operands) :], strict=True))
    changed = {a for a, b in body.carried if a is not b}
    within = {
        var: _laid_out(weight, var) for var, _, weight in inputs if weight and var not in changed
    }
    moved = _moved(body, {v for v, a, _ in inputs if _is_in(a, image)})
    leaves = [found for _, found in _entering(body.jaxpr.eqns, within, moved)]
    for outer, var in zip(eqn.outvars, body.jaxpr.outvars, strict=True):
        if outer not in image and not isinstance(var, core.Literal) and var in within:
            held[outer] = _laid_out(within[var], outer)
    return frozenset().union(*leaves)


def _moved(body: _Body, sources: set) -> frozenset:
    """The values of a body that depend on some of its inputs, at any step."""
    while True:
        found = reached(body.jaxpr.eqns, list(sources))
        later = {a for a, b in body.carried if _is_in(b, found)}
        if later <= sources:
            return found
        sources = sources | later


def _is_in(atom, values) -> bool:
    return not isinstance(atom, core.Literal) and atom in values
