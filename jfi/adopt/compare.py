"""Whether an adopted network computes what the model itself does, before any fault."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfi import forms
from jfi.engine.inputs import check_images
from jfi.engine.rounding import SAFETY, TOLERANCE, spread
from jfi.errors import InputError, kind
from jfi.hardware.compiling import jit
from jfi.networks.program import run
from jfi.networks.sites import Network


def check(
    network: Network, example: Any, original: Callable[[Any], Any], output: str | None = None
) -> None:
    """Compare the network, one image [...] of [B, ...] at a time, with the model on the batch.

    A logit may be off by `jfi.engine.rounding.TOLERANCE` epsilons of the image's largest; where
    that is exceeded, by `SAFETY` times what moving every operand by an epsilon does to the logits.

    Raises:
      InputError: outputs of the model that are random, not finite or of another form than the
        network's; a difference, with how large it is and where.
    """
    wanted, again = (_output(network, original, example, output) for _ in range(2))
    images = check_images(network, example)
    found = np.asarray(jit(lambda p, x: _each(network.apply, p, x))(network.params, images))
    if wanted.shape != found.shape:
        raise InputError(
            f"the model's own output for {len(images)} images is {kind(wanted)}, and the adopted "
            f"network's is {kind(found)}"
        )
    if not np.isfinite(wanted).all():
        bad, output = np.argwhere(~np.isfinite(wanted))[0]
        raise InputError(
            f"the model's own output {output} for image {bad} is {wanted[bad, output]}; it must be "
            "finite"
        )
    least = TOLERANCE * float(jnp.finfo(found.dtype).eps) * np.abs(wanted).max(1, keepdims=True)
    if (_apart(wanted, again) > least).any():
        image, output, most = _worst(_apart(wanted, again))
        raise InputError(
            f"the model's own output is random: two runs differ by {most:.3g} at output {output} "
            f"of image {image}. It draws random numbers in inference too (dropout called as a "
            "function without its training flag?): turn that off"
        )
    if (_apart(wanted, found) > least).any():
        least = np.maximum(least, SAFETY * _spreads(network, images)[:, None])
    off = _apart(wanted, found)
    off[off <= least] = 0
    if off.any():
        image, output, most = _worst(off)
        raise InputError(
            f"the adopted network differs from the model by {most:.3g} at output {output} of image "
            f"{image}: {found[image, output]} for {wanted[image, output]}, where float rounding "
            f"allows {least[image, 0]:.3g}. The model would not be what is broken"
        )


def _output(network: Network, original, images, output: str | None) -> np.ndarray:
    """Rows of outputs [B, N] by the model itself, float64."""
    try:
        found = original(images)
    except InputError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"the model itself does not run on the example, {kind(images)}: "
            f"{type(error).__name__}: {said}"
        ) from error
    found = forms.plain(found)
    leaves = jax.tree.leaves(found if output is None else forms.chosen(found, output))
    form = network.outputs.arrays
    shapes = [getattr(leaf, "shape", (0,))[1:] for leaf in leaves]
    if shapes != [array.shape for array in form]:
        raise InputError(
            f"the model's own output is {', '.join(map(kind, leaves))}, and the adopted network's "
            f"is {', '.join(f'{a.dtype}[B, {str(list(a.shape))[1:]}' for a in form)}"
        )
    typed = [np.asarray(x).astype(array.dtype) for x, array in zip(leaves, form, strict=True)]
    return np.asarray(network.outputs.row(typed)).astype(np.float64)


def _each(apply, params, images):
    """Logits [B, C], every image in a batch of its own, as faults are run."""
    return jax.lax.map(lambda image: apply(params, image[None])[0], images)


def _spreads(network: Network, images) -> np.ndarray:
    """[B]: how far the logits of each image move with the rounding of every operand."""
    program = network.program

    def one(leaves, image):
        return spread(program, run(program, leaves, image[None]))

    each = jit(lambda leaves, images: jax.lax.map(lambda image: one(leaves, image), images))
    return np.float64(each(network.leaves, images))


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far outputs are apart; what is not finite, infinitely."""
    off = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return np.where(np.isnan(off), np.inf, off)


def _worst(off: np.ndarray) -> tuple[int, int, float]:
    image, output = np.unravel_index(off.argmax(), off.shape)
    return int(image), int(output), float(off.max())
