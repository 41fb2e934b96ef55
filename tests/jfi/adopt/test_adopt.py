"""What `jfi.adopt` takes, and what it says of everything else."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfi

IMAGES = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
PARAMS = {"w": np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)}


def apply(params, x):
    return jax.nn.relu(x) @ params["w"]


def refused(message, model, example=IMAGES, **options):
    with pytest.raises(jfi.InputError, match=message) as error:
        jfi.adopt(model, example, **options)
    assert "\n" not in str(error.value).split("\n---")[0]


def test_a_function_and_its_parameters():
    network = jfi.adopt((apply, PARAMS), IMAGES)
    assert set(network.positions) == {"w"}
    np.testing.assert_allclose(network.apply(PARAMS, IMAGES), apply(PARAMS, IMAGES), rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (None, "model is None, which jfi does not know; it takes a PyTorch, Keras"),
        ({"w": 1}, "model is dict of 'w', which"),
        ((apply,), "model is tuple of 1, which"),
        ((PARAMS, apply), "model is tuple of 2, which"),
        (apply, "model is function apply, which"),
    ],
)
def test_what_is_no_model(model, said):
    refused(said, model)


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (None, "example is None; it must be a batch"),
        (np.ones(6, np.float32), r"example is float32\[6\]; it must be a batch"),
        (np.ones((0, 6), np.float32), r"example is float32\[0, 6\]; .* at least one image"),
        ([[1.0]], "example is list of 1; it must be a batch"),
    ],
)
def test_what_is_no_example(example, said):
    refused(said, (apply, PARAMS), example)


def test_files(tmp_path):
    refused(r"model is the path 'net.pth'; jfi reads .onnx and .nir files", "net.pth")
    refused("missing.onnx', and there is no such file", str(tmp_path / "missing.onnx"))
    for name, library in (("a.onnx", "onnx"), ("a.nir", "nir")):
        pytest.importorskip(library)
        (tmp_path / name).write_bytes(b"no such thing")
        refused(f"is no .* that {library} can read", tmp_path / name)


@pytest.mark.parametrize(("file", "library"), [("net.onnx", "onnx"), ("net.nir", "nir")])
def test_a_missing_library_is_named_with_its_command(file, library, tmp_path, monkeypatch):
    (tmp_path / file).touch()
    monkeypatch.setitem(sys.modules, library, None)
    command = rf"needs {library}, which is not installed: pip install 'jfi\[{library}\]'"
    refused(command, tmp_path / file)


def test_missing_torchax_is_named_with_its_command(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.delitem(sys.modules, "torchax", raising=False)
    real = __import__("importlib").import_module

    def without(name, *rest):
        if name == "torchax":
            raise ModuleNotFoundError("No module named 'torchax'", name="torchax")
        return real(name, *rest)

    monkeypatch.setattr("importlib.import_module", without)
    refused(r"needs torchax, .* pip install 'jfi\[torch\]'", torch.nn.Linear(6, 3))


def test_wide_types_are_computed_as_jax_does():
    network = jfi.adopt((apply, PARAMS), IMAGES.astype(np.float64))
    assert network.program.x.aval.dtype == np.float32
    table = {"t": np.eye(4, dtype=np.float32)}
    network = jfi.adopt((lambda p, x: p["t"][x].sum(1), table), np.zeros((2, 3), np.int64))
    assert network.program.x.aval.dtype == np.int32


def test_a_jax_example():
    assert jfi.adopt((apply, PARAMS), jnp.asarray(IMAGES)).program.x.aval.shape == (1, 6)
