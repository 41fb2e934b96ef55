"""Certificates: proof, without running it, that a fault is not critical: that top-1 stays, say.

Fix an image, a cut of the program (a value that everything after it depends on alone) and a
scale s. Any difference d at the cut with max|d| <= s moves every later value by at most a bound
that is propagated through the absolute weights; a ReLU whose golden input plus its bound is
negative stays dead, every other unit passes at most its own difference. With that set of live
units frozen the bound is linear in |d|, so one backward pass gives a map G with

    sum(|d| * G) < 1   =>   every constraint of the criterion moves by less than its slack:

of top-1, that it stays above class k, by the golden margin, for every k.

The proof is in real arithmetic. For float rounding, golden margins are reduced by an allowance,
within which two compiled programs are taken to agree (`rounding.allowance`), and the sum must stay
below `LIMIT`; tests re-run certified pairs naively.

This is interval bound propagation (Gowal et al., 2018) with frozen activation patterns, in the
spirit of CROWN's linear relaxations (Zhang et al., 2018).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jfi.criteria.criterion import Constraints
from jfi.engine import curves
from jfi.hardware.chunks import mapped
from jfi.networks.convolution import EXACT
from jfi.networks.program import PRODUCTS, Program, bind, dependents, flops, nbytes, section

SCALES = tuple(10.0 ** (-k / 2) for k in range(12, -1, -1))
LIMIT = 0.99  # of 1: the sums of the map and of the test are rounded too
WIDE = 1e-3
AFFINE_MOST = 1 << 24  # elements of the matrix of what is affine at the end
PAIR = 2  # scores of a functional that are added one by one
AT_ONCE = 1 << 22  # elements of the functionals that are looked at together
WORTHWHILE = 0.02  # a cut is of use if at least this share of the operations comes after it


class Unbounded(Exception):
    """An equation without a bound: nothing before it can be certified."""


def _is_variable(atom) -> bool:
    return not isinstance(atom, core.Literal)


# --- Bounds, one rule a primitive: (eqn, golden operands, bounds) -> bound of the output. A bound
# --- is None where the operand is golden. Rules are linear in the bounds; whatever else depends on
# --- them goes through stop_gradient, which is what freezes the live units. What is frozen at a
# --- bound must hold for all smaller ones.
# ---
# --- Element-wise functions of one value are not here but in `curves`: these rules are for what
# --- mixes several. All are of float32 and float64 (`_holds`). An infinite bound stays infinite or
# --- becomes NaN, and so does its cost: neither is less than anything, so neither certifies.


def _frozen(bound):
    return 0.0 if bound is None else lax.stop_gradient(bound)


def _sum(eqn, golden, bounds):
    found = [bound for bound in bounds if bound is not None]
    return found[0] if len(found) == 1 else found[0] + found[1]


def _same(eqn, golden, bounds):
    """Sums with coefficients 0 and 1 of the elements: the bound goes the way of the value."""
    zeros = [
        jnp.zeros_like(value) if bound is None else bound
        for value, bound in zip(golden, bounds, strict=True)
    ]
    return bind(eqn, zeros)[0]


def _bilinear(eqn, golden, bounds):
    """a b - a' b' is at most |a - a'| (|b| + |b - b'|) + |a| |b - b'|."""
    (a, b), (da, db) = map(jnp.abs, golden), bounds
    terms = []
    if da is not None:
        terms.append(bind(eqn, [da, b + _frozen(db)])[0])
    if db is not None:
        terms.append(bind(eqn, [a, db])[0])
    return sum(terms[1:], terms[0])


def _max(eqn, golden, bounds):
    """Either operand passes its difference, unless it stays below the other whatever happens."""
    sign = 1.0 if eqn.primitive.name == "max" else -1.0
    (a, b), (da, db) = (sign * value for value in golden), bounds
    terms = []
    if da is not None:
        terms.append(jnp.where(a + _frozen(da) < b - _frozen(db), 0.0, da))
    if db is not None:
        terms.append(jnp.where(b + _frozen(db) < a - _frozen(da), 0.0, db))
    return sum(terms[1:], terms[0])


def _select(eqn, golden, bounds):
    pairs = zip(golden[1:], bounds[1:], strict=True)
    cases = [jnp.zeros_like(g) if d is None else d for g, d in pairs]
    return bind(eqn, [golden[0], *cases])[0]


