"""ONNX models: their graph evaluated node by node in JAX (operators: `jfi.adopt.onnx_operators`).

Not by way of onnx2torch: initialisers keep their names, quantised and recurrent operators are
there, and neither PyTorch nor torchax is needed.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jfi.adopt.adopted import Adopted, library
from jfi.adopt.onnx_operators import OPERATORS, STATIC, Node
from jfi.errors import InputError, kind

_DOMAINS = ("", "ai.onnx")


def adopt_file(path: str) -> Adopted:
    """The model in an `.onnx` file, external data beside it included.

    Raises:
      InputError: onnx is not installed, a file that it can't read; as `adopt`.
    """
    onnx = library("onnx", "onnx")
    try:
        model = onnx.load(path)
    except Exception as error:
        raise InputError(f"model {path!r} is no ONNX model that onnx can read: {error}") from error
    return adopt(model)


def adopt(model: Any) -> Adopted:
    """A `ModelProto`; several inputs [B, ...] are a dict by name or a tuple in the model's order,
    several outputs a dict by name.

    Initialisers, and `Constant` nodes of several numbers, are sites under their names, all but
    those that say a shape, an axis or the like. It is compared with onnxruntime if that is
    installed, else with ONNX's own reference evaluator. A batch that the model fixes to one image
    is mapped over.

    Raises:
      InputError: no input or output, an operator that is not known, a shape that hangs on the
        values of images.
    """
    graph = _read(model)
    static = _static(graph) | graph.numbers
    given = {name for name in graph.stored if name not in static and not _unfit(graph.stored[name])}
    params = {name: graph.stored[name] for name in graph.stored if name in given}
    fixed = {name: value for name, value in graph.stored.items() if name not in given}
    left_out = {name: _unfit(value) or "says a shape, an axis or the like"
                for name, value in fixed.items() if name not in graph.numbers}  # fmt: skip

    def run(params, x):
        given = {**params, **_named(graph, x)}
        found = {name: jax.numpy.asarray(value) for name, value in given.items()}
        return _evaluate(graph, {**fixed, **found})

    def apply(params, x):
        if not graph.one_image or len(jax.tree.leaves(x)[0]) == 1:
            return run(params, x)

        def one(image):
            found = run(params, jax.tree.map(lambda leaf: leaf[None], image))
            return jax.tree.map(lambda leaf: leaf[0], found)

        return jax.vmap(one)(x)

    return Adopted(apply, params, _original(model, graph), left_out)


class _Graph(NamedTuple):
    """A graph as data.

    nodes: in order; stored: initialisers and constants by name; inputs: their types by name;
    one_image: the batch is fixed to 1; numbers: those stored of `Constant` nodes that are one
    number, part of the program.
    """

    nodes: tuple[Node, ...]
    stored: Mapping[str, np.ndarray]
    inputs: Mapping[str, np.dtype]
    outputs: tuple[str, ...]
    one_image: bool
    numbers: frozenset[str]


def _read(model) -> _Graph:
    import onnx

    graph = model.graph
    if graph.sparse_initializer:
        raise InputError("the ONNX model has sparse initialisers; jfi adopts dense ones")
    to_array = onnx.numpy_helper.to_array
    stored = {tensor.name: np.asarray(to_array(tensor)) for tensor in graph.initializer}
    opset = next((o.version for o in model.opset_import if o.domain in _DOMAINS), 1)
    nodes, numbers = [], []
    for proto in graph.node:
        node = _node(proto, opset)
        if node.op == "Constant":
            stored[node.outputs[0]] = _constant(node)
            numbers += [node.outputs[0]] if stored[node.outputs[0]].size == 1 else []
        else:
            nodes.append(node)
    inputs = [value for value in graph.input if value.name not in stored]
    for way, values in (("input", inputs), ("output", graph.output)):
        if not values:
            raise InputError(f"the ONNX model has no {way}")
    forms = {value.name: value.type.tensor_type for value in inputs}
    types = {
        name: onnx.helper.tensor_dtype_to_np_dtype(form.elem_type) for name, form in forms.items()
    }
    one = all(form.shape.dim and form.shape.dim[0].dim_value == 1 for form in forms.values())
    outputs = tuple(value.name for value in graph.output)
    return _Graph(tuple(nodes), stored, types, outputs, one, frozenset(numbers))


def _named(graph: _Graph, x: Any) -> dict[str, Any]:
    """The inputs by name, of an array, a tuple or a dict.

    Raises:
      InputError: they are not those of the model.
    """
    if isinstance(x, Mapping):
        found = dict(x)
    else:
        values = x if isinstance(x, tuple | list) else (x,)
        found = dict(zip(graph.inputs, values, strict=False))
        if len(values) != len(graph.inputs):
            found = {}
    if set(found) != set(graph.inputs):
        raise InputError(
            f"the ONNX model takes {', '.join(graph.inputs)}; it was given {kind(x)}: give a dict "
            "by these names, or a tuple in this order"
        )
    return found


def _node(proto, opset: int) -> Node:
    import onnx

    if proto.domain not in _DOMAINS or (proto.op_type not in {*OPERATORS, "Constant"}):
        name = ".".join(filter(None, [proto.domain, proto.op_type]))
        raise InputError(
            f"the ONNX model has a node {name} ({proto.name or proto.output[0]}), an operator that "
            f"jfi does not know; it knows {', '.join(sorted(OPERATORS))}"
        )
    attributes = {}
    for attribute in proto.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            value = onnx.numpy_helper.to_array(value)
        attributes[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return Node(proto.op_type, tuple(proto.input), tuple(proto.output), attributes, opset)


def _constant(node: Node) -> np.ndarray:
    (name, value), *_ = node.attributes.items()
    if name == "value":
        return np.asarray(value)
    types = {"value_float": np.float32, "value_floats": np.float32}
    types |= {"value_int": np.int64, "value_ints": np.int64}
    if name not in types:
        raise InputError(f"the ONNX constant {node.outputs[0]} is a {name}; jfi adopts numbers")
    return np.asarray(value, types[name])


def _static(graph: _Graph) -> set[str]:
    """Values that must be known to trace: shapes, axes, and all that they are computed from."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        if node.op == "Shape" or node.op == "Size":
            continue
        if found.intersection(node.outputs):
            found.update(node.inputs)
        found.update(node.inputs[k] for k in STATIC.get(node.op, ()) if k < len(node.inputs))
    if found.intersection(graph.inputs):
        raise InputError("the ONNX model computes shapes from the values of images; jfi can't")
    return found


