"""Text to pictures: against diffusers' own pipelines on the same folder and latents, and by itself."""

import copy
import json
import pickle
import re
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_pipeline
from numbered_noise import draw_noise

import lcm_jax
from lcm_jax.compiler import watch_cache
from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.diffusion.schedule import make_schedule
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.sampling import inputs
from lcm_jax.sampling.generate import generate
from lcm_jax.sampling.preview import PreviewSampler
from lcm_jax.sampling.programs import Programs
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.scheduler import lcm_scheduler

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders written by diffusers, by the name of their scheduler: lcm (a student), ddim, trailing, pndm, dpm.

    silent: a scheduler that clips, as pixels need, and leaves steps_offset to its class.
    """
    folder = tmp_path_factory.mktemp("models")
    for name in reference_pipeline.SCHEDULERS:
        reference_pipeline.build(folder / "tokenizer", name).save_pretrained(folder / name)
    shutil.copytree(folder / "ddim", folder / "silent")
    config = folder / "silent" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "DDIMScheduler", "clip_sample": True} | reference_pipeline.SCHEDULE))
    return folder


@pytest.fixture(scope="module")
def student(models):
    return lcm_jax.Pipeline.from_pretrained(models / "lcm")


@pytest.fixture(scope="module")
def teacher(models):
    return lcm_jax.Pipeline.from_pretrained(models / "ddim")


def draw_latents(seed=0, count=1):
    return np.random.default_rng(seed).standard_normal((count, 8, 8, 4)).astype(np.float32)


def to_torch(latents):
    return torch.from_numpy(np.ascontiguousarray(latents.transpose(0, 3, 1, 2)))


def run_theirs(folder, kind, latents, **arguments):
    """The arrays of diffusers' own pipeline for a folder, NHWC."""
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        images = pipe(PROMPT, latents=to_torch(latents), **arguments).images
    return images.numpy().transpose(0, 2, 3, 1) if isinstance(images, torch.Tensor) else images


# --- the same pictures as diffusers ---


def test_diffusers_loads_what_we_write_and_makes_the_same_picture(student, tmp_path):
    student.save_pretrained(tmp_path / "export")
    latents = draw_latents()
    arguments = {"num_inference_steps": 1, "guidance_scale": 8.0, "output_type": "np"}
    theirs = run_theirs(tmp_path / "export", diffusers.LatentConsistencyModelPipeline, latents, **arguments)
    ours = student(PROMPT, latents=latents, **arguments).images
    assert ours.shape == (1, 16, 16, 3) and ours.dtype == np.float32 and ours.std() > 0.1
    assert np.abs(theirs - ours).max() * 255 <= 2

    # The weight of guidance really arrives: another one gives another picture.
    other = student(PROMPT, latents=latents, **arguments | {"guidance_scale": 2.0}).images
    theirs = run_theirs(
        tmp_path / "export", diffusers.LatentConsistencyModelPipeline, latents, **arguments | {"guidance_scale": 2.0}
    )
    assert np.abs(other - ours).max() * 255 > 3 and np.abs(theirs - other).max() * 255 <= 2


def test_several_steps_are_those_of_diffusers_given_the_same_noise(models, student, monkeypatch):
    latents, noise = draw_noise(7, 1, 4, (8, 8, 4))
    draws = iter(noise)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: to_torch(np.asarray(next(draws)))
    )
    arguments = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"}
    theirs = run_theirs(models / "lcm", diffusers.LatentConsistencyModelPipeline, np.asarray(latents), **arguments)
    assert next(draws, None) is None  # all of it was used
    ours = student(PROMPT, seed=7, **arguments).images
    np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["ddim", "silent", "trailing", "pndm", "dpm"])
