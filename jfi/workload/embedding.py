"""The values of one layer, an embedding of the images: found in the flat program."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jfi.engine.golden import BATCH
from jfi.errors import InputError
from jfi.hardware.chunks import chunks, filled_up
from jfi.hardware.compiling import jit
from jfi.networks import program
from jfi.networks.sites import Network
from jfi.networks.weights import products


def embedding(network: Network, images: np.ndarray, layer: str | None = None) -> np.ndarray:
    """[B, D]: what a layer makes of images [B, ...], flattened.

    Args:
      layer: the name of its kernel (`fc2/kernel`): the outputs of its product, before bias and
        activation. By default what the last layer with a kernel takes in.

    Raises:
      InputError: no such kernel, or none at all outside loops and branches.
    """
    wanted = _variable(network, layer)
    part = program.section(network.program, end=wanted)

    def one(leaves, image):
        return program.run(part, leaves, image[None])[wanted].ravel()

    run, size = jit(jax.vmap(one, (None, 0))), min(BATCH, len(images))
    parts = (filled_up(images[rows], size) for rows in chunks(len(images), size))
    found = [np.asarray(run(network.leaves, some)) for some in parts]
    return np.concatenate(found)[: len(images)]


def _variable(network: Network, layer: str | None) -> Any:
    """The variable of the program that holds a layer's values."""
    layers = dict(_layers(network))
    if not layers:
        raise InputError(
            "no layer outside loops and branches has a kernel, so there is no embedding"
        )
    if layer is None:
        return list(layers.values())[-1][0]
    if layer not in layers:
        raise InputError(f"layer {layer!r} is unknown; the kernels are {', '.join(layers)}")
    return layers[layer][1]


def _layers(network: Network) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(kernel, (what its product takes in, what it gives out)) in order of use."""
    names = {number: name for name, number in network.positions.items()}
    image = program.dependents(network.program, network.program.x)
    for number, eqn in products(network.program):
        taken = [a for a in eqn.invars if not isinstance(a, core.Literal) and a in image]
        if number in names and taken and eqn.primitive.name in program.PRODUCTS:
            yield names[number], (taken[0], eqn.outvars[0])
