"""Text-to-image denoising diffusion in a latent space (arXiv 2006.11239, 2112.10752): how a teacher is trained."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcm_jax.diffusion.schedule import PREDICTION_TYPES, add_noise, training_target
from lcm_jax.objectives.by_timestep import loss_by_timestep
from lcm_jax.objectives.networks import Examples, Metrics, Networks
from lcm_jax.ranges import ABOVE_ZERO, FRACTION, check_fields, setting


class Draws(NamedTuple):
    posterior: jax.Array  # float32[B, h, w, c], picks the latent from the autoencoder's posterior
    noise: jax.Array  # float32[B, h, w, c]
    u: jax.Array  # float32[B] in [0, 1), from which `timesteps` makes t
    keep_prompt: jax.Array  # bool[B], False trains the empty prompt (classifier-free guidance, arXiv 2207.12598)


@dataclass(frozen=True)
class Diffusion:
    """Denoising diffusion.

    prediction_type, zero_terminal_snr: of the schedule that the recipe makes (arXiv 2305.08891). prompt_dropout: the
    fraction of prompts replaced by the empty one. timestep_power: see `timesteps`. Raises ValueError that names a
    setting out of its range.
    """

    prediction_type: str = setting("epsilon", PREDICTION_TYPES)
    zero_terminal_snr: bool = setting(False, (False, True))
    prompt_dropout: float = setting(0.1, FRACTION)
    timestep_power: float = setting(1.0, ABOVE_ZERO)

    def __post_init__(self):
        check_fields(self, "objective")

    def draw(self, rng: jax.Array, latents: jax.ShapeDtypeStruct) -> Draws:
        """Draw the random numbers of a step for z of the shape of `latents`, [B, h, w, c]."""
        posterior, noise, time, keep = jax.random.split(rng, 4)
        batch = latents.shape[:1]
        return Draws(
            posterior=jax.random.normal(posterior, latents.shape, jnp.float32),
            noise=jax.random.normal(noise, latents.shape, jnp.float32),
            u=jax.random.uniform(time, batch, jnp.float32),
            keep_prompt=jax.random.uniform(keep, batch, jnp.float32) >= self.prompt_dropout,
        )

    def loss(self, networks: Networks, examples: Examples, draws: Draws) -> tuple[jax.Array, Metrics]:
        """mean (network(z_t, t, c) - y)^2, y the noise, the velocity or the latent by the schedule's prediction type.

        Return (float32[], metrics).
        """
        schedule, z = networks.schedule, examples.z
        t = timesteps(draws.u, len(schedule.alphas_cumprod), self.timestep_power)
        output = networks.student(add_noise(schedule, z, draws.noise, t), t, examples.prompt)
        squared = jnp.square(output.astype(jnp.float32) - training_target(schedule, z, draws.noise, t))
        total, losses = jnp.mean(squared), jnp.mean(squared, axis=(1, 2, 3))
        return total, {"loss": total} | loss_by_timestep(losses, t, len(schedule.alphas_cumprod))


def timesteps(u: jax.Array, num_train_timesteps: int, power: float) -> jax.Array:
    """t = floor(T u^power): int32[B] in 0..T-1 from u: float32[B] in [0, 1).

    power 1 is uniform; below 1 late, noisy steps come more often, where the prompt decides what is generated and where.
    """
    return jnp.minimum(num_train_timesteps * u**power, num_train_timesteps - 1).astype(jnp.int32)
