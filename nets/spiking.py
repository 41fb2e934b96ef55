"""Spiking networks: leaky integrate-and-fire neurons, and the three networks of SpikingJET
(A. B. Gogebakan, E. Magliano, A. Carpegna et al., SpikingJET, IEEE European Test Symposium 2024).

Neurons compute what snnTorch 1.x does (`snn.Leaky`, `snn.Synaptic`). At time step t, with current
I, potential U, synaptic current Y, spike S, reset R and threshold h:

    Leaky     U[t] = beta U[t-1] + I[t] - R[t] h
    Synaptic  Y[t] = alpha Y[t-1] + I[t];  U[t] = beta U[t-1] + Y[t] - R[t] h
    both      S[t] = 1 if U[t] > h else 0;  R[t] = 1 if U[t-1] > h else 0

alpha and beta are clamped to [0, 1]; every state is 0 before the first step. The reset comes one
step late and from the potential, not from the spike: a spike that breaks resets nothing. Equation 1
of the paper is not what its tool runs: there a neuron above its threshold does not decay
(U[t-1] - h + I[t]), and a spike is seen one step later (S[t] from U[t-1]).

Each layer takes a whole train of spikes [T, B, ...]: a dense layer or a convolution is one product
over all time steps, and only the neurons run step by step. Their potentials and spikes are tagged
at every step, by `jax.ad_checkpoint.checkpoint_name`, as `lif1/potential` (before it is compared
and carried on) and `lif1/spike` (before anything sees it), with the names of the layers' paths.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from nets.layers import types_of
from nets.net import UNCHANGED, Net, NetError
from nets.surrogate import Surrogate, step, trainable_step

RESETS = ("subtract", "zero", "none")
RECORDS = ("spike", "potential")
Feedback = Callable[[jax.Array], jax.Array]


class Neurons(nn.Module):
    """What leaky and synaptic neurons share; use `Leaky` or `Synaptic`.

    reset: one of RESETS, what a spike does to the potential one step later.
    record: one of RECORDS, which of its values a layer returns.
    axes: the axes of a current, counted from the last, along which beta, threshold and alpha
      differ: (-1,) is a value a neuron in dense layers and a value a channel after a convolution.
    surrogate: what training uses in place of the derivative of a spike.
    beta, threshold, alpha: first values of the parameters of those names.
    """

    reset: str = "subtract"
    record: str = "spike"
    axes: tuple[int, ...] = (-1,)
    surrogate: Surrogate = Surrogate()
    beta: float = 0.5
    threshold: float = 1.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def _checked(self) -> None:
        for field, known in (("reset", RESETS), ("record", RECORDS)):
            if getattr(self, field) not in known:
                raise NetError(
                    f"{'/'.join(self.path)}: {field} {getattr(self, field)!r} is unknown; "
                    f"known are {', '.join(known)}"
                )

    def _leaf(self, name: str, current: jax.Array) -> jax.Array:
        """A parameter of the neurons, with the axes of one step's current [B, ...]."""
        shape = tuple(current.shape[axis] for axis in self.axes)
        first = nn.initializers.constant(getattr(self, name))
        others = tuple(a for a in range(2 - current.ndim, 0) if a not in self.axes)
        leaf = self.param(name, first, shape, self.param_dtype)
        return jnp.expand_dims(leaf, others).astype(self.dtype)

    def _run(self, integrate, states: int, current, threshold, feedback, train: bool):
        """The recorded values [T, B, ...] of all steps.

        `integrate(state, current, reset)` is the next state of neurons, a tuple of `states`
        arrays, the potential last. Element-wise over neurons but for `feedback`.
        """

        def fire(potential):
            if train:
                return trainable_step(self.surrogate, potential, threshold)
            return step(potential, threshold)

        def advance(carry, current):
            state, spike = carry
            if feedback is not None:
                current = current + feedback(spike)
            *others, potential = integrate(state, current, step(state[-1], threshold))
            potential = checkpoint_name(potential, "/".join((*self.path, "potential")))
            spike = checkpoint_name(fire(potential), "/".join((*self.path, "spike")))
            carried = spike if feedback is not None else None
            recorded = spike if self.record == "spike" else potential
            return ((*others, potential), carried), recorded

        rest = jnp.zeros(current.shape[1:], current.dtype)
        start = (rest,) * states, rest if feedback is not None else None
        return jax.lax.scan(advance, start, current)[1]


