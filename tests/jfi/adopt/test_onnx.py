"""ONNX models adopted: operators against ONNX's own tests, a zoo against its own evaluator."""

import copy
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from adopting import check_campaign

import jfi
from jfi.adopt import onnx as adopter
from jfi.adopt.onnx_operators import OPERATORS, STATIC

onnx = pytest.importorskip("onnx")
from onnx import numpy_helper, parser  # noqa: E402

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(8, 1, 12, 12)).astype(np.float32)
COLOUR = RNG.normal(size=(8, 3, 12, 12)).astype(np.float32)


def draw(*shape, scale=None):
    values = RNG.normal(size=shape) * (scale or (2 / np.prod(shape[1:])) ** 0.5)
    return values.astype(np.float32)


def model(text, opset=17, **stored):
    """A model of a graph in ONNX's own words, and what it stores."""
    graph = parser.parse_graph(text)
    for name, values in stored.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9
    )


def lenet():
    return model(
        """lenet (float[N, 1, 12, 12] x) => (float[N, 5] y) {
            a = Conv <pads = [2, 2, 2, 2]> (x, conv1_w, conv1_b)
            b = Relu (a)
            c = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (b)
            d = Conv (c, conv2_w, conv2_b)
            e = Relu (d)
            f = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (e)
            shape = Shape (x)
            zero = Constant <value = int64 {0}> ()
            batch = Gather (shape, zero)
            axis = Constant <value = int64[1] {0}> ()
            first = Unsqueeze (batch, axis)
            rest = Constant <value = int64[1] {-1}> ()
            flat = Concat <axis = 0> (first, rest)
            g = Reshape (f, flat)
            h = Gemm <transB = 1> (g, fc1_w, fc1_b)
            i = Relu (h)
            j = Dropout (i)
            y = Gemm <transB = 1> (j, fc2_w, fc2_b)
        }""",
        conv1_w=draw(6, 1, 5, 5), conv1_b=draw(6, scale=0.1), conv2_w=draw(16, 6, 5, 5),
        conv2_b=draw(16, scale=0.1), fc1_w=draw(12, 16), fc1_b=draw(12, scale=0.1),
        fc2_w=draw(5, 12), fc2_b=draw(5, scale=0.1),
    )  # fmt: skip


def batch_norm():
    return model(
        """bn (float[N, 3, 12, 12] x) => (float[N, 5] y) {
            a = Conv <strides = [2, 2]> (x, w)
            b = BatchNormalization (a, scale, bias, mean, variance)
            six = Constant <value_float = 6.0> ()
            zero = Constant <value_float = 0.0> ()
            c = Clip (b, zero, six)
            d = GlobalAveragePool (c)
            e = Flatten (d)
            f = MatMul (e, fc)
            y = Softmax (f)
        }""",
        w=draw(6, 3, 3, 3), scale=RNG.uniform(0.5, 1.5, 6).astype(np.float32),
        bias=draw(6, scale=0.1), mean=draw(6, scale=0.1),
        variance=RNG.uniform(0.5, 1.5, 6).astype(np.float32), fc=draw(6, 5, scale=2.0),
    )  # fmt: skip


def quantised():
    """As onnxruntime's static quantisation writes it: int8 weights, int32 biases."""
    return model(
        """int8 (float[N, 3, 12, 12] x) => (float[N, 5] y) {
            q = QuantizeLinear (x, xs, xz)
            a = QLinearConv <strides = [2, 2]> (q, xs, xz, w, ws, wz, hs, hz, bias)
            b = DequantizeLinear (a, hs, hz)
            c = Relu (b)
            pooled = GlobalAveragePool (c)
            d = Flatten (pooled)
            w2 = DequantizeLinear <axis = 0> (fc, fcs, fcz)
            y = Gemm <transB = 1> (d, w2)
        }""",
        opset=19,
        xs=np.float32(0.03), xz=np.uint8(128), hs=np.float32(0.05), hz=np.uint8(120),
        w=RNG.integers(-127, 128, (6, 3, 3, 3)).astype(np.int8),
        ws=RNG.uniform(0.002, 0.004, 6).astype(np.float32), wz=np.zeros(6, np.int8),
        bias=RNG.integers(-900, 900, 6).astype(np.int32),
        fc=RNG.integers(-127, 128, (5, 6)).astype(np.int8),
        fcs=RNG.uniform(0.01, 0.03, 5).astype(np.float32), fcz=np.zeros(5, np.int8),
    )  # fmt: skip


def recurrent():
    """Batches fixed to one image, as many exporters leave them."""
    return model(
        """rnn (float[1, 6, 4] x) => (float[1, 5] y) {
            a = Transpose <perm = [1, 0, 2]> (x)
            b, bh, bc = LSTM <hidden_size = 3, direction = "bidirectional"> (a, w1, r1, b1)
            c = Transpose <perm = [0, 2, 1, 3]> (b)
            joined = Constant <value = int64[3] {0, 0, -1}> ()
            d = Reshape (c, joined)
            e, last = GRU <hidden_size = 4, linear_before_reset = 1> (d, w2, r2, b2)
            front = Constant <value = int64[1] {0}> ()
            f = Squeeze (last, front)
            y = Gemm (f, fc)
        }""",
        w1=draw(2, 12, 4, scale=0.5), r1=draw(2, 12, 3, scale=0.5), b1=draw(2, 24, scale=0.2),
        w2=draw(1, 12, 6, scale=0.5), r2=draw(1, 12, 4, scale=0.5), b2=draw(1, 24, scale=0.2),
        fc=draw(4, 5, scale=1.0),
    )  # fmt: skip


