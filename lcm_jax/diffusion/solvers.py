"""Single steps of the probability-flow ODE, from estimates of x0 and the noise."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lcm_jax.diffusion.schedule import Schedule, alpha_sigma, like, log_snr, timestep_at

# (z float32[B, h, w, c], t int32[B] or float32[B] between training steps) -> x0 and the noise there, of z's shape
Estimate = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def ddim_step(x0: jax.Array, noise: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """Return z = alpha x0 + sigma e, float32[B, h, w, c] (arXiv 2010.02502, eta 0).

    x0, noise: float32[B, h, w, c]; alpha, sigma: float32[B] or [], at the timestep that the step leads to.
    """
    return like(alpha, x0) * x0 + like(sigma, x0) * noise


def dpm_solver_pp_2m_step(z, x0, x0_before, ratio, first, second) -> jax.Array:
    """Return the second-order multistep update of DPM-Solver++ (arXiv 2211.01095, algorithm 2).

    z <- ratio z + first x0 + second (x0 - x0_before), with a row of `make_dpm_solver_pp_table` as the scalars.
    """
    return ratio * z + first * x0 + second * (x0 - x0_before)


def solve_ddim(estimate: Estimate, schedule: Schedule, z: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
    """Return z_t from z_s by a step of DDIM, of first order; see `solve`."""
    return ddim_step(*estimate(z, s), *alpha_sigma(schedule, t))


def solve_dpm(estimate: Estimate, schedule: Schedule, z: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
    """Return z_t from z_s by a step of DPM-Solver-2 (arXiv 2206.00927, algorithm 1); see `solve`.

    The published (alpha_t / alpha_s) z - sigma_t (e^h - 1) e_m, with e_m the noise at the midpoint, is DDIM's step plus
    sigma_t (e^h - 1) (e - e_m): this form loses no digits where alpha_s is near 0.
    """
    (x0, noise), (_, noise_middle), h = _estimate_twice(estimate, schedule, z, s, t)
    alpha, sigma = alpha_sigma(schedule, t)
    return ddim_step(x0, noise, alpha, sigma) + like(sigma * jnp.expm1(h), z) * (noise - noise_middle)


def solve_dpm_pp(estimate: Estimate, schedule: Schedule, z: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
    """Return z_t from z_s by a step of DPM-Solver++(2S) (arXiv 2211.01095, algorithm 1); see `solve`.

    The published (sigma_t / sigma_s) z - alpha_t (e^-h - 1) x0_m is DDIM's step plus alpha_t (1 - e^-h) (x0_m - x0).
    """
    (x0, noise), (x0_middle, _), h = _estimate_twice(estimate, schedule, z, s, t)
    alpha, sigma = alpha_sigma(schedule, t)
    return ddim_step(x0, noise, alpha, sigma) - like(alpha * jnp.expm1(-h), z) * (x0_middle - x0)


def _estimate_twice(estimate: Estimate, schedule: Schedule, z: jax.Array, s: jax.Array, t: jax.Array):
    """Return the estimates at s and midway to t in lambda, and h, the step from s to t in lambda, float32[B].

    DDIM leads to the midpoint: it is the step of first order of both solvers.
    """
    table = jnp.asarray(log_snr(schedule))
    middle = timestep_at(schedule, (table[s] + table[t]) / 2)
    first = estimate(z, s)
    return first, estimate(ddim_step(*first, *alpha_sigma(schedule, middle)), middle), table[t] - table[s]


SOLVERS: Mapping[str, Callable[[Estimate, Schedule, jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "ddim": solve_ddim,
    "dpm": solve_dpm,
    "dpm++": solve_dpm_pp,
}


def solve(solver: str, estimate: Estimate, schedule: Schedule, z: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
    """Return z_t from z_s by one step of a solver of `SOLVERS`, float32[B, h, w, c].

    solver: "ddim" calls `estimate` once; "dpm" and "dpm++", of second order, call it twice. z: float32[B, h, w, c];
    s, t: int32[B], s >= t.
    """
    return SOLVERS[solver](estimate, schedule, z, s, t)