def test_solvers_follow_the_folder_as_diffusers_does(models, name):
    """Classifier-free guidance, the grid of timesteps and the last step, from the scheduler's config."""
    latents = draw_latents()
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(models / name)
    theirs.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "latent"}
    if name == "trailing":
        theirs.text_encoder.__dict__["text_model"] = theirs.text_encoder  # where diffusers looks for the last norm
        arguments |= {"negative_prompt": "a photo of a circle", "clip_skip": 1}
    with torch.no_grad():
        expected = theirs(PROMPT, latents=to_torch(latents), **arguments).images.numpy().transpose(0, 2, 3, 1)
    pipe = lcm_jax.Pipeline.from_pretrained(models / name)
    ours = pipe(PROMPT, latents=latents, **arguments).images
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=2e-4 * np.abs(expected).max())
    if name == "trailing":  # each of the two is seen
        for other in ({"negative_prompt": ""}, {"clip_skip": 0}):
            assert np.abs(pipe(PROMPT, latents=latents, **arguments | other).images - ours).max() > 0.01


def test_what_cannot_act_is_a_warning_that_says_why(student, teacher):
    arguments = {"num_inference_steps": 1, "output_type": "latent", "seed": 5}
    with pytest.warns(UserWarning, match="negative_prompt has no effect: this model is an LCM.*use its teacher"):
        student(PROMPT, negative_prompt="a photo", **arguments)
    with pytest.warns(
        UserWarning, match="negative_prompt has no effect without guidance: raise guidance_scale"
    ) as caught:
        teacher(PROMPT, negative_prompt="a photo", guidance_scale=1, sampler="lcm", **arguments)
    assert caught[0].filename == __file__


def test_a_sampler_that_is_not_supported_is_refused_only_where_it_samples(models, tmp_path):
    folder = shutil.copytree(models / "dpm", tmp_path / "sde")
    path = folder / "scheduler" / "scheduler_config.json"
    odd = {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    pipe = lcm_jax.Pipeline.from_pretrained(folder)
    arguments = {"num_inference_steps": 2, "output_type": "latent"}
    with pytest.raises(
        ValueError, match="algorithm_type 'sde-dpmsolver\\+\\+' is not supported; use 'dpmsolver\\+\\+'"
    ):
        pipe(PROMPT, **arguments)
    assert np.isfinite(pipe(PROMPT, sampler="euler", **arguments).images).all()
    pipe.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / path.relative_to(folder)).read_text()) == pipe.configs["scheduler"]
    student = lcm_scheduler(pipe.configs["scheduler"], 50)
    np.testing.assert_array_equal(make_schedule(student).alphas_cumprod, pipe.model.schedule.alphas_cumprod)


def test_a_network_without_guidance_input_is_guided_by_two_passes_above_a_scale_of_1(teacher, monkeypatch):
    """As after an LCM-LoRA: the consistency sampler with classifier-free guidance."""
    called, run = [], teacher._run
    monkeypatch.setattr(teacher, "_run", lambda *each: called.append(each) or run(*each))
    arguments = {"latents": draw_latents(), "num_inference_steps": 1, "sampler": "lcm", "output_type": "latent"}
    at = {w: teacher(PROMPT, guidance_scale=w, **arguments).images for w in (1.0, 2.0, 3.0)}
    sizes, denoise = [], StableDiffusion.denoise

    def count(model, params, z, *rest):
        sizes.append(len(z))
        return denoise(model, params, z, *rest)

    monkeypatch.setattr(StableDiffusion, "denoise", count)
    for _, given, table in called[:2]:
        jax.eval_shape(partial(generate, teacher.model, sampler="lcm", table=table), teacher.params, given)
    assert sorted(set(sizes)) == [1, 2], "one pass at a scale of 1, as in diffusers"
    # One step is affine in the network's output, and so in the guidance; the one pass is what two make of w = 0.
    assert np.abs(at[2.0] - at[1.0]).max() > 1e-4
    np.testing.assert_allclose(at[3.0] - at[1.0], 2 * (at[2.0] - at[1.0]), rtol=1e-3, atol=1e-4 * np.abs(at[1.0]).max())


