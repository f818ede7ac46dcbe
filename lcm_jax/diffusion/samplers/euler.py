"""Euler steps of the probability-flow equation in sigma / alpha (arXiv 2206.00364), with and without added noise."""

import jax
import numpy as np

from lcm_jax.diffusion import grids
from lcm_jax.diffusion.options import Config, choice, whole
from lcm_jax.diffusion.samplers import sigmas
from lcm_jax.diffusion.samplers.table import Network, Noise, OnStep, Sampler, Table, iterate, split_output, stack_table
from lcm_jax.diffusion.schedule import Schedule

SIGMA_OPTIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def make_euler_table(schedule: Schedule, config: Config, n: int, strength: float) -> Table:
    """Return the table of n steps. Raises ValueError.

    Coefficients: alpha and sigma of each step's start, alpha of its end, and sigma / alpha that the step goes down to
    and that it adds, which is 0.
    """
    choice(config, "interpolation_type", "linear", ("linear",))
    choice(config, "timestep_type", "discrete", ("discrete",))
    timesteps, scaled = _timesteps(schedule, config, n)
    table = sigmas.training_sigmas(schedule)
    levels = np.interp(timesteps, np.arange(len(table)), table)
    selected, _ = sigmas.select_sigmas(config, SIGMA_OPTIONS, levels[0], levels[-1], n)
    if selected is not None:
        levels, timesteps = selected, sigmas.timesteps_at(selected, table)
    levels = sigmas.append_final(levels, config, table)
    return _stack(timesteps, levels, scaled, np.zeros(n)).skip(grids.skipped_steps(n, strength))


def make_euler_karras_table(schedule: Schedule, config: Config, n: int, strength: float) -> Table:
    """Return the table of n steps between Karras' noise levels, whatever the config selects. Raises ValueError."""
    return make_euler_table(schedule, sigmas.with_karras(config), n, strength)


def make_euler_ancestral_table(schedule: Schedule, config: Config, n: int, strength: float) -> Table:
    """Return the table of n steps as `make_euler_table` does; each goes down further and adds noise. Raises ValueError.

    As in diffusers, noise levels are always those of the timesteps and end at zero. SDXL-Turbo is sampled so.
    """
    timesteps, scaled = _timesteps(schedule, config, n)
    table = sigmas.training_sigmas(schedule)
    levels = sigmas.append_final(np.interp(timesteps, np.arange(len(table)), table), {}, table)
    up = levels[1:] * np.sqrt(np.maximum(levels[:-1] ** 2 - levels[1:] ** 2, 0.0)) / levels[:-1]
    return _stack(timesteps, levels, scaled, up).skip(grids.skipped_steps(n, strength))


def _timesteps(schedule: Schedule, config: Config, n: int) -> tuple[np.ndarray, bool]:
    """Return (timesteps float64[n], True if the first latents are sigma noise, without x0, instead of noise)."""
    total = len(schedule.alphas_cumprod)
    spacing = choice(config, "timestep_spacing", "linspace", grids.SPACINGS)
    timesteps = grids.spaced(n, spacing, whole(config, "steps_offset", 0, 0, total), total)
    return timesteps.astype(np.float32).astype(np.float64), spacing != "leading"


def _stack(timesteps: np.ndarray, levels: np.ndarray, scaled: bool, up: np.ndarray) -> Table:
    alpha, sigma = sigmas.to_alpha_sigma(levels)
    down = np.sqrt(levels[1:] ** 2 - up**2)
    scale = sigma[0] if scaled else 1.0
    alpha_to = np.append(alpha[1:-1], 1.0)  # diffusers does not scale the final latents, even if noise is left in them
    start = alpha[:-1], sigma[:-1]
    return stack_table(timesteps.astype(np.float32), start, *start, alpha_to, down, up, scale=scale)


def sample_euler(
    network: Network,
    z: jax.Array,
    table: Table,
    schedule: Schedule,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> jax.Array:
    """Sample from z: float32[B, h, w, c] at the table's first timestep.

    noise(i): float32[B, h, w, c], standard normal, for an ancestral table.
    """

    def step(z, memory, i, t, coefficients):
        alpha, sigma, alpha_to, down, up = coefficients
        x0, direction = split_output(schedule, network(z, t), z, alpha, sigma)
        added = 0.0 if noise is None else up * noise(i)
        return alpha_to * (x0 + down * direction + added), memory

    return iterate(step, z, table, on_step)


EULER = Sampler("euler", "EulerDiscreteScheduler", make_euler_table, sample_euler)
EULER_KARRAS = Sampler("euler_karras", "EulerDiscreteScheduler", make_euler_karras_table, sample_euler)
EULER_ANCESTRAL = Sampler(
    "euler_ancestral", "EulerAncestralDiscreteScheduler", make_euler_ancestral_table, sample_euler, adds_noise=True
)
