"""DDIM (arXiv 2010.02502) with eta 0."""

import jax
import numpy as np

from lcm_jax.diffusion import grids
from lcm_jax.diffusion.options import Config, choice, flag, whole
from lcm_jax.diffusion.samplers.table import (
    Network,
    Sampler,
    Table,
    iterate,
    refuse_clipping,
    split_output,
    stack_table,
)
from lcm_jax.diffusion.schedule import Schedule
from lcm_jax.diffusion.solvers import ddim_step


def noise_levels(bars: np.ndarray, last: float, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (alpha, sigma) at the timesteps; negative ones are the end of sampling, where alpha^2 is `last`."""
    bar = np.where(timesteps >= 0, bars[np.maximum(timesteps, 0)], last)
    return np.sqrt(bar), np.sqrt(1.0 - bar)


def training_timesteps(schedule: Schedule, config: Config, n: int) -> np.ndarray:
    """Return the n timesteps of DDIM and PNDM, descending int32[n]. Raises ValueError."""
    total = len(schedule.alphas_cumprod)
    spacing = choice(config, "timestep_spacing", "leading", grids.SPACINGS)
    return grids.solver_timesteps(n, spacing, whole(config, "steps_offset", 0, 0, total), total)


def ddim_table(
    timesteps: np.ndarray, schedule: Schedule, set_alpha_to_one: bool = False, num_inference_steps: int | None = None
) -> Table:
    """Return alpha and sigma of each step's start and end, for `sample_ddim`.

    timesteps: int32[n] descending and evenly spaced. As in diffusers each step goes to t - 1000 // n, which is the next
    timestep if n divides 1000; the last one goes to t = 0, or to alpha = 1. num_inference_steps: this n, if
    strength < 1 has left fewer timesteps.
    """
    bars = schedule.alphas_cumprod.astype(np.float64)
    end = timesteps - len(bars) // (num_inference_steps or len(timesteps))
    last = 1.0 if set_alpha_to_one else bars[0]
    return stack_table(timesteps, *noise_levels(bars, last, timesteps), *noise_levels(bars, last, end))


def make_ddim_table(schedule: Schedule, config: Config, n: int) -> Table:
    """Return the table of n steps. Raises ValueError."""
    refuse_clipping(config)
    return ddim_table(training_timesteps(schedule, config, n), schedule, flag(config, "set_alpha_to_one", True))


def sample_ddim(network: Network, z: jax.Array, table: Table, schedule: Schedule, noise: None = None) -> jax.Array:
    """Sample from z: float32[B, h, w, c] at the table's first timestep."""

    def step(z, i, t, coefficients):
        alpha, sigma, alpha_to, sigma_to = coefficients
        return ddim_step(*split_output(schedule, network(z, t), z, alpha, sigma), alpha_to, sigma_to)

    return iterate(step, z, table)


DDIM = Sampler("DDIMScheduler", make_ddim_table, sample_ddim)