def _window_max(eqn, golden, bounds):
    """Per window, the sum over the elements that can be its maximum."""
    p, x, d = eqn.params, golden[0], bounds[0]
    config = [(low, high, 0) for low, high in p["padding"]]
    r = lax.stop_gradient(d)
    floor = lax.pad(x - r, jnp.array(-jnp.inf, x.dtype), config)
    reach = lax.pad(x + r, jnp.array(-jnp.inf, x.dtype), config)
    moves = lax.pad(d, jnp.zeros((), d.dtype), config)
    out = eqn.outvars[0].aval.shape

    def windows(value):
        for start in itertools.product(*map(range, p["window_dimensions"])):
            strides = p["window_strides"]
            limit = [a + (n - 1) * t + 1 for a, n, t in zip(start, out, strides, strict=True)]
            yield lax.slice(value, start, limit, strides)

    least = None
    for value in windows(floor):
        least = value if least is None else jnp.maximum(least, value)
    total = jnp.zeros(out, d.dtype)
    for top, move in zip(windows(reach), windows(moves), strict=True):
        total = total + jnp.where(top < least, 0.0, move)
    return total


def _reduce_max(eqn, golden, bounds):
    """The sum over the elements that can be the maximum."""
    axes, x, d = eqn.params["axes"], golden[0], bounds[0]
    r = lax.stop_gradient(d)
    least = jnp.max(x - r, axis=axes, keepdims=True)
    return jnp.sum(jnp.where(x + r < least, 0.0, d), axis=axes)


# By primitive, and when it is sound.
RULES: dict[str, Callable[[Any, Sequence[Any], Sequence[Any]], Any]] = {
    # Always; either or both operands may move.
    **dict.fromkeys("add sub add_any".split(), _sum),
    # They are sums of elements with coefficients 0 and 1, so a bound is never lost nor cancelled.
    # A conversion is from and to float32 or float64.
    **dict.fromkeys(
        "broadcast_in_dim concatenate convert_element_type copy cumsum pad reduce_sum "
        "reduce_window_sum reshape rev slice squeeze transpose".split(),
        _same,
    ),
    # Both factors are float32 or float64, golden or not. An infinite factor times 0 is NaN.
    **dict.fromkeys("mul dot_general conv_general_dilated".split(), _bilinear),
    # Ties count as live: only an operand that is less whatever happens is dropped. A NaN is less
    # than nothing.
    **dict.fromkeys("max min".split(), _max),
    # The choice is golden; one that moves is a curve or has no bound.
    "select_n": _select,
    # As max. Elements may be -inf (padding, masks): such a one is dropped beside a finite one.
    "reduce_max": _reduce_max,
    # The same; windows and input are not dilated.
    "reduce_window_max": _window_max,
}

BILINEAR = PRODUCTS | {"mul"}
LAYOUTS = frozenset("broadcast_in_dim copy reshape rev squeeze transpose".split())
# What leaves sums of the inputs: after the last other primitive the logits are affine.
AFFINE = frozenset(
    "add sub add_any neg broadcast_in_dim concatenate copy pad reduce_sum reduce_window_sum "
    "reshape rev slice squeeze transpose mul div dot_general conv_general_dilated".split()
)


def propagate(program: Program, golden: dict, bound) -> Any:
    """The bound of the output of `program` (a section) for a `bound` of its input.

    Args:
      golden: golden values by variable.

    Raises:
      Unbounded: a primitive without a rule meets a bound.
    """
    roots = _roots(program)
    bounds: dict[Any, Any] = {}
    found: dict[Any, Any] = {}

    def begin(var, bound):
        bounds[var], found[var] = bound, curves.variable(golden[var], _frozen(bound))

    def bound_of(var):
        root = roots[var]
        return bounds[var] if root is var else curves.steepest(found[var]) * bounds[root]

    begin(program.x, bound)
    for eqn, moved in _reached(program):
        name, out, root = eqn.primitive.name, eqn.outvars[0], _root(eqn, moved, roots)
        values = [golden[a] if _is_variable(a) else a.val for a in eqn.invars]
        each = list(zip(eqn.invars, values, moved, strict=True))
        if root is None:
            own = [bound_of(a) if m else None for a, _, m in each]
            begin(out, RULES[name](eqn, values, own))
            continue
        curve = curves.RULES[name](
            eqn, *[found[a] if m else curves.constant(v) for a, v, m in each]
        )
        if _has_kink(eqn, moved):
            kink = values[moved.index(False)]
            reach = found[root].value
            curve = curve._replace(kinks=(partial(_meet, program, golden, root, reach, kink),))
        if roots[out] is out:
            begin(out, curves.steepest(curve) * bounds[root])
        else:
            found[out] = curve
    return bound_of(program.out)