class Leaky(Neurons):
    """Leaky integrate-and-fire neurons: currents [T, B, ...] -> spikes or potentials [T, B, ...].

    `feedback` maps the spikes [B, ...] of one step to what they add to the current of the next.
    Reset to zero multiplies U[t-1] by 1 - R[t]; snnTorch's RLeaky zeroes U[t] in its place.
    """

    @nn.compact
    def __call__(self, current, feedback: Feedback | None = None, train: bool = False):
        self._checked()
        decay = jnp.clip(self._leaf("beta", current), 0, 1)
        threshold = self._leaf("threshold", current)

        def integrate(state, current, reset):
            (potential,) = state
            if self.reset == "zero":
                potential = (1 - reset) * potential
            potential = decay * potential + current
            return (potential - reset * threshold if self.reset == "subtract" else potential,)

        return self._run(integrate, 1, current, threshold, feedback, train)


class Synaptic(Neurons):
    """Neurons with a synaptic current of their own, as `Leaky` but for that: a spike that comes in
    raises Y, which decays by alpha a step and charges the potential."""

    alpha: float = 0.9

    @nn.compact
    def __call__(self, current, feedback: Feedback | None = None, train: bool = False):
        self._checked()
        synapse = jnp.clip(self._leaf("alpha", current), 0, 1)
        decay = jnp.clip(self._leaf("beta", current), 0, 1)
        threshold = self._leaf("threshold", current)

        def integrate(state, current, reset):
            synaptic, potential = state
            synaptic = synapse * synaptic + current
            potential = decay * potential + synaptic
            if self.reset == "zero":
                potential = potential - potential * reset
            return (
                synaptic,
                potential - reset * threshold if self.reset == "subtract" else potential,
            )

        return self._run(integrate, 2, current, threshold, feedback, train)


class DenseFeedback(nn.Module):
    """A dense layer from the spikes of `units` neurons back to themselves, as a function: one that
    the scan over time can call."""

    units: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Feedback:
        first = nn.initializers.lecun_normal()
        kernel = self.param("kernel", first, (self.units, self.units), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.units,), self.param_dtype)
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        return lambda spikes: spikes @ kernel + bias


def over_time(x: jax.Array) -> jax.Array:
    """Spike trains [B, T, ...] with time first, as layers here take them: [T, B, ...]."""
    return jnp.moveaxis(x, 1, 0)


class SpikingDense(nn.Module):
    """Dense layers of leaky neurons: frames [B, T, H, W, P] -> spike counts [B, num_classes]."""

    hidden: tuple[int, ...]
    num_classes: int = 10
    surrogate: Surrogate = Surrogate()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        types = types_of(self)
        x = over_time(x).astype(self.dtype)
        x = x.reshape(*x.shape[:2], -1)
        for i, units in enumerate((*self.hidden, self.num_classes), start=1):
            x = nn.Dense(units, name=f"fc{i}", **types)(x)
            x = Leaky(surrogate=self.surrogate, name=f"lif{i}", **types)(x, train=train)
        return x.sum(0)


