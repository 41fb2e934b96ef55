"""MobileNetV2 small: depthwise convolutions as shifted products, and faults in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jfi
import nets
from jfi.engine import verify
from nets.layers import depthwise_by_taps
from nets.mobilenet import MobileNetV2, Stage

# A block that adds its input, and one that strides.
STAGES = (Stage(1, 4, 1, 1), Stage(3, 6, 1, 2))
SITES = "layers_0/conv2/kernel|layers_1/conv1/kernel|layers_1/conv2/kernel"


def small() -> nets.Net:
    module = MobileNetV2(STAGES, stem=4, head=12, num_classes=5)
    return nets.Net("small", module, (8, 8, 3), 5, (0.0,) * 3, (1.0,) * 3)


@pytest.fixture(scope="module")
def trained() -> tuple[nets.Net, dict, np.ndarray]:
    """Net, variables with running statistics of the images, images."""
    net = small()
    variables = nets.init(net, 0)
    # Each image has a colour of its own: of noise alone, the mean over pixels is the same for all.
    images = sum(np.random.default_rng(0).normal(size=(9, n, n, 3)) for n in (1, 8))
    images = images.astype(np.float32)
    learn = jax.jit(lambda v: net.module.apply(v, images, train=True, mutable=["batch_stats"])[1])
    for _ in range(40):
        variables |= learn(variables)
    return net, variables, images


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 0), (0, 2))])
def test_shifted_products_are_the_depthwise_convolution(strides, padding):
    """Values and both gradients, against XLA's own, on sides odd and even."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 6, 5)).astype(np.float32)
    kernel = rng.normal(size=(3, 2, 1, 5)).astype(np.float32)
    options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=5)

    def outcome(convolve):
        def loss(x, kernel):
            y = convolve(x, kernel, strides, padding, **options)
            return (y**3).sum(), y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, kernel)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        outcome(depthwise_by_taps),
        outcome(lax.conv_general_dilated),
    )


def test_the_fast_net_has_the_same_variables_and_logits(trained):
    net, variables, images = trained
    fast = nets.fast(net)
    assert "conv_general_dilated" in str(jax.make_jaxpr(net.module.apply)(variables, images))
    shapes = jax.tree.map(jnp.shape, nets.init(fast, 0))
    assert shapes == jax.tree.map(jnp.shape, variables)
    apply = jax.jit(nets.apply, static_argnums=0)
    expected = apply(net, variables, images)
    np.testing.assert_allclose(apply(fast, variables, images), expected, atol=1e-4)


def test_other_nets_are_fast_as_they_are():
    net = nets.build("resnet20")
    assert nets.fast(net) is net


@pytest.fixture(scope="module")
def runner(trained) -> jfi.Engine:
    net, variables, images = trained
    network = jfi.network(net.module.apply, variables, images[0])
    return jfi.Engine(network, images, np.arange(9) % 5, jfi.select(network, SITES), loop=False)


def test_faults_agree_with_naive_reruns(runner):
    """Pointwise and depthwise kernels, ReLU6 and the residual: two measures, every bit."""
    space = jfi.FaultSpace(runner.sites, (2,))
    ids = [space.stratum_ids(site, bit, np.arange(3) * 7) for site, bit in np.argwhere(space.cells)]
    faults = space.decode(np.concatenate(ids))
    full, critical = (runner.run(faults, measure) for measure in ("full", "critical"))
    np.testing.assert_array_equal(critical.critical, full.critical)
    assert 0 < (full.critical > 0).sum() < faults.site.size
    assert critical.certified.sum() > 0
    image = np.random.default_rng(1).integers(0, 9, faults.site.size)
    for measure in ("full", "critical"):
        found = verify.verify(runner, faults, image, measure)
        assert found.disagreements == 0, found.worst
        assert found.agreements > 0.9 * found.pairs
