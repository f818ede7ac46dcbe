"""The multistep consistency sampler of latent consistency models (arXiv 2310.04378)."""

import jax
import numpy as np

from lcm_jax.diffusion import grids
from lcm_jax.diffusion.consistency import consistency_function
from lcm_jax.diffusion.options import Config, choice, whole
from lcm_jax.diffusion.samplers.table import (
    Network,
    Noise,
    OnStep,
    Sampler,
    Table,
    iterate,
    refuse_clipping,
    stack_table,
)
from lcm_jax.diffusion.schedule import Schedule


def consistency_table(timesteps: np.ndarray, schedule: Schedule) -> Table:
    """Return alpha and sigma of the next timestep, for `sample_consistency`. timesteps: int32[n], descending."""
    bar = schedule.alphas_cumprod.astype(np.float64)[timesteps]
    alpha, sigma = np.sqrt(bar), np.sqrt(1.0 - bar)
    # Nothing is added after the last jump, as if it had gone to alpha = 1, sigma = 0.
    return stack_table(timesteps, (alpha, sigma), np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0))


def distilled_timesteps(schedule: Schedule, config: Config, n: int, strength: float) -> np.ndarray:
    """Return n timesteps, int32[n], of the grid of `original_inference_steps` timesteps. Raises ValueError."""
    total = len(schedule.alphas_cumprod)
    original = whole(config, "original_inference_steps", 50, 1, total)
    return grids.lcm_timesteps(n, strength, original, total)


def make_lcm_table(schedule: Schedule, config: Config, n: int, strength: float) -> Table:
    """Return the table of n steps. Raises ValueError."""
    refuse_clipping(config)
    choice(config, "timestep_scaling", 10.0, (10.0,))
    return consistency_table(distilled_timesteps(schedule, config, n, strength), schedule)


def sample_consistency(
    network: Network, z: jax.Array, table: Table, schedule: Schedule, noise: Noise, on_step: OnStep | None = None
) -> jax.Array:
    """Sample by Algorithm 3 of arXiv 2310.04378: jump to x0, add noise up to the next timestep, jump again.

    z: float32[B, h, w, c] at the table's first timestep. noise(i): float32[B, h, w, c], standard normal; none of the
    last is added. Returns the latents of the last jump, float32[B, h, w, c].
    """

    def step(z, memory, i, t, coefficients):
        alpha, sigma = coefficients
        return alpha * consistency_function(schedule, network(z, t), z, t) + sigma * noise(i), memory

    return iterate(step, z, table, on_step)


LCM = Sampler("lcm", "LCMScheduler", make_lcm_table, sample_consistency, adds_noise=True, consistency=True)
