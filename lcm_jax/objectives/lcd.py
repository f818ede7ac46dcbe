"""Latent consistency distillation: Algorithm 1 of arXiv 2310.04378."""

from dataclasses import dataclass

import jax

from lcm_jax.diffusion.consistency import consistency_function
from lcm_jax.diffusion.guidance import check_guidance_schedule, classifier_free, scheduled_guidance
from lcm_jax.diffusion.schedule import add_noise, alpha_sigma, predict_noise, predict_x0, skipping_steps
from lcm_jax.diffusion.solvers import ddim_step
from lcm_jax.models.conditioning import deinterleave, interleave
from lcm_jax.objectives.consistency import Consistency, Draws
from lcm_jax.objectives.networks import Examples, Metrics, Networks
from lcm_jax.ranges import Range, setting


@dataclass(frozen=True)
class LCD(Consistency):
    """Latent consistency distillation.

    guidance_schedule: the part of w that guides the teacher at each t, see `scheduled_guidance`; the student has all of
    w as its input (published: all of w).
    """

    guidance_schedule: tuple = setting((), Range(0, real=True, many=True, infinite=True))

    def __post_init__(self):
        super().__post_init__()
        check_guidance_schedule("objective.guidance_schedule", self.guidance_schedule)

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
        assert networks.teacher is not None and networks.target is not None
        z_2, s_2 = interleave((z_s, s), (z_s, s))
        output = networks.teacher(z_2, s_2, interleave(prompt, empty))
        x0_cond, x0_empty = deinterleave(predict_x0(schedule, output, z_2, s_2))
        noise_cond, noise_empty = deinterleave(predict_noise(schedule, output, z_2, s_2))
        w = scheduled_guidance(draws.w, s, self.guidance_schedule)[:, None, None, None]
        x0, noise = classifier_free(x0_empty, x0_cond, w), classifier_free(noise_empty, noise_cond, w)
        z_t = jax.lax.stop_gradient(ddim_step(x0, noise, *alpha_sigma(schedule, t)))

        # 4. The target network's prediction from there; at the boundary t = 0 it is z_t itself.
        origin = consistency_function(schedule, networks.target(z_t, t, guided), z_t, t)

        # 5. The distance between the two.
        return self.compare(schedule, s, prediction, origin)
