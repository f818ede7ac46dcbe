"""Every sampler equals diffusers' scheduler, step for step, given the same network and the same noise."""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampler_parity import (
    NEEDED,
    NOISE,
    ROWS,
    SD,
    SOLVERS,
    UNFORCED,
    Z,
    assert_same,
    draw_as_given,
    network,
    torch_network,
)

from lcm_jax.diffusion.grids import SPACINGS, lcm_timesteps
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.diffusion.samplers.lcm import consistency_table, sample_consistency
from lcm_jax.diffusion.schedule import PREDICTION_TYPES, make_schedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PLAIN = [name for name in SOLVERS if name in UNFORCED]


def follow(scheduler, timesteps):
    """The end of diffusers' own loop."""
    z = torch.tensor(Z)
    for t in timesteps:
        z = scheduler.step(torch_network(z, t), t, z).prev_sample
    return z.numpy()


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("n", "strength"),
    [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (8, 1.0), (50, 1.0), (1, 0.5), (4, 0.8), (7, 0.3), (3, 0.06)],
)
def test_consistency_sampling_equals_lcm_scheduler(n, strength, kind, monkeypatch):
    schedule = make_schedule(SD | {"prediction_type": kind})
    expected, noise = follow_lcm(diffusers.LCMScheduler(**SD, prediction_type=kind), n, strength, monkeypatch)
    table = consistency_table(lcm_timesteps(n, strength), schedule)
    ours = sample_consistency(network, jnp.asarray(Z), table, schedule, noise)
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
    assert_same(sample_consistency(network, jnp.asarray(Z), table, schedule, noise), expected)


def follow_lcm(scheduler, n, strength, monkeypatch):
    """Return (the end of diffusers' own loop, the noise of each step)."""
    scheduler.set_timesteps(n, strength=strength)
    noise = np.random.default_rng(n).standard_normal((n, *Z.shape)).astype(np.float32)
    drawn = iter(noise)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, **k: torch.tensor(next(drawn)))
    z = torch.tensor(Z)
    for t in scheduler.timesteps:
        result = scheduler.step(torch_network(z, t), t, z)
        z = result.prev_sample
    return result.denoised.numpy(), jnp.asarray(noise).__getitem__


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize(("spacing", "offset"), [("trailing", 0), ("leading", 1)])
def test_ddim_equals_ddim_scheduler(spacing, offset, to_one, kind):
    schedule = make_schedule(SD | {"prediction_type": kind})
    for n, strength in [(1, 1.0), (3, 1.0), (8, 1.0), (20, 1.0), (50, 1.0), (20, 0.5), (7, 0.3)]:
        scheduler = diffusers.DDIMScheduler(
            **SD,
            prediction_type=kind,
            clip_sample=False,
            set_alpha_to_one=to_one,
            timestep_spacing=spacing,
            steps_offset=offset,
        )
        scheduler.set_timesteps(n)
        expected = follow(scheduler, scheduler.timesteps[n - int(n * strength) :])
        table = SAMPLERS["ddim"].make_table(schedule, scheduler.config, n, strength)
        assert_same(program("ddim", kind)(table.padded(ROWS)), expected)


# ---- the options of scheduler_config.json ---------------------------------------------------------------------------


@cache
def program(name: str, kind: str):
    """The sampler of that name, compiled once for all tables."""
    sampler, schedule = SAMPLERS[name], make_schedule(SD | {"prediction_type": kind})
    noise = NOISE.__getitem__ if sampler.adds_noise else None
    return jax.jit(lambda table: sampler.sample(network, table.start[1] * jnp.asarray(Z), table, schedule, noise))


def assert_sampled_as_in_diffusers(name, options, counts, monkeypatch, kind="epsilon", tolerance=5e-5):
    """Equal timesteps, and latents at the end, for a config with these options; it may be one of another class."""
    sampler, config = SAMPLERS[name], SD | {"prediction_type": kind} | NEEDED.get(name, {}) | options
    theirs = getattr(diffusers, sampler.scheduler).from_config(config)
    for n in counts:
        draw_as_given(theirs, monkeypatch)
        theirs.set_timesteps(n)
        table = sampler.make_table(make_schedule(config), config, n)
        np.testing.assert_allclose(table.timesteps, theirs.timesteps.numpy(), rtol=0, atol=2e-3)
        z = torch.tensor(Z) * theirs.init_noise_sigma
        for t in theirs.timesteps:
            z = theirs.step(torch_network(theirs.scale_model_input(z, t), t), t, z).prev_sample
        assert_same(program(name, kind)(table.padded(ROWS)), z.numpy(), tolerance)


def written(scheduler) -> dict:
    """scheduler_config.json as `scheduler` writes it."""
    return json.loads(scheduler.to_json_string())


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", PLAIN)
def test_spacings(name, kind, monkeypatch):
    if kind == "sample" and name in ("pndm", "euler_ancestral"):
        pytest.skip("diffusers does not have it")
    for spacing, offset in [*((spacing, 0) for spacing in SPACINGS), ("leading", 1), (None, 1)]:
        options = {"timestep_spacing": spacing, "steps_offset": offset} if spacing else {}
        assert_sampled_as_in_diffusers(name, options, (1, 2, 4, 7, 20), monkeypatch, kind=kind)


