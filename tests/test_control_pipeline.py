"""Pipelines with ControlNets against those of diffusers, on the same latents and noise."""

import numpy as np
import pytest
import reference_controlnet
import reference_families
import reference_inpainting
import reference_pipeline
from PIL import Image
from reference_controlnet import image
from reference_families import PROMPTS, SIZE
from reference_runs import assert_same, run_theirs

import lcm_jax
from lcm_jax.conversion import convert
from lcm_jax.sampling.control import control_window
from lcm_jax.weights.controlnet import open_controlnet
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import open_model

torch = pytest.importorskip("torch")
MultiControlNetModel = pytest.importorskip("diffusers.models.controlnets.multicontrolnet").MultiControlNetModel

GUIDED = {"guidance_scale": 3.0}


def build(folder, family):
    """(components of diffusers, two ControlNets of diffusers, the pipeline of ours with the first of them)

    Of one level, which compiles in half the time; the LCM has two.
    """
    with pytest.MonkeyPatch.context() as patch:
        if family != "lcm":
            patch.setitem(reference_families.FAMILIES, family, reference_families.PUBLISHED[family])
        plain = reference_pipeline.build(folder) if family == "lcm" else reference_families.build(folder, family)
    plain.save_pretrained(folder / "model")
    nets = [reference_controlnet.for_unet(plain.unet, folder / f"net{seed}", seed) for seed in (1, 2)]
    return plain.components, nets, lcm_jax.Pipeline.from_pretrained(folder / "model", controlnet=folder / "net1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sd2")


@pytest.fixture(scope="module")
def models(folder):
    return build(folder, "sd21-768")


@pytest.fixture(scope="module")
def both(folder, models):
    """Ours with both ControlNets; the second is a single file, whose number of heads is that of the UNet."""
    convert(folder / "net2", folder / "net2.safetensors", "ldm", log=lambda _: None)
    return lcm_jax.Pipeline.from_pretrained(folder / "model", controlnet=[folder / "net1", folder / "net2.safetensors"])


def test_text_to_image_is_that_of_diffusers(models, monkeypatch):
    """The size is that of the control image. Another image, scale or window compiles nothing, scale 0 does nothing."""
    components, nets, ours = models
    parts, kind = components | {"controlnet": nets[0]}, "StableDiffusionControlNetPipeline"
    acts = {"controlnet_conditioning_scale": 0.7, "control_guidance_start": 0.2, "control_guidance_end": 0.79}
    all_found = []
    for control, arguments in [(image(), acts), (image(1, "L"), {}), (image(), {"controlnet_conditioning_scale": 0.0})]:
        arguments |= GUIDED
        expected = run_theirs(parts, kind, monkeypatch, 3, 5, PROMPTS, image=control, **arguments)
        found = ours(PROMPTS, 5, seed=3, control_image=control, output_type="np", **arguments).images
        assert_same(found, expected)
        all_found.append(found)
    (program,) = ours._programs.jitted.values()
    assert program._cache_size() == 1
    assert all(np.abs(each - all_found[0]).max() > 0.02 for each in all_found[1:])


def test_image_to_image_with_two_nets_is_that_of_diffusers(models, both, monkeypatch):
    components, nets, _ = models
    arguments = GUIDED | {"controlnet_conditioning_scale": [0.8, 1.2], "control_guidance_start": [0.0, 0.5]}
    arguments |= {"control_guidance_end": [0.5, 1.0], "control_image": [image(), image(2)]}
    arguments |= {"image": reference_inpainting.image().resize((24, 16)), "strength": 0.6}
    parts = components | {"controlnet": MultiControlNetModel(nets)}
    expected = run_theirs(parts, "StableDiffusionControlNetImg2ImgPipeline", monkeypatch, 3, 4, PROMPTS, **arguments)
    assert_same(both(PROMPTS, 4, seed=3, output_type="np", **arguments).images, expected)


def test_the_surroundings_of_a_mask_are_cut_out_of_the_control_image_too(models, folder, monkeypatch):
    """By a net whose residuals are pooled, which act on the prompt alone and not on the negative prompt."""
    components, _, _ = models
    net = reference_controlnet.for_unet(components["unet"], folder / "pooled", 1, global_pool_conditions=True)
    ours = lcm_jax.Pipeline.from_pretrained(folder / "model", controlnet=[folder / "pooled"])
    hole = Image.new("L", (40, 30))
    hole.paste(255, (20, 12, 34, 22))
    arguments = GUIDED | SIZE | {"image": reference_inpainting.image(), "mask_image": hole, "padding_mask_crop": 3}
    arguments |= {"control_image": reference_inpainting.image(5), "strength": 1.0, "controlnet_conditioning_scale": 1.0}
    parts, kind = components | {"controlnet": net}, "StableDiffusionControlNetInpaintPipeline"
    expected = run_theirs(parts, kind, monkeypatch, 3, 4, PROMPTS, output_type="pil", **arguments)
    for found, each in zip(ours(PROMPTS, 4, seed=3, **arguments).images, expected, strict=True):
        assert np.abs(np.asarray(found, int) - np.asarray(each, int)).max() <= 3  # alpha is rounded twice more
    with pytest.raises(ValueError, match=r"control_image is \(25, 17\) and image \(40, 30\) .*; use the same size"):
        ours(PROMPTS, **arguments | {"control_image": image()})


