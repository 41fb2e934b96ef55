"""Compiling, with what makes convolutions fast on a CPU."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

# XLA's CPU backend hands convolutions to a library of its own that took 3 times as long here as
# what it does without (256 images of 8x8x64, 3x3 to 64: 9.1 against 2.7 ms on 4 cores, JAX 0.10.2).
# These are its other uses, which stay; not its element-wise one, where max(NaN, 0) is 0.
_CPU = {
    "xla_cpu_experimental_ynn_fusion_type": ",".join(
        f"LIBRARY_FUSION_TYPE_{name}" for name in ("INDIVIDUAL_DOT", "REDUCE")
    )
}


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` with the compiler's options for this machine."""
    return jax.jit(function, compiler_options=_options(), **options)


@cache
def _options() -> dict[str, str] | None:
    """Options that this version's compiler knows."""
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(jnp.negative, compiler_options=_CPU)(0.0)
    except (ValueError, RuntimeError):  # another version of XLA: its defaults then
        return None
    return _CPU