# --- weights through the public face ---


@pytest.mark.parametrize("dtype, variant", [("float16", "fp16"), ("bfloat16", None)])
def test_saved_as_it_was_stored(models, tmp_path, dtype, variant):
    folder, mine = tmp_path / "theirs", tmp_path / "mine"
    reference_pipeline.build(models / "tokenizer", "lcm").save_pretrained(folder)
    narrow = lcm_jax.Pipeline.from_pretrained(folder)
    narrow.save_pretrained(tmp_path / "narrow", dtype=dtype, variant=variant)
    pipe = lcm_jax.Pipeline.from_pretrained(tmp_path / "narrow", dtype="bfloat16", variant=variant)
    assert {(leaf.ndim >= 2, str(leaf.dtype)) for leaf in jax.tree.leaves(pipe.params)} == {
        (True, "bfloat16"),
        (False, "float32"),
    }
    pipe.save_pretrained(mine, variant=variant)
    written = {str(p.relative_to(mine)): p.read_bytes() for p in mine.rglob("*") if p.is_file()}
    assert len([name for name in written if name.endswith(".safetensors")]) == 3
    for name, content in written.items():
        assert (tmp_path / "narrow" / name).read_bytes() == content, name


def test_half_precision_compute_is_close(models, student):
    half = lcm_jax.Pipeline.from_pretrained(models / "lcm", dtype="bfloat16")
    arguments = {"num_inference_steps": 1, "output_type": "np", "latents": draw_latents()}
    a, b = (pipe(PROMPT, **arguments).images for pipe in (student, half))
    assert 0 < np.abs(a - b).mean() < 0.02


def test_saving_over_a_model_must_be_asked_for(models, student, tmp_path):
    folder = shutil.copytree(models / "ddim", tmp_path / "model")
    before = (folder / "unet" / "config.json").read_bytes()
    with pytest.raises(ModelError, match="exists already"):
        student.save_pretrained(folder)
    assert (folder / "unet" / "config.json").read_bytes() == before
    student.save_pretrained(folder, overwrite=True)
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "LCMScheduler"


# --- randomness ---


def test_a_picture_depends_on_its_seed_and_place_only(student):
    batch = student([PROMPT, "a red circle", PROMPT], num_inference_steps=2, seed=5, output_type="latent").images
    again = student([PROMPT, "a red circle", PROMPT], num_inference_steps=2, seed=5, output_type="latent").images
    np.testing.assert_array_equal(batch, again)
    assert np.abs(batch[0] - batch[2]).max() > 0.1
    alone = student(PROMPT, num_inference_steps=2, seed=5, output_type="latent").images
    np.testing.assert_allclose(alone[0], batch[0], atol=1e-4)
    many = student(PROMPT, num_inference_steps=2, seed=5, num_images_per_prompt=3, output_type="latent").images
    np.testing.assert_allclose(many[[0, 2]], batch[[0, 2]], atol=1e-4)
    assert np.abs(student(PROMPT, num_inference_steps=2, seed=6, output_type="latent").images - alone).max() > 0.1


def test_noise_of_picture_i_is_that_of_any_batch_and_number_of_steps():
    latents, noise = draw_noise(3, 4, 5, (2, 2, 4))
    assert latents.shape == (4, 2, 2, 4) and noise.shape == (4, 4, 2, 2, 4) and noise.dtype == jnp.float32
    later, later_noise = draw_noise(3, 1, 3, (2, 2, 4), first=2)
    np.testing.assert_array_equal(later[0], latents[2])
    np.testing.assert_array_equal(later_noise[:, 0], noise[:2, 2])
    everything = np.concatenate([latents[None], noise]).ravel()
    assert len(np.unique(everything)) == everything.size


