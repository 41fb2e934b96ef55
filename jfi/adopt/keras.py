"""Keras 3 on its JAX backend: `stateless_call` with `training=False`."""

from typing import Any

import numpy as np

from jfi.adopt.adopted import Adopted, check_unchanged
from jfi.errors import InputError


def adopt(model: Any) -> Adopted:
    """A Keras model that is built; all its variables, under their paths: `conv2d/kernel`.

    Raises:
      InputError: another backend than JAX, a model that is not built, two variables of one path,
        layers that train although they are told not to.
    """
    import keras

    if not hasattr(keras, "backend") or keras.backend.backend() != "jax":
        raise InputError(
            f"Keras runs on {keras.backend.backend()}; jfi adopts models on JAX: set the "
            "environment variable KERAS_BACKEND=jax before Keras is imported"
        )
    if not model.built:
        raise InputError(
            f"the Keras model {model.name} is not built and has no weights yet: call it once on "
            "the example"
        )
    trainable, fixed = ([*model.trainable_variables], [*model.non_trainable_variables])
    names = [variable.path for variable in (*trainable, *fixed)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"two variables of the Keras model are called {twice[0]}: rename a layer")
    params = {variable.path: variable.value for variable in (*trainable, *fixed)}

    def call(params, x):
        weights = ([params[variable.path] for variable in some] for some in (trainable, fixed))
        return model.stateless_call(*weights, x, training=False)

    def original(x):
        _, after = call(params, np.asarray(x))
        before = {variable.path: params[variable.path] for variable in fixed}
        check_unchanged(before, dict(zip(before, after, strict=True)), "Keras model")
        return model(x, training=False)

    return Adopted(lambda params, x: call(params, x)[0], params, original)
