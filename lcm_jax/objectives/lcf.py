"""Latent consistency fine-tuning (arXiv 2310.04378, section 4.4): an LCM learns other images, without a teacher."""

from dataclasses import dataclass

import jax

from lcm_jax.diffusion.consistency import consistency_function
from lcm_jax.diffusion.schedule import add_noise, skipping_steps
from lcm_jax.objectives.consistency import Consistency, Draws
from lcm_jax.objectives.networks import Examples, Metrics, Networks


@dataclass(frozen=True)
class LCF(Consistency):
    """Latent consistency fine-tuning. Its settings are those of `Consistency`."""

    def loss(self, networks: Networks, examples: Examples, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Return the consistency fine-tuning loss, float32[], and metrics."""
        schedule, (z, prompt, _) = networks.schedule, examples
        guided = prompt._replace(guidance=draws.w)

        # 1. Two points on one straight path from the data to one noise, a skipping step apart.
        s, t = skipping_steps(draws.index, self.num_ddim_steps, len(schedule.alphas_cumprod))
        z_s, z_t = add_noise(schedule, z, draws.noise, s), add_noise(schedule, z, draws.noise, t)

        # 2. The predictions of the origin, by the student and by the target network, with the same w.
        assert networks.target is not None
        prediction = consistency_function(schedule, networks.student(z_s, s, guided), z_s, s)
        origin = consistency_function(schedule, networks.target(z_t, t, guided), z_t, t)

        # 3. The distance between the two.
        return self.compare(schedule, s, prediction, origin)
