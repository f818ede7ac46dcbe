"""The common part of consistency distillation and fine-tuning: settings, random numbers and distance."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcm_jax.diffusion.schedule import Schedule, alpha_sigma
from lcm_jax.objectives.by_timestep import loss_by_timestep
from lcm_jax.objectives.networks import Metrics
from lcm_jax.ranges import ABOVE_ZERO, FRACTION, REAL, STEPS, check_fields, setting


class Draws(NamedTuple):
    posterior: jax.Array  # float32[B, h, w, c], picks the latent from the autoencoder's posterior
    noise: jax.Array  # float32[B, h, w, c]
    index: jax.Array  # int32[B], 0 <= index < num_ddim_steps, which skipping step
    w: jax.Array  # float32[B], the guidance weight of cond + w (cond - uncond)
    keep_prompt: jax.Array  # bool[B], False trains the empty prompt


@dataclass(frozen=True)
class Consistency:
    """Settings of LCD and LCF.

    num_ddim_steps: skipping steps, of k = T / num_ddim_steps training steps each. w_min, w_max: the range of the
    guidance weight. distance: see `distance`, with huber_c. weighting: see `weights`. prompt_dropout: the fraction of
    prompts replaced by the empty one. Raises ValueError that names a setting out of its range.
    """

    num_ddim_steps: int = setting(50, STEPS)
    w_min: float = setting(2.0, REAL)
    w_max: float = setting(14.0, REAL)
    distance: str = setting("huber", ("l2", "huber"))
    huber_c: float = setting(1e-3, ABOVE_ZERO)
    weighting: str = setting("uniform", ("uniform", "inverse_sigma", "sqrt_snr"))
    prompt_dropout: float = setting(0.0, FRACTION)

    def __post_init__(self):
        check_fields(self, "objective")
        if self.w_min > self.w_max:
            raise ValueError(f"objective.w_min {self.w_min} is above objective.w_max {self.w_max}; lower it")

    def draw(self, rng: jax.Array, latents: jax.ShapeDtypeStruct) -> Draws:
        """Draw the random numbers of a step for z of the shape of `latents`, [B, h, w, c]."""
        posterior, noise, index, weight, keep = jax.random.split(rng, 5)
        batch = latents.shape[:1]
        return Draws(
            posterior=jax.random.normal(posterior, latents.shape, jnp.float32),
            noise=jax.random.normal(noise, latents.shape, jnp.float32),
            index=jax.random.randint(index, batch, 0, self.num_ddim_steps, jnp.int32),
            w=jax.random.uniform(weight, batch, jnp.float32, minval=self.w_min, maxval=self.w_max),
            keep_prompt=jax.random.uniform(keep, batch, jnp.float32) >= self.prompt_dropout,
        )

    def compare(
        self, schedule: Schedule, s: jax.Array, prediction: jax.Array, target: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Return the weighted mean distance of float32[B, h, w, c] from `target`, float32[], and metrics.

        s: int32[B], the timestep of the prediction. The target receives no gradient.
        """
        each = distance(prediction - jax.lax.stop_gradient(target), self.distance, self.huber_c)
        losses = weights(schedule, s, self.weighting) * each
        total = jnp.mean(losses)
        return total, {"loss": total} | loss_by_timestep(losses, s, len(schedule.alphas_cumprod))


def distance(difference: jax.Array, kind: str, huber_c: float) -> jax.Array:
    """[B, ...] -> [B]. l2: mean d^2. huber: mean(sqrt(d^2 + c^2) - c), the pseudo-Huber metric of arXiv 2310.14189."""
    axes = tuple(range(1, difference.ndim))
    if kind == "l2":
        return jnp.mean(jnp.square(difference), axes)
    return jnp.mean(jnp.sqrt(jnp.square(difference) + huber_c**2) - huber_c, axes)


def weights(schedule: Schedule, s: jax.Array, weighting: str) -> jax.Array:
    """Return the weight of each example's distance, float32[B]; s: int32[B], where its step starts.

    uniform: 1, as published. inverse_sigma: 1 / sigma_s, so that an error in the v that a network predicts counts the
    same at every s (x0 = alpha z - sigma v). Otherwise the steps near pure noise, whose errors are the largest, crowd
    out those near the image, on which all others build. sqrt_snr: alpha_s / sigma_s, near to the inverse step in
    sigma / alpha of consistency training (arXiv 2310.14189), where a target is one of all images that z_s may come
    from: near pure noise, it says little more than their mean. With zero terminal SNR it is 0 at the last s.
    """
    if weighting == "uniform":
        return jnp.ones(s.shape, jnp.float32)
    alpha, sigma = (each.reshape(s.shape) for each in alpha_sigma(schedule, s))
    return 1.0 / sigma if weighting == "inverse_sigma" else alpha / sigma
