"""DPM-Solver++ (2M), arXiv 2211.01095."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion import grids
from lcm_jax.diffusion.options import Config, choice, flag, number, unsupported, whole
from lcm_jax.diffusion.samplers import sigmas
from lcm_jax.diffusion.samplers.table import NO_CLIPPING, Network, OnStep, Sampler, Table, iterate, stack_table
from lcm_jax.diffusion.schedule import Schedule, output_to_x0
from lcm_jax.diffusion.solvers import dpm_solver_pp_2m_step


def make_dpm_solver_pp_table(schedule: Schedule, config: Config, n: int, strength: float) -> Table:
    """Return the table of n steps. Raises ValueError.

    Coefficients: alpha and sigma of each step's start, and ratio, first and second of `dpm_solver_pp_2m_step`. With
    lambda = log(alpha / sigma) and h the step in lambda: ratio = sigma_to / sigma, first = alpha_to (1 - e^-h),
    second = first h / (2 h_before), or Heun's alpha_to (1 - (1 - e^-h) / h) h / h_before. The first step is of first
    order; so is the last if it ends at sigma = 0, or there are few.
    """
    if flag(config, "thresholding"):
        raise unsupported("thresholding", True, NO_CLIPPING)
    order = choice(config, "solver_order", 2, (1, 2))
    choice(config, "algorithm_type", "dpmsolver++", ("dpmsolver++",))
    # The last three are solvers of other classes, which diffusers replaces by the midpoint.
    heun = choice(config, "solver_type", "midpoint", ("midpoint", "heun", "bh1", "bh2", "logrho")) == "heun"
    choice(config, "variance_type", None, (None,))
    if flag(config, "use_flow_sigmas"):
        raise unsupported("use_flow_sigmas", True, "false, or another sampler")
    timesteps, levels = _grid(schedule, config, n)
    alpha, sigma = sigmas.to_alpha_sigma(levels)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = -np.diff(np.log(levels))
        ratio, first = sigma[1:] / sigma[:-1], -alpha[1:] * np.expm1(-h)
        half = alpha[1:] * (1 + np.expm1(-h) / h) if heun else first / 2
        second = np.append(0.0, np.where(h[1:] > 0, half[1:] * h[1:] / h[:-1], 0.0))
    lower_final = flag(config, "lower_order_final", True) and n < 15
    if flag(config, "euler_at_final") or lower_final or levels[-1] == 0:
        second[-1] = 0.0
    skipped = grids.skipped_steps(n, strength)
    second[skipped] = 0.0  # nothing comes before the first step
    start = alpha[:-1], sigma[:-1]
    return stack_table(timesteps, start, *start, ratio, first, second * (order == 2)).skip(skipped)


def make_karras_table(schedule: Schedule, config: Config, n: int, strength: float) -> Table:
    """Return the table of n steps between Karras' noise levels, whatever the config selects. Raises ValueError."""
    return make_dpm_solver_pp_table(schedule, sigmas.with_karras(config), n, strength)


def _grid(schedule: Schedule, config: Config, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (timesteps int32[n], sigma / alpha there and at the end, float64[n + 1])."""
    table = sigmas.training_sigmas(schedule)
    number(config, "lambda_min_clipped", -math.inf, -math.inf, -float(np.log(table[-1])))  # above, it clips some steps
    spacing = choice(config, "timestep_spacing", "linspace", grids.SPACINGS)
    offset = whole(config, "steps_offset", 0, 0, len(table))
    timesteps = np.round(grids.spaced(n, spacing, offset, len(table), skip_last=True))
    levels, option = sigmas.select_sigmas(config, tuple(sigmas.GRIDS), float(table[-1]), float(table[0]), n)
    if levels is None:
        levels = table[timesteps.astype(int)].astype(np.float64)
    else:
        timesteps = sigmas.timesteps_at(levels, table)
        # diffusers rounds the timesteps of these two grids and truncates the others.
        if option in ("use_karras_sigmas", "use_lu_lambdas") and config.get("beta_schedule") != "squaredcos_cap_v2":
            timesteps = np.round(timesteps)
    return timesteps.astype(np.int32), sigmas.append_final(levels, config, table)


def sample_dpm_solver_pp(
    network: Network, z: jax.Array, table: Table, schedule: Schedule, noise: None = None, on_step: OnStep | None = None
) -> jax.Array:
    """Sample from z: float32[B, h, w, c] at the table's first timestep."""

    def step(z, x0_before, i, t, coefficients):
        alpha, sigma, *update = coefficients
        x0 = output_to_x0(schedule.prediction_type, network(z, t), z, alpha, sigma)
        return dpm_solver_pp_2m_step(z, x0, x0_before, *update), x0

    return iterate(step, z, table, on_step, jnp.zeros_like(z))


DPM_SOLVER_PP = Sampler("dpmsolver++", "DPMSolverMultistepScheduler", make_dpm_solver_pp_table, sample_dpm_solver_pp)
DPM_SOLVER_PP_KARRAS = Sampler(
    "dpmsolver++_karras", "DPMSolverMultistepScheduler", make_karras_table, sample_dpm_solver_pp
)
