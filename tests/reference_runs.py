"""Calls of diffusers' pipelines with our draws."""

import numpy as np
import pytest
from numbered_noise import draw_noise
from reference_families import LATENTS, to_torch

from lcm_jax.sampling import inputs

diffusers = pytest.importorskip("diffusers")


def run_theirs(components, kind, monkeypatch, seed, steps, prompts, **arguments):
    """Images of diffusers with our draws: the start's, the image's posterior, and those of the sampler's steps."""
    pipeline = getattr(diffusers, kind)
    accepted = pipeline.__init__.__code__.co_varnames
    more = {"requires_safety_checker": False, "add_watermarker": False}
    theirs = pipeline(**{k: v for k, v in (components | more).items() if k in accepted})
    theirs.set_progress_bar_config(disable=True)
    count = len(prompts)
    latents, noise = draw_noise(seed, count, 20, LATENTS[1:])
    draws, own = iter(noise), to_torch(inputs.draw_image_noise(seed, LATENTS[1:]))
    start = to_torch(latents)
    for module in ("diffusers.models.autoencoders.vae", theirs.__class__.__module__):
        fixed = own if "vae" in module else start
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, fixed=fixed, **__: fixed)
    for scheduler in ("scheduling_lcm", "scheduling_euler_ancestral_discrete"):
        monkeypatch.setattr(f"diffusers.schedulers.{scheduler}.randn_tensor", lambda *_, **__: to_torch(next(draws)))
    arguments = {"output_type": "np"} | arguments
    return theirs(prompts, num_inference_steps=steps, **arguments).images


def assert_same(found, expected):
    found, expected = (np.asarray(each, np.float32) for each in (found, expected))
    assert found.shape == expected.shape and np.std(found) > 0.01
    assert np.abs(expected - found).max() * 255 <= 2
