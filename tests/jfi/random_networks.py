"""Random networks: a list of random steps on one value [B, ...], on leaves of random dtypes.

The steps cover every primitive with a rule (`jfi.engine.patch`, `jfi.engine.certify`) and some
without, in many shapes, layouts, strides, groups, dilations and paddings; some leaves are used
several times.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

IMAGES = 24
F32 = np.dtype(np.float32)
BF16, F16, F8, F8B = map(np.dtype, (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2))

ACTIVATIONS = {
    name: getattr(jax.nn, name)
    for name in "relu relu6 leaky_relu elu selu celu softplus silu mish hard_swish hard_tanh "
    "soft_sign log_sigmoid squareplus sigmoid tanh gelu".split()
} | {
    "exact_gelu": lambda h: jax.nn.gelu(h, approximate=False),
    "erf": lax.erf,
    "abs": jnp.abs,
    "square": jnp.square,
    "cube": lambda h: lax.integer_pow(h, 3),
    "bell": lambda h: jnp.exp(-jnp.abs(h)),
    "sine": jnp.sin,
    "log": lambda h: jnp.log1p(jnp.abs(h)),
    "root": lambda h: jnp.sqrt(jnp.abs(h) + jnp.array(0.1, h.dtype)),
    "inverse_root": lambda h: lax.rsqrt(h * h + jnp.array(0.1, h.dtype)),
    "inverse": lambda h: 1 / (1 + h * h),
    "sign": jnp.sign,
    "round": jnp.round,
    "floor": jnp.floor,
    "power": lambda h: (jnp.abs(h) + jnp.array(0.01, h.dtype)) ** 1.5,
}


class Draft:
    """A network being drawn: its leaves, its steps, and the value [B, ...] they have come to."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.params, self.steps, self.names = rng, {}, [], []
        kind = rng.choice(["vector", "sequence", "image"], p=[0.5, 0.15, 0.35])
        n = int(rng.integers(4, 10))
        side = rng.integers(4, 8, 2)
        shape = {"vector": (n,), "sequence": (3, n), "image": (*side, n % 4 + 1)}[str(kind)]
        self.images = rng.standard_normal((IMAGES, *shape)).astype(np.float32)
        self.value = jnp.asarray(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.value.dtype)

    @property
    def is_float(self) -> bool:
        return self.dtype in (F32, BF16, F16)

    def pick(self, *options):
        return options[self.rng.integers(len(options))]

    def leaf(self, *shape, dtype=F32, scale=None) -> str:
        """The name of a leaf: a new one, or now and then one that something else uses too."""
        same = [n for n, v in self.params.items() if v.shape == shape and v.dtype == dtype]
        if same and self.rng.random() < 0.3:
            return self.pick(*same)
        if np.issubdtype(dtype, np.integer):
            values = self.rng.integers(-100, 100, shape)
        else:
            fan = int(np.prod(shape[:-1])) or 1
            values = self.rng.standard_normal(shape) * (scale or fan**-0.5)
            values[self.rng.random(shape) < 0.05] = 0.0
        name = f"w{len(self.params)}"
        self.params[name] = np.asarray(values).astype(dtype)
        return name

    def weight(self, *shape) -> tuple[str, np.dtype]:
        """A leaf to be used in the type of the value; now and then it is kept in fewer bits."""
        dtype = self.dtype if self.rng.random() < 0.8 else self.pick(BF16, F16, F8, F8B)
        return self.leaf(*shape, dtype=dtype if dtype in (F32, BF16, F16, F8, F8B) else F32)

    def add(self, name: str, step: Callable[[Any, Any], Any]) -> bool:
        """Take a step where the value stays usable; it is scaled where it grows or vanishes."""
        value = step(self.params, self.value)
        size = np.abs(np.asarray(value, np.float64)).max() if value.size else 0
        if not np.isfinite(size) or size == 0 or value.size > 4000 * IMAGES:
            return False
        self.steps.append(step)
        self.names.append(name)
        self.value = value
        if self.is_float and not 0.05 < size < 50:
            factor = np.float32(2.0 ** round(-np.log2(size)))
            self.steps.append(lambda p, h: h * factor.astype(h.dtype))
            self.value = self.steps[-1](self.params, value)
        return True

    def as_floats(self) -> None:
        if not self.is_float:
            factor = self.pick(1.0, 0.125, 1 / 64)
            self.add("to float", lambda p, h: h.astype(jnp.float32) * factor)