@pytest.mark.parametrize("family", ["sdxl", "lcm"])
def test_other_families_are_those_of_diffusers(family, tmp_path, monkeypatch):
    """An LCM's guidance weight is an input of the UNet alone."""
    components, nets, ours = build(tmp_path, family)
    kind = "StableDiffusionXLControlNetPipeline" if family == "sdxl" else "StableDiffusionControlNetPipeline"
    arguments = GUIDED | {"controlnet_conditioning_scale": 0.9, "control_guidance_end": 0.75}
    parts = components | {"controlnet": nets[0]}
    expected = run_theirs(parts, kind, monkeypatch, 3, 4, PROMPTS, image=image(), **arguments)
    found = ours(PROMPTS, seed=3, num_inference_steps=4, output_type="np", control_image=image(), **arguments).images
    assert_same(found, expected)


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("start, end", [(0.0, 1.0), (0.25, 0.75), (0.3, 0.31), (0.5, 1.0), (0.0, 0.1), (0.99, 1.0)])
def test_windows_are_the_steps_of_diffusers(steps, start, end):
    timesteps = np.linspace(999, 19, steps)
    low, high = control_window(timesteps, start, end)
    keeps = [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]
    np.testing.assert_array_equal([low <= np.float32(t) <= high for t in timesteps], np.array(keeps) == 1)


def test_nan_in_a_net_names_it(models, monkeypatch):
    _, _, ours = models
    (params,) = ours._controlnet_params
    bias = params["conv_in"]["bias"].at[0].set(np.nan)
    monkeypatch.setattr(ours, "_controlnet_params", (params | {"conv_in": params["conv_in"] | {"bias": bias}},))
    with pytest.raises(ModelError, match="conv_in.bias of the ControlNet .*net1 contains NaN or infinity"):
        ours(PROMPTS, 5, control_image=image(), output_type="np", **GUIDED)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"control_image": None}, "control_image must be a PIL image for each ControlNet, got NoneType"),
        ({"control_image": np.zeros((2, 2))}, "control_image must be a PIL image for each ControlNet, got ndarray"),
        ({"control_image": [image(), image()]}, "control_image has 2 values and there are 1 ControlNets; use one for"),
        ({"controlnet_conditioning_scale": "1"}, "controlnet_conditioning_scale is '1'; use a finite number"),
        ({"controlnet_conditioning_scale": np.nan}, "controlnet_conditioning_scale is nan; use"),
        ({"controlnet_conditioning_scale": [1.0, 1.0]}, "controlnet_conditioning_scale has 2 values"),
        ({"control_guidance_start": 1.0}, "control_guidance_start and control_guidance_end are 1.0 and 1.0; use"),
        ({"control_guidance_start": -0.1}, "control_guidance_start and control_guidance_end are -0.1 and 1.0; use"),
        ({"control_guidance_end": 1.5}, "control_guidance_start and control_guidance_end are 0.0 and 1.5; use"),
        ({"control_guidance_end": [0.5, 1]}, "control_guidance_end has 2 values"),
    ],
)
def test_mistakes_name_the_argument(models, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        models[2](PROMPTS, num_inference_steps=2, **{"control_image": image()} | arguments)


def test_mistakes_with_two_nets_and_with_none(both, folder, tmp_path):
    with pytest.raises(ModelError, match="export does not support ControlNets .*net1, .*net2.safetensors.; omit contr"):
        both.export(tmp_path / "exported")
    for given, count in [(image(), 1), ([image()], 1), (None, 0)]:
        with pytest.raises(ValueError, match=f"control_image has {count} values and there are 2 ControlNets; use one"):
            both(PROMPTS, num_inference_steps=2, control_image=given)
    plain = lcm_jax.Pipeline.from_pretrained(folder / "model")
    for name, value in [("control_image", image()), ("controlnet_conditioning_scale", 0.5)]:
        with pytest.raises(ValueError, match=f"{name} is given, and this pipeline has no ControlNet; pass controlnet"):
            plain(PROMPTS, num_inference_steps=2, **{name: value})


def test_a_net_of_another_family_is_named(folder, models, tmp_path):
    reference_controlnet.build(reference_controlnet.XL).save_pretrained(tmp_path / "xl")
    with pytest.raises(
        ModelError, match="ControlNet .*xl: block_out_channels is \\(8, 16\\), and block_out.* is \\(8,\\); use a"
    ):
        lcm_jax.Pipeline.from_pretrained(folder / "model", controlnet=tmp_path / "xl")
    with pytest.raises(ModelError, match="model is a whole model; use the folder of a ControlNet"):
        lcm_jax.Pipeline.from_pretrained(folder / "model", controlnet=folder / "model")
    stored = open_model(folder / "model")
    with pytest.raises(ModelError, match="model is a model, not a ControlNet"):
        lcm_jax.Pipeline(stored, controlnet=stored)
    assert lcm_jax.Pipeline(stored, controlnet=[open_controlnet(folder / "net1")]).controlnets == (
        str(folder / "net1"),
    )
