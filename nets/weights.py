"""Weights from and to files.

Native: safetensors, one tensor a parameter, named by its path: `params/conv1/kernel`,
`batch_stats/bn1/mean`. Imported: PyTorch checkpoints (a state dict, alone or under "state_dict"),
renamed by one rule for every family:

    layer1.0.conv1.weight     -> params/layer1_0/conv1/kernel    axes O I H W -> H W I O
    fc1.weight                -> params/fc1/kernel               axes O I -> I O
    bn1.weight, bn1.bias      -> params/bn1/scale, params/bn1/bias
    bn1.running_mean, _var    -> batch_stats/bn1/mean, batch_stats/bn1/var
    bn1.num_batches_tracked   -> dropped
    lif1.beta, lif1.threshold -> params/lif1/beta, params/lif1/threshold
    lif1.reset_mechanism_val, lif1.graded_spikes_factor -> dropped where they are snnTorch's usual

A leading `module.` (DataParallel) is dropped; a number joins the name before it.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from nets.net import Net, NetError

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
TORCH_WRAPPERS = ("state_dict", "model_state_dict")


def load(net: Net, path: str | os.PathLike) -> dict:
    """Variables of `net` from a .safetensors file or a PyTorch checkpoint (.th, .pt, .pth).

    Values are cast to the net's own types (a float32 checkpoint loads into a bfloat16 net).
    Raises NetError where the file is missing, truncated or foreign, and naming the first
    parameter that is missing, of another shape, not finite, or unknown to the net.
    """
    path = Path(path)
    readers = {".safetensors": _read_safetensors} | dict.fromkeys(
        (".th", ".pt", ".pth"), lambda p: from_torch(_read_torch(p), dict(net.flattened))
    )
    if path.suffix not in readers:
        raise NetError(f"weights {path}: unknown extension; known are {', '.join(readers)}")
    if not path.is_file():
        raise NetError(f"weights {path}: no such file")
    try:
        arrays = readers[path.suffix](path)
        leaves = _match(_leaves(net), arrays, net.name)
    except NetError as error:
        raise NetError(f"weights {path}: {error}") from error.__cause__
    return traverse_util.unflatten_dict(leaves, sep="/")


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
    import safetensors.numpy

    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise NetError(f"truncated, or not a safetensors file ({error})") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    """The state dict of a PyTorch checkpoint, with `weights_only`: no code of the file is run."""
    try:
        import torch
    except ImportError as error:
        raise NetError("reading it needs PyTorch: pip install 'jfi[torch]'") from error
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a parser of foreign bytes may raise
        raise NetError("truncated, or not a PyTorch checkpoint of tensors alone") from error
    state = _state_dict(checkpoint)
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise NetError("no state dict in it (parameter names with their tensors)")
    return {name: _numpy(tensor) for name, tensor in state.items()}


def _state_dict(checkpoint) -> dict:
    """The mapping of names to tensors in a checkpoint; empty where there is none."""
    if not isinstance(checkpoint, dict):
        return {}
    state = next((checkpoint[key] for key in TORCH_WRAPPERS if key in checkpoint), checkpoint)
    return state if isinstance(state, dict) else {}


def _numpy(tensor) -> np.ndarray:
    """A tensor as NumPy has it; bfloat16, which NumPy lacks, as float32 (exact)."""
    return (tensor.float() if tensor.dtype.itemsize == 2 else tensor).detach().numpy()


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