@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta", "lu"])
@pytest.mark.parametrize("name", ["euler", "dpmsolver++"])
def test_noise_levels_between_training_steps(name, sigmas, monkeypatch):
    if (name, sigmas) == ("euler", "lu"):
        pytest.skip("diffusers does not have it")
    option = {"use_lu_lambdas" if sigmas == "lu" else f"use_{sigmas}_sigmas": True}
    for kind, spacing, final in [
        ("epsilon", "linspace", "zero"),
        ("v_prediction", "leading", "sigma_min"),
        ("epsilon", "trailing", "sigma_min"),
    ]:
        options = option | {"timestep_spacing": spacing, "steps_offset": 1, "final_sigmas_type": final}
        assert_sampled_as_in_diffusers(name, options, (1, 3, 8, 25), monkeypatch, kind=kind)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0}),
        ("euler", {"use_exponential_sigmas": True, "sigma_max": 12.0, "timestep_spacing": "leading"}),
        ("ddim", {"set_alpha_to_one": False}),
        ("pndm", {"set_alpha_to_one": True}),
        ("dpmsolver++", {"solver_type": "heun"}),
        ("dpmsolver++", {"solver_type": "heun", "lower_order_final": False, "use_karras_sigmas": True}),
        ("dpmsolver++", {"solver_type": "bh2"}),
        ("dpmsolver++", {"solver_order": 1}),
        ("dpmsolver++", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
        ("dpmsolver++", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
        ("dpmsolver++", {"lambda_min_clipped": -5.1}),
    ],
)
def test_options_of_one_class(name, options, monkeypatch):
    assert_sampled_as_in_diffusers(name, options, (2, 5, 20), monkeypatch)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": False, "clip_sample": False}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading", "sigma_max": 12.0}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
        ("UniPCMultistepScheduler", {"solver_type": "bh2", "use_exponential_sigmas": True}),
    ],
)
def test_another_sampler_takes_the_options_that_it_has(name, theirs, options, monkeypatch):
    """As the from_config of its class in diffusers, which would clip latents if a config did not say clip_sample."""
    config = written(getattr(diffusers, theirs)(**SD, **options))
    assert config["_class_name"] == theirs and len(config) > 9
    assert_sampled_as_in_diffusers(name, NEEDED.get(name, {}) | config, (4, 20), monkeypatch)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lcm", {"timestep_scaling": 5.0}, "timestep_scaling 5.0 is not supported; use 10.0"),
        (
            "lcm",
            {"original_inference_steps": 0},
            "original_inference_steps 0 is not supported; use a whole number from 1",
        ),
        (
            "lcm",
            {"original_inference_steps": "50"},
            "original_inference_steps '50' is not supported; use a whole number",
        ),
        ("lcm", {"thresholding": True}, "thresholding True is not supported; use false"),
        ("ddim", {"clip_sample": True}, "clip_sample True is not supported; use false"),
        ("ddim", {"_class_name": "DDIMScheduler"}, "clip_sample True is not supported; use false"),
        ("ddim", {"timestep_spacing": None}, "timestep_spacing None is not supported; use 'leading' or 'trailing' or"),
        ("ddim", {"steps_offset": -1}, "steps_offset -1 is not supported; use a whole number from 0 to 1000"),
        ("ddim", {"steps_offset": [1]}, r"steps_offset \[1\] is not supported; use a whole number"),
        ("pndm", {}, "skip_prk_steps False is not supported; use true, or another sampler"),
        (
            "pndm",
            {"skip_prk_steps": True, "prediction_type": "sample"},
            "prediction_type 'sample' is not supported; use",
        ),
        (
            "euler",
            {"interpolation_type": "log_linear"},
            "interpolation_type 'log_linear' is not supported; use 'linear'",
        ),
        ("euler", {"timestep_type": "continuous"}, "timestep_type 'continuous' is not supported; use 'discrete'"),
        ("euler", {"final_sigmas_type": "one"}, "final_sigmas_type 'one' is not supported; use 'zero' or 'sigma_min'"),
        ("euler", {"use_karras_sigmas": "true"}, "use_karras_sigmas 'true' is not supported; use true or false"),
        (
            "euler",
            {"use_karras_sigmas": True, "sigma_min": -1},
            "sigma_min -1 is not supported; use a number between 0",
        ),
        ("euler", {"use_karras_sigmas": True, "sigma_min": 20.0}, "noise levels of 4 steps do not fall"),
        (
            "euler",
            {"use_karras_sigmas": True, "use_beta_sigmas": True},
            "use_karras_sigmas and use_beta_sigmas exclude",
        ),
        ("dpmsolver++", {"use_flow_sigmas": True}, "use_flow_sigmas True is not supported; use false"),
        (
            "dpmsolver++",
            {"algorithm_type": "sde-dpmsolver++"},
            "algorithm_type 'sde-dpmsolver\\+\\+' is not supported; use",
        ),
        ("dpmsolver++", {"solver_order": 3}, "solver_order 3 is not supported; use 1 or 2"),
        ("dpmsolver++", {"variance_type": "learned"}, "variance_type 'learned' is not supported; use None"),
        ("dpmsolver++", {"lambda_min_clipped": -1.0}, "lambda_min_clipped -1.0 is not supported; use a number between"),
    ],
)
def test_an_option_is_refused_by_the_samplers_that_have_it(name, options, message):
    config = SD | options
    schedule = make_schedule(config)
    with pytest.raises(ValueError, match=message) as caught:
        SAMPLERS[name].make_table(schedule, config, 4)
    assert "\n" not in str(caught.value)
    other = "euler_ancestral" if "steps_offset" not in options and "timestep_spacing" not in options else "lcm"
    SAMPLERS[other].make_table(schedule, config, 4)