def _roots(program: Program) -> dict[Any, Any]:
    """By value that moves, the value that it is a curve of; itself where a rule gives its bound.

    What is compared with something golden is its own root, so that it is known where the
    comparison changes.

    Raises:
      Unbounded: an equation has no rule.
    """
    compared = {
        a
        for eqn, moved in _reached(program)
        if _has_kink(eqn, moved)
        for a in eqn.invars
        if _is_variable(a)
    }
    roots = {program.x: program.x}
    for eqn, moved in _reached(program):
        root, out = _root(eqn, moved, roots), eqn.outvars[0]
        if root is None and not _holds(eqn, moved):
            raise Unbounded(eqn.primitive.name)
        roots[out] = out if root is None or out in compared else root
    return roots


def _root(eqn, moved: Sequence[bool], roots: dict) -> Any:
    """What an equation makes a curve of: the one root of its operands; None if it is no curve."""
    own = [atom for atom, m in zip(eqn.invars, moved, strict=True) if m]
    shared = {roots[atom] for atom in own}
    return shared.pop() if len(shared) == 1 and curves.fits(eqn, own) else None


def _has_kink(eqn, moved: Sequence[bool]) -> bool:
    return eqn.primitive.name in curves.COMPARISONS and sum(moved) == 1


def _meet(program: Program, golden: dict, root, reach, kink, cases) -> Any:
    """Where `cases`, curves of `root`, are equal at its value `kink`, or that is out of `reach`.

    Equal in floats: a jump smaller than that is rounding, and in the allowance.
    """
    point = jnp.broadcast_to(jnp.asarray(kink, root.aval.dtype), root.aval.shape)

    def at(atom):
        if not _is_variable(atom):
            return atom.val
        return _rerun(section(program, root, atom), golden, point)

    a, b = map(at, cases)
    return (point < reach.low) | (point > reach.high) | (a == b)


def _rerun(program: Program, env: dict, value) -> Any:
    """The output of a section for another value of its input, all else as in the run `env`."""
    later = {program.x: value}
    for eqn, _ in _reached(program):
        values = [later.get(a, env.get(a)) if _is_variable(a) else a.val for a in eqn.invars]
        later.update(zip(eqn.outvars, bind(eqn, values), strict=True))
    return later.get(program.out, env.get(program.out))


def gates(program: Program) -> list[Any]:
    """Values of the image that all later ones depend on alone, beside parameters, in order."""
    image = dependents(program, program.x)
    last_use = {
        atom: number
        for number, eqn in enumerate(program.eqns)
        for atom in eqn.invars
        if _is_variable(atom) and atom in image
    }
    found, live = [], {program.x}
    for number, eqn in enumerate(program.eqns):
        live.update(var for var in eqn.outvars if var in image)
        live = {var for var in live if last_use.get(var, -1) > number}
        if len(live) == 1 and live == set(eqn.outvars):
            found.extend(live)
    return found


def cuts(program: Program) -> list[Any]:
    """The gates to test at: the last before each stretch of products, where testing pays.

    Differences at a cut can be bounded up to the logits, and enough work comes after it.
    """
    chosen = []
    whole = flops(program.eqns)
    for var in gates(program):
        rest = section(program, var)
        if flops(rest.eqns) >= WORTHWHILE * whole and bounded(rest):
            if chosen and not _products(section(program, chosen[-1], var)):
                chosen.pop()
            chosen.append(var)
    return chosen


def first_cut(program: Program, cuts: Sequence[Any], leaf: int) -> int:
    """Number of the first of some cuts after the last use of a leaf; as many as there are if none.

    Args:
      leaf: number of the parameter leaf.
    """
    source = program.leaves[leaf]
    for number, cut in enumerate(cuts):
        if not any(source in eqn.invars for eqn in section(program, cut).eqns):
            return number
    return len(cuts)


def _products(program: Program) -> bool:
    return any(eqn.primitive.name in PRODUCTS for eqn in program.eqns)


