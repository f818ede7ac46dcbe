"""The sampler of trajectory consistency distillation (arXiv 2402.19159), which renews a part of the noise."""

import numpy as np

from lcm_jax.diffusion.options import Config
from lcm_jax.diffusion.samplers.ddim import sample_ddim
from lcm_jax.diffusion.samplers.lcm import distilled_timesteps
from lcm_jax.diffusion.samplers.table import Sampler, Table, refuse_clipping, stack_table
from lcm_jax.diffusion.schedule import Schedule


def make_tcd_table(schedule: Schedule, config: Config, n: int, strength: float, eta: float) -> Table:
    """Return the table of n steps for `sample_ddim`. Raises ValueError.

    Each step follows the trajectory to s = floor((1 - eta) t_to) and adds new noise up to t_to, the next timestep; the
    last goes to s = t_to = 0. eta is the paper's gamma: 0 adds no noise, and 1 jumps to s = 0 in every step.
    """
    refuse_clipping(config)
    timesteps = distilled_timesteps(schedule, config, n, strength)
    bars = schedule.alphas_cumprod.astype(np.float64)
    t_to = np.append(timesteps[1:], 0)
    s = np.floor(np.float32(1.0 - eta) * t_to.astype(np.float32)).astype(int)  # diffusers rounds in float32, too
    alpha, sigma = np.sqrt(bars[timesteps]), np.sqrt(1.0 - bars[timesteps])
    kept = bars[t_to] / bars[s]  # from s to t_to, z is scaled by the root of `kept`
    coefficients = np.sqrt(bars[t_to]), np.sqrt(kept * (1.0 - bars[s])), np.sqrt(1.0 - kept)
    return stack_table(timesteps, (alpha, sigma), alpha, sigma, *coefficients)


TCD = Sampler("tcd", "TCDScheduler", make_tcd_table, sample_ddim, adds_noise=True, eta=0.3, consistency=True)
