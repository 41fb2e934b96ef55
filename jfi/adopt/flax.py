"""Flax: NNX modules by split and merge, Linen modules by `apply`."""

from functools import partial
from typing import Any

import jax

from jfi.adopt.adopted import Adopted, called, check_unchanged, inference_arguments
from jfi.errors import InputError


def adopt_nnx(model: Any) -> Adopted:
    """An NNX module, a clone of it after `eval()`; all its variables but random keys and counts.

    Raises:
      InputError: a module that draws random numbers or updates statistics all the same.
    """
    from flax import nnx

    model = nnx.clone(model)
    model.eval()
    graph, drawn, state = nnx.split(model, nnx.RngState, ...)
    flags = inference_arguments(type(model).__call__)

    def apply(params, x):
        # Variables of their own: those made elsewhere may not change, nor enter a loop, in a trace.
        own = (jax.tree.map(lambda leaf: leaf, state) for state in (drawn, params))
        return called(nnx.merge(graph, *own), x, **flags)

    def original(x):
        before, found = _state(model), called(model, x, **flags)
        check_unchanged(before, _state(model), "NNX module")
        return found

    return Adopted(apply, state, original)


def _state(model) -> dict[str, Any]:
    """What training alone changes, by path: statistics, and counts of what is drawn."""
    from flax import nnx

    found = nnx.state(model, (nnx.RngState, nnx.BatchStat))
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(found)}


def adopt_linen(module: Any, variables: Any) -> Adopted:
    """A Linen module and its variables, all collections of them.

    An argument of its call that switches training (`train`, `deterministic`) is set for inference.

    Raises:
      InputError: a call that wants random keys or to update statistics.
    """
    from flax import linen
    from flax.errors import FlaxError

    variables = linen.unbox(variables)
    flags = inference_arguments(type(module).__call__)

    def apply(variables, x):
        try:
            return called(partial(module.apply, variables), x, **flags)
        except FlaxError as error:
            raise InputError(
                f"the Linen module {type(module).__name__} does not run with its variables alone; "
                f"is it in training mode? Flax says: {str(error).splitlines()[0]}"
            ) from error

    return Adopted(apply, variables, lambda x: apply(variables, x))
