"""The same numbers, to the last bit, whether or not jax's 64-bit types are on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.diffusion.schedule import make_schedule
from lcm_jax.models.conditioning import Conditioning
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.objectives import autoencoder, diffusion, lcd
from lcm_jax.recipes.diffusion import SCHEDULE
from lcm_jax.recipes.inpainting import draw_masks
from lcm_jax.sampling.generate import generate
from lcm_jax.sampling.inputs import Inputs, draw_noise

SD = SCHEDULE | {"prediction_type": "v_prediction", "skip_prk_steps": True, "timestep_spacing": "linspace"}
SHAPE = (2, 4, 4, 4)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_same_bits(function):
    narrow = jax.tree.map(np.asarray, jax.jit(function)())
    with jax.enable_x64(True):
        wide = jax.tree.map(np.asarray, jax.jit(function)())
    assert jax.tree.structure(narrow) == jax.tree.structure(wide)
    for one, other in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_draws():
    moments, image = jax.ShapeDtypeStruct((4, 2, 2, 6), jnp.float32), jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.uint8)
    for draw, batch in [
        (partial(lcd.draw, num_ddim_steps=50, w_min=2.0, w_max=14.0, empty_prompts=0.5), {"moments": moments}),
        (
            partial(diffusion.draw, num_train_timesteps=1000, empty_prompts=0.5, timestep_power=0.7),
            {"moments": moments},
        ),
        (partial(autoencoder.draw, downscale=4, channels=3), {"image": image}),
    ]:
        assert_same_bits(lambda draw=draw, batch=batch: draw(jax.random.key(7), batch))
    assert_same_bits(lambda: draw_masks(jax.random.key(7), 4, 16, 24))


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name):
    schedule, sampler = make_schedule(SD), SAMPLERS[name]
    table = sampler.make_table(schedule, SD, 3)
    noise = jnp.asarray(normal(1, 4, *SHAPE)).__getitem__ if sampler.adds_noise else None
    network = lambda z, t: jnp.tanh(z) * (1 - t.astype(jnp.float32).reshape(-1, 1, 1, 1) / 3000.0)  # noqa: E731
    for given in (table, jax.tree.map(jnp.asarray, table.padded(5))):
        assert_same_bits(
            lambda given=given: sampler.sample(network, jnp.asarray(normal(0, *SHAPE)), given, schedule, noise)
        )


def test_sampling_with_networks():
    text = tiny_model.TEXT | {"vocab_size": 50, "eos_token_id": 1}
    unet = tiny_model.SHALLOW | {"time_cond_proj_dim": 16}
    model = StableDiffusion.from_configs({"unet": unet, "vae": tiny_model.VAE, "text_encoder": text, "scheduler": SD})
    params = jax.tree.map(lambda leaf: 0.2 * normal(leaf.size, *leaf.shape), model.abstract_params())
    ids, table = np.arange(20, dtype=np.int32)[None], SAMPLERS["lcm"].make_table(model.schedule, SD, 2)

    def sample():
        latents, noise = draw_noise(3, np.arange(1, dtype=np.uint32), (4, 4, 4))
        inputs = Inputs(ids, ids, latents, noise, np.float32(3.0))
        return generate(model, params, inputs, "lcm", table, decode=False)

    assert_same_bits(sample)


def test_a_distillation_step():
    schedule = make_schedule(SD)
    batch = {"moments": normal(0, *SHAPE[:3], 8), "token_ids": np.arange(10, dtype=np.int32).reshape(2, 5)}
    frozen = {"unet": np.float32(0.7), "empty_ids": np.arange(5, dtype=np.int32), "table": normal(1, 10)}

    def denoise(params, z, t, conditioning):
        told = conditioning.context + (0.0 if conditioning.guidance is None else jnp.sin(conditioning.guidance))
        return params * jnp.tanh(
            z * (1 - t.astype(jnp.float32).reshape(-1, 1, 1, 1) / 3000.0) + told.reshape(-1, 1, 1, 1)
        )

    networks = lcd.Networks(
        denoise,
        denoise,
        lambda frozen, ids, _: Conditioning(jnp.asarray(frozen["table"])[ids].mean(-1)),
        lambda moments, noise: moments[..., :4] + moments[..., 4:] * noise,
    )

    def step():
        draws = lcd.draw(jax.random.key(3), batch, num_ddim_steps=50, w_min=2.0, w_max=14.0, empty_prompts=0.5)
        loss = partial(
            lcd.loss,
            networks=networks,
            schedule=schedule,
            num_ddim_steps=50,
            weighting="inverse_sigma",
            own_share=0.5,
            w_caps=((0, 0.0), (300, 9.0)),
        )
        unet = {"unet": jnp.float32(0.9)}
        return jax.value_and_grad(loss, has_aux=True)(unet, unet, frozen, batch, draws)

    assert_same_bits(step)
