"""Weights from and to files.

Native: safetensors, one tensor a parameter, named by its path: `params/conv1/kernel`,
`batch_stats/bn1/mean`, and in the header what images were normalised with in training. Imported:
PyTorch checkpoints (a state dict, alone or under "state_dict", "model_state_dict", "model" or
"net"), renamed by one rule for every family:

    layer1.0.conv1.weight     -> params/layer1_0/conv1/kernel    axes O I H W -> H W I O
    fc1.weight                -> params/fc1/kernel               axes O I -> I O
    bn1.weight, bn1.bias      -> params/bn1/scale, params/bn1/bias
    bn1.running_mean, _var    -> batch_stats/bn1/mean, batch_stats/bn1/var
    bn1.num_batches_tracked   -> dropped
    lif1.beta, lif1.threshold -> params/lif1/beta, params/lif1/threshold
    lif1.reset_mechanism_val, lif1.graded_spikes_factor -> dropped where they are snnTorch's usual

A leading `module.` (DataParallel) is dropped; a number joins the name before it. What stands beside
the tensors and is no parameter, as the epoch or the best accuracy, is dropped.

Types that NumPy lacks are read as ml_dtypes has them: bfloat16, the float8 types of PyTorch, and
float4_e2m1fn, of which a byte holds two.
"""

import json
import numbers
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

from nets.net import Net, NetError

NATIVE, TORCH = ".safetensors", (".th", ".pt", ".pth")  # extensions
NO_SAFETENSORS = "truncated, or not a safetensors file"
TORCH_LEAVES = {
    "weight": "params/{}/kernel",
    "bias": "params/{}/bias",
    "running_mean": "batch_stats/{}/mean",
    "running_var": "batch_stats/{}/var",
}
# Of snnTorch's neurons: reset by subtraction, and spikes that are 1, as in our nets. Any other
# value stays in, and is reported as unknown to the net.
TORCH_USUAL = {"reset_mechanism_val": 0, "graded_spikes_factor": 1}
# Where a PyTorch checkpoint keeps the state dict, when it isn't the state dict itself.
TORCH_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
# What may stand beside the tensors of a checkpoint: epoch, best accuracy, name of the network.
BESIDE = (numbers.Number, np.generic, str, type(None))
# Types of safetensors; of F4 a byte holds two, the first in its lower half.
SAFETENSORS_TYPES = {
    "BOOL": np.bool_,
    **{
        f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}")
        for kind in "IU"
        for size in (1, 2, 4, 8)
    },
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    "C64": np.complex64,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F4": ml_dtypes.float4_e2m1fn,
}


def load(net: Net, path: str | os.PathLike) -> dict:
    """Variables of `net` from a .safetensors file or a PyTorch checkpoint (.th, .pt, .pth).

    Values are cast to the net's own types (a float32 checkpoint loads into a bfloat16 net).
    Raises NetError where the file is missing, truncated or foreign, and naming the first
    parameter that is missing, of another shape, not finite, or unknown to the net.
    """
    path = _existing(path)
    try:
        if path.suffix == NATIVE:
            arrays = _read_safetensors(path)
        else:
            arrays = from_torch(_read_torch(path), dict(net.flattened))
        leaves = _match(_leaves(net), arrays, net.name)
    except NetError as error:
        raise NetError(f"weights {path}: {error}") from error.__cause__
    return traverse_util.unflatten_dict(leaves, sep="/")


def statistics(path: str | os.PathLike) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation that images were normalised with when these weights were trained.

    None where the file does not say, as no PyTorch checkpoint does.
    Raises NetError as `load`, and where the header holds what is no two lists of numbers.
    """
    path = _existing(path)
    if path.suffix != NATIVE:
        return None
    import safetensors

    try:
        with safetensors.safe_open(path, "numpy") as file:
            header = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise NetError(f"weights {path}: {NO_SAFETENSORS} ({error})") from error
    if not {"mean", "std"} <= header.keys():
        return None
    try:
        mean, std = ([float(value) for value in json.loads(header[k])] for k in ("mean", "std"))
    except (TypeError, ValueError) as error:
        told = f"mean {header['mean']!r} and std {header['std']!r}"
        raise NetError(
            f"weights {path}: its header has {told}; lists of numbers are right"
        ) from error
    return mean, std


def statistics_header(net: Net) -> dict[str, str]:
    """What `statistics` reads, for the metadata of `save`; empty of a net that takes no images."""
    if len(net.input_shape) != 3:
        return {}
    return {"mean": json.dumps(net.mean), "std": json.dumps(net.std)}


def _existing(path: str | os.PathLike) -> Path:
    """The path of a file with an extension that can be read, or NetError."""
    path = Path(path)
    if path.suffix not in (NATIVE, *TORCH):
        raise NetError(
            f"weights {path}: unknown extension; known are {', '.join((NATIVE, *TORCH))}"
        )
    if not path.is_file():
        raise NetError(f"weights {path}: no such file")
    return path


def save(path: str | os.PathLike, variables: Mapping, metadata: Mapping[str, str] | None = None):
    """Write `variables` as safetensors, whole or not at all; `metadata` travels in the header.

    Raises OSError where the file can't be written; a file that was there is then untouched.
    """
    import safetensors.numpy

    leaves = traverse_util.flatten_dict(dict(variables), sep="/")
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in leaves.items()}
    _write_whole(Path(path), safetensors.numpy.save(arrays, dict(metadata or {})))


def from_torch(
    state: Mapping[str, np.ndarray], flattened: Mapping[str, tuple[int, int, int]]
) -> dict[str, np.ndarray]:
    """A PyTorch state dict under our names and axes (the table above).

    `flattened` names the dense kernels whose rows are a flattened feature map (H, W, C).
    """
    renamed = (_rename(name, array) for name, array in state.items())
    return {
        name: _from_chw(array, flattened[name]) if name in flattened else array
        for name, array in filter(None, renamed)
    }


def _rename(name: str, array: np.ndarray) -> tuple[str, np.ndarray] | None:
    """Our (name, array) of one PyTorch parameter; None for one we have no use for."""
    layer, _, leaf = name.removeprefix("module.").rpartition(".")
    if leaf == "num_batches_tracked" or (leaf in TORCH_USUAL and array == TORCH_USUAL[leaf]):
        return None
    if not layer and array.ndim == 0:  # a number beside the parameters, as best_prec1
        return None
    layer = re.sub(r"\.(?=\d+(\.|$))", "_", layer).replace(".", "/")
    if leaf == "weight" and array.ndim == 1:
        return f"params/{layer}/scale", array
    if leaf == "weight":
        array = array.transpose(*range(2, array.ndim), 1, 0)
    return TORCH_LEAVES.get(leaf, "params/{}/" + leaf).format(layer), array


def _from_chw(kernel: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Rows of a dense kernel [C*H*W, O] put in the order H, W, C."""
    height, width, channels = shape
    if kernel.ndim != 2 or kernel.shape[0] != height * width * channels:
        return kernel  # of the wrong shape: reported with every other one
    return kernel.reshape(channels, height, width, -1).transpose(1, 2, 0, 3).reshape(kernel.shape)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import safetensors

    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise NetError(f"{NO_SAFETENSORS} ({error})") from error
    unknown = next((name for name, held in tensors if held["dtype"] not in SAFETENSORS_TYPES), None)
    if unknown is not None:
        raise NetError(f"{unknown} is of type {dict(tensors)[unknown]['dtype']}, which is not read")
    return {name: _array(**held) for name, held in tensors}


