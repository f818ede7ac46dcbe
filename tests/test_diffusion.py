"""The objectives of the embedded teacher and autoencoder, against their formulas written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.schedule import make_schedule
from lcm_jax.models.conditioning import Conditioning
from lcm_jax.objectives import autoencoder, diffusion
from lcm_jax.objectives.diffusion import Diffusion
from lcm_jax.objectives.networks import Examples, Networks
from lcm_jax.recipes.diffusion import SCHEDULE

RNG = np.random.default_rng(0)
B, SIDE, C, LENGTH = 4, 3, 2, 5


def normal(*shape) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_diffusion_loss_is_the_squared_error_of_what_the_network_predicts(prediction_type):
    schedule = make_schedule(SCHEDULE | {"prediction_type": prediction_type})
    z, context = normal(B, SIDE, SIDE, C), normal(B, LENGTH)
    u = np.array([0.0, 0.3, 0.7, 0.9999], np.float32)
    draws = diffusion.Draws(normal(B, SIDE, SIDE, C), normal(B, SIDE, SIDE, C), u, np.ones(B, bool))
    student = lambda z, t, told: 0.7 * z + told.context.sum(-1)[:, None, None, None] + t[:, None, None, None] / 1000  # noqa: E731
    prompt = Conditioning(jnp.asarray(context))
    found, metrics = Diffusion(prediction_type).loss(
        Networks(student, None, None, schedule), Examples(z, prompt, prompt), draws
    )

    t = np.array([0, 300, 700, 999])
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bar = np.cumprod(1 - betas)[t][:, None, None, None]
    noisy = np.sqrt(bar) * z + np.sqrt(1 - bar) * draws.noise
    output = 0.7 * noisy + (context.sum(-1) + t / 1000)[:, None, None, None]
    wanted = {"epsilon": draws.noise, "sample": z, "v_prediction": np.sqrt(bar) * draws.noise - np.sqrt(1 - bar) * z}[
        prediction_type
    ]
    np.testing.assert_allclose(found, np.mean((output - wanted) ** 2), rtol=1e-5)
    assert metrics["loss"] == found


@pytest.mark.parametrize("power", [1.0, 0.6])
def test_timesteps_come_as_often_as_the_power_says(power):
    latents = jax.ShapeDtypeStruct((20_000, 1, 1, 1), jnp.float32)
    draws = Diffusion(prompt_dropout=0.25, timestep_power=power).draw(jax.random.key(1), latents)
    t = diffusion.timesteps(draws.u, 1000, power)
    assert 0 <= t.min() and t.max() == 999 and t.dtype == jnp.int32
    for quantile in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(np.quantile(t, quantile), 1000 * quantile**power, atol=12)
    np.testing.assert_allclose(draws.keep_prompt.mean(), 0.75, atol=0.01)


def test_the_autoencoder_loss_is_absolute_error_and_divergence():
    images = normal(B, 4, 4, 3)
    mean, logvar, noise = normal(B, 2, 2, C), normal(B, 2, 2, C), normal(B, 2, 2, C)
    networks = autoencoder.Networks(
        encode=lambda images: jnp.concatenate([0.8 * mean, jnp.asarray(logvar)], axis=-1),
        decode=lambda z: jnp.broadcast_to(0.8 * z.mean((1, 2, 3), keepdims=True), (B, 4, 4, 3)),
    )
    found, metrics = autoencoder.Autoencoder(kl_weight=0.1).loss(networks, images, autoencoder.Draws(noise))
    z = 0.8 * mean + np.exp(0.5 * logvar) * noise
    absolute = np.abs(0.8 * z.mean((1, 2, 3), keepdims=True) - images).mean()
    divergence = 0.5 * np.mean((0.8 * mean) ** 2 + np.exp(logvar) - 1 - logvar)
    np.testing.assert_allclose(metrics["absolute_error"], absolute, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], divergence, rtol=1e-5)
    np.testing.assert_allclose(found, absolute + 0.1 * divergence, rtol=1e-5)
