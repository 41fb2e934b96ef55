"""Compiling: what the options may not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jfi.hardware.compiling import jit

REDUCTIONS = {
    "max": lambda x: x.max(axis=1),
    "sum": lambda x: x.sum(axis=1),
    "relu_mean": lambda x: jax.nn.relu(x).mean(axis=1),
    "relu_max": lambda x: jax.nn.relu(x).max(axis=1),
    "variance": lambda x: x.var(axis=1),
    "window": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID"),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("shape", [(4, 8), (64, 64), (32, 1024)])
def test_a_nan_survives_a_reduction(name, shape):
    """XLA's library for CPUs loses it in maxima, from 4,096 elements on, where it may reduce."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x[1, 3] = np.nan
    assert np.isnan(np.asarray(jit(REDUCTIONS[name])(x))[1]).any()
