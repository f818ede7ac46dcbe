"""Single steps of the probability-flow ODE, from the current estimates of x0 and the noise."""

import jax

from lcm_jax.diffusion.schedule import like


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