class Net(NamedTuple):
    """A drawn network: apply, params, images [B, ...], and its steps in words."""

    apply: Callable[[Any, Any], Any]
    params: dict[str, np.ndarray]
    images: np.ndarray
    words: str


# --- Steps, by name. Each takes a draft and gives `(params, h) -> h`, or None where it does not
# --- apply to a value of this shape and dtype.

STEPS: dict[str, Callable[[Draft], Any]] = {}


def step(function):
    STEPS[function.__name__] = function
    return function


@step
def activation(d):
    function = ACTIVATIONS[d.pick(*ACTIVATIONS)]
    return (lambda p, h: function(h).astype(h.dtype)) if d.is_float else None


@step
def far_out(d):
    """Where the slope of a sigmoid is nearly 0, though what follows makes up for it."""
    if d.dtype != F32:
        return None
    return lambda p, h: (jax.nn.sigmoid(h + 18) - 1) * 1e8


@step
def dense(d):
    n, m = d.shape[-1], int(d.rng.integers(3, 9))
    turned = d.rng.random() < 0.4
    w = d.weight(*((m, n) if turned else (n, m)))
    wider = jnp.float32 if d.rng.random() < 0.3 else None

    def apply(p, h):
        own = p[w].astype(h.dtype)
        return jnp.matmul(h, own.T if turned else own, preferred_element_type=wider)

    return apply if d.is_float else None


@step
def dense_in_few_bits(d):
    n, m = d.shape[-1], int(d.rng.integers(3, 9))
    dtype = d.pick(BF16, F16, F8, F8B)
    w, out = d.leaf(n, m, dtype=d.pick(F32, dtype)), d.pick(jnp.float32, dtype)
    if out in (F8, F8B):
        out = jnp.float32

    def apply(p, h):
        a, b = h.astype(dtype), p[w].astype(dtype)
        return jnp.matmul(a, b, preferred_element_type=out)

    return apply


@step
def layers_in_few_bits(d):
    """As Flax has them with a `dtype`: parameters in float32, all else in fewer bits."""
    n, dtype = d.shape[-1], d.pick(BF16, BF16, F16)
    leaves = [d.leaf(n, n) for _ in range(2)]

    def apply(p, h):
        h = h.astype(dtype)
        for w in leaves:
            h = jax.nn.relu(h @ p[w].astype(dtype)) + h / 4
        return h.astype(jnp.float32)

    return apply if d.is_float else None


@step
def dense_of_integers(d):
    n, m = d.shape[-1], int(d.rng.integers(3, 9))
    w = d.leaf(n, m, dtype=np.dtype(np.int8))

    def apply(p, h):
        codes = jnp.clip(jnp.round(h.astype(jnp.float32) * 30), -127, 127).astype(jnp.int8)
        return jnp.matmul(codes, p[w], preferred_element_type=jnp.int32)

    return apply


@step
def to_integers(d):
    scale, dtype = d.pick(2.0, 4.0, 30.0), d.pick(jnp.int8, jnp.int32)
    clipped = d.rng.random() < 0.7

    def apply(p, h):
        h = h.astype(jnp.float32) * scale
        return (jnp.clip(h, -120, 120) if clipped else h).astype(dtype)

    return apply if d.is_float else None


@step
def to_bits_of_truth(d):
    return (lambda p, h: (h > 0).astype(jnp.float32) + h / 8) if d.dtype == F32 else None


@step
def to_another_float(d):
    dtype = d.pick(F32, F32, BF16, F16)
    return (lambda p, h: h.astype(dtype)) if d.is_float else None


@step
def leaf_twice_in_a_product(d):
    n = d.shape[-1]
    w = d.leaf(n, n, dtype=d.dtype) if d.is_float else None
    return w and (lambda p, h: h @ (p[w].T @ p[w]))


@step
def bias(d):
    w = d.weight(d.shape[-1]) if d.is_float else None
    return w and (lambda p, h: h + p[w].astype(h.dtype))


@step
def scale(d):
    w = d.weight(d.shape[-1]) if d.is_float else None
    return w and (lambda p, h: h * (1 + p[w].astype(h.dtype)))


