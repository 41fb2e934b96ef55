"""Spikes, and the surrogate gradients that training puts in place of their derivative.

A spike is a step of the potential: its derivative is zero or infinite. Training goes down the
slope of a smooth function instead (Neftci, Mostafa, Zenke, IEEE Signal Processing Magazine 36(6),
2019); what is computed forward stays the step. Slopes are those of snnTorch 1.x:

    atan          (k / 2) / (1 + (pi k x / 2)^2)   Fang et al., ICCV 2021; usual k = 2
    fast_sigmoid  1 / (1 + k |x|)^2                Zenke and Ganguli, Neural Computation 2018; 25
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nets.net import NetError


class Surrogate(NamedTuple):
    """A smooth stand-in for the step: one of SLOPES, and how steep it is at the threshold."""

    shape: str = "atan"
    steepness: float = 2.0

    def slope(self, x: jax.Array) -> jax.Array:
        """Its derivative at `x`, the potential less the threshold."""
        return SLOPES[self.shape](self.steepness, x)


SLOPES = {
    "atan": lambda k, x: k / 2 / (1 + jnp.square(jnp.pi / 2 * k * x)),
    "fast_sigmoid": lambda k, x: 1 / jnp.square(1 + k * jnp.abs(x)),
}
USUAL = {"atan": Surrogate("atan", 2.0), "fast_sigmoid": Surrogate("fast_sigmoid", 25.0)}


def named(shape: str) -> Surrogate:
    """The surrogate of that shape, as steep as is usual. Raises NetError for an unknown one."""
    if shape not in USUAL:
        raise NetError(f"surrogate {shape!r} is unknown; known are {', '.join(USUAL)}")
    return USUAL[shape]


def step(potential: jax.Array, threshold: jax.Array) -> jax.Array:
    """1 where the potential is above the threshold, else 0 (also where either is NaN)."""
    return (potential > threshold).astype(potential.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def trainable_step(surrogate: Surrogate, potential, threshold) -> jax.Array:
    """`step` with the slope of `surrogate` as its derivative."""
    return step(potential, threshold)


@trainable_step.defjvp
def _(surrogate, primals, tangents):
    potential, threshold = primals
    rise, lift = tangents
    return step(potential, threshold), surrogate.slope(potential - threshold) * (rise - lift)
