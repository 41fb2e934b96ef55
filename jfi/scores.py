"""A cheap guess at which faults are critical, from one backward pass a batch of images.

To first order a change dw of a word moves the margin of an image, the largest logit less the
second, by dw times the margin's gradient; the fault is critical where that is all of the margin.
The largest |gradient| / margin over the images is a word's sensitivity: times |dw| it is near 1
where criticality begins. `strata.by_score` makes strata of it. Large changes are not of first
order, so the guess is often wrong: that costs injections, not validity.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfi.errors import InputError
from jfi.faults import Site
from jfi.sites import Network

MEMORY = 1 << 26  # gradients held at a time


def sensitivity(network: Network, images: np.ndarray, sites: Sequence[Site]) -> list[np.ndarray]:
    """The sensitivity float32 [words] of each site, in C order.

    Ones for sites of integers and for run-time values.

    Args:
        images: [B, ...], preprocessed as the network takes them.

    Raises:
        InputError: no images.
    """
    if not len(images):
        raise InputError("no images to take gradients on: give at least one")
    known = (s for s in sites if s.name in network.positions)
    chosen = [s for s in known if jnp.issubdtype(s.dtype, jnp.floating)]
    positions = [network.positions[site.name] for site in chosen]
    found = [jnp.zeros(site.shape, jnp.float32) for site in chosen]
    step = _step(network, positions)
    batch = max(1, min(len(images), MEMORY // max(sum(s.words for s in chosen), 1)))
    for start in range(0, len(images), batch):
        found = step(found, images[start : start + batch])
    by_name = {s.name: np.asarray(x).ravel() for s, x in zip(chosen, found, strict=True)}
    return [by_name.get(site.name, np.ones(site.words, np.float32)) for site in sites]


def margin(network: Network, positions: Sequence[int]):
    """`(values, image) -> margin` with the leaves at `positions` set to `values`."""
    structure = jax.tree.structure(network.params)

    def of(values, image):
        leaves = list(network.leaves)
        for position, value in zip(positions, values, strict=True):
            leaves[position] = value
        logits = network.apply(jax.tree.unflatten(structure, leaves), image[None])[0]
        first, second = lax.top_k(logits.astype(jnp.float32), 2)[0]
        return first - second

    return of


def _step(network: Network, positions: Sequence[int]):
    """`(sensitivities, images) -> sensitivities`, the larger of both."""
    gradient = jax.value_and_grad(margin(network, positions))

    def relative(values, image):
        size, gradients = gradient(values, image)
        smallest = jnp.finfo(jnp.float32).tiny
        return [jnp.abs(g.astype(jnp.float32)) / jnp.maximum(size, smallest) for g in gradients]

    @jax.jit
    def step(found, images):
        values = [jnp.asarray(network.leaves[position]) for position in positions]
        now = jax.vmap(relative, (None, 0))(values, images)
        return [jnp.maximum(x, y.max(axis=0)) for x, y in zip(found, now, strict=True)]

    return step
