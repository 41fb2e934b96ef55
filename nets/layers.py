"""Layers that several families share, with PyTorch's conventions: its padding, its BN."""

import flax.linen as nn


def types_of(module: nn.Module) -> dict:
    """The types a module computes in and keeps its parameters in, for the layers inside it."""
    return {"dtype": module.dtype, "param_dtype": module.param_dtype}


def conv(channels: int, side: int, name: str, types: dict, stride: int = 1, **options) -> nn.Conv:
    """Square convolution without bias, padded alike on both sides also where the stride is 2."""
    sizes = {"kernel_size": (side, side), "strides": (stride, stride), "padding": side // 2}
    usual = {"use_bias": False, "kernel_init": nn.initializers.kaiming_normal()}
    return nn.Conv(channels, name=name, **sizes, **types, **(usual | options))


def batch_norm(train: bool, name: str, types: dict) -> nn.BatchNorm:
    """Batch normalisation as PyTorch does it; its momentum of 0.1 is 0.9 in Flax."""
    running = {"use_running_average": not train, "momentum": 0.9, "epsilon": 1e-5}
    return nn.BatchNorm(name=name, **running, **types)
