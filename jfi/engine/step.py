"""One equation of the part that a fault changes: by a rule, as a loop run again, or whole.

Beside the rules of `jfi.engine.patch`: a loop over time is run again for the faulted neuron alone
where its neurons do not mix (`jfi.networks.scans`); a fault in a run-time value
(`jfi.networks.taps`) breaks it as it is computed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jfi.engine import patch
from jfi.engine.patch import Golden, Patch
from jfi.networks import scans
from jfi.networks.program import PRODUCTS, bind
from jfi.networks.taps import Injection, steps


def step(
    golden: Golden,
    eqn,
    values: Sequence[Patch | Any | None],
    evaluate=bind,
    fault: Injection | None = None,
    now: patch.Index = 0,
) -> list[Patch | Any | None]:
    """The faulty outputs of one equation, as small as a rule allows; None for one that is golden.

    Args:
      values: per operand, None where it is golden, else its Patch or full faulty value.
      evaluate: `(eqn, values) -> outputs`, where no rule applies.
      fault: in a run-time value, at step `now` of it.
    """
    rule = patch.RULES.get(eqn.primitive.name)
    local = any(isinstance(value, Patch) for value in values)
    faulted = fault is not None and steps(eqn, fault.name) > 0
    scan = scans.read(eqn)
    if scan and (local or faulted):
        found = _alone(golden, eqn, scan, values, fault if faulted else None, now)
        if found is not None:
            return found
    if faulted and not scan:
        return [_broken(golden, eqn, values[0], fault, now)]
    out = rule(golden, eqn, values) if rule and local else None
    if out is not None:
        return [patch.simplify(eqn.outvars[0], out)]
    out = _used_again(golden, eqn, values, evaluate)
    if out is not None:
        return [out]
    words = _words(scan, values) if scan else {}
    full = [
        golden.whole(atom) if value is None or k in words else patch.whole(golden, atom, value)
        for k, (atom, value) in enumerate(zip(eqn.invars, values, strict=True))
    ]
    if scan and (faulted or words):
        change = _change_whole(fault, now) if faulted else _unchanged
        return scans.run(scan, full, {}, change, _products_with(scan, words, evaluate))
    return evaluate(eqn, full)


def _used_again(golden: Golden, eqn, values, evaluate) -> Any:
    """A product of a faulty word with what has changed already; None of anything else.

    A weight that is used many times, as by the steps of a recurrent network, need not be written
    out: the product by the golden weight, one for all faults, and the update by that word.
    """
    if eqn.primitive.name not in PRODUCTS or any(v is None for v in values) or not _is_product(eqn):
        return None
    words = [isinstance(value, Patch) and value.value.size == 1 for value in values]
    if sum(words) != 1:
        return None
    word = words.index(True)
    other = patch.whole(golden, eqn.invars[1 - word], values[1 - word])
    operands = [golden.whole(eqn.invars[word])] * 2
    operands[1 - word] = other
    return _by_update(eqn, operands, evaluate(eqn, operands), word, values[word])


def _is_product(eqn) -> bool:
    """Whether both operands are values of their own, of a product that is not rounded."""
    a, b = eqn.invars
    return a is not b and not patch.is_rounded(eqn.outvars[0])


def _by_update(eqn, operands, out, side: int, word: Patch) -> Any:
    """A product whose operand `side` has a faulty word, from `out`, that by the golden one."""
    at_hand = _AtHand(dict(zip([*eqn.invars, *eqn.outvars], [*operands, *out], strict=True)))
    values: list[Any] = [None, None]
    values[side] = word
    update = patch.RULES[eqn.primitive.name](at_hand, eqn, values)
    if update is None:
        faulty = list(operands)
        faulty[side] = patch.whole(at_hand, eqn.invars[side], word)
        return bind(eqn, faulty)[0]
    return patch.whole(at_hand, eqn.outvars[0], update)


def _broken(golden: Golden, eqn, value, fault: Injection, now) -> Patch | Any:
    """A named value with the fault in it."""
    (atom,) = eqn.invars
    if value is None:
        block = golden.block(atom, fault.at)
        return patch.simplify(atom, patch.pair(fault.at, fault.broken(block, now), block))
    change = _change_whole(fault, now)
    return change(fault.name, patch.whole(golden, atom, value), 0)


def _change_whole(fault: Injection, now) -> scans.Change:
    """Breaks one word of the whole value."""

    def change(name, value, later):
        if name != fault.name:
            return value
        here = patch.inside(value.shape, fault.at)
        return jnp.where(here, fault.broken(value, now + later), value)

    return change


def _change_alone(fault: Injection | None, now, faulty) -> scans.Change:
    """Breaks the one word of the block, in the lane that is `faulty`."""

    def change(name, value, later):
        if fault is None or name != fault.name:
            return value
        return jnp.where(faulty, fault.broken(value, now + later), value)

    return change


def _alone(golden: Golden, eqn, scan: scans.Scan, values, fault, now) -> list[Any] | None:
    """A loop run again for the neuron that is faulted, and its golden twin; None if neurons mix."""
    if any(value is not None and not isinstance(value, Patch) for value in values):
        return None
    given = [None if value is None else value.at for value in values]
    blocks = scans.lanes(scan, given, {} if fault is None else {fault.name: fault.at})
    if blocks is None:
        return None
    timed = scan.timed([blocks.get(var) for var in scan.body.jaxpr.invars])
    operands = [
        value.blocks
        if value is not None
        else golden.whole(atom)
        if at is None
        else golden.block(atom, at)
        for atom, value, at in zip(eqn.invars, values, timed, strict=True)
    ]

    def run(operands, faulty):
        return scans.run(scan, operands, blocks, _change_alone(fault, now, faulty))

    axes = [None if value is None else 0 for value in values]
    outs = jax.vmap(run, (axes, 0))(operands, jnp.array([True, False]))
    at_ends = scan.timed([blocks.get(var) for var in scan.body.jaxpr.outvars], outputs=True)
    return [
        None if at is None else patch.simplify(atom, Patch(at, out))
        for atom, at, out in zip(eqn.outvars, at_ends, outs, strict=True)
    ]


def _unchanged(name, value, now):
    return value


def _words(scan: scans.Scan, values) -> dict[int, Patch]:
    """Operands of a loop of which one word is faulty, and which the body only multiplies by.

    They need not be written out: each product is the golden one, and a rank-one update; of one that
    is not constant, as of layers that are run in a loop, at the step the word is of.
    """

    def is_word(k, value):
        if not isinstance(value, Patch) or value.value.size > 1:
            return False
        if scan.consts <= k < scan.over_time.start:
            return False
        rounded = any(patch.is_rounded(eqn.outvars[0]) for eqn in scans.uses(scan, k))
        return scans.only_multiplied(scan, k) and not rounded

    return {k: value for k, value in enumerate(values) if is_word(k, value)}


def _products_with(scan: scans.Scan, words: dict[int, Patch], evaluate):
    """Evaluates equations of the body, products by faulty `words` from those by golden ones."""
    invars, later = scan.body.jaxpr.invars, scan.over_time.start
    when = {invars[k]: word.at[0] for k, word in words.items() if k >= later}
    faulty = {
        invars[k]: Patch(word.at[1:], word.blocks[:, 0]) if k >= later else word
        for k, word in words.items()
    }

    def written(at_hand, var, now):
        found = patch.whole(at_hand, var, faulty[var])
        if when.get(var) is None:
            return found
        return jnp.where(now == when[var], found, at_hand.whole(var))

    def run(eqn, values, now):
        out = evaluate(eqn, values)
        side = [k for k, a in enumerate(eqn.invars) if isinstance(a, core.Var) and a in faulty]
        if not side:
            return out
        if len(side) == 2:
            at_hand = _AtHand(dict(zip(eqn.invars, values, strict=True)))
            return bind(eqn, [written(at_hand, a, now) for a in eqn.invars])
        (word,) = side
        var = eqn.invars[word]
        found = _by_update(eqn, values, out, word, faulty[var])
        # A loop of one step has no index of it.
        return [found if when.get(var) is None else jnp.where(now == when[var], found, out[0])]

    return run


class _AtHand(NamedTuple):
    """As a `Golden`, over values that are there."""

    values: dict[Any, Any]

    def whole(self, atom):
        return self.values[atom]

    def block(self, atom, at):
        start = [jnp.int32(0) if i is None else i for i in at]
        sizes = [d if i is None else 1 for i, d in zip(at, patch.shape(atom), strict=True)]
        return lax.dynamic_slice(self.values[atom], start, sizes)

    def padded(self, atom, config, start, sizes):
        value = self.values[atom]
        filled = lax.pad(value, jnp.zeros((), value.dtype), config)
        return lax.dynamic_slice(filled, [jnp.int32(i) for i in start], sizes)