def test_batches_make_the_same_images_with_one_program(student):
    """An image's number alone decides its noise; the last batch is filled up."""
    prompts = [PROMPT, "a red circle", "a blue square"]
    arguments = {"num_inference_steps": 2, "seed": 5, "output_type": "latent"}
    whole = student(prompts, **arguments).images
    parts = student(prompts, batch_size=2, **arguments).images
    np.testing.assert_allclose(parts, whole, atol=1e-4)
    compiled = {key: function._cache_size() for key, function in student._programs.jitted.items()}
    np.testing.assert_array_equal(student(prompts[2], first=2, batch_size=2, **arguments).images, parts[2:])
    own = draw_latents(count=3)
    np.testing.assert_array_equal(
        student(prompts, latents=own, batch_size=2, **arguments).images[2:],
        student(prompts[2:], latents=own[2:], first=2, batch_size=2, **arguments).images,
    )
    assert {key: function._cache_size() for key, function in student._programs.jitted.items()} == compiled


def test_64_bit_types_change_no_bit(student):
    arguments = {"num_inference_steps": 2, "seed": 5, "batch_size": 2, "output_type": "np"}
    expected = student(PROMPT, **arguments).images
    with jax.enable_x64(True):
        latents, noise = draw_noise(3, 2, 2, (2, 2, 4))
        image = inputs.draw_image_noise(3, (2, 2, 4))
        assert latents.dtype == noise.dtype == image.dtype == np.float32
        np.testing.assert_array_equal(student(PROMPT, **arguments).images, expected)
    for narrow, wide in zip(draw_noise(3, 2, 2, (2, 2, 4)), (latents, noise), strict=True):
        np.testing.assert_array_equal(narrow, wide)
    np.testing.assert_array_equal(inputs.draw_image_noise(3, (2, 2, 4)), image)


def test_a_pipeline_that_has_made_images_can_be_pickled(student):
    arguments = {"num_inference_steps": 2, "seed": 5, "batch_size": 2, "output_type": "np"}
    expected = student(PROMPT, **arguments).images
    again = pickle.loads(pickle.dumps(student))
    np.testing.assert_array_equal(again(PROMPT, **arguments).images, expected)


# --- NaN ---


@pytest.mark.parametrize(
    "network, key, label",
    [
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1.bias", "text_encoder"),
        ("unet", "conv_in.bias", "unet"),
        ("vae", "decoder.conv_out.bias", "vae"),
    ],
)
def test_weights_with_nan_are_an_error_that_names_the_network_and_the_parameter(student, network, key, label):
    path = [part.replace(".", "_") for part in key.replace("layers.0", "layers_0").split(".")]
    broken = copy.copy(student)
    broken.params = jax.tree.map(lambda leaf: leaf, student.params)
    leaf = broken.params[network]
    for part in path[:-1]:
        leaf = leaf[part]
    leaf[path[-1]] = leaf[path[-1]].at[0].set(np.nan)
    with pytest.raises(ModelError, match=f"{key} of the {label} contains NaN or infinity; fetch the weights again"):
        broken(PROMPT, num_inference_steps=2, seed=5, batch_size=2, output_type="np")


def test_float16_that_overflows_is_an_error_that_names_the_network_and_another_dtype(models):
    half = lcm_jax.Pipeline.from_pretrained(models / "lcm", dtype="float16")
    # XLA keeps float32 between the operations of a CPU: beyond its range, too.
    half.params["vae"]["decoder"]["conv_in"]["bias"] += 3e38
    with pytest.raises(ModelError, match="autoencoder's decoder gives NaN.* in float16.*use dtype float32 or bfloat16"):
        half(PROMPT, num_inference_steps=1)
    half.params["unet"]["conv_in"]["bias"] += 3e38
    with pytest.raises(ModelError, match="UNet gives NaN.* in float16.*use dtype float32 or bfloat16"):
        half(PROMPT, num_inference_steps=1)


# --- what comes out ---


