"""PyTorch modules adopted: a zoo, every verdict against PyTorch itself; and what is refused."""

import ml_dtypes
import numpy as np
import pytest
from adopting import check_campaign

import jfi
from jfi.adopt import torchax_import

torch = pytest.importorskip("torch")
pytest.importorskip("torch_zoo")
from torch import nn  # noqa: E402
from torch_zoo import (  # noqa: E402
    Convolutions,
    Embedding,
    Encoder,
    LeNet,
    MobileNetV2,
    Recurrent,
    ResNet,
    settled,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Beside JAX's own threads PyTorch's wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # The fused kernel of attention reads a mask of floats as true or false: other faults there.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
    torch.backends.mha.set_fastpath_enabled(fast)


def images(*shape):
    return lambda: torch.randn(8, *shape)


def tokens():
    return torch.randint(0, 20, (8, 6))


ZOO = {
    "lenet": (LeNet, images(1, 12, 12), {"conv1.weight", "conv2.bias", "fc3.weight"}),
    "batch_norm": (
        lambda: ResNet((6, 8), 1, 5),
        images(3, 16, 16),
        {"layer1.0.conv1.weight", "layer2.0.downsample.1.running_var", "bn1.running_mean"},
    ),
    "convolutions": (Convolutions, images(4, 8, 8), {"grouped.weight", "up.weight"}),
    "lstm": (lambda: Recurrent(nn.LSTM), images(5, 4), {"first.weight_hh_l0_reverse"}),
    "gru": (lambda: Recurrent(nn.GRU), images(5, 4), {"second.bias_ih_l0"}),
    "encoder": (Encoder, images(6, 4), {"encoder.layers.1.self_attn.in_proj_weight", "mask"}),
    "embedding": (Embedding, tokens, {"table.weight", "places.weight", "fc.bias"}),
}
LARGE = {
    "resnet18": (ResNet, images(3, 48, 48), {"layer1.0.conv1.weight", "layer4.1.bn2.running_var"}),
    "mobilenet_v2": (MobileNetV2, images(3, 48, 48), {"features.2.conv.0.0.weight"}),
}


def rerun(model):
    """Naive, by PyTorch: the whole module with other words in one tensor."""
    model = model.eval()

    def run(name, words, images):
        images = torch.from_numpy(np.asarray(images))
        images = images.long() if images.dtype == torch.int32 else images
        with torch.no_grad():
            return torch.func.functional_call(model, {name: torch.from_numpy(words)}, images)

    return run


def check(case, campaign=check_campaign, **options):
    make, draw, names = case
    model, example = settled(make()), draw()
    network = jfi.adopt(model, example)
    assert model.training
    found = {site.name for site in network.parameters}
    assert names <= found <= {*model.state_dict(), "mask"}
    campaign(network, network_images(example), rerun(model), **options)


def network_images(example):
    return example.numpy().astype(np.int32 if example.dtype == torch.int64 else np.float32)


QUICK = ("batch_norm", "gru", "embedding")


@pytest.mark.parametrize("name", QUICK)
def test_zoo(name):
    check(ZOO[name])


@pytest.mark.parametrize("name", [name for name in ZOO if name not in QUICK])
def test_more_of_the_zoo(name, campaign):
    check(ZOO[name], campaign)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large(name):
    check(LARGE[name], most=200)


def test_the_ways_of_the_engine_are_right_on_an_adopted_network():
    model, example = Embedding(), tokens()
    network = jfi.adopt(model, example)
    check_campaign(network, network_images(example), rerun(model), loop=False)


def test_tied_weights_are_one_site_and_integer_buffers_are_told():
    network = jfi.adopt(Embedding(), tokens())
    assert [name for name in network.positions if name.startswith(("table", "out"))] == [
        "table.weight"
    ]
    assert network.left_out["position"].startswith("int64 words, which JAX computes as int32")


def test_plain_attributes_narrow_types_and_tensors_made_on_the_way():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5, dtype=torch.bfloat16)
            self.scale = torch.linspace(0.5, 1.5, 6, dtype=torch.bfloat16)
            self.frozen = nn.Parameter(torch.ones(6, dtype=torch.bfloat16), requires_grad=False)

        def forward(self, x):
            x = x.to(torch.bfloat16) * self.scale + torch.tensor([0.5], dtype=torch.bfloat16)
            return self.fc(x * self.frozen).float()

    model, example = Odd(), torch.randn(4, 6)
    network = jfi.adopt(model, example)
    assert set(network.positions) == {"fc.weight", "fc.bias", "scale", "frozen"}
    assert {site.dtype for site in network.sites} == {np.dtype(ml_dtypes.bfloat16)}
    assert isinstance(model.scale, torch.Tensor) and model.scale.device.type == "cpu"
    # A later change of the model is none of the network's.
    before = network.values(network.sites[0]).copy()
    with torch.no_grad():
        model.scale.fill_(7), model.fc.weight.zero_()
    assert (network.values(network.sites[0]) == before).all()


