"""Equinox: modules of one example, in inference mode, mapped over the batch."""

from typing import Any

import jax
import jax.numpy as jnp

from jfi.adopt.adopted import Adopted, called, inference_arguments


def adopt(model: Any, state: Any = None) -> Adopted:
    """An Equinox module in inference mode, called on one image, or `(model, state)`.

    Its arrays are sites under their paths, `layers/0/weight`; those of the state under `state/` and
    the path of their index in the model. What is no array, as an activation, is held fixed.
    """
    import equinox as eqx

    model = eqx.nn.inference_mode(model)
    flags = inference_arguments(type(model).__call__)
    if state is None:

        def apply(model, images):
            return jax.vmap(lambda x: called(model, x, **flags))(images)

        return Adopted(apply, model, lambda x: _each(model, x, flags))

    kept = {name: state.get(index) for name, index in _indices(model).items()}
    held, tree = jax.tree.flatten(state)
    places = {id(leaf): place for place, leaf in enumerate(held)}
    order = [places[id(leaf)] for leaf in jax.tree.leaves(kept)]

    def with_state(params, images):
        # Not by State.set, which asks for the same weak types.
        leaves = list(held)
        for place, leaf in zip(order, jax.tree.leaves(params["state"]), strict=True):
            leaves[place] = leaf
        own = jax.tree.unflatten(tree, leaves)
        model = params["params"]
        return jax.vmap(lambda x: model(*_tupled(x), own, **flags)[0])(images)

    def original(images):
        return _stacked(lambda x: model(*_tupled(x), _copy(state), **flags)[0], images)

    return Adopted(with_state, {"params": model, "state": kept}, original)


def _each(model, images, flags):
    return _stacked(lambda x: called(model, x, **flags), images)


def _stacked(one, images):
    """What a function returns of each image, in one tree of arrays [B, ...]."""
    count = len(jax.tree.leaves(images)[0])
    each = [one(jax.tree.map(lambda x: jnp.asarray(x)[k], images)) for k in range(count)]  # noqa: B023
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def _tupled(x) -> tuple:
    return tuple(x) if isinstance(x, tuple | list) else (x,)


def _indices(model) -> dict[str, Any]:
    """Path -> index of every state that a layer keeps."""
    import equinox as eqx

    def is_index(node):
        return isinstance(node, eqx.nn.StateIndex)

    found = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_index)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): node
        for path, node in found
        if is_index(node)
    }


def _copy(state):
    """A state of its own: `set` makes the one that it is called on invalid."""
    leaves, tree = jax.tree.flatten(state)
    return jax.tree.unflatten(tree, leaves)
