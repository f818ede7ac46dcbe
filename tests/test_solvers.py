"""Single steps of the probability-flow ODE, on a problem whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.guidance import classifier_free
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.diffusion.schedule import add_noise, alpha_sigma, log_snr, make_schedule, skipping_steps, timestep_at
from lcm_jax.diffusion.solvers import SOLVERS, ddim_step, dpm_solver_pp_2m_step, solve

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


def estimate_gaussian(schedule):
    """The exact x0 and noise of data N(0, SPREAD^2) at any t, between training steps as well."""

    def estimate(z, t):
        alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in alpha_sigma(schedule, t))
        variance = alpha**2 * SPREAD**2 + sigma**2
        return alpha * SPREAD**2 * z / variance, sigma * z / variance

    return estimate


def relative_error(solver, num_ddim_steps, schedule):
    """Of the steps of LCD from the last timestep down to about 200, against the closed form."""
    estimate, start = estimate_gaussian(schedule), jnp.ones((1, 1, 1, 1))

    def step(z, index):
        return solve(solver, estimate, schedule, z, *skipping_steps(index[None], num_ddim_steps)), None

    z, _ = jax.lax.scan(step, start, jnp.arange(num_ddim_steps // 5, num_ddim_steps)[::-1])
    (a_1, s_1), (a_0, s_0) = (alpha_sigma(schedule, jnp.array(t)) for t in (999, 199))
    exact = float(jnp.sqrt((a_0**2 * SPREAD**2 + s_0**2) / (a_1**2 * SPREAD**2 + s_1**2)))
    return abs(float(z[0, 0, 0, 0]) - exact) / exact


@pytest.mark.parametrize(("solver", "order", "bound"), [("ddim", 1, 0.1), ("dpm", 2, 0.01), ("dpm++", 2, 0.01)])
def test_a_teachers_steps_converge_to_the_closed_form_with_their_order(solver, order, bound):
    """Half the skipping step: half the error for a solver of first order, a quarter for one of second order."""
    schedule = make_schedule(SD)
    coarse, fine = (relative_error(solver, n, schedule) for n in (20, 40))
    assert fine < coarse < bound
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.25), (coarse, fine)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_from_the_true_x0_and_noise_is_exact_at_every_length(solver):
    """Also of one training step, of no length (the first of k = 1), and over the whole table."""
    schedule = make_schedule(SD)
    x0, noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 2, 2, 1)), jnp.float32)
    s, t = jnp.array([999, 500, 0, 979]), jnp.array([0, 499, 0, 959])
    z = solve(solver, lambda z, t: (x0, noise), schedule, add_noise(schedule, x0, noise, s), s, t)
    np.testing.assert_allclose(z, add_noise(schedule, x0, noise, t), atol=2e-4)


@pytest.mark.parametrize("solver", ["dpm", "dpm++"])
def test_a_step_of_second_order_equals_diffusers(solver):
    torch = pytest.importorskip("torch")
    from diffusers import DPMSolverSinglestepScheduler

    schedule, estimate = make_schedule(SD), estimate_gaussian(make_schedule(SD))
    s, t = jnp.array([619]), jnp.array([599])
    z = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 4, 1)), jnp.float32)
    seen = []

    def recorded(z, t):
        seen.append((z, float(t[0]), estimate(z, t)[("dpm++", "dpm").index(solver)]))
        return estimate(z, t)

    ours = solve(solver, recorded, schedule, z, s, t)
    (_, _, start), (z_middle, middle, end) = seen
    assert 599 < middle < 609.5, "halfway in lambda is nearer to the end, where lambda rises faster"
    theirs = DPMSolverSinglestepScheduler(
        algorithm_type={"dpm": "dpmsolver", "dpm++": "dpmsolver++"}[solver], final_sigmas_type="sigma_min"
    )
    theirs.set_timesteps(2)
    at = [alpha_sigma(schedule, each) for each in (s, jnp.float32([middle]), t)]
    theirs.sigmas = torch.tensor([float(sigma[0] / alpha[0]) for alpha, sigma in at])
    to_torch = lambda x: torch.tensor(np.asarray(x))  # noqa: E731
    theirs._step_index = 0
    first = theirs.dpm_solver_first_order_update(to_torch(start), sample=to_torch(z))
    np.testing.assert_allclose(z_middle, first, atol=1e-5)
    theirs._step_index = 1
    both = theirs.singlestep_dpm_solver_second_order_update([to_torch(start), to_torch(end)], sample=to_torch(z))
    np.testing.assert_allclose(ours, both, atol=1e-5)


def test_alpha_and_sigma_between_training_steps():
    """At training steps they are the table's; between them lambda is linear, and `timestep_at` is the inverse."""
    schedule, whole = make_schedule(SD), jnp.arange(1000)
    for ours, table in zip(alpha_sigma(schedule, whole.astype(float)), alpha_sigma(schedule, whole), strict=True):
        np.testing.assert_allclose(ours, table, rtol=1e-4)
    t = jnp.float32([0.25, 499.5, 998.75])
    alpha, sigma = alpha_sigma(schedule, t)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)
    table = log_snr(schedule)
    np.testing.assert_allclose(jnp.log(alpha / sigma)[1], (table[499] + table[500]) / 2, atol=1e-5)
    np.testing.assert_allclose(timestep_at(schedule, jnp.log(alpha / sigma)), t, atol=2e-3)


@pytest.mark.parametrize("solver", ["dpm", "dpm++"])
def test_a_step_from_a_zero_terminal_snr_is_no_farther_than_ddims_from_the_closed_form(solver):
    schedule = make_schedule(SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    z, s = jnp.ones((3, 1, 1, 1)), jnp.full(3, 999)
    t = jnp.array([979, 899, 749])
    alpha, sigma = alpha_sigma(schedule, t)
    exact = jnp.sqrt(alpha**2 * SPREAD**2 + sigma**2)
    ddim, ours = (
        jnp.abs(solve(name, estimate_gaussian(schedule), schedule, z, s, t)[:, 0, 0, 0] - exact)
        for name in ("ddim", solver)
    )
    assert (ours < 1.01 * ddim + 1e-6).all() and ours.max() < 5e-3, (ddim, ours)


@pytest.mark.parametrize("w", [0.0, 7.0])
def test_guidance(w):
    cond, uncond = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    scale = 1 + w  # as diffusers calls it
    np.testing.assert_allclose(classifier_free(uncond, cond, w), uncond + scale * (cond - uncond), atol=1e-5)
