"""PyTorch: an `nn.Module` traced by torchax, which runs its operators in JAX."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jfi import forms
from jfi.adopt import recurrent
from jfi.adopt.adopted import Adopted, called
from jfi.adopt.torchax_import import torchax
from jfi.errors import InputError

# Types that NumPy lacks, and those of its words that torch can hand over.
_NARROW = "bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz".split()


def adopt(model: Any) -> Adopted:
    """An `nn.Module` in evaluation mode; the user's module is copied, not changed.

    Parameters, buffers and tensors kept as plain attributes are all stored words, and so are sites:
    `layer1.0.conv1.weight`, `bn1.running_mean`. Shared ones are one, under their first name.
    Attention is computed by its operators, as in training, not by PyTorch's fused kernel for
    inference, which reads a mask of floats as true or false.

    Raises:
      InputError: torchax is not installed; a module that can't be copied, or of which `eval()`
        leaves a part in training mode.
    """
    import torch

    torchax()
    module = _inference_copy(model)
    tensors = {name: tensor.detach().cpu() for name, tensor in _tensors(module)}
    left_out = {name: why for name, tensor in tensors.items() if (why := _unfit(tensor))}
    params = {name: array(tensors[name]) for name in tensors if name not in left_out}
    fixed = {name: array(tensors[name]) for name in left_out}

    def apply(params, x):
        return _run(module, {**params, **fixed}, x)

    def original(x):
        with torch.no_grad():
            found = called(module, jax.tree.map(_tensor, x))
        return jax.tree.map(_array, forms.plain(found))

    return Adopted(apply, params, original, left_out)


def _inference_copy(model):
    """A copy of its own, on the CPU and in evaluation mode."""
    try:
        module = copy.deepcopy(model).cpu()
    except Exception as error:
        raise InputError(
            f"the PyTorch model {type(model).__name__} can't be copied (copy.deepcopy: {error}); "
            "give one without what is bound to a run, such as hooks and graphs"
        ) from error
    module.eval()
    for name, part in module.named_modules():
        if part.training:
            where = f"its part {name} ({type(part).__name__})" if name else type(part).__name__
            raise InputError(
                f"the PyTorch model is still in training mode after eval(): {where}; mend its "
                "train() method, or set its attribute `training` to False"
            )
    return module


def _tensors(module) -> Iterator[tuple[str, Any]]:
    """Name and tensor of every parameter, buffer and tensor kept as a plain attribute."""
    import torch

    yield from module.named_parameters()
    yield from module.named_buffers()
    for owner, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                yield (f"{owner}.{name}" if owner else name), value


def _unfit(tensor) -> str:
    """Why a tensor is no site, though it enters the network; else empty."""
    if str(tensor.dtype) == "torch.int64" and not jax.config.jax_enable_x64:
        return "int64 words, which JAX computes as int32 without jax_enable_x64"
    return ""


def _run(module, arrays, x):
    """The module's output on `x`, computed in JAX with these arrays for its tensors."""
    import torch

    env = torchax().default_env()
    tensors, x = env.j2t_iso(jax.tree.map(jax.numpy.asarray, (arrays, x)))
    args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else (x, {})
    args = tuple(args) if isinstance(args, tuple | list) else (args,)
    known = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    plain = {name: tensor for name, tensor in tensors.items() if name not in known}
    stored = {name: tensor for name, tensor in tensors.items() if name in known}
    # Without a key of its own, a draw would leave a value of this trace in torchax.
    key = env.override_property(prng=jax.random.key(0))
    with _plain_attention(), _attributes(module, plain), key, env, _in_jax(env), torch.no_grad():
        found = torch.func.functional_call(module, stored, args, kwargs)
        return env.t2j_iso(forms.plain(found))


@contextlib.contextmanager
def _plain_attention():
    """Attention as its operators: the fused kernel of inference is opaque, and whether a mask is
    the causal one, which would select another, can't be asked of values that are traced."""
    import torch

    transformer, name = torch.nn.modules.transformer, "_detect_is_causal_mask"
    fast, detect = torch.backends.mha.get_fastpath_enabled(), getattr(transformer, name, None)
    torch.backends.mha.set_fastpath_enabled(False)
    setattr(transformer, name, lambda mask, is_causal=None, size=None: bool(is_causal))
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        setattr(transformer, name, detect)


@contextlib.contextmanager
def _attributes(module, values: dict[str, Any]):
    """The module with other values for attributes, by their full names."""
    places = [(module.get_submodule(name.rpartition(".")[0]), name) for name in values]
    owners = [(owner, name.rpartition(".")[2], values[name]) for owner, name in places]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in owners]
    try:
        for owner, name, value in owners:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _in_jax(env):
    """What torchax lacks: tensors that `forward` makes, as `torch.zeros(...)`, are made in JAX
    like all others, and recurrent layers are loops."""
    from torch.overrides import TorchFunctionMode
    from torchax.tensor import TENSOR_CONSTRUCTORS

    class InJax(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            name = getattr(function, "__name__", "")
            if name in recurrent.LAYERS and isinstance(args[3], bool):  # not a packed sequence
                found = recurrent.LAYERS[name](*env.t2j_iso(args))
                return env.j2t_iso(found)
            if function in TENSOR_CONSTRUCTORS and str(kwargs.get("device") or "cpu") == "cpu":
                kwargs["device"] = "jax"
            return function(*args, **kwargs)

    return InJax()


def array(tensor) -> np.ndarray:
    """The same words as NumPy, a copy."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _NARROW:
        return np.array(tensor.numpy())
    words = torch.int16 if tensor.element_size() == 2 else torch.uint8
    return np.array(tensor.view(words).numpy()).view(getattr(ml_dtypes, name))


def _array(found):
    """A tensor as NumPy; what is none as it is."""
    return array(found) if hasattr(found, "detach") else found


def _tensor(x):
    """The example for the model itself, which takes indices as int64 alone."""
    import torch

    tensor = torch.from_numpy(np.array(x))
    return tensor.long() if tensor.dtype == torch.int32 else tensor
