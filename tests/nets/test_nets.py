"""The registry and the networks: names, shapes, types, normalisation, bad input."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import jfi
import nets
from nets.net import Net
from nets.resnet import ResNet

LENET_SHAPES = [(28, 28, 1), (32, 32, 1), (32, 32, 3), (8, 8, 1)]


def variables_of(net: nets.Net) -> dict:
    """Shapes and types of the variables, without running anything."""
    return jax.eval_shape(net.module.init, jax.random.key(0), jnp.zeros((1, *net.input_shape)))


def logits_of(net: nets.Net, batch: int) -> jax.ShapeDtypeStruct:
    images = jnp.zeros((batch, *net.input_shape))
    return jax.eval_shape(net.module.apply, variables_of(net), images)


def shapes(net: nets.Net) -> dict[str, tuple[int, ...]]:
    """Shapes of the variables by path."""
    leaves = traverse_util.flatten_dict(variables_of(net), sep="/")
    return {name: leaf.shape for name, leaf in leaves.items()}


def kernel_words(net: nets.Net) -> int:
    return sum(np.prod(s) for k, s in shapes(net).items() if k.endswith("kernel"))


def parameters(net: nets.Net) -> int:
    """Values that training changes: all but the running statistics."""
    return sum(np.prod(s) for k, s in shapes(net).items() if k.startswith("params/"))


@pytest.mark.parametrize("shape", LENET_SHAPES)
def test_lenet_maps_images_to_logits(shape):
    net = nets.build("lenet", shape)
    assert logits_of(net, 3).shape == (3, 10)
    assert {k.split("/")[1] for k in shapes(net)} == {"conv1", "conv2", "fc1", "fc2", "fc3"}


@pytest.mark.parametrize("shape", LENET_SHAPES[:2])
def test_lenet_has_the_layer_sizes_of_the_paper(shape):
    """LeCun 1998: C1 has 156 parameters; C5 48,120; F6 10,164."""
    net = nets.build("lenet", shape)
    count = dict.fromkeys(("conv1", "fc1", "fc2"), 0)
    for name, size in shapes(net).items():
        layer = name.split("/")[1]
        if layer in count:
            count[layer] += np.prod(size)
    assert count == {"conv1": 156, "fc1": 48_120, "fc2": 10_164}


def test_small_lenet_is_small_enough_for_an_exhaustive_campaign():
    assert kernel_words(nets.build("lenet", (8, 8, 1))) == 54 + 648 + 1536 + 768 + 240


@pytest.mark.parametrize(
    ("name", "layers", "words"), [("resnet20", 20, 268_336), ("resnet56", 56, 848_944)]
)
def test_resnet_has_the_kernels_of_the_literature(name, layers, words):
    """268,336 kernel words of ResNet-20: Ruospo et al., DATE 2023, Table I less 10 biases."""
    net = nets.build(name)
    kernels = [k for k in shapes(net) if k.endswith("kernel")]
    assert len(kernels) == layers
    assert {"params/conv1/kernel", "params/layer1_0/conv1/kernel", "params/linear/kernel"} <= set(
        kernels
    )
    assert kernel_words(net) == words


@pytest.mark.parametrize(
    ("name", "layers", "count"),
    [
        ("resnet9", 9, 6_575_370),
        ("resnet18", 21, 11_173_962),
        ("vgg11", 9, 9_231_114),
        ("vgg16", 14, 14_728_266),
        # 2,296,922 of kuangliu's, less 58,240 kernel words and 912 of BN on four shortcuts.
        ("mobilenetv2", 54, 2_237_770),
    ],
)
def test_deep_nets_have_the_parameters_of_the_literature(name, layers, count):
    """Totals that the PyTorch definitions named in the docstrings are known for."""
    net = nets.build(name)
    assert sum(k.endswith("kernel") for k in shapes(net)) == layers
    assert parameters(net) == count


def test_mobilenet_has_the_kernels_of_the_paper():
    """Ruospo et al., DATE 2023, Table II; 64 stuck-at faults a word."""
    words = kernel_words(nets.build("mobilenetv2"))
    assert (words, 64 * words) == (2_203_584, 141_029_376)


def test_mobilenet_is_the_network_that_the_engine_sees():
    """All its layers are sites: pointwise and depthwise convolutions, and the dense one."""
    net = nets.build("mobilenetv2")
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables_of(net))
    sites = jfi.select(jfi.network(net.module.apply, variables, jnp.zeros(net.input_shape)))
    assert (len(sites), sum(site.words for site in sites)) == (54, 2_203_584)


@pytest.mark.parametrize("name", [n for n in nets.names() if not n.startswith(("snn_", "gpt"))])
@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3)])
def test_every_net_takes_the_images_of_mnist_and_cifar(name, shape):
    assert logits_of(nets.build(name, shape, 7), 3).shape == (3, 7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_nets_compute_in_the_type_they_are_built_for(dtype):
    net = nets.build("lenet", (8, 8, 1), dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables_of(net))} == {jnp.dtype(dtype)}
    assert logits_of(net, 2).dtype == dtype


def test_resnet_in_bfloat16_stays_near_float32():
    x = jax.random.uniform(jax.random.key(1), (4, 16, 16, 3))
    wide, narrow = (ResNet(1, dtype=d, param_dtype=d) for d in (jnp.float32, jnp.bfloat16))
    variables = jax.jit(wide.init)(jax.random.key(0), x)
    cast = {
        "params": jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables["params"]),
        "batch_stats": variables["batch_stats"],
    }
    logits = jax.jit(narrow.apply)(cast, x)
    assert logits.dtype == jnp.bfloat16
    expected = jax.jit(wide.apply)(variables, x)
    np.testing.assert_allclose(
        logits.astype(jnp.float32), expected, atol=0.05 * abs(expected).max()
    )


def test_apply_is_inference():
    """An image's logits don't depend on its neighbours in the batch."""
    net = Net("resnet8", ResNet(1), (8, 8, 3), 10, (0.0,) * 3, (1.0,) * 3)
    variables, x = nets.init(net, 0), jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    apply = jax.jit(net.module.apply)
    alone = apply(variables, x[:1])
    np.testing.assert_allclose(apply(variables, x)[:1], alone, rtol=1e-4, atol=1e-5)


def test_init_is_seeded():
    net = nets.build("lenet", (8, 8, 1))
    first, again, other = (nets.init(net, seed)["params"]["fc1"]["kernel"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_normalise_takes_mean_and_divides_by_deviation():
    net = nets.build("resnet20")
    images = np.random.default_rng(0).random((2, 32, 32, 3))
    x = nets.normalise(net, images)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x[..., 1], (images[..., 1] - 0.456) / 0.224, rtol=1e-5, atol=1e-6)


def test_mean_and_deviation_are_the_users():
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    images = np.random.default_rng(0).random((2, 32, 32, 3))
    x = nets.normalise(nets.normalising(nets.build("resnet20"), mean, std), images)
    np.testing.assert_allclose(x, (images - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "mean", "std", "message"),
    [
        ("resnet20", [0.5], [0.5], "mean 0.5: 1 numbers; images of resnet20 have 3 channels"),
        ("resnet20", [0.5] * 3, [0.5] * 4, "std 0.5,0.5,0.5,0.5: 4 numbers"),
        ("lenet", [np.nan], [1], "mean nan: finite"),
        ("lenet", [1e39], [1], "mean 1e+39: finite"),  # in float32 it isn't
        ("lenet", [0.5], [0], "std 0: finite numbers above 0"),
        ("lenet", [0], [1e-46], "std 1e-46: finite numbers above 0"),
        ("lenet", [0.5], [1e-39], "std 1e-39: finite numbers above 0"),
        ("lenet", [0.5], [-1], "std -1: finite numbers above 0"),
        ("lenet", [0.5], [np.nan], "std nan: finite numbers above 0"),
        ("lenet", [0.5], [np.inf], "std inf: finite numbers above 0"),
        ("snn_nmnist", [0.5], [1], "snn_nmnist takes events, which are not normalised"),
    ],
)
def test_means_and_deviations_that_are_none(name, mean, std, message):
    with pytest.raises(nets.NetError, match=re.escape(message)):
        nets.normalising(nets.build(name), mean, std)


@pytest.mark.parametrize("shape", [(2, 28, 28, 1), (32, 32, 3), (2, 3, 32, 32)])
def test_normalise_refuses_images_of_another_shape(shape):
    with pytest.raises(nets.NetError, match=r"resnet20 takes .*\(32, 32, 3\)"):
        nets.normalise(nets.build("resnet20"), np.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet19"}, "'resnet19' is unknown; known are lenet, resnet20"),
        ({"name": "lenet", "input_shape": (16, 16, 1)}, "16x16; known are 8x8, 28x28, 32x32"),
        ({"name": "lenet", "input_shape": (28, 28, 2)}, "2 channels"),
        ({"name": "resnet20", "input_shape": (32, 32)}, "(height, width, channels)"),
        ({"name": "lenet", "num_classes": 1}, "1 classes"),
        ({"name": "lenet", "dtype": jnp.int8}, "dtype int8"),
        ({"name": "resnet9", "input_shape": (4, 32, 3)}, "4x32; 8x8 is smallest"),
        ({"name": "vgg11", "input_shape": (48, 32, 3)}, "48x32; 32x32 is the largest"),
        ({"name": "lenet", "dtype": "float31"}, "'float31' is unknown"),
        ({"name": "lenet", "dtype": jnp.float64}, "JAX_ENABLE_X64"),
    ],
)
def test_build_says_what_is_wrong(arguments, message):
    with pytest.raises(nets.NetError) as error:
        nets.build(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["lenet", "resnet20"])
def test_naming_layers_changes_no_number(name):
    net = nets.build(name)
    variables = nets.init(net, 0)
    x = np.random.default_rng(0).normal(size=(2, *net.input_shape)).astype("f4")
    plain, named = (jax.jit(partial(f, net)) for f in (nets.apply, nets.apply_named))
    np.testing.assert_array_equal(plain(variables, x), named(variables, x))
    text = str(jax.make_jaxpr(partial(nets.apply_named, net))(variables, x))
    assert "name=conv1/output" in text and "output" not in str(jax.make_jaxpr(plain)(variables, x))
