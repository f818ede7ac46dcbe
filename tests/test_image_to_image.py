"""Image-to-image and inpainting by blending latents, against diffusers' pipelines on the same latents and noise."""

import numpy as np
import pytest
import reference_families
import reference_inpainting
import reference_pipeline
from PIL import Image
from reference_families import PROMPTS, SIZE
from reference_inpainting import image, mask
from reference_runs import assert_same, run_theirs

import lcm_jax
from lcm_jax.sampling import crop

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# family -> the pipelines of diffusers for image-to-image and for inpainting, strength and steps of either
KINDS = {
    "sd21-768": (("StableDiffusionImg2ImgPipeline", 0.5, 4), ("StableDiffusionInpaintPipeline", 0.6, 5)),
    "sdxl": (("StableDiffusionXLImg2ImgPipeline", 1.0, 2), ("StableDiffusionXLInpaintPipeline", 0.5, 4)),
    # diffusers' inpainting pipeline shortens an LCM's grid in a way of its own.
    "lcm": (("LatentConsistencyModelImg2ImgPipeline", 0.5, 4), ("StableDiffusionInpaintPipeline", 1.0, 2)),
}


@pytest.fixture(scope="module", params=list(KINDS))
def models(request, tmp_path_factory):
    """(family, components of diffusers, the same folder in ours)"""
    folder = tmp_path_factory.mktemp(request.param)
    plain = (
        reference_pipeline.build(folder) if request.param == "lcm" else reference_families.build(folder, request.param)
    )
    plain.save_pretrained(folder / "model")
    return request.param, plain.components, lcm_jax.Pipeline.from_pretrained(folder / "model")


def test_image_to_image_is_that_of_diffusers(models, monkeypatch):
    family, components, ours = models
    kind, strength, steps = KINDS[family][0]
    arguments: dict = {"image": image().resize((24, 16)), "strength": strength, "guidance_scale": 3.0}
    expected = run_theirs(components, kind, monkeypatch, 3, steps, PROMPTS, **arguments)
    found = ours(PROMPTS, seed=3, num_inference_steps=steps, output_type="np", **arguments).images
    assert_same(found, expected)


def test_inpainting_by_blending_is_that_of_diffusers(models, monkeypatch):
    family, components, ours = models
    kind, strength, steps = KINDS[family][1]
    arguments: dict = {"image": image(), "mask_image": mask(), "strength": strength, "guidance_scale": 3.0} | SIZE
    if family == "lcm":
        arguments["guidance_scale"] = 1.0  # above, diffusers guides an LCM twice: by its input and by two passes
    expected = run_theirs(components, kind, monkeypatch, 3, steps, PROMPTS, **arguments)
    found = ours(PROMPTS, seed=3, num_inference_steps=steps, output_type="np", **arguments).images
    assert_same(found, expected)

    if family != "sd21-768":
        return
    hole = Image.new("L", (40, 30))
    hole.paste(255, (20, 12, 34, 22))
    arguments |= {"mask_image": hole, "padding_mask_crop": 3}
    expected = run_theirs(components, kind, monkeypatch, 3, steps, PROMPTS, output_type="pil", **arguments)[1]
    found = ours(PROMPTS, seed=3, num_inference_steps=steps, **arguments).images[1]
    assert found.size == (40, 30)
    found, expected, original = (np.asarray(each, int) for each in (found, expected, image()))
    assert np.abs(found - expected).max() <= 3  # alpha is rounded twice more
    np.testing.assert_array_equal(found[np.asarray(hole) == 0], original[np.asarray(hole) == 0])
    assert np.abs(found - original).max() > 20


def test_an_inpainting_model_below_full_strength_is_that_of_diffusers(tmp_path, monkeypatch):
    components = reference_inpainting.build(tmp_path, "sd21-768").components
    ours = lcm_jax.Pipeline.from_pretrained(tmp_path / "model")
    arguments: dict = {"image": image(), "mask_image": mask(), "strength": 0.6, "guidance_scale": 3.0} | SIZE
    expected = run_theirs(components, "StableDiffusionInpaintPipeline", monkeypatch, 3, 5, PROMPTS, **arguments)
    assert_same(ours(PROMPTS, seed=3, num_inference_steps=5, output_type="np", **arguments).images, expected)


@pytest.mark.parametrize("box", [(0, 0, 5, 5), (30, 20, 40, 30), (0, 14, 40, 16), (18, 0, 20, 30), (3, 3, 4, 4)])
@pytest.mark.parametrize("size", [(16, 24), (64, 64)])
@pytest.mark.parametrize("padding", [0, 7])
def test_the_region_around_a_mask_is_that_of_diffusers(box, size, padding):
    hole = Image.new("L", (40, 30))
    hole.paste(255, box)
    height, width = size
    processor = diffusers.image_processor.VaeImageProcessor()
    region = crop.crop_region(hole, size, padding)
    assert region == processor.get_crop_region(hole, width, height, pad=padding)
    expected = processor.resize(image().crop(region), height, width, resize_mode="fill")
    found = np.asarray(crop.fit(image().crop(region), size), int)
    assert np.abs(found - np.asarray(expected, int)).max() <= 4  # diffusers interpolates what it fills margins with


# --- what the caller gets wrong ---


@pytest.fixture(scope="module")
def student():
    return lcm_jax.Pipeline.from_pretrained("shapes-lcm")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mask_image": mask()}, "image must be a PIL image to inpaint, got NoneType"),
        ({"image": np.zeros((16, 24, 3))}, "image must be a PIL image, got ndarray"),
        ({"image": [image()]}, "image must be a PIL image, got list"),
        ({"image": image(), "mask_image": "mask.png"}, "mask_image must be a PIL image to inpaint, got str"),
        ({"strength": 0.5}, "strength is 0.5 and there is no image to start from; pass image, or omit strength"),
        ({"image": image(), "strength": 0}, "strength is 0; use a number above 0 and at most 1"),
        ({"image": image(), "strength": float("nan")}, "strength is nan; use a number above 0"),
        ({"image": image(), "strength": "1"}, "strength is '1'; use a number above 0"),
        ({"padding_mask_crop": 8}, "padding_mask_crop is 8 and there is no mask_image"),
        (
            {"image": image(), "mask_image": mask().resize((8, 8)), "padding_mask_crop": 8},
            "image is 40 x 30 and mask_image 8 x 8 pixels; use the same size with padding_mask_crop",
        ),
        (
            {"image": image(), "mask_image": Image.new("L", (40, 30)), "padding_mask_crop": 8},
            "mask_image is all black, so that padding_mask_crop has nothing to crop",
        ),
        (
            {"image": image(), "mask_image": mask(), "padding_mask_crop": 8, "output_type": "np"},
            "output_type is 'np'; use 'pil' with padding_mask_crop",
        ),
        ({"image": image().resize((3, 3))}, "height and width are 0 and 0; use multiples of"),
        ({"image": image(), "strength": 0.1, "num_inference_steps": 6}, "strength is 0.1, which leaves none of"),
    ],
)
def test_mistakes_name_the_argument(student, arguments, message):
    with pytest.raises(ValueError) as raised:
        student("a red circle", **arguments)
    assert str(raised.value).startswith(message)
