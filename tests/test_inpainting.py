"""Inpainting models against diffusers' own pipelines on the same folder, latents and noise, and by themselves."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numbered_noise import draw_noise
from PIL import Image
from reference_families import LATENTS, PROMPTS, SIZE, to_torch
from reference_inpainting import build, image, mask

import lcm_jax
from lcm_jax.sampling import inputs

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

FAMILIES = ("sd15-taesd", "sd21-768", "lcm-sdxl")


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    """(diffusers' pipeline, the same folder in ours)"""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = build(folder, request.param)
    return theirs, lcm_jax.Pipeline.from_pretrained(folder / "model")


def run_theirs(theirs, monkeypatch, seed, steps, **arguments):
    """Diffusers' pictures with our draws: the picture's from the seed, then a sampler's own."""
    latents, noise = draw_noise(seed, 2, steps, LATENTS[1:])
    own = to_torch(inputs.draw_image_noise(seed, LATENTS[1:]))
    draws = iter(noise)
    monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", lambda *_, **__: own)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: to_torch(next(draws, noise[-1]))
    )
    return theirs(PROMPTS, latents=to_torch(latents), strength=1.0, num_inference_steps=steps, **arguments).images


@pytest.mark.parametrize("mode", ["L", "1", "RGB"])
def test_pixels_are_those_of_diffusers(mode):
    colours, hole = (
        diffusers.image_processor.VaeImageProcessor(),
        diffusers.image_processor.VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True),
    )
    expected = colours.preprocess(image(), height=16, width=24).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(inputs.to_pixels(image(), (16, 24)), expected, rtol=0, atol=2e-7)
    expected = hole.preprocess(mask(mode=mode), height=16, width=24).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(inputs.to_mask(mask(mode=mode), (16, 24)), expected)
    assert 0 < expected.mean() < 1


def test_a_mask_of_any_mode_is_the_same_mask():
    """16 bits, a palette, and what is clear as white."""
    expected = inputs.resize(mask(), (16, 24), "L").astype(int)
    wide = Image.fromarray(np.asarray(mask(), np.uint16) * 257)
    clear = Image.new("RGBA", (40, 30))
    clear.putalpha(Image.fromarray(255 - np.asarray(mask())))
    for other in (wide, mask(mode="P"), clear):
        np.testing.assert_allclose(inputs.resize(other, (16, 24), "L"), expected, atol=1)


def test_the_picture_is_that_of_diffusers(models, monkeypatch):
    theirs, ours = models
    arguments = {"guidance_scale": 3.0, "image": image(), "mask_image": mask()} | SIZE
    expected = run_theirs(theirs, monkeypatch, 3, 2, output_type="np", **arguments)
    found = ours(PROMPTS, seed=3, num_inference_steps=2, output_type="np", **arguments).images
    assert found.shape == expected.shape == (2, 16, 24, 3) and np.std(found) > 0.01
    assert np.abs(expected - found).max() * 255 <= 2

    expected = run_theirs(theirs, monkeypatch, 3, 2, output_type="latent", **arguments)
    found = ours(PROMPTS, seed=3, num_inference_steps=2, output_type="latent", **arguments).images
    expected = expected.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, atol=5e-4 * np.abs(expected).max())


def test_what_is_masked_is_not_seen_and_what_is_kept_is(models):
    _, ours = models
    fixed = {"seed": 1, "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.0} | SIZE
    run = lambda picture, hole: ours(PROMPTS, image=picture, mask_image=hole, **fixed).images  # noqa: E731
    everywhere = Image.new("L", (40, 30), 255)
    np.testing.assert_array_equal(run(image(0), everywhere), run(image(1), everywhere))
    first = run(image(0), mask())
    for other in (run(image(1), mask()), run(image(0), mask(20, 33)), run(image(0), everywhere)):
        assert np.abs(first - other).max() > 0.02 * np.abs(first).max()
    # diffusers takes colours alone: what has a grey or an alpha channel is made RGB first.
    np.testing.assert_array_equal(run(image(mode="RGBA"), mask()), first)
    np.testing.assert_array_equal(run(image(mode="L"), mask()), run(image(mode="L").convert("RGB"), mask()))
    # A picture is the same alone and among others.
    alone = ours(PROMPTS[0], image=image(0), mask_image=mask(), **fixed).images
    np.testing.assert_allclose(alone, first[:1], atol=1e-4 * np.abs(first).max())


def test_mistakes_name_the_argument(models):
    _, ours = models
    with pytest.raises(ValueError, match="^image must be a PIL image for inpainting models, got NoneType"):
        ours("a circle")
    with pytest.raises(ValueError, match="^mask_image must be a PIL image for inpainting models, got NoneType"):
        ours("a circle", image=image())
    with pytest.raises(ValueError, match="^image must be a PIL image for inpainting models, got ndarray"):
        ours("a circle", image=np.zeros((16, 24, 3)), mask_image=mask())


def test_the_command_paints_in_the_picture(tmp_path):
    build(tmp_path, "sd15-taesd")
    exif = Image.Exif()
    exif[274] = 6  # a photo taken upright: its rows run from the bottom to the top
    image().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "image.png", exif=exif)
    mask().save(tmp_path / "mask.png")
    arguments = [f"--image={tmp_path / 'image.png'}", f"--mask_image={tmp_path / 'mask.png'}", "--prompt=a red circle"]
    command = ["-m", "lcm_jax.sample", f"--model={tmp_path / 'model'}", f"--output={tmp_path / 'new'}", *arguments]
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stderr
    expected = lcm_jax.Pipeline.from_pretrained(tmp_path / "model")("a red circle", image=image(), mask_image=mask())
    found = np.asarray(Image.open(tmp_path / "new" / "000.png"), int)
    assert np.abs(found - np.asarray(expected.images[0], int)).max() <= 1
