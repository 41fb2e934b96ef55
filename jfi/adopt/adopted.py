"""What an adopter makes of a model of its framework, and what adopters share."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from jfi.errors import InputError

# What arguments that switch training are called, and their value for inference.
_INFERENCE = {
    **dict.fromkeys(["train", "training", "is_training"], False),
    **dict.fromkeys(["deterministic", "inference", "eval", "use_running_average"], True),
}


class Adopted(NamedTuple):
    """A model as a pure function, and the model itself to compare it with.

    apply: `(params, x [B, ...]) -> outputs [B, ...]`, in inference mode, traceable by JAX. Both may
      be trees of arrays.
    params: pytree of all stored arrays that faults may strike, under the framework's own names; its
      other leaves are held fixed.
    original: `x [B, ...] -> outputs [B, ...]` by the framework itself, in inference mode; None
      where nothing else runs the model.
    left_out: name -> why, of stored arrays that `params` lacks.
    """

    apply: Callable[[Any, Any], Any]
    params: Any
    original: Callable[[Any], Any] | None
    left_out: Mapping[str, str] = {}


def called(function: Callable[..., Any], x: Any, **flags: Any) -> Any:
    """A model called on its inputs: an array, or a tuple by position or a dict by name."""
    if isinstance(x, Mapping):
        return function(**x, **flags)
    if isinstance(x, tuple | list):
        return function(*x, **flags)
    return function(x, **flags)


def library(name: str, extra: str) -> ModuleType:
    """An optional library by name.

    Raises:
      InputError: it is not installed; with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise
        raise InputError(
            f"adopting this model needs {name}, which is not installed: pip install 'jfi[{extra}]'"
        ) from None


def inference_arguments(function: Callable[..., Any]) -> dict[str, bool]:
    """The arguments of a model's call that put it in inference mode, of those that it has."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in _INFERENCE.items() if name in known}


def check_unchanged(before: Mapping[str, Any], after: Mapping[str, Any], model: str) -> None:
    """Refuse a model that updates state in inference, as batch norm in training does.

    Raises:
      InputError: an array that is another after the call.
    """
    for name, value in before.items():
        if not np.array_equal(_words(value), _words(after[name]), equal_nan=False):
            raise InputError(
                f"the {model} is in training mode: a call in inference mode changed its {name}; "
                "call it so that statistics are only read and nothing is drawn"
            )


def _words(value) -> np.ndarray:
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(value)
