"""PyTorch's recurrent layers as loops over time (`lax.scan`), not as many equations as steps.

The formulas are those of `torch.nn.LSTM`, `GRU` and `RNN`; arguments come as these modules hand
them to `torch.lstm`, `torch.gru`, `torch.rnn_tanh` and `torch.rnn_relu`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jfi.errors import InputError


def _layers(step: Callable, x, states, weights, bias, layers, training, both, batch_first):
    """Output over time, and the last states, each [layers times directions, B, H]."""
    if training:
        raise InputError("a recurrent layer of the PyTorch model is in training mode")
    if batch_first:
        x = x.swapaxes(0, 1)
    ways = 2 if both else 1
    each = len(weights) // (layers * ways)
    lasts = []
    for layer in range(layers):
        outputs = []
        for way in range(ways):
            number = layer * ways + way
            own = _named(weights[number * each : (number + 1) * each], bias)
            start = tuple(state[number] for state in states)
            last, output = lax.scan(
                lambda state, now, own=own: step(own, state, now), start, x, reverse=way == 1
            )
            outputs.append(output)
            lasts.append(last)
        x = jnp.concatenate(outputs, -1)
    x = x.swapaxes(0, 1) if batch_first else x
    return x, tuple(jnp.stack(state) for state in zip(*lasts, strict=True))


def _named(weights, bias: bool) -> dict[str, Any]:
    """Weights of one direction of a layer; `hr` projects the output, if there is one."""
    names = ["ih", "hh", "bih", "bhh"] if bias else ["ih", "hh"]
    return dict(zip([*names, "hr"], weights, strict=False))


def _summed(own, x, h) -> tuple[Any, Any]:
    """What the input and the state add to the gates."""
    from_x, from_h = x @ own["ih"].T, h @ own["hh"].T
    if "bih" in own:
        from_x, from_h = from_x + own["bih"], from_h + own["bhh"]
    return from_x, from_h


def _lstm_step(own, state, x):
    h, c = state
    i, f, g, o = jnp.split(sum(_summed(own, x, h)), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    h = h @ own["hr"].T if "hr" in own else h
    return (h, c), h


def _gru_step(own, state, x):
    (h,) = state
    from_x, from_h = (jnp.split(part, 3, axis=-1) for part in _summed(own, x, h))
    r, z = (jax.nn.sigmoid(from_x[k] + from_h[k]) for k in range(2))
    new = jnp.tanh(from_x[2] + r * from_h[2])
    h = (1 - z) * new + z * h
    return (h,), h


def _rnn_step(activation):
    def step(own, state, x):
        h = activation(sum(_summed(own, x, state[0])))
        return (h,), h

    return step


def _lstm(x, states, weights, bias, layers, dropout, training, both, batch_first):
    x, (h, c) = _layers(_lstm_step, x, states, weights, bias, layers, training, both, batch_first)
    return x, h, c


def _of_one_state(step):
    def layer(x, state, weights, bias, layers, dropout, training, both, batch_first):
        x, (h,) = _layers(step, x, (state,), weights, bias, layers, training, both, batch_first)
        return x, h

    return layer


LAYERS = {
    "lstm": _lstm,
    "gru": _of_one_state(_gru_step),
    "rnn_tanh": _of_one_state(_rnn_step(jnp.tanh)),
    "rnn_relu": _of_one_state(_rnn_step(jax.nn.relu)),
}
