"""Text-to-image denoising diffusion in a latent space (arXiv 2006.11239, 2112.10752): how a teacher is trained."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcm_jax.diffusion.schedule import Schedule, add_noise, training_target


class Networks(NamedTuple):
    """unet(params, z, t, context) -> output; encode_prompt(params, token_ids, time_ids) ->
    context; to_latents(moments, noise) -> z."""

    unet: Callable
    encode_prompt: Callable
    to_latents: Callable


class Draws(NamedTuple):
    posterior: jax.Array  # float32[B, h, w, c], picks the latent from the autoencoder's posterior
    noise: jax.Array  # float32[B, h, w, c]
    t: jax.Array  # int32[B], 0 <= t < T
    keep_prompt: jax.Array  # bool[B], False trains the empty prompt (classifier-free guidance, arXiv 2207.12598)


def draw(
    rng: jax.Array, batch, *, num_train_timesteps: int, empty_prompts: float, timestep_power: float = 1.0
) -> Draws:
    """batch["moments"]: float32[B,h,w,2c]; empty_prompts: the share of captions replaced by the empty one.

    timestep_power p: t = floor(T u^p), u ~ U[0, 1). 1 is uniform; below 1 late, noisy steps come more often, where
    the caption decides what is drawn and where.
    """
    b, h, w, c2 = batch["moments"].shape
    posterior, noise, time, keep = jax.random.split(rng, 4)
    u = jax.random.uniform(time, (b,), jnp.float32)
    return Draws(
        posterior=jax.random.normal(posterior, (b, h, w, c2 // 2), jnp.float32),
        noise=jax.random.normal(noise, (b, h, w, c2 // 2), jnp.float32),
        t=jnp.minimum(num_train_timesteps * u**timestep_power, num_train_timesteps - 1).astype(jnp.int32),
        keep_prompt=jax.random.uniform(keep, (b,), jnp.float32) >= empty_prompts,
    )


def loss(params, target, frozen, batch, draws: Draws, *, networks: Networks, schedule: Schedule):
    """mean (network(z_t, t, c) - y)^2, y the noise, the velocity or the latent by the schedule's prediction type.

    params: {"unet", "text_encoder"}; frozen["empty_ids"]: int32[L]; batch: moments float32[B,h,w,2c], token_ids
    int32[B,L].
    Returns (float32[], metrics).
    """
    z = networks.to_latents(batch["moments"], draws.posterior)
    token_ids = jnp.where(draws.keep_prompt[:, None], batch["token_ids"], frozen["empty_ids"][None])
    context = networks.encode_prompt(params, token_ids, batch.get("time_ids"))
    output = networks.unet(params["unet"], add_noise(schedule, z, draws.noise, draws.t), draws.t, context)
    total = jnp.mean(jnp.square(output.astype(jnp.float32) - training_target(schedule, z, draws.noise, draws.t)))
    return total, {"loss": total}
