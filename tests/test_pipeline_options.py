"""What a pipeline takes from the model's preset, another autoencoder, and tiles."""

import json
import warnings

import numpy as np
import pytest
import reference_pipeline
from safetensors.numpy import save_file

import lcm_jax
from lcm_jax.weights import single_file
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import open_model, replace_vae
from lcm_jax.weights.preset import Preset

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPT = "a red circle above a blue square"
TINY = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a student with a preset and of a tiny autoencoder, by diffusers."""
    folder = tmp_path_factory.mktemp("models")
    reference_pipeline.build(folder / "tokenizer").save_pretrained(folder / "lcm")
    preset = {"sampler": "lcm", "num_inference_steps": 2, "guidance_scale": 3.0, "guidance_range": [2.0, 6.0]}
    (folder / "lcm" / "preset.json").write_text(json.dumps(preset))
    torch.manual_seed(1)
    diffusers.AutoencoderTiny(**TINY).save_pretrained(folder / "tiny")
    torch.manual_seed(2)
    config = reference_pipeline.networks(True)["vae"].config
    diffusers.AutoencoderKL.from_config(config).save_pretrained(folder / "other")
    diffusers.AutoencoderKL.from_config({**config, "latent_channels": 8}).save_pretrained(folder / "wide")
    return folder


@pytest.fixture(scope="module")
def student(models):
    return lcm_jax.Pipeline.from_pretrained(models / "lcm")


def draw_latents(*shape):
    return np.random.default_rng(0).standard_normal((1, *shape, 4)).astype(np.float32)


def run_theirs(models, latents, vae=None, tiled=False, **arguments):
    kind = diffusers.LatentConsistencyModelPipeline
    pipe = kind.from_pretrained(models / "lcm", **({} if vae is None else {"vae": vae}))
    pipe.set_progress_bar_config(disable=True)
    if tiled:
        pipe.vae.enable_tiling()
    latents = torch.from_numpy(np.ascontiguousarray(latents.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        return pipe(
            PROMPT, num_inference_steps=1, latents=latents, guidance_scale=3.0, output_type="np", **arguments
        ).images


def test_a_call_without_arguments_follows_the_preset(student, tmp_path):
    assert student.preset == Preset("lcm", 2, 3.0, (2.0, 6.0)) and student.sampler == "lcm"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = student(PROMPT, output_type="np").images
        expected = student(PROMPT, 2, 3.0, sampler="lcm", output_type="np").images
    np.testing.assert_array_equal(images, expected)
    student.save_pretrained(tmp_path / "saved")
    assert open_model(tmp_path / "saved").preset == student.preset


@pytest.mark.parametrize("scale", [1.0, 6.5])
def test_guidance_outside_the_range_of_the_distillation_warns(student, scale):
    message = f"guidance_scale is {scale:g}, and the model was distilled for 2 to 6; use a guidance_scale in that range"
    with pytest.warns(UserWarning, match=message) as caught:
        student(PROMPT, 1, scale)
    assert caught[0].filename == __file__


def test_the_bundled_models_have_presets():
    stored = {name: open_model(name).preset for name in ("shapes", "shapes-lcm")}
    assert stored == {"shapes": Preset("ddim", 50, 3.0), "shapes-lcm": Preset("lcm", 4, 4.0, (4.0, 8.0))}
    pipe = lcm_jax.Pipeline.from_pretrained("shapes")
    pipe.load_lora("shapes-lcm-lora", weight=0.5)
    assert pipe.preset == Preset("lcm", 4, 1.0) and pipe.sampler == "lcm"
    pipe.set_lora_weight("shapes-lcm-lora", 0)
    assert pipe.preset == stored["shapes"]
    pipe.set_lora_weight("shapes-lcm-lora", 1)
    pipe.unload_lora()
    assert pipe.preset == stored["shapes"]


@pytest.mark.parametrize(("name", "kind"), [("tiny", "AutoencoderTiny"), ("other", "AutoencoderKL")])
def test_another_autoencoder_decodes_as_in_diffusers(models, name, kind, tmp_path):
    latents = draw_latents(8, 8)
    theirs = run_theirs(models, latents, vae=getattr(diffusers, kind).from_pretrained(models / name))
    pipe = lcm_jax.Pipeline.from_pretrained(models / "lcm", vae=models / name)
    ours = pipe(PROMPT, 1, latents=latents, output_type="np").images
    assert np.abs(ours - theirs).max() <= 2 / 255
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", kind] and "vae" in open_model(tmp_path / "saved").tensors
    if name == "tiny":
        with pytest.raises(ValueError, match="the autoencoder is an AutoencoderTiny, which is not tiled"):
            pipe.enable_vae_tiling()


def test_an_autoencoder_in_a_file_has_the_scaling_factor_of_the_one_it_replaces(models, tmp_path):
    folder = open_model(models / "other")
    save_file(single_file.to_ldm(folder.tensors, "vae"), tmp_path / "vae.safetensors")
    own = open_model(models / "lcm")
    replaced = replace_vae(own, open_model(tmp_path / "vae.safetensors"))
    assert replaced.configs["vae"]["scaling_factor"] == own.configs["vae"]["scaling_factor"]
    assert {name: tensor.tobytes() for name, tensor in replaced.tensors["vae"].items()} == {
        name: tensor.tobytes() for name, tensor in folder.tensors["vae"].items()
    }
    assert replace_vae(own, own).configs == own.configs, "a model with an autoencoder is one, too"


def test_an_autoencoder_that_does_not_fit_is_named(models, tmp_path):
    with pytest.raises(ModelError, match="wide has 8 latent channels, and .*lcm has 4; use one of the same family"):
        lcm_jax.Pipeline.from_pretrained(models / "lcm", vae=models / "wide")
    with pytest.raises(ModelError, match="there is no model 'nowhere'"):
        lcm_jax.Pipeline.from_pretrained(models / "lcm", vae="nowhere")
    save_file({"a": np.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"a.safetensors"):
        lcm_jax.Pipeline.from_pretrained(models / "lcm", vae=tmp_path / "a.safetensors")
    (tmp_path / "unet").symlink_to(models / "lcm" / "unet")
    with pytest.raises(ModelError, match="pass its model as base"):
        lcm_jax.Pipeline.from_pretrained(models / "lcm", vae=tmp_path / "unet")


def test_tiles_are_those_of_diffusers(models, student):
    latents, size = draw_latents(16, 8), {"height": 32, "width": 16}
    theirs = run_theirs(models, latents, tiled=True, **size)
    whole = student(PROMPT, 1, latents=latents, output_type="np", **size).images
    student.enable_vae_tiling()
    try:
        ours = student(PROMPT, 1, latents=latents, output_type="np", **size).images
    finally:
        student.disable_vae_tiling()
    assert np.abs(ours - theirs).max() <= 2 / 255 < np.abs(whole - theirs).max()
    np.testing.assert_array_equal(student(PROMPT, 1, latents=latents, output_type="np", **size).images, whole)
    with pytest.raises(ValueError, match="tile_sample_min_size 10 is not supported for tiles; .* multiple of 8"):
        student.enable_vae_tiling(10)