def bounded(program: Program) -> bool:
    """Whether every equation that meets what follows from the input has a rule that holds there.

    Rules are of float32 and float64: sums in fewer bits are rounded by more than any allowance
    here, and a conversion to integers is a step.
    """
    try:
        _roots(program)
    except Unbounded:
        return False
    return True


def _holds(eqn, moved: Sequence[bool]) -> bool:
    """Whether there is a rule for an equation some of whose operands have moved."""
    name, p = eqn.primitive.name, eqn.params
    own = [atom for atom, m in zip(eqn.invars, moved, strict=True) if m]
    if name not in RULES or not all(_is_exact(atom) for atom in (*own, *eqn.outvars)):
        return False
    if name in BILINEAR:  # the other factor is rounded too
        return all(_is_exact(atom) for atom in eqn.invars)
    if name == "reduce_window_max":
        return all(n == 1 for n in (*p["base_dilation"], *p["window_dilation"]))
    return name != "select_n" or not moved[0]


def _is_exact(atom) -> bool:
    return atom.aval.dtype in EXACT


def _reached(program: Program) -> Iterator[tuple[Any, list[bool]]]:
    """The equations that depend on the input, with which of their operands do."""
    image = dependents(program, program.x)
    for eqn in program.eqns:
        moved = [_is_variable(atom) and atom in image for atom in eqn.invars]
        if any(moved):
            yield eqn, moved


def features(program: Program) -> Any:
    """The first gate that the logits are an affine function of; the logits if there is none."""
    if _affine(program):
        return program.x
    return next((v for v in gates(program) if _affine(section(program, v))), program.out)


def _affine(program: Program) -> bool:
    for eqn, moved in _reached(program):
        name = eqn.primitive.name
        if name not in AFFINE or (name in BILINEAR and all(moved)) or (name == "div" and moved[1]):
            return False
    return True


def _weights(
    program: Program, env: dict, allowance, constraints: Callable[[Any], Constraints]
) -> tuple[Any, Any]:
    """What each difference of the input costs, where scores are affine in it.

    That is the most, over the constraints, of what it moves one by over its slack. Returns the
    weights, shaped as the input, and False where a slack is within rounding.
    """
    index, weight, slack = constraints(env[program.out].ravel())
    # A functional of several scores is off by half of what all of them are, as a difference is.
    slack = slack - allowance * jnp.maximum(1, jnp.abs(weight).sum(axis=1) / 2)
    share = jnp.where(slack > 0, 1 / slack, 0.0)
    if program.x is program.out:
        moves = jnp.zeros(program.out.aval.size, share.dtype)
        moves = moves.at[index].max(jnp.abs(weight) * share[:, None])
    else:
        moves = _affine_moves(program, env, index, weight, share)
    return moves.reshape(program.x.aval.shape), jnp.all(slack > 0)


