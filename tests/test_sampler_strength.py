"""Every sampler begins from an image and blends one in after each step, as diffusers' pipelines do."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from sampler_parity import (
    CONSISTENCY,
    NEEDED,
    NOISE,
    ROWS,
    SD,
    SOLVERS,
    Z,
    assert_same,
    draw_as_given,
    network,
    torch_network,
)

from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.diffusion.schedule import make_schedule
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.sampling.generate import default_sampler, is_consistency_model

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

IMAGE, FRESH = np.random.default_rng(1).standard_normal((2, *Z.shape)).astype(np.float32)
MASK = (np.arange(Z.size).reshape(Z.shape) % 3 > 0).astype(np.float32)  # 1 to repaint


@cache
def program(name: str, kind: str):
    """Image-to-image by the sampler of that name, compiled once for all tables and masks."""
    sampler, schedule = SAMPLERS[name], make_schedule(SD | {"prediction_type": kind})
    noise = NOISE.__getitem__ if sampler.adds_noise else None

    def sample(table, mask):
        def blend(i, z):
            signal, level = table.levels[i + 1]
            return mask * z + (1 - mask) * (signal * IMAGE + level * FRESH)

        z = table.start[0] * IMAGE + table.start[1] * Z
        return sampler.sample(network, z, table, schedule, noise, blend)

    return jax.jit(sample)


def follow(scheduler, n, strength, mask, options):
    """Return the latents at the end of diffusers' loop: StableDiffusionInpaintPipeline's, or an LCM's."""
    if options.pop("on_grid"):
        scheduler.set_timesteps(n, strength=strength)
        timesteps = scheduler.timesteps
    else:
        scheduler.set_timesteps(n)
        first = (n - min(int(n * strength), n)) * scheduler.order
        timesteps = scheduler.timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
    image, fresh, mask = torch.tensor(IMAGE), torch.tensor(FRESH), torch.tensor(mask)
    z = scheduler.add_noise(image, torch.tensor(Z), timesteps[:1])
    for i, t in enumerate(timesteps):
        result = scheduler.step(torch_network(scheduler.scale_model_input(z, t), t), t, z, **options)
        last = i == len(timesteps) - 1
        kept = image if last else scheduler.add_noise(image, fresh, timesteps[i + 1 : i + 2])
        z = mask * result.prev_sample + (1 - mask) * kept
    return z.numpy()


def assert_as_in_diffusers(name, n, strength, monkeypatch, options=None, kind="epsilon", eta=None, mask=MASK):
    sampler, config = SAMPLERS[name], SD | {"prediction_type": kind} | NEEDED.get(name, {}) | (options or {})
    karras = {"use_karras_sigmas": True} if name.endswith("_karras") else {}
    scheduler = getattr(diffusers, sampler.scheduler).from_config(config | karras)
    draw_as_given(scheduler, monkeypatch)
    table = sampler.make_table(make_schedule(config), config, n, strength, eta).from_image()
    driven = {"on_grid": sampler.consistency} | ({} if eta is None else {"eta": eta})
    expected = follow(scheduler, n, strength, mask, driven)
    assert_same(program(name, kind)(table.padded(ROWS), mask), expected)


STRENGTHS = [(1, 1.0), (2, 0.5), (4, 0.8), (4, 0.25), (8, 0.3), (20, 0.95), (50, 0.58)]