@step
def divided(d):
    w = d.weight(d.shape[-1]) if d.is_float else None
    return w and (lambda p, h: h / (1 + jnp.square(p[w].astype(h.dtype))))


@step
def divided_by_itself(d):
    return (lambda p, h: h / (1 + jnp.abs(h[..., ::-1]))) if d.is_float else None


@step
def at_most_a_leaf(d):
    w, of = d.weight(d.shape[-1]), d.pick(jnp.minimum, jnp.maximum)
    return (lambda p, h: of(h, p[w].astype(h.dtype))) if d.is_float else None


@step
def clamped(d):
    w, by_value = d.weight(d.shape[-1]), d.rng.random() < 0.5

    def apply(p, h):
        low = jnp.broadcast_to(p[w].astype(h.dtype) - 1, h.shape)
        return lax.clamp(low, h, 1 + h[..., ::-1] if by_value else low + 2)

    return apply if d.is_float else None


@step
def selected(d):
    w, by_value = d.weight(d.shape[-1]), d.rng.random() < 0.5

    def apply(p, h):
        own = p[w].astype(h.dtype)
        return jnp.where(h > own if by_value else own > 0, h, -h / 4)

    return apply if d.is_float else None


@step
def sign_of_a_leaf(d):
    w = d.weight(d.shape[-1])

    def signed(p, h):
        leaf = p[w].astype(h.dtype)
        # The sign of a NaN that was converted is left open by the standard.
        return jnp.where(jnp.signbit(leaf) & ~jnp.isnan(leaf), 1 + h, h)

    return signed if d.is_float else None


@step
def normalised(d):
    kind = d.pick("softmax", "log_softmax", "layer", "l1", "mean", "max")
    functions = {
        "softmax": jax.nn.softmax,
        "log_softmax": jax.nn.log_softmax,
        "layer": lambda h: (
            (h - h.mean(-1, keepdims=True))
            * lax.rsqrt(h.var(-1, keepdims=True) + jnp.array(1e-3, h.dtype))
        ),
        "l1": lambda h: h / (jnp.abs(h).sum(-1, keepdims=True) + jnp.array(1e-3, h.dtype)),
        "mean": lambda h: h - h.mean(-1, keepdims=True),
        "max": lambda h: h - h.max(-1, keepdims=True),
    }
    return (lambda p, h: functions[kind](h).astype(h.dtype)) if d.is_float else None


@step
def batch_normalised(d):
    if not d.is_float:
        return None
    mean, var = d.weight(d.shape[-1]), d.leaf(d.shape[-1], dtype=d.dtype)
    d.params[var] = np.abs(d.params[var]).astype(d.dtype)

    def apply(p, h):
        return (h - p[mean].astype(h.dtype)) * lax.rsqrt(p[var] + jnp.array(1e-3, h.dtype))

    return apply


