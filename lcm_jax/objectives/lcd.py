"""Latent consistency distillation: Algorithm 1 of arXiv 2310.04378."""

from dataclasses import dataclass

import jax

from lcm_jax.diffusion.consistency import consistency_function
from lcm_jax.diffusion.guidance import check_guidance_schedule, classifier_free, scheduled_guidance
from lcm_jax.diffusion.schedule import add_noise, predict_noise, predict_x0, skipping_steps
from lcm_jax.diffusion.solvers import SOLVERS, solve
from lcm_jax.models.conditioning import deinterleave, interleave
from lcm_jax.objectives.consistency import Consistency, Draws
from lcm_jax.objectives.networks import Examples, Metrics, Networks
from lcm_jax.ranges import Range, setting


@dataclass(frozen=True)
class LCD(Consistency):
    """Latent consistency distillation.

    solver: of the teacher's step, see `solvers.solve` (published: ddim, dpm and dpm++, of which the second and the
    third take two evaluations of the guided teacher). guidance_schedule: the part of w that guides the teacher at each
    t, see `scheduled_guidance`; the student has all of w as its input (published: all of w).
    """

    solver: str = setting("ddim", tuple(SOLVERS))
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

        # 3. One solver step by the guided teacher, whose two passes are one batch of 2B: z_t.
        def guided_teacher(z: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
            assert networks.teacher is not None
            z_2, t_2 = interleave((z, t), (z, t))
            output = networks.teacher(z_2, t_2, interleave(prompt, empty))
            x0_cond, x0_empty = deinterleave(predict_x0(schedule, output, z_2, t_2))
            noise_cond, noise_empty = deinterleave(predict_noise(schedule, output, z_2, t_2))
            w = scheduled_guidance(draws.w, t, self.guidance_schedule)[:, None, None, None]
            return classifier_free(x0_empty, x0_cond, w), classifier_free(noise_empty, noise_cond, w)

        z_t = jax.lax.stop_gradient(solve(self.solver, guided_teacher, schedule, z_s, s, t))

        # 4. The target network's prediction from there; at the boundary t = 0 it is z_t itself.
        assert networks.target is not None
        origin = consistency_function(schedule, networks.target(z_t, t, guided), z_t, t)

        # 5. The distance between the two.
        return self.compare(schedule, s, prediction, origin)
