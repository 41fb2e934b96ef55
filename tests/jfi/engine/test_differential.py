"""Random networks judged by a naive run (`differential`): a few, for an hour, and with faults."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import differential
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfi import bits
from jfi.engine import certify, curves, golden, patch, rounding
from jfi.networks.program import PRODUCTS

FEW = 6  # networks of a usual run, on one and on two devices in turn
TRIED = 60  # networks on which a fault must be found


def run(*arguments):
    """The script, in a process of its own: the number of devices is fixed when JAX starts."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    script = Path(differential.__file__)
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True, text=True, env=env, cwd=script.parents[2], check=False,
    )  # fmt: skip


def test_every_measure_is_right_on_a_few_random_networks():
    found = run("--programs", FEW)
    assert found.returncode == 0, found.stdout + found.stderr
    counts = found.stdout.split()
    assert int(counts[0]) == FEW and counts[-2:] == ["0", "wrong"], found.stdout


@pytest.mark.slow
def test_every_measure_is_right_for_an_hour_of_random_networks():
    """Minutes and the first seed may be given: MINUTES=600 SEED=10000."""
    found = run(
        "--minutes", os.environ.get("MINUTES", 60), "--seed", os.environ.get("SEED", 1000)
    )  # fmt: skip
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr


def certify_low(bits_of, patched):
    """Floats of so many bits are certified, by an allowance that knows the logits' type alone."""

    def is_exact(atom, right=certify._is_exact):
        dtype = atom.aval.dtype
        return right(atom) or (
            jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits == bits_of
        )

    patched.setattr(certify, "_is_exact", is_exact)
    patched.setattr(rounding, "SAFETY", 0)


def integers_too(atom, right=certify._is_exact):
    return jnp.issubdtype(atom.aval.dtype, jnp.integer) or right(atom)


def set_to(owner, name, value, patched):
    patched.setattr(owner, name, value)


def equal_numbers(a, b):
    return a != b


def first_image_alone(a, b, least=0.0, right=golden.close):
    found = right(a, b, least)
    return found | (np.arange(len(found)) > 0) if a.shape == b.shape else found


def once_an_equation(program, leaf):
    """The product that uses a leaf, however often."""
    source = program.leaves[leaf]
    uses = [eqn for eqn in program.eqns if source in eqn.invars]
    if len(uses) != 1 or uses[0].primitive.name not in PRODUCTS:
        return None
    return uses[0] if certify.bounded(certify.section(program, uses[0].outvars[0])) else None


def slope_at_plus_x(patched):
    def slope(x):
        return jax.nn.sigmoid(x) * (1 - jax.nn.sigmoid(x))

    patched.setitem(curves.RULES, "logistic", curves._monotone(curves._falling(slope)))


IN_FEW_BITS = ("layers_in_few_bits", "to_another_float")
# By mend: what puts the fault back, and steps where it shows.
MENDS = {
    "a conversion to integers is a step": (
        partial(set_to, certify, "_is_exact", integers_too), ("to_integers",),
    ),
    "float8 is not certified": (
        partial(certify_low, 8), ("dense_in_few_bits", "dense_in_few_bits"),
    ),
    "sums that are rounded are not updated": (
        partial(set_to, patch, "is_rounded", lambda atom: False), IN_FEW_BITS,
    ),
    "a leaf used twice in a product has no radii": (
        partial(set_to, certify, "product", once_an_equation), ("leaf_twice_in_a_product",),
    ),
    "the slope of a sigmoid does not vanish": (slope_at_plus_x, ("far_out",)),
    "-0 is not 0": (partial(set_to, bits, "differs", equal_numbers), ("sign_of_a_leaf",)),
    "every image is run alone": (
        partial(set_to, golden, "close", first_image_alone), ("mixed",),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mend", MENDS)
def test_a_fault_that_was_mended_would_be_found(mend, monkeypatch):
    put_back, focus = MENDS[mend]
    put_back(monkeypatch)
    tried = 0
    while tried < TRIED and not differential.search([tried], focus=focus).wrong:
        tried += 1
    assert tried < TRIED
    print(f"{mend}: found on network {tried + 1} when taken out")
