"""The same numbers, to the last bit, whether or not jax's 64-bit types are on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.diffusion.schedule import make_schedule
from lcm_jax.models.conditioning import Conditioning
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.objectives.autoencoder import Autoencoder
from lcm_jax.objectives.backward_simulation import BackwardSimulation
from lcm_jax.objectives.diffusion import Diffusion, timesteps
from lcm_jax.objectives.lcd import LCD
from lcm_jax.objectives.networks import Examples, Networks
from lcm_jax.recipes.diffusion import SCHEDULE
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
    latents = jax.ShapeDtypeStruct((4, 2, 2, 3), jnp.float32)
    for objective in (BackwardSimulation(LCD(prompt_dropout=0.5), 0.5), Diffusion(timestep_power=0.7), Autoencoder()):
        assert_same_bits(lambda objective=objective: objective.draw(jax.random.key(7), latents))
    u = normal(0, 4) ** 2 % 1
    assert_same_bits(lambda: timesteps(jnp.asarray(u), 1000, 0.7))


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
    z, context = normal(0, *SHAPE), normal(1, SHAPE[0], 5)

    def denoise(params):
        def network(z, t, told):
            rest = told.context.mean(-1) + (0.0 if told.guidance is None else told.guidance)
            slope = 1 - t.astype(jnp.float32).reshape(-1, 1, 1, 1) / 3000.0
            return params * jnp.tanh(z * slope + rest.reshape(-1, 1, 1, 1))

        return network

    objective = BackwardSimulation(LCD(weighting="inverse_sigma", guidance_schedule=((0, 0.0), (300, 9.0))), 0.5)

    def step():
        draws = objective.draw(jax.random.key(3), jax.ShapeDtypeStruct(SHAPE, jnp.float32))
        examples = Examples(jnp.asarray(z), *(Conditioning(jnp.asarray(c)) for c in (context, 0 * context)))

        def loss(params):
            networks = Networks(denoise(params), denoise(jnp.float32(0.9)), denoise(jnp.float32(0.7)), schedule)
            return objective.loss(networks, examples, draws)

        return jax.value_and_grad(loss, has_aux=True)(jnp.float32(0.9))

    assert_same_bits(step)
