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


def dpm_solver_step(z: jax.Array, noise: jax.Array, ratio: jax.Array, sigma: jax.Array, h: jax.Array) -> jax.Array:
    """Return the exponential step of DPM-Solver for a constant noise, float32[B, h, w, c] (arXiv 2206.00927, eq. 3.7).

    z <- ratio z - sigma (e^h - 1) e. z, noise: float32[B, h, w, c]. ratio: alpha at the end by that at the start;
    sigma: at the end; h: the step in lambda = log(alpha / sigma), at least 0; float32[B] each.
    """
    return like(ratio, z) * z - like(sigma * jnp.expm1(h), z) * noise


def dpm_solver_pp_step(z: jax.Array, x0: jax.Array, ratio: jax.Array, alpha: jax.Array, h: jax.Array) -> jax.Array:
    """Return the exponential step of DPM-Solver++ for a constant x0, float32[B, h, w, c] (arXiv 2211.01095, eq. 9).

    z <- ratio z - alpha (e^-h - 1) x0. z, x0: float32[B, h, w, c]. ratio: sigma at the end by that at the start; alpha:
    at the end; h: see `dpm_solver_step`.
    """
    return like(ratio, z) * z - like(alpha * jnp.expm1(-h), z) * x0


def solve_ddim(estimate: Estimate, schedule: Schedule, z: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
    """Return z_t from z_s by a step of DDIM, of first order; see `solve`."""
    return ddim_step(*estimate(z, s), *alpha_sigma(schedule, t))


def solve_dpm(estimate: Estimate, schedule: Schedule, z: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
    """Return z_t from z_s by a step of DPM-Solver-2 (arXiv 2206.00927, algorithm 1); see `solve`.

    A step of first order to the midpoint in lambda, then one over the whole way with the noise that is estimated there.
    """
    middle, h = _midpoint(schedule, s, t)
    (alpha_s, _), (alpha_m, sigma_m), (alpha_t, sigma_t) = (alpha_sigma(schedule, each) for each in (s, middle, t))
    z_m = dpm_solver_step(z, estimate(z, s)[1], alpha_m / alpha_s, sigma_m, h / 2)
    return dpm_solver_step(z, estimate(z_m, middle)[1], alpha_t / alpha_s, sigma_t, h)


def solve_dpm_pp(estimate: Estimate, schedule: Schedule, z: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
    """Return z_t from z_s by a step of DPM-Solver++(2S) (arXiv 2211.01095, algorithm 1); see `solve`.

    The midpoint of `solve_dpm`, with x0 in place of the noise.
    """
    middle, h = _midpoint(schedule, s, t)
    (_, sigma_s), (alpha_m, sigma_m), (alpha_t, sigma_t) = (alpha_sigma(schedule, each) for each in (s, middle, t))
    z_m = dpm_solver_pp_step(z, estimate(z, s)[0], sigma_m / sigma_s, alpha_m, h / 2)
    return dpm_solver_pp_step(z, estimate(z_m, middle)[0], sigma_t / sigma_s, alpha_t, h)


def _midpoint(schedule: Schedule, s: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the timestep midway between s and t in lambda, and the step in lambda, float32[B]."""
    table = jnp.asarray(log_snr(schedule))
    return timestep_at(schedule, (table[s] + table[t]) / 2), table[t] - table[s]


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


def check_solver(key: str, solver: str, schedule: Schedule) -> None:
    """Raise ValueError, naming `key`, if a schedule has no lambda at its end for a solver that steps in it."""
    if solver != "ddim" and schedule.alphas_cumprod[-1] <= 0:
        raise ValueError(
            f"{key} {solver!r} is not supported for a schedule with zero terminal SNR (rescale_betas_zero_snr), where "
            "log(alpha / sigma) is infinite; use ddim"
        )