@pytest.mark.parametrize("mask", [np.ones_like(MASK), MASK], ids=["image", "inpainting"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_part_of_the_steps_from_an_image(name, mask, monkeypatch):
    """At n * strength that is not whole, too; 50 * 0.58 is 28.999... and 28 steps."""
    for n, strength in STRENGTHS:
        if name not in CONSISTENCY or n <= int(50 * strength):
            assert_as_in_diffusers(name, n, strength, monkeypatch, mask=mask)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_part_of_the_steps_of_other_grids(name, monkeypatch):
    for options in (
        {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
        {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min", "lower_order_final": False},
    ):
        for n, strength in [(3, 0.7), (16, 0.6)]:
            assert_as_in_diffusers(name, n, strength, monkeypatch, options, "v_prediction")


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["tcd", "ddim"])
def test_eta(name, kind, eta, monkeypatch):
    steps = [(1, 1.0), (2, 1.0), (4, 1.0), (7, 0.5), (8, 0.8)]
    for n, strength in steps:
        options = {"set_alpha_to_one": n % 2 == 0, "steps_offset": 1}
        assert_as_in_diffusers(name, n, strength, monkeypatch, options, kind, eta, mask=np.ones_like(MASK))


def test_the_default_of_eta():
    """It is that of the scheduler's `step` in diffusers."""
    assert {name: sampler.eta for name, sampler in SAMPLERS.items() if sampler.eta is not None} == {
        "tcd": 0.3,
        "ddim": 0.0,
    }


def test_a_model_with_tcd_scheduler_is_a_consistency_model():
    scheduler = {"_class_name": "TCDScheduler"}
    configs = {"unet": tiny_model.SHALLOW, "vae": tiny_model.VAE, "text_encoder": tiny_model.TEXT}
    model = StableDiffusion.from_configs(configs | {"scheduler": scheduler})
    assert default_sampler(model) == "tcd" and is_consistency_model(model)
    np.testing.assert_allclose(
        model.schedule.alphas_cumprod, diffusers.TCDScheduler().alphas_cumprod.numpy(), rtol=1e-5
    )


def test_no_noise_is_drawn_at_eta_0():
    """Although one program serves every eta."""
    drawn = []

    def noise(i):
        jax.debug.callback(lambda i: drawn.append(int(i)), i)
        return NOISE[i]

    schedule = make_schedule(SD)
    program = jax.jit(lambda table: SAMPLERS["ddim"].sample(network, jnp.asarray(Z), table, schedule, noise))
    for eta, expected in [(0.0, []), (0.5, [0, 1, 2])]:
        program(SAMPLERS["ddim"].make_table(schedule, NEEDED["ddim"], 4, eta=eta)).block_until_ready()
        jax.effects_barrier()
        assert sorted(drawn) == expected


def test_karras_noise_levels_replace_those_of_the_config():
    schedule = make_schedule(SD)
    for name in ("dpmsolver++", "euler"):
        forced = SAMPLERS[f"{name}_karras"].make_table(schedule, {"use_beta_sigmas": True}, 6)
        for ours, theirs in zip(
            forced, SAMPLERS[name].make_table(schedule, {"use_karras_sigmas": True}, 6), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", SAMPLERS)
def test_bad_strengths_and_etas(name):
    make, schedule = SAMPLERS[name].make_table, make_schedule(SD)
    config = SD | NEEDED.get(name, {})
    for strength in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(ValueError, match=f"^strength is {strength}; choose a number above 0 and at most 1$"):
            make(schedule, config, 4, strength)
    n = 50 if name in CONSISTENCY else 4
    with pytest.raises(ValueError, match=f"^strength is 0.01, which leaves none of {n} steps; choose {1 / n:g} to 1$"):
        make(schedule, config, 4, 0.01)
    if SAMPLERS[name].eta is None:
        with pytest.raises(
            ValueError, match=f"^eta is 0.5, but sampler '{re.escape(name)}' has no eta; omit it, or use"
        ):
            make(schedule, config, 4, eta=0.5)
        return
    for eta in (-0.1, 1.5, float("nan"), "high", True):
        with pytest.raises(ValueError, match=f"^eta is {eta!r}; use a number from 0 to 1$"):
            make(schedule, config, 4, eta=eta)


@pytest.mark.parametrize("name", CONSISTENCY)
def test_too_many_steps_for_the_strength(name):
    message = "num_inference_steps is 30; choose 1 to 25 .at strength 0.5., best 2 to 8"
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name].make_table(make_schedule(SD), SD, 30, 0.5)
