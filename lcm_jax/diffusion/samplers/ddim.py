"""DDIM (arXiv 2010.02502)."""

import jax
import numpy as np

from lcm_jax.diffusion import grids
from lcm_jax.diffusion.options import Config, choice, flag, whole
from lcm_jax.diffusion.samplers.table import (
    Network,
    Noise,
    OnStep,
    Sampler,
    Table,
    add_scaled,
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


def make_ddim_table(schedule: Schedule, config: Config, n: int, strength: float, eta: float) -> Table:
    """Return the table of n steps for `sample_ddim`. Raises ValueError.

    Coefficients: alpha and sigma of each step's start; the factors of x0, of the estimated noise and of new noise at
    its end. As in diffusers each step goes to t - 1000 // n, which is the next timestep if n divides 1000, and the last
    one to t = 0 or to alpha = 1. New noise has the standard deviation eta sigma_to / sigma sqrt(1 - (alpha /
    alpha_to)^2), of which DDPM is eta 1.
    """
    refuse_clipping(config)
    timesteps = training_timesteps(schedule, config, n)
    bars = schedule.alphas_cumprod.astype(np.float64)
    last = 1.0 if flag(config, "set_alpha_to_one", True) else bars[0]
    alpha, sigma = noise_levels(bars, last, timesteps)
    alpha_to, sigma_to = noise_levels(bars, last, timesteps - len(bars) // n)
    added = eta * sigma_to / sigma * np.sqrt(np.maximum(1.0 - (alpha / alpha_to) ** 2, 0.0))
    table = stack_table(timesteps, (alpha, sigma), alpha, sigma, alpha_to, np.sqrt(sigma_to**2 - added**2), added)
    return table.skip(grids.skipped_steps(n, strength))


def sample_ddim(
    network: Network, z: jax.Array, table: Table, schedule: Schedule, noise: Noise, on_step: OnStep | None = None
) -> jax.Array:
    """Sample from z: float32[B, h, w, c] at the table's first timestep. noise(i): of this shape, standard normal."""

    def step(z, memory, i, t, coefficients):
        alpha, sigma, alpha_to, sigma_to, added = coefficients
        z = ddim_step(*split_output(schedule, network(z, t), z, alpha, sigma), alpha_to, sigma_to)
        return add_scaled(z, added, noise, i), memory

    return iterate(step, z, table, on_step)


DDIM = Sampler("ddim", "DDIMScheduler", make_ddim_table, sample_ddim, adds_noise=True, eta=0.0)