@step
def laid_out_anew(d):
    n = d.shape[-1]
    kind = d.pick("reverse", "roll", "pad", "dilate", "slice", "double", "fold", "turn")
    if (
        (kind == "fold" and n % 2)
        or (kind == "slice" and n < 4)
        or (kind == "turn" and len(d.shape) < 3)
    ):
        return None
    lead = [(0, 0, 0)] * (len(d.shape) - 1)
    functions = {
        "reverse": lambda h: h[..., ::-1],
        "roll": lambda h: jnp.roll(h, 1, axis=-1),
        "pad": lambda h: lax.pad(h, jnp.ones((), h.dtype), [*lead, (1, 1, 0)]),
        "dilate": lambda h: lax.pad(h, jnp.zeros((), h.dtype), [*lead, (-1, 0, 1)]),
        "slice": lambda h: h[..., 1::2],
        "double": lambda h: jnp.concatenate([h, 2 * h], axis=-1),
        "fold": lambda h: jnp.swapaxes(h.reshape(*h.shape[:-1], 2, n // 2), -1, -2).reshape(
            h.shape
        ),
        "turn": lambda h: jnp.swapaxes(h, 1, -1),
    }
    return lambda p, h: functions[kind](h)


@step
def over_the_last_axis(d):
    functions = {
        "cumsum": lambda h: jnp.cumsum(h, axis=-1),
        "cummax": lambda h: lax.cummax(h, axis=h.ndim - 1),
        "sort": lambda h: jnp.sort(h, axis=-1),
        "one_hot": lambda h: jax.nn.one_hot(h.argmax(-1), h.shape[-1], dtype=h.dtype) + h / 4,
        "sum": lambda h: h + h.sum(-1, keepdims=True),
        "most": lambda h: h + h.max(-1, keepdims=True),
        "least": lambda h: h - h.min(-1, keepdims=True),
        "product": lambda h: h + jnp.prod(jnp.tanh(h), axis=-1, keepdims=True),
        "logsumexp": lambda h: h - jax.nn.logsumexp(h, axis=-1, keepdims=True),
    }
    function = functions[d.pick(*functions)]
    return (lambda p, h: function(h).astype(h.dtype)) if d.is_float else None


@step
def looked_up(d):
    """A row of a table, by the answer so far."""
    n = d.shape[-1]
    table = d.weight(n, int(d.rng.integers(3, 8)))
    return lambda p, h: p[table][h.argmax(-1)].astype(jnp.float32)


@step
def gated(d):
    n, of = d.shape[-1], d.pick("residual", "gate", "twice")
    if not d.is_float:
        return None
    w = d.leaf(n, n, dtype=d.dtype)
    functions = {
        "residual": lambda p, h: h + jax.nn.relu(h @ p[w]),
        "gate": lambda p, h: h * jax.nn.sigmoid(h @ p[w]),
        "twice": lambda p, h: jnp.tanh(jnp.tanh(h @ p[w]) @ p[w]),
    }
    return functions[of]


@step
def attention(d):
    if not d.is_float or len(d.shape) != 3:
        return None
    n = d.shape[-1]
    q, k = d.leaf(n, n, dtype=d.dtype), d.leaf(n, n, dtype=d.dtype)

    def apply(p, h):
        scores = jnp.einsum("bqc,bkc->bqk", h @ p[q], h @ p[k])
        return jax.nn.softmax(scores, axis=-1).astype(h.dtype) @ h

    return apply


@step
def looped(d):
    n, kind = d.shape[-1], d.pick("scan", "fori", "while", "remat")
    if not d.is_float:
        return None
    w = d.leaf(n, n, dtype=d.pick(F32, d.dtype))

    def once(p, c, h):
        return jnp.tanh(c @ p[w].astype(h.dtype) + h)

    def until(p, h):
        def more(state):
            return state[0] < 3

        return lax.while_loop(more, lambda s: (s[0] + 1, once(p, s[1], h)), (0, h))[1]

    functions = {
        "scan": lambda p, h: lax.scan(lambda c, _: (once(p, c, h), None), h, length=3)[0],
        "fori": lambda p, h: lax.fori_loop(0, 2, lambda _, c: once(p, c, h), h),
        "while": until,
        "remat": lambda p, h: jax.checkpoint(lambda h: once(p, h, h))(h),
    }
    return functions[kind]


@step
def branched(d):
    """Control flow by a leaf, and by each image alone."""
    w = d.leaf(d.shape[-1])
    if d.dtype != F32:
        return None

    def by_leaf(p, h):
        return lax.cond(p[w][0] > 0, lambda h: h + p[w], lambda h: 0.5 * h, h)

    def by_image(p, h):
        branches = (lambda h: h, lambda h: h * p[w], jnp.sin)
        return jax.vmap(lambda h: lax.switch((3 * jnp.abs(h.ravel()[0])).astype(int), branches, h))(
            h
        )

    return d.pick(by_leaf, by_image)


@step
def pooled(d):
    if len(d.shape) != 4 or d.dtype != F32:
        return None
    kind = d.pick("max", "min", "sum")
    window, stride = (
        (1, *map(int, d.rng.integers(1, 4, 2)), 1),
        (1, *map(int, d.rng.integers(1, 3, 2)), 1),
    )
    gaps = (1, *map(int, d.rng.integers(1, 3, 2)), 1) if d.rng.random() < 0.3 else (1,) * 4
    start, of = {"max": (-np.inf, lax.max), "min": (np.inf, lax.min), "sum": (0.0, lax.add)}[kind]
    padding = d.pick("SAME", "VALID", [(0, 0), (1, 0), (0, 2), (0, 0)])

    def apply(p, h):
        return lax.reduce_window(
            h, np.float32(start), of, window, stride, padding, window_dilation=gaps
        )

    return apply


@step
def convolution(d):
    if len(d.shape) != 4 or not d.is_float:
        return None
    channels = d.shape[-1]
    kind = d.pick("plain", "plain", "depthwise", "grouped", "bits", "integers", "transposed")
    groups = {"depthwise": channels, "grouped": 2 if channels % 2 == 0 else 1}.get(kind, 1)
    out = groups * int(d.rng.integers(1, 4))
    size = tuple(map(int, d.rng.integers(1, 4, 2)))
    strides = tuple(map(int, d.rng.integers(1, 3, 2)))
    gaps = tuple(map(int, d.rng.integers(1, 3, 2))) if d.rng.random() < 0.3 else (1, 1)
    inner = (2, 1) if kind == "transposed" else (1, 1)
    padding = d.pick("SAME", "VALID", [(1, 0), (0, 2)], [(2, 2), (1, 1)])
    if inner != (1, 1):
        padding = [(1, 2), (1, 1)]
    first = d.rng.random() < 0.25  # channels first
    layout = ("NCHW", "OIHW", "NCHW") if first else ("NHWC", "HWIO", "NHWC")
    shape = (*size, channels // groups, out)
    shape = (shape[3], shape[2], *size) if first else shape
    dtype, wider = d.dtype, d.pick(None, np.float32)
    w = d.weight(*shape)
    if kind == "bits":
        dtype, wider = d.pick((BF16, np.float32), (F16, np.float32), (BF16, None), (F8, np.float32))
    if kind == "integers":
        dtype, wider = np.dtype(np.int8), np.int32
        w = d.leaf(*shape, dtype=dtype)

    def apply(p, h):
        if kind == "integers":
            h = jnp.clip(jnp.round(h.astype(jnp.float32) * 30), -127, 127)
        h = jnp.moveaxis(h, -1, 1) if first else h
        y = lax.conv_general_dilated(
            h.astype(dtype), p[w].astype(dtype), strides, padding, inner, gaps,
            dimension_numbers=layout, feature_group_count=groups, preferred_element_type=wider,
        )  # fmt: skip
        return jnp.moveaxis(y, 1, -1) if first else y

    return apply


@step
def flattened(d):
    if len(d.shape) < 3:
        return None
    kind = d.pick("all", "mean", "max")
    axes = tuple(range(1, len(d.shape) - 1))
    functions = {
        "all": lambda h: h.reshape(h.shape[0], -1),
        "mean": lambda h: h.mean(axes),
        "max": lambda h: h.max(axes),
    }
    return (lambda p, h: functions[kind](h)) if kind == "max" or d.is_float else None


def mixed(d):
    """A step in which images influence each other, but not the first: no network of ours."""

    def apply(p, h):
        later = (jnp.arange(len(h)) > 0).reshape(-1, *[1] * (h.ndim - 1))
        return jnp.where(later, h * (1 + jnp.where(h.sum() > 0, 1, -3)).astype(h.dtype), h)

    return apply if d.is_float else None


def draw(seed: int, focus: tuple[str, ...] = ()) -> Net:
    """The network of a seed; steps in `focus` are as likely as all others together."""
    rng = np.random.default_rng(seed)
    d = Draft(rng)
    for _ in range(rng.integers(3, 9)):
        name = d.pick(*focus) if focus and rng.random() < 0.5 else d.pick(*STEPS)
        if not d.is_float and rng.random() < 0.7:
            d.as_floats()
        found = mixed(d) if name == "mixed" else STEPS[name](d)
        if found:
            d.add(name, found)
    d.as_floats()
    if len(d.shape) > 2:
        d.add("flat", lambda p, h: h.reshape(h.shape[0], -1))
    classes = int(rng.integers(3, 7))
    end = d.leaf(d.shape[-1], classes)
    d.add("end", lambda p, h: h.astype(jnp.float32) @ p[end])
    steps = tuple(d.steps)

    def apply(p, x):
        for one in steps:
            x = one(p, x)
        return x

    return Net(apply, d.params, d.images, " > ".join(d.names))
