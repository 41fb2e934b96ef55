"""A cheap guess at which faults are critical, from a few backward passes an image.

To first order a change dw of a word moves the margin of an image over another class, the largest
logit less that class's (or another constraint of the criterion), by dw times the margin's gradient;
the fault is critical where that is all of the margin. A word's sensitivity is the largest fall of a
margin over the margin, of all images and rival classes, for a word that grows by one, and for one
that falls: times |dw| it is near 1 where criticality begins. `strata.by_score` makes strata of it.
Large changes are not of first order, so the guess is often wrong: that costs injections, not
validity.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfi.criteria.criterion import Judgement
from jfi.errors import InputError
from jfi.faults import Site
from jfi.networks.program import run as run_program
from jfi.networks.program import section
from jfi.networks.sites import Network

MEMORY = 1 << 26  # gradients held at a time
RIVALS = 9  # classes whose margins are looked at, the nearest to the golden one


def sensitivity(
    network: Network, images: np.ndarray, sites: Sequence[Site], by: Judgement
) -> list[np.ndarray]:
    """The sensitivity float32 [2, words] of each site, in C order: to growth, and to fall.

    Ones for sites of integers and for run-time values.

    Args:
        images: [B, ...], preprocessed as the network takes them.
        by: what is critical, with constraints.

    Raises:
        InputError: no images.
    """
    if not len(images):
        raise InputError("no images to take gradients on: give at least one")
    known = (s for s in sites if s.name in network.positions)
    chosen = [s for s in known if jnp.issubdtype(s.dtype, jnp.floating)]
    positions = [network.positions[site.name] for site in chosen]
    found = [jnp.zeros((2, *site.shape), jnp.float32) for site in chosen]
    step = jax.jit(partial(_step, over_rivals(network, positions, _most, RIVALS, by)))
    values = [jnp.asarray(network.leaves[position]) for position in positions]
    batch = max(1, min(len(images), MEMORY // max(2 * sum(s.words for s in chosen), 1)))
    for start in range(0, len(images), batch):
        found = step(found, values, images[start : start + batch])
    by_name = {s.name: np.asarray(x).reshape(2, -1) for s, x in zip(chosen, found, strict=True)}
    return [by_name.get(site.name, np.ones((2, site.words), np.float32)) for site in sites]


def over_rivals(
    network: Network,
    positions: Sequence[int],
    fold: Callable[[Any, list[Any]], Any],
    rivals: int,
    by: Judgement,
) -> Callable[[Any, Sequence[Any], Any], Any]:
    """`(start, values, image) -> found`: ``fold`` over an image's margins to its rival classes.

    Args:
        positions: the leaves that ``values`` are of.
        fold: `(found, slopes) -> found`, where slopes are the gradients of a margin by each of the
            ``values``, over the margin.
        rivals: how many of the nearest classes: of the constraints of `by` of least slack.
    """
    end = network.program.out if by.on_outputs else network.scores
    program = section(network.program, end=end)

    def forward(image, values):
        leaves = list(network.leaves)
        for position, value in zip(positions, values, strict=True):
            leaves[position] = value
        return run_program(program, leaves, image[None])[end].ravel().astype(jnp.float32)

    def run(start, values, image):
        logits, pull = jax.vjp(partial(forward, image), list(values))
        index, weight, slack = by.constraints(logits)
        near = lax.top_k(-slack, min(rivals, slack.size))[1]

        def one(found, number):
            margin = jnp.maximum(slack[number], jnp.finfo(jnp.float32).tiny)
            (gradients,) = pull(jnp.zeros_like(logits).at[index[number]].add(weight[number]))
            return fold(found, [g.astype(jnp.float32) / margin for g in gradients]), None

        return lax.scan(one, start, near)[0]

    return run


def _most(found: list[Any], slopes: list[Any]) -> list[Any]:
    """The larger of each sensitivity."""
    both = [jnp.stack([-slope, slope]) for slope in slopes]
    return [jnp.maximum(x, y) for x, y in zip(found, both, strict=True)]


def _step(of_image, found: list[Any], values: list[Any], images) -> list[Any]:
    """The larger of the sensitivities found and those of a batch of images."""
    now = jax.vmap(of_image, (None, None, 0))(found, values, images)
    return [x.max(axis=0) for x in now]
