"""The boundary scalings and the embedding of w, against diffusers; the golden values stand in test_lcd.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.consistency import boundary_scalings, consistency_function, guidance_embedding
from lcm_jax.diffusion.schedule import PREDICTION_TYPES, make_schedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def test_boundary_scalings_equal_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.LCMScheduler(**SD)
    t = [0, 1, 19, 259, 999]
    theirs = [scheduler.get_scalings_for_boundary_condition_discrete(x) for x in t]
    np.testing.assert_allclose(np.stack(boundary_scalings(jnp.array(t)), axis=1), theirs, rtol=1e-6)
    c_skip, c_out = boundary_scalings(jnp.array([0]))
    assert (c_skip, c_out) == (1, 0), "exact at t = 0"
    c_skip, c_out = boundary_scalings(jnp.array([1]))
    assert 0 < c_skip < 0.01 and 0.99 < c_out < 1, "and at t = 0 only"


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_consistency_function_equals_diffusers(kind):
    torch = pytest.importorskip("torch")
    from diffusers import LCMScheduler

    theirs = LCMScheduler(**SD, prediction_type=kind)
    theirs.set_timesteps(50)
    z, output = np.random.default_rng(0).standard_normal((2, 4, 3, 2, 1)).astype(np.float32)
    t = [19, 259, 499, 999]
    ours = consistency_function(make_schedule(SD | {"prediction_type": kind}), output, z, jnp.array(t))
    for i, step in enumerate(t):
        theirs._step_index = None
        expected = theirs.step(torch.tensor(output[i]), step, torch.tensor(z[i])).denoised.numpy()
        np.testing.assert_allclose(ours[i], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dim", [256, 64])
def test_the_guidance_embedding_equals_diffusers(dim):
    torch = pytest.importorskip("torch")
    from diffusers import LatentConsistencyModelPipeline

    w = np.array([0.0, 0.5, 2.0, 7.0, 7.5, 14.0], np.float32)
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor(w), dim, torch.float32)
    # The angles reach 14,000, where neighbouring float32 numbers are 1e-3 apart.
    np.testing.assert_allclose(guidance_embedding(jnp.asarray(w), dim), theirs, atol=2e-3)
