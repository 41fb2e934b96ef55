"""The peers' PyTorch models have our weights and give our logits."""

import jax
import numpy as np
import pytest
import torch

import nets
from experiments import target
from experiments.bench import models
from jfi.errors import InputError
from nets.mobilenet import MobileNetV2, Stage


def small_mobilenet() -> nets.Net:
    stages = (Stage(1, 4, 1, 1), Stage(3, 4, 2, 1), Stage(3, 6, 2, 2))
    module = MobileNetV2(stages, stem=8, head=12, num_classes=5)
    return nets.Net("mobilenetv2", module, (8, 8, 3), 5, (0.0,) * 3, (1.0,) * 3)


NETS = {
    "lenet": lambda: nets.build("lenet", (8, 8, 1)),
    "resnet20": lambda: nets.build("resnet20", (8, 8, 3)),
    "mobilenetv2": small_mobilenet,
}


def randomised(path, leaf, rng=np.random.default_rng(0)):  # noqa: B008
    """Kernels as they are; biases, scales and statistics not those that training begins with."""
    middle = {"bias": 0.0, "mean": 0.0, "scale": 1.0, "var": 1.0}.get(path[-1].key)
    return leaf if middle is None else rng.uniform(-0.5, 0.5, leaf.shape).astype("f") + middle


@pytest.mark.parametrize("name", NETS)
def test_models_give_our_logits(name):
    net, rng = NETS[name](), np.random.default_rng(1)
    variables = jax.tree_util.tree_map_with_path(randomised, nets.init(net, 0))
    x = rng.normal(size=(3, *net.input_shape)).astype(np.float32)
    model = models.module(net, target.read(net, variables))
    with torch.inference_mode():
        found = model(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    expected = jax.jit(net.module.apply)(variables, x)
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet9", "resnet18", "vgg11"])
def test_other_nets_have_no_model(name):
    with pytest.raises(InputError, match=f"net {name} has no PyTorch model here; lenet, resnet20"):
        models.module(nets.build(name), None)
