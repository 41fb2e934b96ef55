"""The transformers: their blocks are PyTorch's, texts are read from left to right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nets
from nets.transformer import CHARACTERS, Block, Sizes

torch = pytest.importorskip("torch")
SIZES = Sizes(width=12, heads=3, wider=2)


def twin(params: dict) -> "torch.nn.Module":
    """PyTorch's own block with these parameters."""
    block = torch.nn.TransformerEncoderLayer(
        12, 3, 24, 0.0, lambda x: torch.nn.functional.gelu(x, approximate="tanh"), 1e-6,
        batch_first=True, norm_first=True,
    ).eval()  # fmt: skip
    attention, mlp = params["attention"], params["mlp"]
    parts = [attention[name] for name in "qkv"]
    given = {
        "self_attn.in_proj_weight": np.concatenate([part["kernel"].T for part in parts]),
        "self_attn.in_proj_bias": np.concatenate([part["bias"] for part in parts]),
    }
    dense = {"self_attn.out_proj": attention["projection"], "linear1": mlp["fc1"]}
    for name, own in (dense | {"linear2": mlp["fc2"]}).items():
        given |= {f"{name}.weight": own["kernel"].T, f"{name}.bias": own["bias"]}
    for name in ("norm1", "norm2"):
        given |= {f"{name}.weight": params[name]["scale"], f"{name}.bias": params[name]["bias"]}
    block.load_state_dict({name: torch.tensor(np.array(x)) for name, x in given.items()})
    return block


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_is_pytorch_s(causal):
    x = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
    block = Block(SIZES, causal)
    params = block.init(jax.random.key(0), x)["params"]
    keys = iter(jax.random.split(jax.random.key(1), 99))
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), params)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5) if causal else None
    with torch.no_grad():
        expected = twin(params)(torch.tensor(x), src_mask=mask).numpy()
    np.testing.assert_allclose(block.apply({"params": params}, x), expected, atol=2e-5)


def test_a_gpt_sees_no_character_to_come():
    net = nets.build("gpt", (7,))
    variables = nets.init(net, 0)
    x = np.random.default_rng(0).integers(0, len(CHARACTERS), (1, 7)).astype(np.float32)
    other = x.copy()
    other[0, 4] = (x[0, 4] + 1) % len(CHARACTERS)
    before, after = (np.asarray(nets.apply(net, variables, one)) for one in (x, other))
    assert before.shape == (1, 7, len(CHARACTERS))
    np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-5)
    assert (abs(before[:, 4:] - after[:, 4:]).max(axis=-1) > 1e-3).all()


def test_a_vit_has_sixteen_patches_and_one_token_of_its_own():
    for shape in ((8, 8, 1), (28, 28, 1), (32, 32, 3)):
        params = jax.eval_shape(
            nets.build("vit", shape).module.init, jax.random.key(0), jnp.zeros((1, *shape))
        )["params"]
        assert params["position"].shape == (17, 64)
        assert params["embedding"]["kernel"].shape == (shape[0] // 4, shape[1] // 4, shape[2], 64)
    with pytest.raises(nets.NetError, match="vit: images of 30x28; sides that are multiples of 4"):
        nets.build("vit", (30, 28, 1))
