"""The objectives of the embedded teacher and autoencoder, against their formulas written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.schedule import make_schedule
from lcm_jax.objectives import autoencoder, diffusion
from lcm_jax.recipes.diffusion import SCHEDULE

RNG = np.random.default_rng(0)
B, SIDE, C, LENGTH = 4, 3, 2, 5


def normal(*shape) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_diffusion_loss_is_the_squared_error_of_what_the_network_predicts(prediction_type):
    schedule = make_schedule(SCHEDULE | {"prediction_type": prediction_type})
    batch = {"moments": normal(B, SIDE, SIDE, 2 * C), "token_ids": RNG.integers(1, 9, (B, LENGTH)).astype(np.int32)}
    t, keep = np.array([0, 300, 700, 999], np.int32), np.array([True, False, True, True])
    draws = diffusion.Draws(normal(B, SIDE, SIDE, C), normal(B, SIDE, SIDE, C), t, keep)
    networks = diffusion.Networks(
        unet=lambda scale, z, t, context: scale * z + context[:, None, None, None] + t[:, None, None, None] / 1000,
        encode_prompt=lambda params, ids, _: params["text_encoder"] * ids.sum(-1),
        to_latents=lambda moments, noise: moments[..., :C] + 0.5 * noise,
    )
    params = {"unet": jnp.float32(0.7), "text_encoder": jnp.float32(0.1)}
    empty = np.arange(LENGTH, dtype=np.int32)
    found, metrics = diffusion.loss(
        params, None, {"empty_ids": empty}, batch, draws, networks=networks, schedule=schedule
    )

    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bar = np.cumprod(1 - betas)[t][:, None, None, None]
    z = batch["moments"][..., :C] + 0.5 * draws.posterior
    noisy = np.sqrt(bar) * z + np.sqrt(1 - bar) * draws.noise
    ids = np.where(keep[:, None], batch["token_ids"], empty)
    output = 0.7 * noisy + (0.1 * ids.sum(-1) + t / 1000)[:, None, None, None]
    wanted = {"epsilon": draws.noise, "sample": z, "v_prediction": np.sqrt(bar) * draws.noise - np.sqrt(1 - bar) * z}[
        prediction_type
    ]
    np.testing.assert_allclose(found, np.mean((output - wanted) ** 2), rtol=1e-5)
    assert metrics["loss"] == found


@pytest.mark.parametrize("power", [1.0, 0.6])
def test_timesteps_come_as_often_as_the_power_says(power):
    batch = {"moments": jnp.zeros((20_000, 1, 1, 2))}
    draws = diffusion.draw(jax.random.key(1), batch, num_train_timesteps=1000, empty_prompts=0.25, timestep_power=power)
    assert 0 <= draws.t.min() and draws.t.max() == 999 and draws.t.dtype == jnp.int32
    for quantile in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(np.quantile(draws.t, quantile), 1000 * quantile**power, atol=12)
    np.testing.assert_allclose(draws.keep_prompt.mean(), 0.75, atol=0.01)


def test_the_autoencoder_loss_is_absolute_error_and_divergence():
    batch = {"image": RNG.integers(0, 256, (B, 4, 4, 3), np.uint8)}
    mean, logvar, noise = normal(B, 2, 2, C), normal(B, 2, 2, C), normal(B, 2, 2, C)
    networks = autoencoder.Networks(
        encode=lambda params, images: jnp.concatenate([params * mean, jnp.asarray(logvar)], axis=-1),
        decode=lambda params, z: jnp.broadcast_to(params * z.mean((1, 2, 3), keepdims=True), (B, 4, 4, 3)),
    )
    found, metrics = autoencoder.loss(
        jnp.float32(0.8), None, {}, batch, autoencoder.Draws(noise), networks=networks, kl_weight=0.1
    )
    z = 0.8 * mean + np.exp(0.5 * logvar) * noise
    absolute = np.abs(0.8 * z.mean((1, 2, 3), keepdims=True) - (batch["image"] / 127.5 - 1)).mean()
    divergence = 0.5 * np.mean((0.8 * mean) ** 2 + np.exp(logvar) - 1 - logvar)
    np.testing.assert_allclose(metrics["absolute_error"], absolute, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], divergence, rtol=1e-5)
    np.testing.assert_allclose(found, absolute + 0.1 * divergence, rtol=1e-5)
