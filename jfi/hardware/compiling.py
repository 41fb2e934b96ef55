"""Compiling: one rule of rounding for every program, and what makes convolutions fast on a CPU.

Every operation rounds to its own type, as it does run by itself, in JAX and in PyTorch. Left to
itself XLA keeps float32 between operations of bfloat16 where it fuses them, so that two programs
cut up differently round at different places. The golden run, the engine and the naive re-run are
all compiled here.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

ROUNDING = "every operation rounds to its own type (xla_allow_excess_precision is off)"

_ALWAYS = {"xla_allow_excess_precision": False}
# XLA's CPU backend hands convolutions to a library of its own, on some shapes slower and on some
# faster than what it does without. GFLOP/s of one core with it and without (64 images, JAX 0.10.2):
# 14x14x512 3x3 142, 215; 4x4x512 186, 230; 14x14x1024 1x1 54, 215; 16x16x32 3x3 236, 166; 64x64x3
# 7x7 213, 116. On two cores whole networks are slower with it: images/s of ResNet-18 184, 301, of
# ResNet-20 2048, 2247; on 4 cores 8x8x64 3x3 took 9.1 against 2.7 ms. Depthwise convolutions, 0.9
# and 0.4, are slow in any case: `jfi.networks.convolution` computes them otherwise.
# Matrix products stay with it; element-wise operations and reductions do not: there max(NaN, 0)
# is 0, and whether a NaN survived would depend on how a program is cut.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` with the compiler's options for this machine."""
    return jax.jit(function, compiler_options=_options(), **options)


@cache
def _options() -> dict[str, Any]:
    """Options that this version's compiler knows."""
    if jax.default_backend() != "cpu":
        return _ALWAYS
    both = {**_ALWAYS, **_CPU}
    try:
        jax.jit(jnp.negative, compiler_options=both)(0.0)
    except (ValueError, RuntimeError):  # another version of XLA: its defaults then
        return _ALWAYS
    return both
