"""Element-wise functions of one value: how far they move, by intervals of values and of slopes.

Whatever a network computes element by element from one value x, with all else golden, is a curve
f(x) for each element. Over an interval of x, interval arithmetic on its equations gives an
interval of f(x) and one of its slopes (f(x) - f(y)) / (x - y), for any two points: forward
derivatives in interval arithmetic (Moore, 1966; Rall, 1981), by difference quotients, so that a
kink takes the hull of its slopes (Neumaier, 1990). Then |f(x + d) - f(x)| <= L |d| with L the
steepest of the slopes, for every activation made of the equations known here.

Ends of intervals are computed in floats and moved outwards by `WIDER` (64 epsilons, and the least
normal number, for what underflows). A NaN at an end makes the interval the whole line: what
overflows or is not defined on all of the interval is unbounded, never too small.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jfi.networks.convolution import EXACT
from jfi.networks.program import bind

WIDER = 64  # epsilons that an end is moved by: more than any function here is off


class Interval(NamedTuple):
    """All numbers from `low` to `high`, by element."""

    low: Any
    high: Any


class Curve(NamedTuple):
    """A function over the interval of its variable: its values, and slopes of any two points."""

    value: Interval
    slope: Interval


class Truth(NamedTuple):
    """A comparison over the interval of a variable.

    `value` is what it is where `fixed`. Elsewhere it may change at its kinks, one function each:
    `(cases) -> bool`, whether these atoms are equal there, or the kink is out of reach. None: it
    is not known where it changes.
    """

    value: Any
    fixed: Any
    kinks: tuple | None


ZERO = Interval(0.0, 0.0)
ONE = Interval(1.0, 1.0)


# --- Intervals.


def _hull(*ends) -> Interval:
    """The least interval with all `ends`; the whole line where one is NaN."""
    lost = reduce(jnp.logical_or, map(jnp.isnan, ends))
    low, high = reduce(jnp.minimum, ends), reduce(jnp.maximum, ends)
    return Interval(jnp.where(lost, -jnp.inf, low), jnp.where(lost, jnp.inf, high))


def _wider(low, high) -> Interval:
    """What holds the true ends of an interval whose ends were rounded, or underflowed."""
    kind = jnp.finfo(jnp.result_type(low, high))
    share, least = WIDER * kind.eps, kind.tiny
    low, high = low - share * jnp.abs(low) - least, high + share * jnp.abs(high) + least
    lost = jnp.isnan(low) | jnp.isnan(high)
    return Interval(jnp.where(lost, -jnp.inf, low), jnp.where(lost, jnp.inf, high))


def _join(a: Interval, b: Interval) -> Interval:
    return _hull(a.low, a.high, b.low, b.high)


def _pick(condition, a: Interval, b: Interval) -> Interval:
    return Interval(*(jnp.where(condition, x, y) for x, y in zip(a, b, strict=True)))


def _minus(a: Interval) -> Interval:
    return ZERO if a is ZERO else Interval(-a.high, -a.low)


def _plus(a: Interval, b: Interval) -> Interval:
    if a is ZERO or b is ZERO:
        return b if a is ZERO else a
    return _wider(a.low + b.low, a.high + b.high)


def _times(a: Interval, b: Interval) -> Interval:
    if a is ZERO or b is ZERO:
        return ZERO
    return _wider(*_hull(a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high))


def _over(a: Interval, b: Interval) -> Interval:
    if a is ZERO:
        return ZERO
    found = _hull(a.low / b.low, a.low / b.high, a.high / b.low, a.high / b.high)
    whole = Interval(-jnp.inf, jnp.inf)
    return _pick((b.low > 0) | (b.high < 0), _wider(*found), whole)


def _power(a: Interval, y: int) -> Interval:
    """Monotone on each side of 0, where it is 0 for y > 0 and not defined for y < 0."""
    if y == 0:
        return ONE
    across = (a.low <= 0) & (a.high >= 0)
    found = _hull(a.low**y, a.high**y)
    middle = _hull(*found, jnp.zeros_like(a.low)) if y > 0 else Interval(-jnp.inf, jnp.inf)
    return _wider(*_pick(across, middle, found))


# --- Curves, one rule a primitive: (eqn, curves of the operands) -> curve of the output.


def variable(golden, radius) -> Curve:
    """x itself, no further than `radius` from its golden value."""
    return Curve(_wider(golden - radius, golden + radius), ONE)


def constant(golden) -> Curve | Truth:
    """What does not move."""
    if not jnp.issubdtype(jnp.result_type(golden), jnp.floating):
        return Truth(golden, True, ())
    return Curve(_hull(golden), ZERO)


def steepest(curve: Curve) -> Any:
    """L: the curve moves by at most L times as much as its variable."""
    return jnp.maximum(jnp.abs(curve.slope.low), jnp.abs(curve.slope.high))


def _identity(eqn, f):
    return f


def _neg(eqn, f):
    return Curve(_minus(f.value), _minus(f.slope))


def _add(eqn, f, g):
    return Curve(_plus(f.value, g.value), _plus(f.slope, g.slope))


def _sub(eqn, f, g):
    return _add(eqn, f, _neg(eqn, g))


def _mul(eqn, f, g):
    """f(x) g(x) - f(y) g(y) = (f(x) - f(y)) g(x) + f(y) (g(x) - g(y))."""
    slope = _plus(_times(f.slope, g.value), _times(f.value, g.slope))
    return Curve(_times(f.value, g.value), slope)


def _div(eqn, f, g):
    """f(x) / g(x) - f(y) / g(y) = (f(x) - f(y) - (f/g)(y) (g(x) - g(y))) / g(x)."""
    value = _over(f.value, g.value)
    return Curve(value, _over(_plus(f.slope, _minus(_times(value, g.slope))), g.value))


def _abs(eqn, f):
    return _max(eqn, f, _neg(eqn, f))


def _max(eqn, f, g):
    """The slopes of the larger, of both where either may be."""
    (a, s), (b, t) = f, g
    slope = _pick(a.low > b.high, s, _pick(b.low > a.high, t, _join(s, t)))
    return Curve(Interval(jnp.maximum(a.low, b.low), jnp.maximum(a.high, b.high)), slope)


def _min(eqn, f, g):
    return _neg(eqn, _max(eqn, _neg(eqn, f), _neg(eqn, g)))


def _clamp(eqn, low, f, high):
    return _min(eqn, _max(eqn, f, low), high)


def _pow(eqn, f):
    y = eqn.params.get("y", 2)  # `square` has no y
    rise = _times(Interval(float(y), float(y)), _power(f.value, y - 1))
    return Curve(_power(f.value, y), _times(rise, f.slope))


def _monotone(slope: Callable[[Interval], tuple[Any, Any]]):
    """A monotone function; `slope` gives two slopes that all those over an interval lie between.

    Both must be NaN or infinite where the function is not defined on all of the interval.
    """

    def rule(eqn, f):
        ends = [bind(eqn, [end])[0] for end in f.value]
        rise = _wider(*_hull(*slope(f.value)))
        return Curve(_wider(*_hull(*ends)), _times(rise, f.slope))

    return rule


def _falling(slope: Callable[[Any], Any]):
    """A slope that is a function of |x| and falls with it, taken nearest to 0 and farthest."""

    def between(x: Interval):
        nearest = jnp.maximum(jnp.maximum(x.low, -x.high), 0.0)
        return slope(jnp.maximum(-x.low, x.high)), slope(nearest)

    return between


def _logistic_slope(x):
    """s(x) (1 - s(x)) of x >= 0, taken at -x: 1 - s(x) is 0 in float32 beyond 17.4."""
    low = jax.nn.sigmoid(-x)
    return low * (1 - low)


def _erf_slope(x):
    return 2 / math.sqrt(math.pi) * jnp.exp(-(x**2))


def _positive(slope: Callable[[Any], Any], zero: float = 0.0):
    """A monotone function of x - zero, for x > zero: unbounded where x may be less."""

    def between(x: Interval):
        inside = x.low > zero
        return tuple(jnp.where(inside, slope(end - zero), jnp.nan) for end in x)

    return between


# --- Comparisons, and what they choose.


def _compare(eqn, f, g):
    """As at one end of the intervals, wherever they lie apart."""
    low, high = jnp.broadcast_arrays(f.value.low, g.value.low), (f.value.high, g.value.high)
    fixed = (low[0] > high[1]) | (high[0] < low[1])
    if eqn.invars[0] is eqn.invars[1]:  # so is `isnan` written
        fixed = jnp.isfinite(low[0]) & jnp.isfinite(f.value.high)
    return Truth(bind(eqn, low)[0], fixed, None)


def _logic(eqn, *operands):
    known = all(truth.kinks is not None for truth in operands)
    return Truth(
        bind(eqn, [truth.value for truth in operands])[0],
        reduce(jnp.logical_and, [truth.fixed for truth in operands]),
        sum((truth.kinks for truth in operands), ()) if known else None,
    )


def _select(eqn, truth, *cases):
    """The chosen case; either, where the choice may change, if they meet wherever it does.

    A continuous function that is one of two everywhere has the slopes of both.
    """
    aval = eqn.outvars[0].aval

    def chosen(*ends):
        full = [jnp.broadcast_to(jnp.asarray(end, aval.dtype), aval.shape) for end in ends]
        return bind(eqn, [truth.value, *full])[0]

    def choose(intervals):
        return Interval(*map(chosen, *intervals))

    values, slopes = [case.value for case in cases], [case.slope for case in cases]
    if truth.fixed is True:
        return Curve(choose(values), choose(slopes))
    joined = False
    if truth.kinks is not None:
        joined = reduce(jnp.logical_and, [meet(eqn.invars[1:]) for meet in truth.kinks])
    steep = _pick(joined, _join(*slopes), Interval(-jnp.inf, jnp.inf))
    return Curve(
        _pick(truth.fixed, choose(values), _join(*values)),
        _pick(truth.fixed, choose(slopes), steep),
    )


def _exp_slope(x: Interval):
    return jnp.exp(x.low), jnp.exp(x.high)


COMPARISONS = frozenset("gt ge lt le eq ne".split())
LOGIC = frozenset("and or not xor".split())
# By primitive, and where it is sound. All hold for float32 and float64 (`fits`), for operands that
# move or not, at ties, and are the whole line where an operand is, or an end is NaN.
RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys("copy name stop_gradient".split(), _identity),  # everywhere
    "neg": _neg,  # everywhere
    **dict.fromkeys(("add", "add_any"), _add),  # everywhere
    "sub": _sub,  # everywhere
    "mul": _mul,  # everywhere; 0 times infinity is the whole line
    "div": _div,  # whole line where the divisor may be 0
    "abs": _abs,  # everywhere; both slopes where x may be 0
    "max": _max,  # everywhere; both slopes where the operands may be equal
    "min": _min,  # the same
    "clamp": _clamp,  # low <= high; the limits may move too
    **dict.fromkeys(("square", "integer_pow"), _pow),  # y < 0: whole line where x may be 0
    **dict.fromkeys(("exp", "expm1"), _monotone(_exp_slope)),  # whole line where it overflows
    "exp2": _monotone(lambda x: tuple(math.log(2) * jnp.exp2(end) for end in x)),  # the same
    "log": _monotone(_positive(lambda x: 1 / x)),  # whole line where x may be 0 or less
    "log1p": _monotone(_positive(lambda x: 1 / x, zero=-1.0)),  # ... -1 or less
    "sqrt": _monotone(_positive(lambda x: 0.5 * lax.rsqrt(x))),  # ... 0 or less
    "rsqrt": _monotone(_positive(lambda x: -0.5 * lax.rsqrt(x) / x)),  # ... 0 or less
    # Everywhere: slopes are even in x and fall with |x|. What underflows is within `_wider`.
    "tanh": _monotone(_falling(lambda x: 4 * _logistic_slope(2 * x))),
    "logistic": _monotone(_falling(_logistic_slope)),
    "erf": _monotone(_falling(_erf_slope)),
    "erfc": _monotone(_falling(lambda x: -_erf_slope(x))),
    # Fixed where the intervals lie apart; x == x also where x is finite.
    **dict.fromkeys(COMPARISONS, _compare),
    **dict.fromkeys(LOGIC, _logic),  # of comparisons; fixed where all of them are
    # A choice that moves is between two cases, which must meet wherever it may change.
    "select_n": _select,
}


def fits(eqn, own: Sequence[Any]) -> bool:
    """Whether there is a rule here for an equation whose operands `own` move.

    Rules are of float32 and float64, element by element. Comparisons are of such, logic and
    choices of two are by comparisons.
    """
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    truths = own if name in LOGIC else eqn.invars[:1] if name == "select_n" else ()

    def is_fit(atom):
        kinds = (jnp.bool_,) if any(atom is truth for truth in truths) else EXACT
        return atom.aval.shape == out.shape and atom.aval.dtype in kinds

    makes_truth = name in COMPARISONS or name in LOGIC
    return name in RULES and all(map(is_fit, own)) and (makes_truth or out.dtype in EXACT)
