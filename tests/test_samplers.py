"""The three samplers equal diffusers' schedulers, step for step, given the same network and the same noise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.samplers import (
    consistency_table,
    ddim_table,
    dpm_solver_pp_table,
    euler_table,
    sample_consistency,
    sample_ddim,
    sample_dpm_solver_pp,
    sample_euler,
)
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
    table = consistency_table(lcm_timesteps(n, strength), schedule)
    ours = sample_consistency(network, jnp.asarray(Z), table, noise, schedule)
    assert_same(ours, expected)


@pytest.mark.parametrize("n", [1, 2, 4, 7, 8])
def test_consistency_sampling_on_the_grid_and_table_of_the_embedded_student(n, monkeypatch):
    config = SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    scheduler = diffusers.LCMScheduler(**config, original_inference_steps=8)
    expected, noise = follow_lcm(scheduler, n, 1.0, monkeypatch)
    timesteps = lcm_timesteps(n, original_steps=8)
    assert timesteps.tolist() == scheduler.timesteps.tolist() and timesteps[0] == 999
    schedule = make_schedule(config)
    table = consistency_table(timesteps, schedule)
    assert_same(sample_consistency(network, jnp.asarray(Z), table, noise, schedule), expected)


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
        table = ddim_table(timesteps, schedule, to_one, n)
        assert_same(sample_ddim(network, jnp.asarray(Z), table, schedule), expected)


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
        table = dpm_solver_pp_table(theirs.numpy().astype(np.int32), schedule)
        ours = sample_dpm_solver_pp(network, jnp.asarray(Z), table, schedule)
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
    table = ddim_table(timesteps, schedule)
    assert_same(sample_ddim(network, jnp.asarray(Z), table, schedule), follow(ddim, ddim.timesteps))
    dpm = diffusers.DPMSolverMultistepScheduler(**config, timestep_spacing="trailing")
    dpm.set_timesteps(n)
    found = sample_dpm_solver_pp(network, jnp.asarray(Z), dpm_solver_pp_table(timesteps, schedule), schedule)
    np.testing.assert_allclose(found, follow(dpm, dpm.timesteps), atol=1e-3)

    euler = diffusers.EulerDiscreteScheduler(**config, timestep_spacing="trailing")
    euler.set_timesteps(n)
    z = torch.tensor(Z) * euler.init_noise_sigma
    for t in euler.timesteps:
        z = euler.step(torch_network(euler.scale_model_input(z, t), t), t, z).prev_sample
    found = sample_euler(network, jnp.asarray(Z), euler_table(timesteps, schedule), None, schedule)
    np.testing.assert_allclose(found, z.numpy(), atol=1e-3)


def every_sampler(network, schedule, noise):
    """(what makes the table of some timesteps, what samples by it), for each sampler."""
    return {
        "lcm": (consistency_table, lambda z, table: sample_consistency(network, z, table, noise, schedule)),
        "ddim": (ddim_table, lambda z, table: sample_ddim(network, z, table, schedule)),
        "euler": (euler_table, lambda z, table: sample_euler(network, z, table, None, schedule)),
        "euler_ancestral": (
            partial(euler_table, ancestral=True),
            lambda z, table: sample_euler(network, z, table, noise, schedule),
        ),
        "dpmsolver++": (dpm_solver_pp_table, lambda z, table: sample_dpm_solver_pp(network, z, table, schedule)),
    }


SAMPLERS = list(every_sampler(network, make_schedule(SD), None))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_one_scan_under_one_jit(name):
    """The network stands in the program once, however many steps there are."""
    schedule = make_schedule(SD)
    traced = []

    def counted(z, t):
        traced.append(t.shape)
        return network(z, t)

    z, noise = jnp.asarray(Z), jnp.zeros((7, *Z.shape))
    make_table, sample = every_sampler(counted, schedule, noise)[name]
    end = jax.jit(lambda z: sample(z, make_table(solver_timesteps(8), schedule)))(z)
    assert traced == [(2,)] and end.shape == z.shape and end.dtype == jnp.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_program_takes_any_number_of_steps(name):
    """By padded tables; what is passed over asks nothing of the network."""
    schedule, traced, asked = make_schedule(SD), [], []

    def counted(z, t):
        traced.append(t.shape)
        jax.debug.callback(lambda t: asked.append(int(t)), t[0], ordered=True)
        return network(z, t)

    noise = jnp.asarray(np.random.default_rng(1).standard_normal((7, *Z.shape)).astype(np.float32))
    make_table, sample = every_sampler(counted, schedule, noise)[name]
    program = jax.jit(sample)
    for n in (1, 2, 4, 8):
        timesteps = solver_timesteps(n)
        ours = program(jnp.asarray(Z), make_table(timesteps, schedule).padded(8))
        jax.effects_barrier()
        assert asked == timesteps.tolist()
        assert traced == [(2,)]
        alone = every_sampler(network, schedule, noise)[name][1](jnp.asarray(Z), make_table(timesteps, schedule))
        np.testing.assert_allclose(ours, alone, atol=1e-5)
        asked.clear()


def test_one_consistency_step_asks_for_no_noise():
    schedule = make_schedule(SD)
    table = consistency_table(lcm_timesteps(1), schedule)
    end = sample_consistency(network, jnp.asarray(Z), table, jnp.zeros((0, *Z.shape)), schedule)
    assert jnp.isfinite(end).all()
