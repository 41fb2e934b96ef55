"""Loops over time (`lax.scan`): run again with a fault in them, for one neuron alone if they can.

The neurons of a spiking layer do not see each other: apart from recurrent connections, the body
of their loop is element-wise. A fault in one of them then changes the values of that one neuron
only, at every step, and the loop is run again for it alone: on blocks of size 1 on the axes that
the fault fixes. `lanes` finds those blocks; where a body mixes neurons it finds none, and the
loop is run again whole.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jfi.networks import program
from jfi.networks.program import bind

At = tuple[Any, ...]  # per axis, the index of a block or None where it spans the axis

ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp "
    "convert_element_type copy cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt "
    "integer_pow is_finite le log log1p logistic lt max min mul name ne neg nextafter not or "
    "pow reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient "
    "sub tan tanh xor".split()
)

# What is done to a named value: (name, value, step) -> value.
Change = Callable[[str, Any, Any], Any]


class Scan(NamedTuple):
    """A `scan` equation: constants, carried values and inputs over time, in this order.

    body: its flat jaxpr, closed.
    """

    body: core.ClosedJaxpr
    consts: int
    carry: int
    length: int
    reverse: bool

    @property
    def over_time(self) -> slice:
        """Which operands have a leading axis of time."""
        return slice(self.consts + self.carry, None)

    def timed(self, ats: Sequence[At | None], outputs: bool = False) -> list[At | None]:
        """Blocks of the operands, or of the outputs, from those of one step."""
        start = self.carry if outputs else self.over_time.start
        later = [None if at is None else (None, *at) for at in ats[start:]]
        return [*ats[:start], *later]


def read(eqn) -> Scan | None:
    """The parts of an equation that is a `scan`; None for any other."""
    if eqn.primitive.name != "scan":
        return None
    body, p = _flat(eqn.params["jaxpr"]), eqn.params
    # By shapes, as versions of JAX name the numbers otherwise: over time there is one axis more.
    timed = sum(map(_is_longer, eqn.invars, body.jaxpr.invars))
    carry = len(eqn.outvars) - sum(map(_is_longer, eqn.outvars, body.jaxpr.outvars))
    return Scan(body, len(eqn.invars) - carry - timed, carry, p["length"], p["reverse"])


def _is_longer(outside, inside) -> bool:
    return len(outside.aval.shape) > len(inside.aval.shape)


@lru_cache(maxsize=64)
def _flat(body: core.ClosedJaxpr) -> core.ClosedJaxpr:
    return program.flatten(body)


def names(scan: Scan) -> list[tuple[str, Any]]:
    """Name, and shape and dtype, of the values named in the body, in order; one step each."""
    return [
        (eqn.params["name"], eqn.outvars[0].aval)
        for eqn in scan.body.jaxpr.eqns
        if eqn.primitive.name == "name"
    ]


def lanes(scan: Scan, given: Sequence[At | None], named: dict[str, At]) -> dict[Any, At] | None:
    """The block of each value of the body that a fault can change; None where neurons mix.

    Args:
      given: for each operand, the block it changes in, None where it does not.
      named: blocks of named values that are changed in the body.
    """
    found = _Lanes(scan)
    for var, at in zip(scan.body.jaxpr.invars, _steps(scan, given), strict=True):
        found.put(var, at)
    for eqn in scan.body.jaxpr.eqns:
        if eqn.primitive.name == "name" and eqn.params["name"] in named:
            found.put(eqn.outvars[0], named[eqn.params["name"]])
    timed = [at for at in given[scan.over_time] if at is not None]
    spread = any(at[0] is not None for at in timed)
    # A value of one word has no block smaller than itself.
    spread |= any(all(i is None for i in at) for at in named.values())
    return None if spread else found.settle()


def _steps(scan: Scan, given: Sequence[At | None]) -> list[At | None]:
    """Blocks of one step, from those of the operands."""
    one = list(given)
    one[scan.over_time] = [at if at is None else at[1:] for at in given[scan.over_time]]
    return one


class _Lanes:
    """Blocks by value, made to agree along every equation until nothing changes."""

    def __init__(self, scan: Scan):
        self.scan, self.at, self.mixed, self.grown = scan, {}, False, False

    def put(self, var, at: At | None) -> None:
        """Note the block of a value; one that spans all of it is none."""
        if at is None or isinstance(var, core.Literal):
            return
        at = tuple(None if d == 1 else i for i, d in zip(at, var.aval.shape, strict=True))
        if all(index is None for index in at):
            self.mixed |= var in self.at
            return
        known = self.at.setdefault(var, at)
        # Tracers are compared by identity: the same fault index stays the same object.
        self.mixed |= any(i is not j for i, j in zip(known, at, strict=True))
        self.grown |= known is at

    def get(self, var) -> At | None:
        """The block of a value, None if it has none."""
        return None if isinstance(var, core.Literal) else self.at.get(var)

    def settle(self) -> dict[Any, At] | None:
        """Blocks of all values, or None where one does not fit."""
        scan, jaxpr = self.scan, self.scan.body.jaxpr
        carried = jaxpr.invars[scan.consts : scan.consts + scan.carry]
        self.grown = True
        while self.grown and not self.mixed:
            self.grown = False
            for eqn in jaxpr.eqns:
                self._along(eqn)
            for a, b in zip(carried, jaxpr.outvars, strict=False):
                self.put(a, self.get(b))
                self.put(b, self.get(a))
        # What a block is carried on as must be one too; a constant of the body can't be cut.
        fits = all(
            (self.get(a) is None) == (self.get(b) is None)
            for a, b in zip(carried, jaxpr.outvars, strict=False)
        )
        cut = any(self.get(var) is not None for var in jaxpr.constvars)
        return None if self.mixed or cut or not fits else self.at

    def _along(self, eqn) -> None:
        atoms = [*eqn.invars, *eqn.outvars]
        if all(self.get(atom) is None for atom in atoms):
            return
        if eqn.primitive.name in ELEMENTWISE:
            wide = [atom for atom in atoms if atom.aval.shape]
            at = next(self.get(atom) for atom in wide if self.get(atom) is not None)
            for atom in wide:
                self.put(atom, at)
        elif eqn.primitive.name == "broadcast_in_dim":
            self._along_broadcast(eqn)
        else:
            self.mixed = True

    def _along_broadcast(self, eqn) -> None:
        (source, *_), (out,) = eqn.invars, eqn.outvars
        dims, at, below = eqn.params["broadcast_dimensions"], self.get(out), self.get(source)
        if at is not None and not isinstance(source, core.Literal):
            same = (source.aval.shape[axis] == out.aval.shape[dim] for axis, dim in enumerate(dims))
            self.put(source, tuple(at[d] if s else None for d, s in zip(dims, same, strict=True)))
        elif below is not None:
            up: list[Any] = [None] * len(out.aval.shape)
            for dim, index in zip(dims, below, strict=True):
                up[dim] = index
            self.put(out, tuple(up))


def _bind(eqn, values, now):
    return bind(eqn, values)


def run(
    scan: Scan, operands: Sequence[Any], blocks: dict[Any, At], change: Change, evaluate=_bind
) -> list[Any]:
    """The outputs of the loop on operands cut to their blocks, with named values changed.

    Args:
      change: its steps count the values of a name, of which the body may make several.
      evaluate: `(eqn, values, step) -> outputs` of an equation of the body.
    """
    jaxpr, times = scan.body.jaxpr, Counter(name for name, _ in names(scan))

    def step(carry, now_and_inputs):
        now, inputs = now_and_inputs
        seen: Counter[str] = Counter()
        env = dict(zip(jaxpr.constvars, scan.body.consts, strict=True))
        env.update(zip(jaxpr.invars, [*consts, *carry, *inputs], strict=True))

        def value(atom):
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            values = [value(atom) for atom in eqn.invars]
            sizes = _sizes(eqn, blocks)
            if sizes is None:
                outs = evaluate(eqn, values, now)
            else:
                outs = [_broadcast(eqn, values[0], sizes)]
            if eqn.primitive.name == "name":
                name = eqn.params["name"]
                outs = [change(name, outs[0], now * times[name] + seen[name])]
                seen[name] += 1
            env.update(zip(eqn.outvars, outs, strict=True))
        outs = [value(atom) for atom in jaxpr.outvars]
        return outs[: scan.carry], outs[scan.carry :]

    consts = operands[: scan.consts]
    start = list(operands[scan.consts : scan.consts + scan.carry])
    inputs = jnp.arange(scan.length, dtype=jnp.int32), list(operands[scan.over_time])
    carry, over_time = lax.scan(step, start, inputs, length=scan.length, reverse=scan.reverse)
    return [*carry, *over_time]


def _sizes(eqn, blocks: dict[Any, At]) -> list[int] | None:
    """What a broadcast makes of a block; None of any other equation."""
    at = blocks.get(eqn.outvars[0])
    if at is None or eqn.primitive.name != "broadcast_in_dim":
        return None
    return [1 if i is not None else d for i, d in zip(at, eqn.params["shape"], strict=True)]


def _broadcast(eqn, value, sizes: Sequence[int]):
    return lax.broadcast_in_dim(value, sizes, eqn.params["broadcast_dimensions"])


def uses(scan: Scan, operand: int) -> list[Any]:
    """The equations of the body that use an operand."""
    var = scan.body.jaxpr.invars[operand]
    return [eqn for eqn in scan.body.jaxpr.eqns if any(atom is var for atom in eqn.invars)]


def only_multiplied(scan: Scan, operand: int) -> bool:
    """Whether the body takes products of an operand with other values, and nothing else."""
    jaxpr = scan.body.jaxpr
    var = jaxpr.invars[operand]
    products = all(
        eqn.primitive.name == "dot_general" and list(eqn.invars).count(var) == 1
        for eqn in uses(scan, operand)
    )
    return products and var not in jaxpr.outvars
