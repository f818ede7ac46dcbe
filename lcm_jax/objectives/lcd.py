"""Latent consistency distillation: Algorithm 1 of arXiv 2310.04378."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcm_jax.diffusion.consistency import consistency_function
from lcm_jax.diffusion.guidance import check_guidance_schedule, classifier_free, scheduled_guidance
from lcm_jax.diffusion.schedule import Schedule, add_noise, alpha_sigma, predict_noise, predict_x0, skipping_steps
from lcm_jax.diffusion.solvers import ddim_step
from lcm_jax.models.conditioning import concatenate
from lcm_jax.objectives.networks import Examples, Metrics, Networks
from lcm_jax.ranges import ABOVE_ZERO, FRACTION, REAL, STEPS, Range, check_fields, setting


class Draws(NamedTuple):
    posterior: jax.Array  # float32[B, h, w, c], picks the latent from the autoencoder's posterior
    noise: jax.Array  # float32[B, h, w, c]
    index: jax.Array  # int32[B], 0 <= index < num_ddim_steps, which skipping step
    w: jax.Array  # float32[B], the guidance weight of cond + w (cond - uncond)
    keep_prompt: jax.Array  # bool[B], False distills the empty prompt


@dataclass(frozen=True)
class LCD:
    """Latent consistency distillation.

    num_ddim_steps: skipping steps of the solver, k = T / num_ddim_steps training steps each. w_min, w_max: the range of
    the guidance weight. distance: see `distance`, with huber_c. weighting: see `weights`. guidance_schedule: the part
    of w that guides the teacher at each t, see `scheduled_guidance`; the student has all of w as its input (published:
    all of w).
    prompt_dropout: the fraction of prompts replaced by the empty one. Raises ValueError that names a setting out of
    its range.
    """

    num_ddim_steps: int = setting(50, STEPS)
    w_min: float = setting(2.0, REAL)
    w_max: float = setting(14.0, REAL)
    distance: str = setting("huber", ("l2", "huber"))
    huber_c: float = setting(1e-3, ABOVE_ZERO)
    weighting: str = setting("uniform", ("uniform", "inverse_sigma"))
    guidance_schedule: tuple = setting((), Range(0, real=True, many=True, infinite=True))
    prompt_dropout: float = setting(0.0, FRACTION)

    def __post_init__(self):
        check_fields(self, "objective")
        check_guidance_schedule("objective.guidance_schedule", self.guidance_schedule)
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

    def loss(self, networks: Networks, examples: Examples, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Return the consistency distillation loss, float32[], and metrics."""
        schedule, (z, prompt, empty) = networks.schedule, examples
        guided = prompt._replace(guidance=draws.w)

        # 1. A point z_s on the data's trajectory, and the step t that comes one skipping step before s.
        s, t = skipping_steps(draws.index, self.num_ddim_steps, len(schedule.alphas_cumprod))
        z_s = add_noise(schedule, z, draws.noise, s)

        # 2. The student's prediction of the trajectory's origin.
        prediction = consistency_function(schedule, networks.student(z_s, s, guided), z_s, s)

        # 3. One guided solver step by the teacher, its two passes as one batch of 2B: z_t.
        twice = lambda x: jnp.concatenate([x, x])  # noqa: E731
        assert networks.teacher is not None and networks.target is not None
        output = networks.teacher(twice(z_s), twice(s), concatenate(prompt, empty))
        x0_cond, x0_empty = jnp.split(predict_x0(schedule, output, twice(z_s), twice(s)), 2)
        noise_cond, noise_empty = jnp.split(predict_noise(schedule, output, twice(z_s), twice(s)), 2)
        w = scheduled_guidance(draws.w, s, self.guidance_schedule)[:, None, None, None]
        x0, noise = classifier_free(x0_empty, x0_cond, w), classifier_free(noise_empty, noise_cond, w)
        z_t = jax.lax.stop_gradient(ddim_step(x0, noise, *alpha_sigma(schedule, t)))

        # 4. The target network's prediction from there; at the boundary t = 0 it is z_t itself.
        origin = consistency_function(schedule, networks.target(z_t, t, guided), z_t, t)

        # 5. The distance between the two.
        difference = distance(prediction - jax.lax.stop_gradient(origin), self.distance, self.huber_c)
        total = jnp.mean(weights(schedule, s, self.weighting) * difference)
        return total, {"loss": total}


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
    out those near the image, on which all others build. Consistency training weighs in the same spirit (2310.14189).
    """
    if weighting == "uniform":
        return jnp.ones(s.shape, jnp.float32)
    return 1.0 / alpha_sigma(schedule, s)[1].reshape(s.shape)
