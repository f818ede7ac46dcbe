"""From noise to latents: the multistep consistency sampler, DDIM, Euler and DPM-Solver++, each a `lax.scan`.

`network(z, t)` takes z: float32[B, h, w, c] and t: int32[B] and returns the network's output, guidance included.
Every coefficient that depends on the timesteps alone is computed on the host in float64, into a table of all steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.consistency import consistency_function
from lcm_jax.diffusion.schedule import Schedule, predict_noise, predict_x0
from lcm_jax.diffusion.solvers import ddim_step, dpm_solver_pp_2m_step

Network = Callable[[jax.Array, jax.Array], jax.Array]


class Table(NamedTuple):
    """A sampler's steps, a row for each: where it starts, int32[n], and its coefficients, float32[n, k].

    A table on the host is part of the program. One that is traced is an argument of it, and may be `padded`, so that
    one program takes any number of steps up to n.
    """

    timesteps: np.ndarray | jax.Array
    coefficients: np.ndarray | jax.Array

    def padded(self, n: int) -> "Table":
        """n rows, those added with the timestep -1: they are passed over, and cost nothing."""
        more = n - len(self.timesteps)
        return Table(
            np.pad(self.timesteps, (0, more), constant_values=-1), np.pad(self.coefficients, ((0, more), (0, 0)))
        )


def _table(timesteps: np.ndarray, *coefficients: np.ndarray) -> Table:
    return Table(timesteps.astype(np.int32), np.stack(coefficients, axis=1).astype(np.float32))


def _step_noise(noise: jax.Array, table: Table, z: jax.Array) -> jax.Array:
    """The noise that each step of the table adds; none is asked for the last, which adds none."""
    return jnp.concatenate([noise[: len(table.timesteps) - 1], jnp.zeros_like(z)[None]])


def _scan(step: Callable, carry, table: Table, *more: jax.Array):
    """`carry` after step(carry, t, coefficients, *more) for every row of the table; t: int32[B]."""
    batch = len(jax.tree.leaves(carry)[0])

    def take(carry, row):
        (timestep, coefficients), *rest = row
        return step(carry, jnp.full(batch, timestep), coefficients, *rest)

    def take_or_pass(carry, row):
        return jax.lax.cond(row[0].timesteps >= 0, take, lambda carry, row: carry, carry, row)

    chosen = take if isinstance(table.timesteps, np.ndarray) else take_or_pass
    return jax.lax.scan(lambda carry, row: (chosen(carry, row), None), carry, (table, *more))[0]


def consistency_table(timesteps: np.ndarray, schedule: Schedule) -> Table:
    """For `sample_consistency`: alpha and sigma of the next timestep. timesteps: int32[n], descending."""
    n = len(timesteps)
    bar = schedule.alphas_cumprod.astype(np.float64)[np.append(timesteps[1:], timesteps[-1])]
    # After the last jump nothing is added, as if it had gone to alpha = 1, sigma = 0.
    last = np.arange(n) == n - 1
    return _table(timesteps, np.where(last, 1.0, np.sqrt(bar)), np.where(last, 0.0, np.sqrt(1.0 - bar)))


def sample_consistency(network: Network, z: jax.Array, table: Table, noise: jax.Array, schedule: Schedule) -> jax.Array:
    """Algorithm 3 of arXiv 2310.04378: jump to x0, noise it again to the next timestep, jump again.

    z: float32[B, h, w, c], standard normal. noise: float32[n - 1 or more, B, h, w, c].
    Returns the last jump's latents, float32[B, h, w, c].
    """

    def step(z, t, coefficients, noise):
        alpha, sigma = coefficients
        return alpha * consistency_function(schedule, network(z, t), z, t) + sigma * noise

    return _scan(step, z, table, _step_noise(noise, table, z))


def ddim_table(
    timesteps: np.ndarray, schedule: Schedule, set_alpha_to_one: bool = False, num_inference_steps: int | None = None
) -> Table:
    """For `sample_ddim`: alpha and sigma of where each step goes.

    timesteps: int32[n] descending and evenly spaced. As in diffusers each step goes to t - 1000 // n, which is the next
    timestep where n divides 1000; the last one goes to t = 0, or to alpha = 1. num_inference_steps: this n, where
    strength < 1 has left fewer timesteps.
    """
    before = timesteps - len(schedule.alphas_cumprod) // (num_inference_steps or len(timesteps))
    bars = schedule.alphas_cumprod.astype(np.float64)
    bar = np.where(before >= 0, bars[np.maximum(before, 0)], 1.0 if set_alpha_to_one else bars[0])
    return _table(timesteps, np.sqrt(bar), np.sqrt(1.0 - bar))


def sample_ddim(network: Network, z: jax.Array, table: Table, schedule: Schedule) -> jax.Array:
    """DDIM with eta 0 (arXiv 2010.02502) from z: float32[B, h, w, c] at the table's first timestep."""

    def step(z, t, coefficients):
        output = network(z, t)
        return ddim_step(predict_x0(schedule, output, z, t), predict_noise(schedule, output, z, t), *coefficients)

    return _scan(step, z, table)