def _array(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    """A tensor of a safetensors file."""
    codes = np.frombuffer(data, np.uint8)
    if dtype == "F4":
        codes = _halves(codes)
    return codes.view(SAFETENSORS_TYPES[dtype]).reshape(shape)


def _halves(codes: np.ndarray) -> np.ndarray:
    """Bytes that hold two numbers each, along the last axis, as a byte a number, lower half first:
    the order of torch.float4_e2m1fn_x2."""
    return np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    """The state dict of a PyTorch checkpoint, with `weights_only`: no code of the file is run."""
    try:
        import torch
    except ImportError as error:
        raise NetError("reading it needs PyTorch: pip install 'jfi[torch]'") from error
    try:
        with torch.serialization.safe_globals(_numpy_numbers()):
            checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a parser of foreign bytes may raise
        raise NetError("truncated, or not a PyTorch checkpoint of tensors alone") from error
    state = _state_dict(checkpoint)
    if not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise NetError("no state dict in it (parameter names with their tensors)")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise NetError(
                f"holds {name!r}, a {type(value).__name__}, among its tensors; parameter names "
                "with their tensors are right"
            )
    return {name: _numpy(tensor) for name, tensor in state.items()}


def _numpy_numbers() -> list:
    """What a pickled number of NumPy, as a best accuracy often is, is made of; it runs no code."""
    scalar = np._core.multiarray.scalar
    codes = "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]
    kinds = {type(np.dtype(code)) for code in codes}
    # Before NumPy 2 it had another name.
    return [np.dtype, *kinds, scalar, (scalar, "numpy.core.multiarray.scalar")]


def _state_dict(checkpoint) -> dict:
    """The mapping of names to tensors in a checkpoint, without what may stand beside them; empty
    where there is none."""
    if not isinstance(checkpoint, dict):
        return {}
    inner = (checkpoint.get(key) for key in TORCH_WRAPPERS)
    state = next((value for value in inner if isinstance(value, dict)), checkpoint)
    return {name: value for name, value in state.items() if not isinstance(value, BESIDE)}


def _numpy(tensor) -> np.ndarray:
    """A tensor as NumPy has it; of types that NumPy lacks, as float32 or float4_e2m1fn (exact)."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None):
        return _halves(tensor.view(torch.uint8).numpy()).view(ml_dtypes.float4_e2m1fn)
    return (
        tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
    ).numpy()


def _leaves(net: Net) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of every variable, from tracing `init` without running it."""
    image = jax.ShapeDtypeStruct((1, *net.input_shape), jnp.float32)
    shapes = jax.eval_shape(net.module.init, jax.random.key(0), image)
    return traverse_util.flatten_dict(shapes, sep="/")


def _match(leaves: Mapping, arrays: Mapping[str, np.ndarray], net_name: str) -> dict:
    """`arrays` as the net's leaves; NetError names the first that doesn't fit."""
    for name, leaf in leaves.items():
        if name not in arrays:
            raise NetError(f"lacks {name}, a parameter of {net_name}")
        if arrays[name].shape != leaf.shape:
            raise NetError(
                f"{name} has shape {arrays[name].shape}; {net_name} has it as {leaf.shape}"
            )
    extra = next((name for name in arrays if name not in leaves), None)
    if extra is not None:
        raise NetError(f"holds {extra}, which is no parameter of {net_name}")
    return {name: _cast(name, arrays[name], leaf.dtype) for name, leaf in leaves.items()}


def _cast(name: str, array: np.ndarray, dtype) -> jax.Array:
    """The array in the leaf's type; NetError where a value isn't finite in it."""
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    finite = np.isfinite(cast)
    if not finite.all():
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise NetError(f"{name} holds {array[index]} at {index}; finite in {dtype} is right")
    return jnp.asarray(cast)


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