ZOO = {
    "lenet": (lenet, IMAGES, {"conv1_w", "fc2_b"}),
    "batch_norm": (batch_norm, COLOUR, {"w", "mean", "variance", "fc"}),
    "quantised": (quantised, COLOUR, {"w", "bias", "ws", "fc", "fcs"}),
    "recurrent": (recurrent, RNG.normal(size=(8, 6, 4)).astype(np.float32), {"w1", "r2", "fc"}),
}


def rerun(proto):
    """Naive, by ONNX's reference evaluator: the whole model with other words in one initialiser."""
    from onnx.reference import ReferenceEvaluator

    one = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1

    def run(name, words, images):
        broken = copy.deepcopy(proto)
        (tensor,) = (t for t in broken.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(words, name))
        evaluator = ReferenceEvaluator(broken)
        parts = images[:, None] if one else [images]
        with np.errstate(all="ignore"):
            return np.concatenate([evaluator.run(None, {"x": part})[0] for part in parts])

    return run


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the evaluator, where words are broken
@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    make, images, names = ZOO[name]
    proto = make()
    onnx.checker.check_model(proto, full_check=True)
    network = jfi.adopt(proto, images)
    assert names <= set(network.positions)
    check_campaign(network, images, rerun(proto), most=100)


def test_what_says_a_shape_is_no_site(tmp_path):
    proto = model(
        """net (float[N, 6] x) => (float[N, 3] y) {
            a = Reshape (x, shape)
            b = Mul (a, weights)
            y = ReduceSum <keepdims = 0> (b, axis)
        }""",
        shape=np.array([-1, 2, 3]), weights=draw(1, 2, 3), axis=np.array([1]),
    )  # fmt: skip
    onnx.save(proto, tmp_path / "net.onnx")
    network = jfi.adopt(tmp_path / "net.onnx", np.ones((2, 6), np.float32))
    assert set(network.positions) == {"weights"}
    assert set(network.left_out) == {"shape", "axis"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "n (float[N, 4] x) => (float[N, 4] y) { y = Bernoulli (x) }",
            "has a node Bernoulli .*, an operator that jfi does not know; it knows Abs, Acos",
        ),
        (
            "n (float[N, 4] x, float[N, 4] z) => (float[N, 4] y) { y = Add (x, z) }",
            r"takes x, z; it was given float32\[1, 4\]: give a dict by these names",
        ),
        (
            "n (int64[N, 2] x) => (float[a, b] y) { s = ReduceMax <keepdims = 0, axes = [0]> (x) "
            " y = Expand (w, s) }",
            "computes shapes from the values of images",
        ),
    ],
)
def test_models_that_are_refused(text, message):
    with pytest.raises(jfi.InputError, match=message):
        jfi.adopt(model(text, w=draw(1, 4)), np.ones((2, 4), np.float32))


@pytest.mark.parametrize("batch", ["N", "1"])
def test_several_inputs_and_outputs_go_by_name(batch):
    """Compared on the way in with ONNX's own evaluator; a head is judged by its name."""
    proto = model(
        f"""net (float[{batch}, 4] x, float[{batch}, 4] z)
            => (float[{batch}, 3] y, float[{batch}, 4] s) {{
            s = Add (x, z)
            y = MatMul (s, w)
        }}""",
        w=draw(4, 3),
    )
    inputs = {"z": draw(5, 4), "x": draw(5, 4)}
    both = jfi.adopt(proto, inputs)
    assert [array.name for array in both.outputs.arrays] == ["s", "y"]
    ordered = jfi.adopt(proto, (inputs["x"], inputs["z"]), output="y")
    engine = jfi.study(ordered, (inputs["x"], inputs["z"])).engine(ordered.sites)
    wanted = (inputs["x"] + inputs["z"]) @ onnx.numpy_helper.to_array(proto.graph.initializer[0])
    np.testing.assert_allclose(engine.golden.logits, wanted, rtol=1e-5)


def test_tokens_are_given_in_the_type_that_the_model_asks_for():
    proto = model(
        """n (int64[N, 3] x) => (float[N, 4] y) {
            e = Gather (table, x)
            y = ReduceMean <axes = [1], keepdims = 0> (e)
        }""",
        table=draw(9, 4),
    )
    tokens = RNG.integers(-9, 9, (4, 3))
    network = jfi.adopt(proto, tokens)
    wanted = numpy_helper.to_array(proto.graph.initializer[0])[tokens].mean(1)
    np.testing.assert_allclose(network.apply(network.params, tokens), wanted, rtol=1e-5)
    with pytest.raises(jfi.InputError, match="the model does not run in JAX on images float32"):
        jfi.adopt(proto, np.ones((4, 3), np.float32))