def _positive(bar: np.ndarray) -> np.ndarray:
    """A zero-SNR table ends in 0, where sigma / alpha is infinite: 2^-24 stands in for it, as in diffusers."""
    return np.maximum(bar, 2.0**-24)


def euler_table(timesteps: np.ndarray, schedule: Schedule, ancestral: bool = False) -> Table:
    """For `sample_euler`: alpha of where each step goes, sigma / alpha that it goes down to and that it adds.

    timesteps: int32[n] descending. ancestral: each step goes down further and adds noise, as SDXL-Turbo samples.
    """
    bar = _positive(schedule.alphas_cumprod.astype(np.float64)[timesteps])
    sigma = np.append(np.sqrt((1.0 - bar) / bar), 0.0)
    ahead, up = sigma[1:], np.zeros(len(timesteps))
    if ancestral:
        up = ahead * np.sqrt(np.maximum(sigma[:-1] ** 2 - ahead**2, 0.0)) / sigma[:-1]
    return _table(timesteps, 1.0 / np.sqrt(1.0 + ahead**2), np.sqrt(ahead**2 - up**2), up)


def sample_euler(
    network: Network, z: jax.Array, table: Table, noise: jax.Array | None, schedule: Schedule
) -> jax.Array:
    """Euler steps of the probability-flow equation in sigma / alpha (arXiv 2206.00364), to no noise.

    z: float32[B, h, w, c], standard normal; noise: for an ancestral table, float32[n - 1 or more, B, h, w, c].
    """

    def step(z, t, coefficients, *fresh):
        alpha, down, up = coefficients
        output = network(z, t)
        x0, direction = predict_x0(schedule, output, z, t), predict_noise(schedule, output, z, t)
        return alpha * (x0 + down * direction + sum(up * each for each in fresh))

    return _scan(step, z, table, *([] if noise is None else [_step_noise(noise, table, z)]))


def dpm_solver_pp_table(timesteps: np.ndarray, schedule: Schedule) -> Table:
    """For `sample_dpm_solver_pp`: ratio, first and second of `dpm_solver_pp_2m_step`, ending at sigma = 0.

    With lambda = log(alpha / sigma) and h the step in lambda: ratio = sigma_next / sigma,
    first = alpha_next (1 - e^-h), second = first h / (2 h_before).
    The first step is of first order; so is the last, since it ends at sigma = 0.
    timesteps: int32[n] descending; the last step needs timesteps[-1] > 0 or sigma > 0 there.
    """
    bar = _positive(schedule.alphas_cumprod.astype(np.float64)[timesteps])
    alpha, sigma = np.append(np.sqrt(bar), 1.0), np.append(np.sqrt(1.0 - bar), 0.0)
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    h = np.diff(lam)
    ratio, first = sigma[1:] / sigma[:-1], -alpha[1:] * np.expm1(-h)
    second = np.zeros_like(first)
    second[1:-1] = first[1:-1] * h[1:-1] / (2 * h[:-2])
    return _table(timesteps, ratio, first, second)


def sample_dpm_solver_pp(network: Network, z: jax.Array, table: Table, schedule: Schedule) -> jax.Array:
    """DPM-Solver++ (2M), arXiv 2211.01095, from z: float32[B, h, w, c] at the table's first timestep."""

    def step(carry, t, coefficients):
        z, x0_before = carry
        x0 = predict_x0(schedule, network(z, t), z, t)
        return dpm_solver_pp_2m_step(z, x0, x0_before, *coefficients), x0

    return _scan(step, (z, jnp.zeros_like(z)), table)[0]