class SpikingRecurrent(nn.Module):
    """A recurrent hidden layer and an output layer of synaptic neurons: trains [B, T, channels] ->
    largest potential of all steps [B, num_classes]. Time constants of 5 and 10 steps."""

    hidden: int
    num_classes: int = 20
    surrogate: Surrogate = Surrogate("fast_sigmoid", 100.0)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        types = types_of(self)
        neurons = {"alpha": float(np.exp(-1 / 5)), "beta": float(np.exp(-1 / 10)), **types}
        neurons["surrogate"] = self.surrogate
        x = nn.Dense(self.hidden, name="fc1", **types)(over_time(x).astype(self.dtype))
        feedback = DenseFeedback(self.hidden, name="fb1", **types)()
        x = Synaptic(name="lif1", **neurons)(x, feedback, train)
        x = nn.Dense(self.num_classes, name="fc2", **types)(x)
        return Synaptic(name="lif2", record="potential", **neurons)(x, train=train).max(0)


class SpikingConv(nn.Module):
    """Convolutions of 5x5, each pooled by 2 before its leaky neurons, and a dense layer: frames
    [B, T, H, W, P] -> spike counts [B, num_classes].

    The parameters of the neurons after a convolution differ by column, not by channel, as in
    SpikingJET's network, where they broadcast over the last axis [B, C, H, W].
    """

    channels: tuple[int, ...]
    num_classes: int = 11
    surrogate: Surrogate = Surrogate("fast_sigmoid", 25.0)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        types = types_of(self)
        x = over_time(x).astype(self.dtype)
        for i, channels in enumerate(self.channels, start=1):
            x = nn.Conv(channels, (5, 5), padding="VALID", name=f"conv{i}", **types)(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            columns = Leaky(axes=(-2,), surrogate=self.surrogate, name=f"lif{i}", **types)
            x = columns(x, train=train)
        x = nn.Dense(self.num_classes, name="fc1", **types)(x.reshape(*x.shape[:2], -1))
        last = f"lif{len(self.channels) + 1}"
        return Leaky(surrogate=self.surrogate, name=last, **types)(x, train=train).sum(0)


def build_dense(name: str, hidden: tuple[int, ...], input_shape, num_classes: int, dtype) -> Net:
    """Frames (T, H, W, P) through dense layers of `hidden` and `num_classes` leaky neurons.

    578-20-10 is SpikingJET's N-MNIST network as released, for 34x34 events of two polarities of
    which every second row and column is kept; 578-500-10 is the one of its paper. Logits are spike
    counts, as in the tool, which takes softmax of them.
    """
    module = SpikingDense(hidden, num_classes, dtype=dtype, param_dtype=dtype)
    flattened = (("params/fc1/kernel", tuple(input_shape[1:])),)
    return Net(name, module, input_shape, num_classes, *UNCHANGED, flattened)


def build_recurrent(name: str, hidden: int, input_shape, num_classes: int, dtype) -> Net:
    """Trains (T, channels) through a recurrent layer of `hidden` synaptic neurons.

    700-200-20 is SpikingJET's SHD network. Its logits are not spike counts: the tool takes softmax
    of the largest potential that each output neuron reaches. So a fault in a spike of the output
    layer (`lif2/spike`) changes nothing.
    """
    module = SpikingRecurrent(hidden, num_classes, dtype=dtype, param_dtype=dtype)
    return Net(name, module, input_shape, num_classes, *UNCHANGED)


def build_conv(name: str, channels: tuple[int, ...], input_shape, num_classes: int, dtype) -> Net:
    """Frames (T, H, W, P) through 5x5 convolutions of `channels` and one dense layer.

    12C5-32C5-800-11 is SpikingJET's DVS128 network, for 128x128 events of which every fourth row
    and column is kept. Logits are spike counts, as in the tool, which takes softmax of them.
    Raises NetError where the frames are too small.
    """
    height, width = input_shape[1:3]
    for _ in channels:
        height, width = (height - 4) // 2, (width - 4) // 2
    if min(height, width) < 1:
        raise NetError(f"{name}: frames of {input_shape[1]}x{input_shape[2]}; 16x16 is smallest")
    module = SpikingConv(channels, num_classes, dtype=dtype, param_dtype=dtype)
    flattened = (("params/fc1/kernel", (height, width, channels[-1])),)
    return Net(name, module, input_shape, num_classes, *UNCHANGED, flattened)
