"""The inputs of towers against transformers' image processor, and on images of odd sizes and modes."""

import numpy as np
import pytest
from PIL import Image

from lcm_jax.evaluation import clip_inputs

SIZES = [(37, 53), (53, 37), (24, 24), (24, 31), (90, 25), (25, 90), (47, 48), (10, 9)]


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def processor():
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    return module.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})


@pytest.mark.parametrize("size", SIZES)
def test_inputs_equal_transformers(processor, size):
    theirs = processor(Image.fromarray(image(*size)), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(clip_inputs.for_transformers(image(*size), 24), theirs.transpose(1, 2, 0))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_any_mode_equal_transformers(processor, mode):
    """They are converted, then resized. Transparent ones are not comparable: each version has another rule."""
    made = Image.fromarray(image(37, 53)).convert(mode)
    theirs = processor(made, return_tensors="np")["pixel_values"][0]
    ours = clip_inputs.for_transformers(np.asarray(made.convert("RGB")), 24)
    np.testing.assert_array_equal(ours, theirs.transpose(1, 2, 0))


def test_every_value_of_a_pixel_is_normalized_as_by_transformers(processor):
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, 2)
    theirs = processor(Image.fromarray(every), do_resize=False, do_center_crop=False, return_tensors="np")
    ours = clip_inputs.normalize(every)
    np.testing.assert_array_equal(ours, theirs["pixel_values"][0].transpose(1, 2, 0))


def test_an_odd_rest_is_cut_by_one_pixel_as_each_tool_cuts_it():
    ramp = np.arange(27, dtype=np.uint8)[None, :, None].repeat(24, 0).repeat(3, 2)
    first = lambda pixels: round((pixels[0, 0, 0] * clip_inputs.STD[0] + clip_inputs.MEAN[0]) * 255)  # noqa: E731
    assert first(clip_inputs.for_transformers(ramp, 24)) == 1  # 3 // 2
    assert first(clip_inputs.for_open_clip(ramp, 24)) == 2  # 1.5 rounded to even


def test_cmmd_crops_before_it_resizes():
    """The square at the center alone counts, whatever lies beside it."""
    square = image(30, 30)
    wide = np.concatenate([image(30, 7) * 0, square, image(30, 8) * 0 + 255], axis=1)
    np.testing.assert_array_equal(clip_inputs.for_cmmd(wide, 24), clip_inputs.for_cmmd(square, 24))
    np.testing.assert_array_equal(clip_inputs.for_cmmd(square, 24), clip_inputs.for_transformers(square, 24))


def test_hps_centers_on_black():
    pixels = clip_inputs.for_hps(np.full((12, 48, 3), 255, np.uint8), 24)
    black, white = clip_inputs.normalize(np.array([[[0, 0, 0]], [[255, 255, 255]]]))[:, 0]
    assert (pixels[:9] == black).all() and (pixels[15:] == black).all()
    np.testing.assert_allclose(pixels[9:15], np.broadcast_to(white, (6, 24, 3)), atol=1e-5)