def test_output_types_and_sizes(student):
    arguments = {"num_inference_steps": 1, "latents": draw_latents()}
    picture = student(PROMPT, **arguments).images
    assert len(picture) == 1 and picture[0].size == (16, 16) and picture[0].mode == "RGB"
    floats = student(PROMPT, output_type="np", **arguments).images
    np.testing.assert_array_equal(np.round(floats[0] * 255), np.asarray(picture[0]))
    wide = student(PROMPT, num_inference_steps=1, height=8, width=24, output_type="latent").images
    assert wide.shape == (1, 4, 12, 4)


def test_a_call_is_one_compiled_function_reused(student):
    run = lambda prompt, w: student(prompt, num_inference_steps=1, guidance_scale=w, latents=draw_latents())  # noqa: E731
    run(PROMPT, 8.0)
    before = {key: function._cache_size() for key, function in student._programs.jitted.items()}
    run("a blue square", 3.0)
    assert {key: function._cache_size() for key, function in student._programs.jitted.items()} == before


def test_a_call_of_what_was_compiled_ahead_of_time_compiles_nothing(student, teacher, capsys):
    """Batches, sizes and, for a model without an input for the guidance, negative prompts."""
    side = student.model.downscale * 4
    plan = (
        (student, 2, [PROMPT, "a red circle"], {}, {"guidance_scale": 3.0}),
        (teacher, 1, PROMPT, {"sampler": "ddim", "negative_prompt": True}, {"sampler": "ddim", "negative_prompt": "a"}),
    )
    for pipe, batch, prompts, options, call in plan:
        pipe = copy.copy(pipe)
        pipe._programs = Programs(pipe.model, pipe.mesh)
        assert pipe.compile([batch], [(side, 2 * side)], **options) is None
        with watch_cache() as cache:
            pipe(prompts, num_inference_steps=3, seed=4, height=side, width=2 * side, **call)
        assert cache.programs == 0
    line = rf"{side} x {2 * side} pixels, batch of 2: (compiled|loaded from the cache) in [\d.]+ s"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and re.fullmatch(line, lines[0])
    with pytest.raises(ValueError, match="batch_size is 0; use 1 or more"):
        student.compile([0])
    with pytest.raises(ValueError, match=f"height and width are 5 and 8; use multiples of {student.model.downscale}"):
        student.compile(sizes=[(5, 8)])


def test_another_number_of_steps_compiles_nothing(student):
    """A slider from 1 to 8 steps and past it, in the pipeline and in previews, which make the same images."""
    prompts, size = [PROMPT, "a blue square", "two green circles"], student.model.downscale * 4
    pipe, sampler = copy.copy(student), PreviewSampler(student.model, student.tokenize, prompts, size, 2, seed=3)
    pipe._programs = Programs(pipe.model, pipe.mesh)
    for steps in (1, 2, 3, 4, 5, 6, 7, 8, 50):
        images, seconds = sampler(student.params, "lcm", steps, 6.0)
        expected = pipe(prompts, steps, 6.0, seed=3, height=size, width=size, batch_size=2).images
        np.testing.assert_array_equal(images, np.stack([np.asarray(image) for image in expected]))
        assert images.shape == (3, size, size, 3) and seconds > 0
    assert [program._cache_size() for program in pipe._programs.jitted.values()] == [1]
    assert len(sampler._programs) == 1


