"""The three samplers equal diffusers' schedulers, step for step, given the same network and the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.samplers import sample_consistency, sample_ddim, sample_dpm_solver_pp, sample_euler
from lcm_jax.diffusion.schedule import PREDICTION_TYPES, lcm_timesteps, make_schedule, solver_timesteps

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
Z = np.random.default_rng(0).standard_normal((2, 2, 3, 1)).astype(np.float32)


def network(z, t):
    """Stands for a network in jax: bounded, different at every z and t."""
    return jnp.tanh(z * 0.7 + 0.1) * (1 - t.reshape(-1, 1, 1, 1) / 3000.0)


def torch_network(z, t):
    return torch.tanh(z * 0.7 + 0.1) * (1 - t / 3000.0)


def follow(scheduler, timesteps):
    """The end of diffusers' own loop."""
    z = torch.tensor(Z)
    for t in timesteps:
        z = scheduler.step(torch_network(z, t), t, z).prev_sample
    return z.numpy()


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("n", "strength"),
    [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (8, 1.0), (50, 1.0), (1, 0.5), (4, 0.8), (7, 0.3), (3, 0.06)],
)
def test_consistency_sampling_equals_lcm_scheduler(n, strength, kind, monkeypatch):
    schedule = make_schedule(SD | {"prediction_type": kind})
    expected, noise = follow_lcm(diffusers.LCMScheduler(**SD, prediction_type=kind), n, strength, monkeypatch)
    ours = sample_consistency(network, jnp.asarray(Z), lcm_timesteps(n, strength), noise, schedule)
    assert_same(ours, expected)


@pytest.mark.parametrize("n", [1, 2, 4, 7, 8])
def test_consistency_sampling_on_the_grid_and_table_of_the_embedded_student(n, monkeypatch):
    config = SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    scheduler = diffusers.LCMScheduler(**config, original_inference_steps=8)
    expected, noise = follow_lcm(scheduler, n, 1.0, monkeypatch)
    timesteps = lcm_timesteps(n, original_steps=8)
    assert timesteps.tolist() == scheduler.timesteps.tolist() and timesteps[0] == 999
    assert_same(sample_consistency(network, jnp.asarray(Z), timesteps, noise, make_schedule(config)), expected)


def follow_lcm(scheduler, n, strength, monkeypatch):
    """(the end of diffusers' own loop, the noise that it drew)."""
    scheduler.set_timesteps(n, strength=strength)
    noise = np.random.default_rng(n).standard_normal((n, *Z.shape)).astype(np.float32)
    drawn = iter(noise)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, **k: torch.tensor(next(drawn)))
    z = torch.tensor(Z)
    for t in scheduler.timesteps:
        result = scheduler.step(torch_network(z, t), t, z)
        z = result.prev_sample
    return result.denoised.numpy(), noise[: n - 1]


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize(("spacing", "offset"), [("trailing", 0), ("leading", 1)])
def test_ddim_equals_ddim_scheduler(spacing, offset, to_one, kind):
    schedule = make_schedule(SD | {"prediction_type": kind})
    for n, strength in [(1, 1.0), (3, 1.0), (8, 1.0), (20, 1.0), (50, 1.0), (20, 0.5), (7, 0.3)]:
        scheduler = diffusers.DDIMScheduler(
            **SD, prediction_type=kind, clip_sample=False, set_alpha_to_one=to_one, timestep_spacing=spacing,
            steps_offset=offset,
        )  # fmt: skip
        scheduler.set_timesteps(n)
        timesteps = solver_timesteps(n, spacing, offset, strength=strength)
        expected = follow(scheduler, scheduler.timesteps[n - int(n * strength) :])
        assert_same(sample_ddim(network, jnp.asarray(Z), timesteps, schedule, to_one, n), expected)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_dpm_solver_equals_dpm_solver_multistep_scheduler(spacing, kind):
    schedule = make_schedule(SD | {"prediction_type": kind})
    for n, strength in [(1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (20, 1.0), (50, 1.0), (20, 0.5), (7, 0.3)]:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **SD, prediction_type=kind, timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0
        )
        scheduler.set_timesteps(n)
        theirs = scheduler.timesteps[n - int(n * strength) :]
        if spacing == "trailing":
            assert solver_timesteps(n, strength=strength).tolist() == theirs.tolist()
        ours = sample_dpm_solver_pp(network, jnp.asarray(Z), theirs.numpy().astype(np.int32), schedule)
        assert_same(ours, follow(scheduler, theirs))


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
@pytest.mark.parametrize("n", [1, 2, 4, 8, 50])
def test_zero_snr_tables_are_sampled_as_in_diffusers(n, kind):
    """Where alpha is 0 at the first step. diffusers' other two put 2^-12 there, also where it reads the network."""
    config = SD | {"rescale_betas_zero_snr": True, "prediction_type": kind}
    schedule, timesteps = make_schedule(config), solver_timesteps(n)
    assert schedule.alphas_cumprod[timesteps[0]] == 0
    ddim = diffusers.DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    ddim.set_timesteps(n)
    assert_same(sample_ddim(network, jnp.asarray(Z), timesteps, schedule), follow(ddim, ddim.timesteps))
    dpm = diffusers.DPMSolverMultistepScheduler(**config, timestep_spacing="trailing")
    dpm.set_timesteps(n)
    found, expected = sample_dpm_solver_pp(network, jnp.asarray(Z), timesteps, schedule), follow(dpm, dpm.timesteps)
    np.testing.assert_allclose(found, expected, atol=1e-3)

    euler = diffusers.EulerDiscreteScheduler(**config, timestep_spacing="trailing")
    euler.set_timesteps(n)
    z = torch.tensor(Z) * euler.init_noise_sigma
    for t in euler.timesteps:
        z = euler.step(torch_network(euler.scale_model_input(z, t), t), t, z).prev_sample
    np.testing.assert_allclose(sample_euler(network, jnp.asarray(Z), timesteps, schedule), z.numpy(), atol=1e-3)


def test_a_sampler_is_one_scan_under_one_jit():
    """The network stands in the program once, however many steps there are."""
    schedule = make_schedule(SD)
    traced = []

    def counted(z, t):
        traced.append(t.shape)
        return network(z, t)

    z, noise = jnp.asarray(Z), jnp.zeros((7, *Z.shape))
    for sampler in (
        lambda z: sample_consistency(counted, z, lcm_timesteps(8), noise, schedule),
        lambda z: sample_ddim(counted, z, solver_timesteps(8), schedule),
        lambda z: sample_dpm_solver_pp(counted, z, solver_timesteps(8), schedule),
    ):
        traced.clear()
        end = jax.jit(sampler)(z)
        assert traced == [(2,)] and end.shape == z.shape and end.dtype == jnp.float32


def test_one_consistency_step_asks_for_no_noise():
    schedule = make_schedule(SD)
    end = sample_consistency(network, jnp.asarray(Z), lcm_timesteps(1), jnp.zeros((0, *Z.shape)), schedule)
    assert jnp.isfinite(end).all()
