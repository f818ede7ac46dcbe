"""Single steps of the probability-flow ODE, on a problem whose answer is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.guidance import classifier_free
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.diffusion.schedule import add_noise, alpha_sigma, make_schedule
from lcm_jax.diffusion.solvers import ddim_step, dpm_solver_pp_2m_step

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SPREAD = 0.5  # of the Gaussian data of the exact problem


def test_a_ddim_step_stays_on_a_straight_trajectory():
    """With the true x0 and noise, a step from any s to any t gives z_t itself."""
    schedule = make_schedule(SD)
    x0, noise = np.random.default_rng(0).standard_normal((2, 3, 2, 2, 1)).astype(np.float32)
    t = jnp.array([0, 259, 979])
    np.testing.assert_array_equal(ddim_step(x0, noise, *alpha_sigma(schedule, t)), add_noise(schedule, x0, noise, t))


def test_the_multistep_update_is_first_order_ddim_without_its_second_term():
    """First-order DPM-Solver is DDIM: ratio z + first x0 = alpha x0 + sigma e."""
    schedule = make_schedule(SD)
    table = SAMPLERS["dpmsolver++"].make_table(schedule, {"timestep_spacing": "trailing"}, 2)
    _, _, ratio, first, second = table.coefficients[0]
    assert second == 0 and table.timesteps.tolist() == [999, 499]
    x0, noise = np.random.default_rng(0).standard_normal((2, 1, 2, 2, 1)).astype(np.float32)
    z = add_noise(schedule, x0, noise, jnp.array([999]))
    ours = dpm_solver_pp_2m_step(z, x0, np.zeros_like(x0), ratio, first, second)
    np.testing.assert_allclose(ours, add_noise(schedule, x0, noise, jnp.array([499])), atol=1e-5)


def gaussian(schedule):
    """The exact network for data N(0, SPREAD^2), which says epsilon."""

    def network(z, t):
        alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in alpha_sigma(schedule, t))
        return sigma * z / (alpha**2 * SPREAD**2 + sigma**2)

    return network


def errors(name, counts, schedule):
    """Largest distance from the ODE's exact solution: z scales with the standard deviation of its marginal."""
    z = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 8, 1)), jnp.float32)
    alpha, sigma = alpha_sigma(schedule, jnp.array(999))
    exact = z * SPREAD / jnp.sqrt(alpha**2 * SPREAD**2 + sigma**2)
    config = {"timestep_spacing": "trailing", "skip_prk_steps": True, "set_alpha_to_one": True}
    sampler = SAMPLERS[name]
    tables = [sampler.make_table(schedule, config, n) for n in counts]
    ends = [sampler.sample(gaussian(schedule), z, table, schedule, lambda i: 0 * z) for table in tables]
    return [float(jnp.abs(end - exact).max()) for end in ends]


def test_ddim_and_dpm_solver_converge_to_the_exact_solution():
    schedule = make_schedule(SD)
    ddim, dpm = (errors(name, (10, 20, 40), schedule) for name in ("ddim", "dpmsolver++"))
    assert ddim[0] > 1.7 * ddim[1] > 1.7**2 * ddim[2], ddim  # first order: half the step, half the error
    assert dpm[0] > 2 * dpm[1] > 4 * dpm[2], dpm  # its last step, to sigma = 0, is of first order
    assert all(b < a for a, b in zip(ddim, dpm, strict=True)), (ddim, dpm)
    assert ddim[2] < 0.1 and dpm[2] < 0.05


@pytest.mark.parametrize("w", [0.0, 7.0])
def test_guidance(w):
    cond, uncond = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    scale = 1 + w  # as diffusers calls it
    np.testing.assert_allclose(classifier_free(uncond, cond, w), uncond + scale * (cond - uncond), atol=1e-5)