def test_a_part_that_stays_in_training_mode_is_refused():
    class Stubborn(nn.Dropout):
        def train(self, mode=True):
            return super().train(True)

    model = nn.Sequential(nn.Linear(4, 3), Stubborn())
    with pytest.raises(jfi.InputError, match=r"training mode after eval\(\): its part 1 \(Stub"):
        jfi.adopt(model, torch.randn(2, 4))


def test_dropout_without_its_flag_is_found():
    class Always(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            return nn.functional.dropout(self.fc(x), 0.5)

    with pytest.raises(jfi.InputError, match="the model's own output is random: two runs differ"):
        jfi.adopt(Always(), torch.randn(4, 8))


def test_a_difference_says_how_large_and_where(monkeypatch):
    """As if an operator were translated wrongly, on one output alone."""
    from jfi.adopt import pytorch

    run = pytorch._run

    def wrong(module, arrays, x):
        return run(module, arrays, x).at[:, 2].add(0.25)

    monkeypatch.setattr(pytorch, "_run", wrong)
    with pytest.raises(jfi.InputError, match=r"differs from the model by 0\.25 at output 2 of ima"):
        jfi.adopt(nn.Linear(4, 3), torch.randn(2, 4))


def test_a_small_difference_of_small_outputs_is_one(monkeypatch):
    """Rounding is measured by the outputs' own size, not by 1."""
    from jfi.adopt import pytorch

    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.mul_(1e-4), model.bias.mul_(1e-4)
    jfi.adopt(model, torch.randn(2, 4))
    run = pytorch._run
    monkeypatch.setattr(pytorch, "_run", lambda *a: run(*a) * 1.01)
    with pytest.raises(jfi.InputError, match="differs from the model"):
        jfi.adopt(model, torch.randn(2, 4))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: (x, x.sum()), r"returns float32\[\] as 1 for one image; the first axis must be"),
        (lambda x: "x", "the network returns str 'x'"),
        (lambda x: x if x.sum() > 0 else -x, "does not run in JAX on images float32.* Concret"),
        (lambda x: torch.linalg.eig(torch.diag_embed(x))[0].real, "does not run in JAX"),
    ],
)
def test_what_can_not_be_adopted_is_said_in_one_line(model, message):
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return model(self.fc(x))

    with pytest.raises(jfi.InputError, match=message) as error:
        jfi.adopt(Ends(), torch.randn(2, 4))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", [True, False])
def test_several_inputs_and_outputs(names):
    """By position or by name, in a dict, compared with the module itself."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.fc, self.size = nn.Embedding(9, 4), nn.Linear(6, 3), nn.Linear(6, 1)

        def forward(self, tokens, state, scale=None):
            both = torch.cat([self.table(tokens).mean(1), state], 1)
            return {"kind": self.fc(both), "size": self.size(both), "none": scale}

    torch.manual_seed(0)
    tokens, state = torch.randint(0, 9, (5, 7)), torch.randn(5, 2)
    images = {"tokens": tokens, "state": state} if names else (tokens, state)
    model = Two()
    study = jfi.study(model, images, criterion="tolerance:0.1")
    assert [array.name for array in study.network.outputs.arrays] == ["kind", "size"]
    golden = study.engine(study.network.sites).golden.logits
    with torch.no_grad():
        found = model(tokens, state)
    wanted = torch.cat([found["kind"], found["size"]], 1).numpy()
    np.testing.assert_allclose(golden, wanted, rtol=1e-5, atol=1e-6)
    alone = jfi.adopt(model, images, output="kind")
    assert "size.weight" in alone.left_out and "fc.weight" in alone.positions


def test_double_precision_asks_for_x64():
    with pytest.raises(jfi.InputError, match=r"weight is float64, but JAX .* jax_enable_x64"):
        jfi.adopt(nn.Linear(4, 3).double(), torch.randn(2, 4))


def test_importing_torchax_leaves_torch_as_it_was():
    torch.backends.mha.set_fastpath_enabled(True)
    jfi.adopt(nn.Linear(4, 3), torch.randn(2, 4))
    assert torch.backends.mha.get_fastpath_enabled()
    assert torchax_import.torchax().__name__ == "torchax"
    with pytest.raises(AttributeError):
        _ = torch.ops.aten.add.no_such_overload
