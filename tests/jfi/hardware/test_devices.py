"""jfi.hardware.devices: several devices give the outcomes of one."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = """
import jax, numpy as np
import jfi
from jfi import bits
from jfi.faults import Faults
from jfi.engine.inputs import MEASURES
from jfi.hardware.devices import hardware

def conv(x, w, stride):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

def apply(params, x):
    x = jax.nn.relu(conv(x, params["a"], 1))
    x = jax.nn.relu(conv(x, params["b"], 2))
    x = jax.nn.relu(conv(x, params["c"], 2))
    return x.mean((1, 2)) @ params["d"]

rng = np.random.default_rng(0)
shapes = dict(a=(3, 3, 2, 4), b=(3, 3, 4, 4), c=(3, 3, 4, 8), d=(8, 5))
params = {name: rng.normal(0, .3, shape).astype(np.float32) for name, shape in shapes.items()}
images = rng.normal(size=(13, 8, 8, 2)).astype(np.float32)
labels = rng.integers(0, 5, 13)
network = jfi.network(apply, params, images[0])
sites = jfi.select(network)
space = jfi.FaultSpace(sites, (0, 1))
faults = space.decode(np.sort(rng.choice(space.size, 3000, replace=False)))
devices = jax.local_devices()
assert len(devices) == 4
found, radii = {}, {}
for count in (1, 3):
    own = dict(hardware=hardware(devices[:count]))
    engine = jfi.Engine(network, images, labels, sites, loop=False, **own)
    engine.make_radii()
    starts = engine._cut_to_cut.pruner.starts
    radii[count] = [starts[k].radii.codes(images).astype(int) for k in range(4)]
    found[count] = {m: engine.run(faults, m, keep_bits=True) for m in MEASURES}
    looped = jfi.Engine(network, images, labels, sites, loop=True, **own)
    found[count]["loop"] = looped.run(faults, keep_bits=True)
    assert engine.hardware.count == count
for one, many in zip(radii[1], radii[3], strict=True):
    assert abs(one - many).max() <= 1, abs(one - many).max(axis=0)
# Whether a last bit of a logit moves, its program says: of few pairs, masked or just not.
close = {"masked", "non_critical", "sdc_0_5", "masked_bits"}
for measure in found[1]:
    one, many = (found[count][measure]._asdict() for count in (1, 3))
    for field in set(one) - close:
        assert np.array_equal(one[field], many[field]), (measure, field)
    if one["masked"] is not None:
        assert abs(one["masked"] - many["masked"]).sum() < 3000 * 13 / 1000
        kept = [told["masked"] + told["sdc_0_5"] for told in (one, many)]
        assert np.array_equal(*kept), measure
assert (found[1]["full"].critical > 0).sum() > 30
assert np.array_equal(found[1]["full"].critical, found[1]["loop"].critical)
assert found[1]["critical"].certified.sum() > 1000
print("same")
"""


# A state of Flax NNX holds the random keys of its dropout, whether it is on or not.
KEYS = """
import jax, numpy as np
from flax import nnx
import jfi
from jfi.hardware.devices import hardware

class Net(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(6, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.c = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.c(self.drop(nnx.relu(self.a(x))))

graph, state = nnx.split(Net(nnx.Rngs(0)))
images = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
network = jfi.network(lambda state, x: nnx.merge(graph, state)(x), state, images[0])
faults = jfi.FaultSpace(network.sites, (2,)).decode(np.arange(0, 2000, 50))
found = []
for count in (1, 4):
    devices = hardware(jax.local_devices()[:count])
    engine = jfi.Engine(network, images, np.zeros(5, int), network.sites, hardware=devices)
    assert engine.hardware.count == count
    found.append([engine.run(faults, m).critical for m in ("full", "critical")])
assert np.array_equal(*found)
print("same")
"""


@pytest.mark.parametrize("script", [SCRIPT, KEYS])
def test_several_devices_give_the_outcomes_of_one(script):
    """In a process of its own: the number of host devices is fixed when JAX starts."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True, text=True, env=env, cwd=Path(__file__).parents[3], check=False,
    )  # fmt: skip
    assert found.stdout == "same\n", found.stderr
