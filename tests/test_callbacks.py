"""Functions called after each step, the progress bar, and a batch that several devices share."""

import jax
import numpy as np
import pytest

import lcm_jax
from lcm_jax.sampling import callbacks

PROMPT = "a red circle"
FIXED: dict = {"num_inference_steps": 4, "seed": 5, "output_type": "latent"}


@pytest.fixture(scope="module")
def student():
    return lcm_jax.Pipeline.from_pretrained("shapes-lcm")


def test_the_callback_sees_each_step_and_changes_no_bit(student):
    calls = []

    def keep(pipe, i, t, kwargs):
        calls.append((pipe, i, t, kwargs["latents"]))
        return {}

    expected = student(PROMPT, **FIXED).images
    found = student(PROMPT, callback_on_step_end=keep, **FIXED).images
    np.testing.assert_array_equal(found, expected)
    pipes, numbers, timesteps, latents = zip(*calls, strict=True)
    assert set(map(id, pipes)) == {id(student)} and numbers == (0, 1, 2, 3)
    assert all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False))
    np.testing.assert_array_equal(latents[-1], expected)
    # Another function and another number of steps compile nothing.
    programs = {key: function._cache_size() for key, function in student._programs.jitted.items()}
    student(PROMPT, callback_on_step_end=lambda *_: None, **(FIXED | {"num_inference_steps": 2}))
    assert {key: function._cache_size() for key, function in student._programs.jitted.items()} == programs


def test_the_callback_replaces_the_latents(student):
    zeros = student(PROMPT, callback_on_step_end=lambda _, i, t, kwargs: {"latents": 0 * kwargs["latents"]}, **FIXED)
    assert not zeros.images.any()


def test_what_the_callback_raises_is_raised_and_ends_the_run(student):
    calls = []

    def stop(pipe, i, t, kwargs):
        calls.append(i)
        if i == 1:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="^enough$"):
        student(PROMPT, callback_on_step_end=stop, **FIXED)
    assert calls == [0, 1]
    with pytest.raises(ValueError, match=r"latents of shape \(1, 2\); return \(1, 16, 16, 4\)"):
        student(PROMPT, callback_on_step_end=lambda *_: {"latents": np.zeros((1, 2))}, **FIXED)
    with pytest.raises(ValueError, match="callback_on_step_end returned .* return a dict with latents"):
        student(PROMPT, callback_on_step_end=lambda *_: {"prompt_embeds": 1}, **FIXED)
    assert np.isfinite(student(PROMPT, **FIXED).images).all()


def test_a_bar_counts_the_steps_of_all_batches(student, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    counted = []
    bar = callbacks.progress_bar

    def watched(total, shown):
        counted.append((total, shown))
        return bar(total, shown)

    monkeypatch.setattr("lcm_jax.sampling.callbacks.progress_bar", watched)
    expected = student([PROMPT] * 3, batch_size=2, **FIXED).images
    assert not counted
    found = student([PROMPT] * 3, batch_size=2, progress=True, **FIXED).images
    np.testing.assert_array_equal(found, expected)
    assert counted == [(8, True)] and "8/8" in capsys.readouterr().err


def test_images_are_the_same_on_8_devices(student):
    shared = lcm_jax.Pipeline.from_pretrained("shapes-lcm", mesh=jax.make_mesh((8,), ("data",)))
    prompts = [PROMPT, "a blue square", "a green triangle"]
    fixed: dict = {"num_inference_steps": 2, "seed": 5}
    found, expected = (pipe(prompts, output_type="np", **fixed).images for pipe in (shared, student))
    assert np.abs(found - expected).max() * 255 <= 1
    # A callback sees the batch as a whole, which is filled up to the number of devices.
    shapes = []
    callback = lambda pipe, i, t, kwargs: shapes.append(kwargs["latents"].shape)  # noqa: E731
    shared(prompts, callback_on_step_end=callback, **fixed)
    assert shapes == [(8, 16, 16, 4)] * 2
