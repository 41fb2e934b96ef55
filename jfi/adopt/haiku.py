"""Haiku: what `hk.transform` and `hk.transform_with_state` return, without random keys."""

from functools import partial
from typing import Any

import jax

from jfi.adopt.adopted import Adopted, called, check_unchanged, inference_arguments
from jfi.errors import InputError


def adopt(transformed: Any, params: Any, state: Any = None) -> Adopted:
    """A transformed function and its parameters, and its state if it has one.

    An argument that switches training (`is_training`) is set for inference.

    Raises:
      InputError: a state that is missing or too much; a function that wants random keys or updates
        its state.
    """
    has_state = type(transformed).__name__ == "TransformedWithState"
    if has_state != (state is not None):
        form = "(transformed, params, state)" if has_state else "(transformed, params)"
        raise InputError(f"a Haiku {type(transformed).__name__} is adopted as {form}")
    flags = inference_arguments(transformed.apply)

    def call(params, state, x):
        try:
            if has_state:
                return called(partial(transformed.apply, params, state, None), x, **flags)
            return called(partial(transformed.apply, params, None), x, **flags), {}
        except ValueError as error:
            if "RNG" not in str(error) and "PRNG" not in str(error):
                raise
            raise InputError(
                "the Haiku function draws random numbers in inference; call it with dropout off, "
                f"as hk.transform(lambda x: f(x, is_training=False)). Haiku says: {error}"
            ) from error

    def original(x):
        found, after = call(params, state, x)
        check_unchanged(_named(state or {}), _named(after), "Haiku function")
        return found

    if has_state:

        def apply(both, x):
            return call(both["params"], both["state"], x)[0]

        return Adopted(apply, {"params": params, "state": state}, original)
    return Adopted(lambda params, x: call(params, None, x)[0], params, original)


def _named(state) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(state)
    }