def _affine_moves(program: Program, env: dict, index, weight, share) -> Any:
    """[n]: the most, over functionals [K, M] of the scores, that an element moves one by."""
    scores, transpose = jax.vjp(lambda value: _rerun(program, env, value).ravel(), env[program.x])
    widest = max(var.aval.size for eqn in program.eqns for var in eqn.outvars)

    def row(number):
        return transpose(jnp.zeros_like(scores).at[number].set(1))[0].ravel()

    # As many scores at a time as there is room for on the way back from them.
    rows = mapped(row, jnp.arange(scores.size), max(1, AT_ONCE // widest))

    def most(index, weight, share):
        if index.shape[1] > PAIR:
            dense = jnp.zeros((len(index), len(rows)), rows.dtype)
            moved = dense.at[jnp.arange(len(index))[:, None], index].add(weight) @ rows
        else:
            moved = sum(w[:, None] * rows[k] for w, k in zip(weight.T, index.T, strict=True))
        return (jnp.abs(moved) * share[:, None]).max(axis=0)

    count = max(1, AT_ONCE // (min(index.shape[1], PAIR) * rows.shape[1]))
    if count >= len(index):
        return most(index, weight, share)
    parts = [
        jnp.resize(x, (-(-len(index) // count), count, *x.shape[1:]))  # some come twice
        for x in (index, weight, share)
    ]

    def larger(found, part):
        return jnp.maximum(found, most(*part)), None

    return lax.scan(larger, jnp.zeros(rows.shape[1], scores.dtype), parts)[0]


def bound_map(
    program: Program,
    env: dict,
    source,
    scale,
    allowance,
    constraints: Callable[[Any], Constraints],
) -> Any:
    """G of one image at the value `source`: sum(|d| * G) < 1 keeps all `constraints` of the scores,
    the output of the program, if max|d| <= scale.

    Args:
      env: the golden run, by variable (`jfi.networks.program.run`).
      allowance: how far each logit may be off (`jfi.engine.rounding.allowance`).
    """
    rest = section(program, source)
    last = features(rest)
    if last.aval.size * rest.out.aval.size > AFFINE_MOST:
        last = rest.out
    weights, certain = _weights(section(rest, last), env, allowance, constraints)

    def cost(bound):
        return jnp.sum(weights * propagate(section(rest, end=last), env, bound))

    slopes = jax.grad(cost)(jnp.full_like(env[source], scale))
    return jnp.where(certain, slopes, jnp.inf)


def is_useful(maps) -> bool:
    """Whether maps [S, b, ...] can certify a difference of the smallest scale in many places."""
    cost = SCALES[0] * np.asarray(maps[0]).reshape(maps.shape[1], -1).mean(axis=1)
    return bool(np.median(cost) < WIDE)


def product(program: Program, leaf: int):
    """The one product that uses a leaf, once, as it is or laid out anew; None if there is none.

    Each word meets the product as itself in one place: after a transpose or a reshape, not after
    a broadcast, a sum or a scaling. Biases and all else that enters no product have no radii.
    """
    source = program.leaves[leaf]
    while True:
        uses = [eqn for eqn in program.eqns for atom in eqn.invars if atom is source]
        if len(uses) != 1:
            return None
        (own,) = uses
        if not _only_lays_out(own):
            break
        (source,) = own.outvars
    if own.primitive.name not in PRODUCTS:
        return None
    exact = all(_is_exact(atom) for atom in (*own.invars, *own.outvars))
    return own if exact and bounded(section(program, own.outvars[0])) else None


def _only_lays_out(eqn) -> bool:
    """Whether every word of the operand is once in the output, and nothing else."""
    if eqn.primitive.name not in LAYOUTS:
        return False
    return eqn.invars[0].aval.size == eqn.outvars[0].aval.size


def footprint(program: Program) -> int:
    """Bytes that a bound of one scale takes on its way through a program, forth and back."""
    return 2 * sum(nbytes(var.aval) for eqn in program.eqns for var in eqn.outvars)


def radii(
    program: Program,
    env: dict,
    product,
    leaf,
    allowance,
    constraints: Callable[[Any], Constraints],
    at_a_time: int = len(SCALES),
) -> Any:
    """Certified radius of every word of a leaf for one image, shaped as the leaf.

    `at_a_time` scales are under way at once.

    A word that changes by less than its radius keeps the top-1 answer: |dw| moves the product's
    output by |dw| times a shifted input, whose cost under the bound map is |dw| * (map correlated
    with the absolute input), a value shaped like the weight's gradient.
    """
    (out,) = product.outvars
    reached = dependents(program, leaf)
    side = 0 if product.invars[0] in reached else 1
    other = jnp.abs(env[product.invars[1 - side]])
    largest = other.max()

    def spread(bound):
        bound = _rerun(section(program, leaf, product.invars[side]), env, bound)
        return bind(product, (bound, other) if side == 0 else (other, bound))[0]

    _, transpose = jax.vjp(spread, env[leaf])

    def radius(scale):
        (cost,) = transpose(bound_map(program, env, out, scale, allowance, constraints))
        fits = jnp.minimum(LIMIT / cost, scale / largest)
        # A radius of NaN would be taken for more than any change.
        return jnp.where(jnp.isnan(cost) | jnp.isnan(largest), 0.0, fits)

    def larger(found, scales):
        return jnp.maximum(found, jax.vmap(radius)(scales).max(axis=0)), None

    scales = jnp.asarray(SCALES, other.dtype)
    if at_a_time >= scales.size:
        return jax.vmap(radius)(scales).max(axis=0)
    parts = jnp.resize(scales, (-(-scales.size // at_a_time), at_a_time))  # some come twice
    return lax.scan(larger, jnp.zeros_like(env[leaf]), parts)[0]