@pytest.mark.parametrize("name", PLAIN)
def test_a_number_of_steps_that_the_grid_does_not_hold(name):
    config = SD | NEEDED.get(name, {}) | {"timestep_spacing": "leading", "steps_offset": 1}
    for n, most in [(0, 1000), (1001, 1000), *([(1000, 999)] if name == "dpmsolver++" else [])]:
        most = 999 if name == "dpmsolver++" else most
        with pytest.raises(ValueError, match=f"num_inference_steps is {n}; choose 1 to {most}$"):
            SAMPLERS[name].make_table(make_schedule(config), config, n)


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "euler"])
def test_zero_snr_tables_are_sampled_as_in_diffusers(name, kind, monkeypatch):
    """Where alpha is 0 at the first step; for all but DDIM 2^-12 stands for it."""
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert make_schedule(SD | options | {"prediction_type": kind}).alphas_cumprod[-1] == 0
    tolerance = 2e-3 if name == "euler" else 5e-5  # diffusers' latents are in the thousands, in float32
    assert_sampled_as_in_diffusers(name, options, (1, 2, 4, 8, 30), monkeypatch, kind=kind, tolerance=tolerance)


# ---- the programs ---------------------------------------------------------------------------------------------------


def trailing_table(name: str, schedule, n: int, eta: float | None = None):
    config = {"timestep_spacing": "trailing", "skip_prk_steps": True}
    return SAMPLERS[name].make_table(schedule, config, n, eta=eta)


@pytest.mark.parametrize("name", UNFORCED)
def test_a_sampler_is_one_scan_under_one_jit(name):
    """The network stands in the program once, however many steps there are."""
    schedule = make_schedule(SD)
    traced = []

    def counted(z, t):
        traced.append(t.shape)
        return network(z, t)

    z, noise = jnp.asarray(Z), NOISE.__getitem__ if SAMPLERS[name].adds_noise else None
    table = trailing_table(name, schedule, 8)
    end = jax.jit(lambda z: SAMPLERS[name].sample(counted, z, table, schedule, noise))(z)
    assert traced == [(2,)] and end.shape == z.shape and end.dtype == jnp.float32


@pytest.mark.parametrize("name", UNFORCED)
def test_one_program_takes_any_number_of_steps(name):
    """By padded tables, whose added rows do not evaluate the network."""
    schedule, traced, asked = make_schedule(SD), [], []

    def counted(z, t):
        traced.append(t.shape)
        jax.debug.callback(lambda t: asked.append(float(t)), t[0], ordered=True)
        return network(z, t)

    noise = NOISE.__getitem__ if SAMPLERS[name].adds_noise else None
    program = jax.jit(lambda z, table: SAMPLERS[name].sample(counted, z, table, schedule, noise))
    for n in (1, 2, 4, 8):
        table = trailing_table(name, schedule, n)
        ours = program(jnp.asarray(Z), table.padded(9))
        jax.effects_barrier()
        assert asked == table.timesteps.tolist()
        assert traced == [(2,)]
        alone = SAMPLERS[name].sample(network, jnp.asarray(Z), table, schedule, noise)
        np.testing.assert_allclose(ours, alone, atol=1e-5)
        asked.clear()


@pytest.mark.parametrize("name", [name for name in SAMPLERS if SAMPLERS[name].adds_noise])
def test_the_last_step_adds_no_noise(name):
    eta = None if SAMPLERS[name].eta is None else 1.0
    table = trailing_table(name, make_schedule(SD), 3, eta)
    sample = lambda noise: SAMPLERS[name].sample(network, jnp.asarray(Z), table, make_schedule(SD), noise)  # noqa: E731
    ends = [sample(lambda i, step=step: NOISE[i] + 9.0 * (i == step)) for step in (-1, 1, 2)]
    assert np.abs(ends[1] - ends[0]).max() > 0.1
    np.testing.assert_array_equal(ends[2], ends[0])
