"""jfi.engine.screen: verdicts in reduced precision first, in full where that leaves a doubt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfi
from jfi.engine import screen, verify
from jfi.engine.engine import Engine
from jfi.networks.program import bind

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(16, 8, 8, 3)).astype(np.float32)
LABELS = RNG.integers(0, 5, 16)
PARAMS = {
    "a": RNG.normal(0, 0.2, (3, 3, 3, 8)).astype(np.float32),
    "b": RNG.normal(0, 0.2, (3, 3, 8, 8)).astype(np.float32),
    "c": RNG.normal(0, 0.2, (8, 5)).astype(np.float32),
}


def apply(params, x):
    for name in "ab":
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(
                x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
    return x.mean((1, 2)) @ params["c"]


def engine(screen=None) -> Engine:
    network = jfi.network(apply, PARAMS, IMAGES[0])
    return Engine(network, IMAGES, LABELS, jfi.select(network), screen=screen)


@pytest.fixture(scope="module")
def faults():
    space = jfi.FaultSpace(engine().sites, (0, 1))
    return space.decode(np.sort(RNG.choice(space.size, 4000, replace=False)))


def test_screened_verdicts_are_those_in_full(faults):
    """Precision is reduced, a part runs again, and the verdicts are the same."""
    full, rough = engine(), engine("bfloat16")
    image = np.zeros(faults.site.size, int)
    logits = rough.pairs(faults, image, reduced=True).logits
    finite = np.isfinite(logits).all(1)
    assert np.abs(logits[finite] - full.pairs(faults, image).logits[finite]).max() > 1e-4
    doubt = screen.doubtful(logits, rough._to_logits._threshold).mean()
    assert 0 < doubt < 0.5
    for measure in ("critical", "detect"):
        wanted, found = (e.run(faults, measure) for e in (full, rough))
        assert np.array_equal(wanted.critical, found.critical)
    assert found.critical.sum() > 20


def test_tfloat32_is_float32_on_a_cpu(faults):
    rough, image = engine("tfloat32"), np.zeros(faults.site.size, int)
    assert jax.default_backend() != "cpu" or rough._to_logits._threshold < 1e-5
    found = verify.verify(rough, faults, image, "critical")
    assert found.disagreements == 0
    assert found.pairs == faults.site.size


def noisy(eqn, values):
    """An evaluation that is far off."""
    (out,) = bind(eqn, values)
    return [out * jnp.cos(jnp.arange(out.shape[-1]))]


def test_audit_finds_a_threshold_that_is_too_low(faults, monkeypatch):
    """Without a doubt, wrong verdicts stand; the audit says so and bounds them."""
    monkeypatch.setattr(screen, "doubtful", lambda logits, _: np.zeros(len(logits), bool))
    monkeypatch.setitem(screen.REDUCED, "bfloat16", noisy)
    image = np.arange(faults.site.size) % len(IMAGES)
    found = verify.verify(engine("bfloat16"), faults, image, "critical")
    assert found.disagreements > 10
    assert 1 > found.bound > found.disagreements / found.pairs


@pytest.mark.parametrize(("wrong", "pairs"), [(0, 2000), (3, 500), (5, 5)])
def test_bound_against_scipy(wrong, pairs):
    from scipy import stats

    found = verify.Verification(pairs, pairs - wrong, 0, wrong).bound
    exact = stats.binomtest(wrong, pairs, alternative="less").proportion_ci(0.95).high
    assert found == pytest.approx(exact)


def test_threshold_is_four_times_what_a_gap_may_be_off():
    full = np.array([[10.0, 0], [1, 0], [np.inf, 0]])
    assert screen.threshold(full, full + np.eye(3, 2) * 0.1 * [1, 0]) == pytest.approx(0.08)
    doubt = screen.doubtful(np.array([[10.0, 9.3], [10, 9.1], [0.05, 0], [np.nan, 1]]), 0.08)
    assert doubt.tolist() == [True, False, True, True]


def test_bad_screen(faults):
    with pytest.raises(jfi.InputError, match="screen 'half' is unknown; choose from bfloat16"):
        engine("half")
    with pytest.raises(jfi.InputError, match="screen 'bfloat16' tells critical or not"):
        engine("bfloat16").run(faults, "full")