def test_previews_take_parameters_from_the_host_and_from_devices(student):
    """And other prompts, with the programs that are there."""
    sampler = PreviewSampler(student.model, student.tokenize, [PROMPT, "a red circle"], 16, 2)
    images, _ = sampler(student.params, "lcm", 2, 6.0)
    again, _ = sampler.with_prompts(["a red circle"])(jax.device_get(student.params), "lcm", 2, 6.0)
    assert again.shape == (1, 16, 16, 3) and np.abs(again[0].astype(int) - images[0]).max() > 0
    assert len(sampler._programs) == 1
    same, _ = sampler.with_prompts([PROMPT])(student.params, "lcm", 2, 6.0)
    np.testing.assert_array_equal(same[0], images[0])
    broken = jax.tree.map(lambda leaf: leaf, student.params)
    broken["vae"]["decoder"]["conv_out"]["bias"] = jnp.full_like(broken["vae"]["decoder"]["conv_out"]["bias"], jnp.nan)
    with pytest.raises(ModelError, match="lcm at 2 steps: decoder.conv_out.bias of the vae contains NaN"):
        sampler(broken, "lcm", 2, 6.0)


def test_previews_without_guidance_take_one_pass(teacher):
    sampler = PreviewSampler(teacher.model, teacher.tokenize, [PROMPT], 16, 1)
    first = np.zeros(1, int)
    assert sampler._inputs(first, 1.0).negative_ids is None and sampler._inputs(first, 2.0).negative_ids is not None


