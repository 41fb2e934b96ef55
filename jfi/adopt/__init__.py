"""Networks of other frameworks, adopted as they are: one file a framework."""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jfi.adopt import compare, equinox, flax, haiku, keras, nir, onnx, pytorch
from jfi.adopt.adopted import Adopted
from jfi.errors import InputError, kind
from jfi.networks.sites import Network, network

# What a class of each framework is called; the first that fits. On its PyTorch backend a Keras
# model is a module of PyTorch too.
_CLASSES = {
    "Keras": r"keras\..*\.Layer",
    "PyTorch": r"torch\.nn\.modules\.module\.Module",
    "Flax NNX": r"flax\.nnx\..*\.Module",
    "Flax Linen": r"flax\.linen\..*\.Module",
    "Equinox": r"equinox\..*\.Module",
    "Haiku": r"haiku\..*\.Transformed(WithState)?",
    "ONNX": r"onnx\..*ModelProto",
    "NIR": r"nir\..*NIRGraph",
}
# Who adopts a model of each framework, from how many values, and what they are.
_ADOPTERS = {
    "PyTorch": (pytorch.adopt, (1,), "the module alone"),
    "Keras": (keras.adopt, (1,), "the model alone"),
    "Flax NNX": (flax.adopt_nnx, (1,), "the module alone"),
    "Flax Linen": (flax.adopt_linen, (2,), "(module, variables)"),
    "Equinox": (equinox.adopt, (1, 2), "the module, or (model, state)"),
    "Haiku": (haiku.adopt, (2, 3), "(transformed, params) or (transformed, params, state)"),
    "ONNX": (onnx.adopt, (1,), "the model alone"),
}
_TAKEN = (
    "a PyTorch, Keras, Flax NNX or Equinox model, (module, variables) of Flax Linen, "
    "(model, state) of Equinox, (transformed, params) or (transformed, params, state) of Haiku, "
    "an ONNX model or a NIR graph or the path of one (.onnx, .nir), or (apply, params)"
)


def adopt(model: Any, example: Any, *, dt: float = 1e-4, output: str | None = None) -> Network:
    """A network of any framework, ready for fault injection: `jfi.adopt(model, x_test[:8])`.

    The framework is recognised by the model's class; only its own library is imported. The network
    is put in inference mode (no dropout, stored statistics in batch norm), on a copy: the user's
    model stays as it is. Its outputs are compared with those of the model itself, run by its own
    framework, on every image of `example`.

    Args:
      model: one of
        - a PyTorch `nn.Module`, run in JAX by torchax (`pip install 'jfi[torch]'`);
        - a Keras 3 model on the JAX backend (`jfi[keras]`);
        - a Flax NNX module, or a Linen `(module, variables)`, `variables` as `init` gives them;
        - an Equinox module, called on one image, or `(model, state)` (`jfi[equinox]`);
        - a Haiku `(transformed, params)`, or `(transformed, params, state)` of
          `transform_with_state` (`jfi[haiku]`);
        - an ONNX model: a `ModelProto`, or the path of an `.onnx` file (`jfi[onnx]`);
        - a NIR graph, or the path of a `.nir` file (`jfi[nir]`): images are [B, T, ...], inputs of
          T steps, and the logits are the output summed over the steps;
        - `(apply, params)`: `(params, x) -> outputs` in JAX, as for `jfi.network`.
        It may return several arrays [B, ...] in a tree.
      example: a batch of images [B, ...] as the model takes them: NumPy, JAX or PyTorch; or a tuple
        or dict of such arrays: a model gets those as its arguments, by position or by name, and
        `apply` and a Keras model the tree itself. Tokens may be int64: JAX computes them as int32.
      output: the name of the one array to judge faults by, of several that the model returns.
      dt: the time step of a NIR graph in seconds, which the graph does not say; 1e-4 is snnTorch's.

    Returns:
      The network. Its sites have the framework's own names: `layer1.0.conv1.weight` (PyTorch),
      `conv2d/kernel` (Keras), `conv/kernel` (Flax), `conv2_d/w` (Haiku), `layers/0/weight`
      (Equinox), the initialiser's name (ONNX), `node/parameter` (NIR). Every stored array that
      the outputs depend on is a site, also what is not trained: running means and variances of
      batch norm lie in memory as weights do. What is not is told in `left_out`.

    Raises:
      InputError: a model of no framework named above; a missing library, with its install command;
        a model that can't be put in inference mode, whose outputs are random, that does not run
        in JAX, or whose outputs are not arrays [B, ...]; an adopted network whose outputs differ
        from the model's by more than float rounding (`jfi.engine.rounding`), with how much and
        where; what `jfi.network` refuses.
    """
    images = batch(example)
    found = _adopted(model, dt)
    one = jax.tree.map(lambda x: x[0], images)
    adopted = network(found.apply, found.params, one, output)
    adopted = adopted._replace(left_out={**adopted.left_out, **found.left_out})
    if found.original is not None:
        compare.check(adopted, images, found.original, output)
    return adopted


