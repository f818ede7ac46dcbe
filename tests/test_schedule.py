"""Tables, conversions and grids of timesteps, against diffusers and the published figures."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.grids import lcm_timesteps, solver_timesteps, steps_within
from lcm_jax.diffusion.schedule import (
    PREDICTION_TYPES,
    Schedule,
    add_noise,
    alpha_sigma,
    make_schedule,
    predict_noise,
    predict_x0,
    skipping_steps,
    training_target,
    velocity,
)
from lcm_jax.weights.scheduler import lcm_scheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
CONFIGS = [
    SD,
    {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000},
    {"trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4},
    SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=["scaled_linear", "linear", "cosine", "trained", "zero_snr"])
def test_tables_equal_diffusers(config):
    diffusers = pytest.importorskip("diffusers")
    table = make_schedule(config).alphas_cumprod
    assert table.dtype == np.float32 and table.shape == (config["num_train_timesteps"],)
    # The last step of a zero-SNR table is 0 but for rounding.
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
    np.testing.assert_allclose(table, theirs, rtol=5e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["DDIMScheduler", "LCMScheduler"])
def test_a_silent_config_has_the_defaults_of_its_class(name):
    diffusers = pytest.importorskip("diffusers")
    theirs = getattr(diffusers, name)().alphas_cumprod.numpy()
    silent = {"_class_name": name}
    np.testing.assert_allclose(make_schedule(silent).alphas_cumprod, theirs, rtol=5e-6)
    student = lcm_scheduler(silent, 50)
    np.testing.assert_array_equal(make_schedule(student).alphas_cumprod, make_schedule(silent).alphas_cumprod)
    named = {key: value for key, value in student.items() if key[0] != "_"}
    np.testing.assert_allclose(diffusers.LCMScheduler(**named).alphas_cumprod.numpy(), theirs, rtol=5e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not supported; use 'linear' or 'scaled_linear' or"),
        ({"beta_schedule": ["linear"]}, r"beta_schedule \['linear'\] is not supported; use 'linear'"),
        ({"prediction_type": "flow"}, "prediction_type 'flow' is not supported; use 'epsilon' or 'sample' or 'v_pre"),
        ({"prediction_type": None}, "prediction_type None is not supported; use 'epsilon'"),
        ({"rescale_betas_zero_snr": True}, "'epsilon', which does not determine .* choose sample or v_prediction"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr 'yes' is not supported; use true or false"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps '1000' is not supported; use a whole number from 2 to"),
        ({"num_train_timesteps": None}, "num_train_timesteps None is not supported; use a whole number"),
        ({"num_train_timesteps": [1000]}, r"num_train_timesteps \[1000\] is not supported; use a whole number"),
        ({"num_train_timesteps": -5}, "num_train_timesteps -5 is not supported; use a whole number"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps 1000000000000 is not supported; use a whole number"),
        ({"num_train_timesteps": True}, "num_train_timesteps True is not supported; use a whole number"),
        ({"beta_start": "0.1"}, "beta_start '0.1' is not supported; use a number between 0 and 1"),
        ({"beta_end": -0.02}, "beta_end -0.02 is not supported; use a number between 0 and 1"),
        ({"beta_end": float("nan")}, "beta_end nan is not supported; use a number between 0 and 1"),
        ({"trained_betas": "betas.npy"}, "trained_betas 'betas.npy' is not supported; use a list of numbers between"),
        ({"trained_betas": 0.5}, "trained_betas 0.5 is not supported; use a list of numbers between 0 and 1"),
        (
            {"trained_betas": ["0.1"] * 1000},
            r"trained_betas \['0.1', .*\.\.\.\] is not supported; use a list of numbers",
        ),
        ({"trained_betas": [[0.1], [0.1, 0.2]]}, "trained_betas .* is not supported; use a list of numbers"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 numbers and num_train_timesteps is 1000; use"),
    ],
)
def test_a_config_that_is_not_supported_is_an_error_of_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_schedule(SD | options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_alpha_and_sigma():
    schedule = make_schedule(SD)
    t = jnp.array([[0, 19], [499, 999]])
    alpha, sigma = alpha_sigma(schedule, t)
    assert alpha.shape == t.shape and alpha.dtype == jnp.float32
    np.testing.assert_allclose(alpha**2 + sigma**2, np.ones((2, 2)), rtol=1e-6)
    np.testing.assert_allclose(alpha[1, 1] ** 2, 0.0047, atol=1e-4)  # Stable Diffusion's last abar


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_pitfall_3_a_perfect_network_is_read_the_same_in_every_language(kind):
    schedule = Schedule(make_schedule(SD).alphas_cumprod, kind)
    x0, noise = np.random.default_rng(0).standard_normal((2, 5, 4, 4, 3)).astype(np.float32)
    t = jnp.array([0, 19, 500, 800, 999])
    z = add_noise(schedule, x0, noise, t)
    output = training_target(schedule, x0, noise, t)
    # Rounding in z is multiplied by 1 / alpha in x0 and by 1 / sigma in the noise, up to 15 and 34.
    np.testing.assert_allclose(predict_x0(schedule, output, z, t), x0, atol=2e-5)
    np.testing.assert_allclose(predict_noise(schedule, output, z, t), noise, atol=2e-5)


def test_half_precision_outputs_are_computed_with_in_float32():
    x0, noise = np.random.default_rng(0).standard_normal((2, 1, 4, 4, 3)).astype(np.float32)
    t = jnp.array([999])
    for kind in PREDICTION_TYPES:
        schedule = Schedule(make_schedule(SD).alphas_cumprod, kind)
        output = jnp.asarray(x0, jnp.bfloat16)
        for convert in (predict_x0, predict_noise):
            result = convert(schedule, output, noise, t)
            assert result.dtype == jnp.float32
            np.testing.assert_array_equal(result, convert(schedule, output.astype(jnp.float32), noise, t))


def test_noise_and_velocity_equal_diffusers():
    torch = pytest.importorskip("torch")
    from diffusers import DDIMScheduler

    schedule, theirs = make_schedule(SD), DDIMScheduler(**SD)
    x0, noise = np.random.default_rng(0).standard_normal((2, 4, 3, 2, 1)).astype(np.float32)
    t = np.array([0, 19, 500, 999])
    arguments = torch.tensor(x0), torch.tensor(noise), torch.tensor(t)
    np.testing.assert_allclose(add_noise(schedule, x0, noise, t), theirs.add_noise(*arguments), atol=1e-6)
    np.testing.assert_allclose(velocity(schedule, x0, noise, t), theirs.get_velocity(*arguments), atol=1e-6)


def test_golden_few_step_grids():
    golden = {
        1: [999],
        2: [999, 499],
        4: [999, 759, 499, 259],
        8: [999, 879, 759, 639, 499, 379, 259, 139],
        50: list(range(999, 0, -20)),
    }
    for n, timesteps in golden.items():
        assert lcm_timesteps(n).tolist() == timesteps
    assert lcm_timesteps(4).dtype == np.int32


@pytest.mark.parametrize("strength", [1.0, 0.99, 0.75, 0.5, 0.3, 0.06, 0.02])
def test_few_step_grids_equal_diffusers(strength):
    diffusers = pytest.importorskip("diffusers")
    theirs, most = diffusers.LCMScheduler(**SD), int(50 * strength)
    for n in range(1, most + 1):
        theirs.set_timesteps(n, strength=strength)
        assert lcm_timesteps(n, strength).tolist() == theirs.timesteps.tolist(), n
    with pytest.raises(ValueError, match=f"num_inference_steps is {most + 1}; choose 1 to {most}"):
        lcm_timesteps(most + 1, strength)


@pytest.mark.parametrize("n", [0, 51, -1])
def test_few_step_counts_out_of_range(n):
    with pytest.raises(ValueError, match=f"num_inference_steps is {n}; choose 1 to 50"):
        lcm_timesteps(n)


@pytest.mark.parametrize("strength", [0.0, 1.5, -0.1])
def test_a_strength_out_of_range(strength):
    with pytest.raises(ValueError, match=f"strength is {strength}; choose a number above 0 and at most 1"):
        lcm_timesteps(4, strength)


@pytest.mark.parametrize(("spacing", "offset"), [("trailing", 0), ("leading", 0), ("leading", 1), ("linspace", 0)])
def test_many_step_grids_equal_diffusers(spacing, offset):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(**SD, timestep_spacing=spacing, steps_offset=offset)
    for n in (1, 2, 3, 4, 7, 8, 13, 20, 25, 50, 100, 999):
        theirs.set_timesteps(n)
        assert solver_timesteps(n, spacing, offset).tolist() == theirs.timesteps.tolist(), n


def test_many_step_errors():
    for n in (0, 1001):
        with pytest.raises(ValueError, match=f"num_inference_steps is {n}; choose 1 to 1000"):
            solver_timesteps(n)
    with pytest.raises(ValueError, match="num_inference_steps is 1000, whose first timestep is 1000 with steps_offset"):
        solver_timesteps(1000, "leading", 1)


@pytest.mark.parametrize("n", [1, 3, 7, 10, 50, 999])
def test_the_error_names_the_smallest_strength(n):
    with pytest.raises(
        ValueError, match=f"strength is 0.0005, which leaves none of {n} steps; choose .* to 1"
    ) as caught:
        steps_within(n, 0.0005)
    smallest = float(str(caught.value).split("choose ")[1].split()[0])
    assert steps_within(n, smallest) >= 1 and int(n * (smallest - 0.001)) < 1


def test_skipping_steps_begin_at_the_tables_first_entry():
    s, t = skipping_steps(jnp.arange(50))
    assert s.tolist() == list(range(19, 1000, 20)) and t.tolist() == [0, *range(19, 980, 20)]
    alpha, _ = alpha_sigma(make_schedule(SD), t[:1])
    np.testing.assert_allclose(alpha**2, [1 - 0.00085], rtol=1e-6)  # i = 0 uses abar[0], not 1
    assert lcm_timesteps(50).tolist() == s.tolist()[::-1], "the sampler's grid is the one that is distilled"
    for count in (0, 30, 1001):
        with pytest.raises(ValueError, match=f"num_ddim_steps is {count}, which does not divide num_train_timesteps"):
            skipping_steps(jnp.arange(2), count)