def test_a_long_and_weighted_prompt_is_that_of_diffusers_given_its_chunks(models, teacher):
    """No word is lost, and the negative prompt ends with empty chunks. The random encoder's states are centered."""
    chunks = [["a", "red", "circle"] * 3 + ["a"], ["blue", "square"]]
    prompt = " ".join([*chunks[0], f"({chunks[1][0]}:1.5)", chunks[1][1]])
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(models / "ddim")
    theirs.set_progress_bar_config(disable=True)
    encode = lambda words: theirs.encode_prompt(" ".join(words), "cpu", 1, False)[0]  # noqa: E731
    with torch.no_grad():
        second = encode(chunks[1])
        second[:, 1] *= 1.5
        embeds = torch.cat([encode(chunks[0]), second], 1)
        negative = torch.cat([encode(["photo"]), encode([])], 1)
        latents, arguments = draw_latents(), {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
        expected = theirs(
            prompt_embeds=embeds, negative_prompt_embeds=negative, latents=to_torch(latents), **arguments
        ).images
    arguments |= {"negative_prompt": "photo", "latents": latents}
    ours = teacher(prompt, prompt_weights=True, **arguments).images
    np.testing.assert_allclose(ours, expected.numpy().transpose(0, 2, 3, 1), rtol=1e-3, atol=1e-3)
    assert np.abs(teacher(prompt.replace("1.5", "1.0"), prompt_weights=True, **arguments).images - ours).max() > 0.01


def test_a_long_prompt_does_not_change_the_others_of_its_batch(student):
    prompts = ["a red circle", "a " * 30, "a blue square", "red " * 11]
    arguments = {"num_inference_steps": 2, "output_type": "latent", "seed": 4}
    together = student(prompts, batch_size=3, **arguments).images
    for i, prompt in enumerate(prompts):
        alone = student(prompt, batch_size=3, first=i, **arguments).images[0]
        np.testing.assert_allclose(together[i], alone, atol=1e-5 * np.abs(alone).max())
    with pytest.raises(ValueError, match="has 20 chunks of 10 tokens; use at most 16"):
        student("a " * 200)


# --- what is refused ---


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0; choose 1 to 50"),
        ({"num_inference_steps": 51}, "num_inference_steps is 51; choose 1 to 50"),
        ({"prompt": []}, "prompt is \\[\\]; use a string or a list of strings"),
        ({"prompt": ["a", 3]}, "prompt is .*; use a string"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0; use 1 or more"),
        ({"output_type": "pt"}, "output_type is 'pt'; choose pil, np, latent"),
        ({"sampler": "heun"}, "sampler is 'heun'; choose"),
        ({"sampler": "ddim"}, "this model is an LCM; use 'lcm' or 'tcd', or its teacher"),
        ({"height": 17}, "height and width are 17 and 16; use multiples of 2"),
        ({"width": 0}, "height and width are 16 and 0; use multiples of 2"),
        ({"latents": np.zeros((1, 4, 8, 8))}, r"latents have shape \(1, 4, 8, 8\); use \(1, 8, 8, 4\)"),
        ({"latents": draw_latents(count=2)}, r"latents have shape \(2, 8, 8, 4\); use \(1, 8, 8, 4\)"),
        ({"guidance_scale": 0.0}, "guidance_scale is 0.0; use 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"seed": -1}, "seed is -1; use 0 to 2147483647"),
        ({"num_inference_steps": "8"}, "num_inference_steps is '8'; use an integer"),
        ({"guidance_scale": "8"}, "guidance_scale is '8'; use 1"),
        ({"guidance_scale": [8.0, 1.0]}, r"guidance_scale is \[8.0, 1.0\]; use 1"),
        ({"seed": None}, "seed is None; use 0 to"),
        ({"seed": 1.0}, "seed is 1.0; use 0 to"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt is True; use 1 or more"),
        ({"height": "16"}, "height is '16'; use an integer"),
        ({"width": 16.0}, "width is 16.0; use an integer"),
        ({"batch_size": 0}, "batch_size is 0; use 1 or more"),
        ({"first": -1}, "first is -1; use 0 to"),
        ({"clip_skip": 3}, "clip_skip is 3; use 0 to 2"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 prompts and prompt has 1; use one, or one for each"),
        ({"negative_prompt": 3}, "negative_prompt is 3; use a string"),
        ({"prompt": "caf\udce9"}, r"prompt is 'caf\\udce9', which is not valid Unicode at character 3; use UTF-8"),
        ({"latents": np.full((1, 8, 8, 4), np.nan)}, "latents have NaN or infinity; use"),
    ],
)
def test_bad_arguments_are_named_with_their_value_and_the_remedy(student, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        student(**{"prompt": PROMPT} | arguments)
    assert len(str(caught.value).splitlines()) == 1


def test_models_that_cannot_work_are_refused(models, tmp_path):
    with pytest.raises(ModelError, match="no model"):
        lcm_jax.Pipeline.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="dtype is 'float8'; choose float32, bfloat16, float16"):
        lcm_jax.Pipeline.from_pretrained(models / "lcm", dtype="float8")

    def changed(part, **options):
        folder = shutil.copytree(models / "ddim", tmp_path / str(len(list(tmp_path.iterdir()))))
        path = folder / part
        path.write_text(json.dumps(json.loads(path.read_text()) | options))
        return folder

    for part, options, message in [
        ("scheduler/scheduler_config.json", {"beta_start": "0.1"}, "beta_start '0.1' is not supported; use a number"),
        (
            "unet/config.json",
            {"cross_attention_dim": 24},
            "dim is 24 and the text encoder's hidden_size is 16; use networks of one model",
        ),
        ("unet/config.json", {"block_out_channels": [16, 16]}, "unet of .*another shape"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ("text_encoder/config.json", {"vocab_size": 300}, "text_encoder of .*another shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            lcm_jax.Pipeline.from_pretrained(changed(part, **options))

    folder = changed("unet/config.json", block_out_channels=[16, 16])
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 300}))
    with pytest.raises(ModelError, match="(?s)unet of .*another shape.*! conv_.*text_encoder of .*! text_model"):
        lcm_jax.Pipeline.from_pretrained(folder)

    folder = changed("scheduler/scheduler_config.json", _class_name="HeunDiscreteScheduler")
    with pytest.raises(
        ValueError, match="HeunDiscreteScheduler is not supported; pass sampler=, one of lcm, tcd, ddim"
    ):
        lcm_jax.Pipeline.from_pretrained(folder)(PROMPT)
    tokenizers.build(reference_pipeline.WORDS, folder / "tokenizer", model_max_length=30)
    with pytest.raises(ModelError, match="model_max_length is 30, above the text encoder's max_position_embeddings 12"):
        lcm_jax.Pipeline.from_pretrained(folder)