def batch(example: Any, called: str = "example is") -> Any:
    """Images [B, ...] of NumPy, JAX or PyTorch as NumPy, in the types that JAX computes; or a tree
    of such arrays, of as many images each.

    Raises:
      InputError: no batch of images; `called` begins the message.
    """
    leaves = jax.tree.leaves(example)
    several = isinstance(example, Mapping | tuple | list) and bool(leaves)
    arrays = [_array(leaf) for leaf in leaves]
    if not arrays or any(x is None or x.ndim < 2 - several or not len(x) for x in arrays):
        raise InputError(
            f"{called} {kind(example)}; it must be a batch of images [B, ...], one array with at "
            "least one image, as the model takes it, or a dict or tuple of such arrays"
        )
    counts = sorted({len(x) for x in arrays})
    if len(counts) > 1:
        raise InputError(f"{called} arrays of {counts} images; each must have as many")
    return jax.tree.unflatten(jax.tree.structure(example), arrays) if several else arrays[0]


def _array(leaf: Any) -> np.ndarray | None:
    """An array of NumPy, JAX or PyTorch as NumPy, in the type that JAX computes; else None."""
    if hasattr(leaf, "detach"):  # PyTorch
        leaf = pytorch.array(leaf)
    if not isinstance(leaf, np.ndarray | jax.Array) or not leaf.ndim:
        return None
    found = np.asarray(leaf)
    return found.astype(jax.dtypes.canonicalize_dtype(found.dtype))


def _adopted(model: Any, dt: float) -> Adopted:
    """The model, by the adopter of its framework."""
    if isinstance(model, str | os.PathLike):
        found = _read(os.fspath(model), dt)
        return found._replace(apply=_said(found.apply))
    values = model if type(model) is tuple and model else (model,)
    of = _framework(values[0])
    if of == "NIR":
        found = nir.adopt(values[0], dt)
        return found._replace(apply=_said(found.apply))
    if of is not None:
        by, numbers, form = _ADOPTERS[of]
        if len(values) not in numbers:
            raise InputError(f"model is {kind(model)} of {of}; {of} models are adopted as {form}")
        found = by(*values)
        return found._replace(apply=_said(found.apply))
    if len(values) == 2 and callable(values[0]):
        return Adopted(*values, None)
    raise InputError(f"model is {kind(model)}, which jfi does not know; it takes {_TAKEN}")


def _framework(model: Any) -> str | None:
    """The framework of which the model's class is, without importing it."""
    classes = [f"{one.__module__}.{one.__qualname__}" for one in type(model).__mro__]
    fitting = (of for of, name in _CLASSES.items() if any(re.fullmatch(name, c) for c in classes))
    return next(fitting, None)


def _read(path: str, dt: float) -> Adopted:
    """The model in a file."""
    by = {".onnx": onnx.adopt_file, ".nir": lambda path: nir.adopt_file(path, dt)}
    found = by.get(os.path.splitext(path)[1].lower())
    if found is None:
        raise InputError(f"model is the path {path!r}; jfi reads .onnx and .nir files")
    if not os.path.isfile(path):
        raise InputError(f"model is the path {path!r}, and there is no such file")
    return found(path)


def _said(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The function, with what it can't do said in one line."""

    def checked(params, x):
        try:
            found = apply(params, x)
        except InputError:
            raise
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                f"the model does not run in JAX on images {kind(x)}: {type(error).__name__}: {said}"
            ) from error
        return found

    return checked