def test_dropout_in_training_mode_is_refused():
    proto = model(
        """n (float[N, 4] x) => (float[N, 4] y) {
            m = Mul (x, w)
            half = Constant <value_float = 0.5> ()
            on = Constant <value = bool {1}> ()
            y = Dropout (m, half, on)
        }""",
        w=draw(1, 4),
    )
    with pytest.raises(jfi.InputError, match=r"node Dropout \(y\) is in training mode"):
        jfi.adopt(proto, np.ones((2, 4), np.float32))


def cases():
    """ONNX's own tests of one node, by operator, of the types that JAX has."""
    from onnx.backend.test.case.node import collect_testcases

    found = {}
    for case in collect_testcases(None):
        nodes = case.model.graph.node if case.model is not None else []
        if len(nodes) != 1 or nodes[0].op_type not in OPERATORS or nodes[0].domain:
            continue
        data = [([array(x) for x in a], [array(x) for x in b]) for a, b in case.data_sets]
        if case.name not in ROUNDED and all(
            x.size and x.dtype.kind in "fiub" for pair in data for some in pair for x in some
        ):
            found.setdefault(nodes[0].op_type, []).append((case, data))
    return found


# -127.5 in exact numbers: how 2.5 / 0.0196 is rounded decides.
ROUNDED = {"test_dynamicquantizelinear"}


def array(value):
    return numpy_helper.to_array(value) if hasattr(value, "dims") else np.asarray(value)


def computed(case, inputs):
    """The outputs of a case by jfi's operator."""
    node = adopter._node(case.model.graph.node[0], case.model.opset_import[0].version)
    given = iter(inputs)
    values = [next(given) if name else None for name in node.inputs]
    for k, value in enumerate(values):
        if value is not None and k not in STATIC.get(node.op, ()):
            values[k] = jax.numpy.asarray(value)
    known = all(value is None or isinstance(value, np.ndarray) for value in values)
    found = OPERATORS[node.op](node._replace(xp=np if known else jax.numpy), *values)
    found = found if isinstance(found, tuple) else (found,)
    return [found[k] for k, name in enumerate(node.outputs) if name]


def check_cases(known):
    """How many cases of each operator are computed; the others are refused in so many words."""
    wrong, right = [], dict.fromkeys(known, 0)
    for op, (case, data) in ((op, case) for op, some in known.items() for case in some):
        try:
            for inputs, outputs in data:
                for a, b in zip(computed(case, inputs), outputs, strict=True):
                    a = np.asarray(a)
                    assert a.shape == b.shape, (a.shape, b.shape)
                    # Some of ONNX's results are written down in four digits: its own tolerance.
                    rough = 1e-2 if b.dtype.itemsize < 4 else case.rtol
                    numbers = (x.astype(np.float64) for x in (a, b))
                    np.testing.assert_allclose(*numbers, rtol=rough, atol=1e-5)
            right[op] += 1
        except jfi.InputError as error:
            assert "does not support" in str(error) or "training mode" in str(error)
        except Exception as error:
            wrong.append(f"{case.name}: {type(error).__name__} {error}"[:300])
    assert not wrong, "\n".join(wrong)
    return right


HARD = "AveragePool ConvTranspose GRU LSTM QLinearConv Slice".split()


@pytest.mark.filterwarnings("ignore")
def test_operators_do_what_onnx_says():
    """Some of ONNX's tests of what is easily got wrong."""
    found = cases()
    right = check_cases({op: found[op][:2] for op in HARD})
    assert all(right.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_operators_do_all_that_onnx_says():
    right = check_cases(cases())
    assert all(right.values()) and sum(right.values()) > 650


def bytes_of(path):
    """What magika looks at: the first and the last 1024 bytes without white space, 256 beyond."""
    content = path.read_bytes()
    start, end = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
    found = np.full(2048, 256, np.int32)
    found[: len(start)] = list(start)
    found[2048 - len(end) :] = list(end)
    return found


@pytest.mark.slow
def test_magika():
    """A network that is used: the type of a file, told by its bytes."""
    magika = pytest.importorskip("magika")
    folder = Path(magika.__file__).parent / "models"
    (path,) = folder.glob("*/model.onnx")
    root = Path(__file__).parents[3]
    files = [Path(jax.__file__), root / "README.md", root / "pyproject.toml", root / "LICENSE"]
    files += [root / "scripts" / "setup", Path(np.__file__).parent / "py.typed", path]
    files = [file for file in files if file.stat().st_size > 64]
    examples = np.stack([bytes_of(file) for file in files])
    network = jfi.adopt(path, examples)
    tool = magika.Magika()
    labels = json.loads(path.with_name("config.min.json").read_text())["target_labels_space"]
    told = np.asarray(network.apply(network.params, examples)).argmax(1)
    wanted = [str(tool.identify_path(file).dl.label) for file in files]
    assert [labels[k] for k in told] == wanted and len(set(wanted)) > 3
    assert len(network.positions) > 8
    check_campaign(network, examples, most=150)
