"""The softmax, log_softmax or sigmoid that a network itself ends in, found in its equations.

The answer is the same before and after it, and before it is where margins are to be measured: what
a criterion takes for scores. Only a softmax over the last axis that takes off the maximum first is
known: no finite score overflows in it.
"""

from collections.abc import Iterator
from typing import Any

from jax.extend import core

from jfi.networks.program import Program

# What changes neither the order of elements nor their values.
_SAME = frozenset("reshape squeeze broadcast_in_dim copy stop_gradient".split())


def find(program: Program, classes: int) -> tuple[str, Any]:
    """The link, and the variable of the scores before it; empty, and the output, where none is.

    Args:
      classes: of the last axis of the output, before it was laid out as a row.
    """
    made = {out: eqn for eqn in program.eqns for out in eqn.outvars}
    last = _origin(program.out, made)
    eqn = made.get(last)
    name = "" if eqn is None else eqn.primitive.name
    scores = None
    if name == "logistic":
        return _fitting("sigmoid", eqn.invars[0], program)
    if name == "div":
        scores = _softmax(eqn, made)
        link = "softmax"
    elif name == "sub":
        scores = _log_softmax(eqn, made)
        link = "log_softmax"
    if scores is None or scores.aval.shape[-1] != classes:
        return "", program.out
    return _fitting(link, scores, program)


def _fitting(link: str, scores: Any, program: Program) -> tuple[str, Any]:
    """The link, where scores are as many as outputs, and of their type."""
    same = scores.aval.size == program.out.aval.size and scores.aval.dtype == program.out.aval.dtype
    return (link, scores) if same else ("", program.out)


def _origin(atom: Any, made: dict[Any, Any]) -> Any:
    """The value that an atom is, before what changes no element of it."""
    while not isinstance(atom, core.Literal) and (eqn := made.get(atom)) is not None:
        source = eqn.invars[0] if eqn.invars else None
        known = eqn.primitive.name in _SAME and not isinstance(source, core.Literal)
        if not known or source.aval.size != atom.aval.size:
            break
        atom = source
    return atom


def _spread(atom: Any, made: dict[Any, Any]) -> Any:
    """The equation that an atom is of, before it was given for all elements of an axis."""
    while not isinstance(atom, core.Literal) and (eqn := made.get(atom)) is not None:
        if eqn.primitive.name not in _SAME:
            return eqn
        atom = eqn.invars[0]
    return None


def _is(eqn: Any, name: str) -> bool:
    return eqn is not None and eqn.primitive.name == name


def _over_last(eqn: Any) -> bool:
    """Whether a reduction is over the last axis alone."""
    return tuple(eqn.params["axes"]) == (len(eqn.invars[0].aval.shape) - 1,)


def _softmax(eqn: Any, made: dict[Any, Any]) -> Any:
    """x of exp(x - max) / sum(exp(x - max)); None where it is another quotient."""
    above, below = _origin(eqn.invars[0], made), _spread(eqn.invars[1], made)
    exps = made.get(above)
    if not (_is(exps, "exp") and _is(below, "reduce_sum") and _over_last(below)):
        return None
    if _origin(below.invars[0], made) is not above or exps.outvars[0].aval != eqn.outvars[0].aval:
        return None
    return _shifted(exps.invars[0], made)


def _log_softmax(eqn: Any, made: dict[Any, Any]) -> Any:
    """x of (x - max) - log(sum(exp(x - max))); None where it is another difference."""
    left, right = eqn.invars[0], _spread(eqn.invars[1], made)
    total = _spread(right.invars[0], made) if _is(right, "log") else None
    if not (_is(total, "reduce_sum") and _over_last(total)):
        return None
    exps = made.get(_origin(total.invars[0], made))
    if not _is(exps, "exp") or _origin(exps.invars[0], made) is not _origin(left, made):
        return None
    return _shifted(left, made)


def _shifted(atom: Any, made: dict[Any, Any]) -> Any:
    """x of x - max(x), the maximum over the last axis; None where it is another value."""
    eqn = made.get(_origin(atom, made))
    if not _is(eqn, "sub"):
        return None
    source = _origin(eqn.invars[0], made)
    if any(found is source for found in _maxima(eqn.invars[1], made)):
        return eqn.invars[0]
    return None


def _maxima(atom: Any, made: dict[Any, Any]) -> Iterator[Any]:
    """What an atom is the maximum of, over the last axis, beside constants."""
    eqn = _spread(atom, made)
    if _is(eqn, "max"):
        for operand in eqn.invars:
            yield from _maxima(operand, made)
    elif _is(eqn, "reduce_max") and _over_last(eqn):
        yield _origin(eqn.invars[0], made)