def _unfit(value: np.ndarray) -> str:
    """Why an initialiser is no site, though it enters the network; else empty."""
    wide = value.dtype in (np.int64, np.uint64, np.float64)
    if wide and not jax.config.jax_enable_x64:
        return f"{value.dtype} words, which JAX computes in 32 bits without jax_enable_x64"
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        return "holds numbers that are not finite, as masks do"
    return ""


def _evaluate(graph: _Graph, values: dict[str, Any]):
    """The output of the graph, several by name; nodes of known values by NumPy, as they are."""
    for node in graph.nodes:
        given = [values[name] if name else None for name in node.inputs]
        known = all(value is None or isinstance(value, np.ndarray) for value in given)
        with jax.ensure_compile_time_eval() if known else contextlib.nullcontext():
            found = OPERATORS[node.op](node._replace(xp=np if known else jax.numpy), *given)
        found = found if isinstance(found, tuple) else (found,)
        if known or node.op in ("Shape", "Size"):
            found = tuple(np.asarray(value) for value in found)
        values.update(zip(node.outputs, found, strict=False))
    if len(graph.outputs) == 1:
        return values[graph.outputs[0]]
    return {name: values[name] for name in graph.outputs}


def _original(model, graph: _Graph) -> Callable[[Any], np.ndarray]:
    """The model run by ONNX Runtime or by the reference evaluator, in batches that it takes."""
    run = _runtime(model) or _reference(model)

    def typed(name, x):
        # int64, say, which JAX has in 32 bits.
        fits = np.can_cast(x.dtype, graph.inputs[name], "same_kind")
        return x.astype(graph.inputs[name]) if fits else x

    def original(x):
        feeds = {name: typed(name, np.asarray(part)) for name, part in _named(graph, x).items()}
        count = len(next(iter(feeds.values())))
        parts = [feeds]
        if graph.one_image:
            parts = [{n: part[k : k + 1] for n, part in feeds.items()} for k in range(count)]
        found = map(np.concatenate, zip(*(run(part) for part in parts), strict=True))
        named = dict(zip(graph.outputs, found, strict=True))
        return named if len(named) > 1 else named[graph.outputs[0]]

    return original


def _runtime(model):
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda feeds: session.run(None, feeds)


def _reference(model):
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(model)
    return lambda feeds: evaluator.run(None, feeds)
